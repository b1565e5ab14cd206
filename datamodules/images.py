"""Image files without annotations, to predict on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from effvit.datamodules._decode import read_image
from effvit.datamodules._image_sources import image_endings
from effvit.datamodules._samples import PlainImages, single_threaded
from effvit.datamodules.transforms import Collate, eval_transform
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)
_MOST_NAMED = 10


class ImageFiles(LightningDataModule):
    """Images of files and folders, in the batches of ``CocoDetection`` without boxes and labels.

    Folders are searched with their subfolders, in alphabetical order, for files with the ending of an image format.
    Image ids count from 1 in that order; ``file_name`` is relative to the folder.

    Args:
        images: A file, a folder, or a list of them.
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads in the calling process.
        image_size: Limits of the long and the short side in pixels; the ratio is kept.
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
        pad_divisor: int = 32,
        unreadable: Literal["error", "skip"] = "error",
    ) -> None:
        super().__init__()
        if batch_size < 1 or pad_divisor < 1 or min(image_size) < 1 or num_workers < 0:
            raise ConfigError(
                "batch_size, pad_divisor and image_size must be 1 or more and num_workers 0 or more, "
                f"found {batch_size}, {pad_divisor}, {image_size} and {num_workers}"
            )
        if unreadable not in {"error", "skip"}:
            raise ConfigError(f"unreadable must be 'error' or 'skip', found {unreadable!r}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.unreadable = unreadable
        self._collate = Collate(pad_divisor)
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

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches ``(images, targets)``."""
        return DataLoader(
            PlainImages(self.files, self.names, eval_transform(self.image_size)),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            worker_init_fn=single_threaded,
        )


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
