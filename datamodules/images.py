"""Image files without annotations, to predict on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from effvit.datamodules._decode import PREDICT_REMEDY, read_image
from effvit.datamodules._image_samples import EvalImages, NetworkInput, collate
from effvit.datamodules._image_sources import ListedFiles, image_endings
from effvit.datamodules._loaders import check_at_least, check_choice, check_unreadable, plain_loader
from effvit.datamodules._samples import PlainImages
from effvit.datamodules.transforms import RESIZES, Collate, eval_transform
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)
_MOST_NAMED = 10


class _Files(LightningDataModule):
    """Base: which files there are, and which of them can be read."""

    def __init__(self, images: str | list[str], batch_size: int, num_workers: int, unreadable: str) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        check_unreadable(unreadable)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.unreadable = unreadable
        self.files, self.names = _collect([images] if isinstance(images, str) else images)

    def setup(self, stage: str) -> None:
        """Opens the files once where unreadable ones are to be left out."""
        del stage
        if self.unreadable != "skip":
            return
        sound = []
        for file, name in zip(self.files, self.names, strict=True):
            if _is_readable(file):
                sound.append((file, name))
        if not sound:
            raise DatasetError(f"none of the {len(self.files)} files can be read, the first is {self.files[0]}")
        self.files, self.names = [file for file, _ in sound], [name for _, name in sound]

    def _loader(self, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Any]) -> DataLoader[Any]:
        return plain_loader(dataset, self.batch_size, self.num_workers, collate_fn)


class ImageFiles(_Files):
    """Images of files and folders, in the batches of ``CocoDetection`` without boxes and labels.

    Folders are searched with their subfolders, in alphabetical order, for files with the ending of an image format.
    Image ids count from 1 in that order; ``file_name`` is relative to the folder.

    Args:
        images: A file, a folder, or a list of them.
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads in the calling process.
        image_size: Limits of the long and the short side in pixels, or width and height where ``resize`` is "squash".
        resize: "keep_ratio", "align" to bring both sides up to a multiple of ``pad_divisor`` then, or "squash" to give
            images exactly ``image_size`` whatever their ratio.
        pad_divisor: Height and width of a batch are multiples of this.
        unreadable: "error" stops at a file that cannot be read, "skip" opens every file first and leaves those out.

    Raises:
        ConfigError: An option is out of its range.
        DatasetError: A file or folder is missing, or holds no image.
    """

    def __init__(
        self,
        images: str | list[str],
        *,
        batch_size: int = 1,
        num_workers: int = 0,
        image_size: tuple[int, int] = (1333, 800),
        resize: Literal["keep_ratio", "align", "squash"] = "keep_ratio",
        pad_divisor: int = 32,
        unreadable: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(images, batch_size, num_workers, unreadable)
        check_at_least(1, pad_divisor=pad_divisor, **{"image_size[0]": image_size[0], "image_size[1]": image_size[1]})
        check_choice("resize", resize, RESIZES)
        self.image_size = image_size
        self.resize = resize
        self.pad_divisor = pad_divisor

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches ``(images, targets)``."""
        dataset = PlainImages(self.files, self.names, eval_transform(self.image_size, self.resize, self.pad_divisor))
        return self._loader(dataset, Collate(self.pad_divisor))


class ClassifiedFiles(_Files):
    """Images of files and folders, in the batches of ``ImageData`` with the label -1, to be classified.

    Folders are searched as by ``ImageFiles``; image ids count from 0 in that order.

    Args:
        images: A file, a folder, or a list of them.
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads in the calling process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        published: Input of the backbone's published weights: size, crop, interpolation.
        unreadable: "error" stops at a file that cannot be read, "skip" opens every file first and leaves those out.

    Raises:
        ConfigError: An option is out of its range.
        DatasetError: A file or folder is missing, or holds no image.
    """

    def __init__(
        self,
        images: str | list[str],
        *,
        batch_size: int = 1,
        num_workers: int = 0,
        image_size: int | None = None,
        published: dict[str, Any] | None = None,
        unreadable: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__(images, batch_size, num_workers, unreadable)
        self.image_size = image_size
        self.published = published

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches ``(images, targets)``."""
        source = ListedFiles(self.files, self.names)
        return self._loader(EvalImages(source, NetworkInput.of(self.image_size, self.published), skip=False), collate)

    def read_original(self, split: str, image_id: int) -> torch.Tensor:
        """An image as it was before any transform, uint8 RGB ``(3, H, W)``.

        Args:
            split: Ignored: there is one.
            image_id: Its position.
        """
        del split
        return read_image(self.files[image_id], remedy=PREDICT_REMEDY)


def _is_readable(file: Path) -> bool:
    try:
        read_image(file, remedy="restore or remove the file")
    except DatasetError as error:
        _log.warning("left out: %s", error)
        return False
    return True


def _collect(sources: list[str]) -> tuple[list[Path], list[str]]:
    """Files in order, and their names in the results."""
    endings = image_endings()
    files: list[Path] = []
    names: list[str] = []
    for source in map(Path, sources):
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.suffix.lower() in endings and path.is_file())
            if not inside:
                others = sorted(path.name for path in source.iterdir())[:_MOST_NAMED]
                raise DatasetError(
                    f"no image in {source} or its subfolders; there is: {', '.join(others) or 'nothing'}"
                )
            files += inside
            names += [path.relative_to(source).as_posix() for path in inside]
        elif source.is_file():
            files.append(source)
            names.append(source.name)
        else:
            raise DatasetError(f"there is no file or folder {source}")
    if not files:
        raise DatasetError("the list of images is empty")
    return files, names
