"""Classification from WebDataset shards: tar files with images and labels, read without unpacking."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from effvit.datamodules._image_data import PLAIN, ClassifiedData
from effvit.datamodules._loaders import check_at_least
from effvit.datamodules._samples import single_threaded
from effvit.datamodules._shards import Decoder, EvalStream, ShardIndex, ShardLoader, ShardStream, TrainStream
from effvit.datamodules.augmentation import Augmentation, eval_transform, train_transform
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)


class ImageShards(ClassifiedData):
    """Images in WebDataset tar shards (extra ``shards``), read in sequence without unpacking.

    A sample is a run of members with the same name up to the first dot: an image (``jpg``, ``png``, …) and its label, a
    number from 0, as ``cls`` or as a field of ``json``. A split is a file name with braces, such as
    ``train-{000000..000146}.tar``, or a list of such names.

    In an epoch every process and every worker reads a range of samples of its own; shards are shuffled by seed and
    epoch, samples within a buffer. The last images that do not fill a batch in every process are left out, other ones
    in each epoch. The order depends on the number of processes and workers, the augmentation of an image on seed, epoch
    and image alone. A run that is resumed within an epoch takes the rest of its steps from the beginning of that
    epoch's order: exact resumption needs files (``ImageNet``). Batches are as in ``ClassifiedData``; repeated
    augmentation and batches of several sizes need images in any order, and are refused.

    Args:
        root: Folder of the shards.
        train: Training shards, relative to ``root``.
        val: Validation shards.
        classes: Class names: a list, or a JSON file relative to ``root`` with a list or an object ``{label: name}``.
        json_label: Field of the label in ``json`` members.
        shuffle_buffer: Samples in each worker among which the next one is drawn, still compressed.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        augmentation: What is done to training images.
        repeats: 1 only; there for the configurations that set it.
        multi_scale: None only; there for the configurations that set it.
        unreadable: "error" stops at an image that cannot be read; "skip" trains on the next one in its place, and
            leaves it out of the evaluation.
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line.

    Raises:
        ConfigError: An option is out of its range, or is one that shards cannot do, or webdataset is not installed.
        DatasetError: The class names cannot be read.
    """

    def __init__(
        self,
        root: str,
        *,
        train: str | list[str],
        val: str | list[str],
        classes: str | list[str],
        json_label: str = "label",
        shuffle_buffer: int = 2000,
        batch_size: int = 128,
        val_batch_size: int = 128,
        num_workers: int = 8,
        image_size: int | None = None,
        augmentation: Augmentation = PLAIN,
        repeats: int = 1,
        multi_scale: list[int] | None = None,
        unreadable: Literal["error", "skip"] = "error",
        seed: int = 0,
        published: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            augmentation=augmentation,
            unreadable=unreadable,
            seed=seed,
            published=published,
        )
        _check_no_reordering(repeats, multi_scale)
        check_at_least(1, shuffle_buffer=shuffle_buffer)
        self.shuffle_buffer = shuffle_buffer
        self._patterns = {"train": train, "val": val}
        self._names = _class_names(self.root, classes)
        self._decoder = Decoder(len(self._names), json_label)
        self._indices: dict[str, ShardIndex] = {}

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each label."""
        return dict(enumerate(self._names))

    @property
    def num_train_images(self) -> int:
        """Number of training images."""
        return len(self._index("train"))

    def prepare_data(self) -> None:
        """Counts the samples of the shards; later processes find the counts in the cache."""
        self._index("train")
        self._index("val")

    def setup(self, stage: str) -> None:
        """Finds the shards of a stage.

        Raises:
            DatasetError: A shard is missing or damaged.
        """
        cv2.setNumThreads(0)  # see ImageData
        for split in ("train", "val") if stage == "fit" else ("val",):
            self._index(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches of this epoch."""
        spec = self.network_input
        stream = TrainStream(
            self._index("train"),
            self._decoder,
            self.batch_size,
            self._ranks(),
            transform=train_transform(self.augmentation, spec.interpolation),
            size=spec.size,
            seed=self.seed,
            buffer=self.shuffle_buffer,
            skip=self.unreadable == "skip",
        )
        return self._loader(stream)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in the order of the shards."""
        return self._eval_shards()

    def test_dataloader(self) -> DataLoader[Any]:
        """The validation batches."""
        return self._eval_shards()

    def predict_dataloader(self) -> DataLoader[Any]:
        """The validation batches, to predict on."""
        return self._eval_shards()

    def read_original(self, split: str, image_id: int) -> torch.Tensor:
        """An image as it was before any transform; reads its shard up to there.

        Args:
            split: "train", "val" or "test" (the validation split).
            image_id: Its position in the split.

        Returns:
            uint8 ``(3, H, W)``, RGB.

        Raises:
            DatasetError: It cannot be read.
        """
        sample = self._index(self._resolve(split)).read_one(image_id)
        return torch.from_numpy(self._decoder.image(sample)).permute(2, 0, 1)

    def _has(self, split: str) -> bool:
        return split != "test"

    def _index(self, split: str) -> ShardIndex:
        if split not in self._indices:
            index = ShardIndex(_expand(self.root, self._patterns[split]))
            _log.info("%s split: %d images in %d shards", split, len(index), len(index.shards))
            self._indices[split] = index
        return self._indices[split]

    def _eval_shards(self) -> DataLoader[Any]:
        spec = self.network_input
        stream = EvalStream(
            self._index("val"),
            self._decoder,
            self.val_batch_size,
            self._ranks(),
            transform=eval_transform(spec.size, spec.crop, spec.interpolation),
            size=spec.size,
            skip=self.unreadable == "skip",
        )
        return self._loader(stream)

    def _loader(self, stream: ShardStream) -> DataLoader[Any]:
        return ShardLoader(
            stream,
            epoch=lambda: self.trainer.current_epoch if self.trainer is not None else 0,
            num_workers=self.num_workers,
            worker_init_fn=single_threaded,
            pin_memory=self._on_cuda(),
        )


def _check_no_reordering(repeats: int, multi_scale: list[int] | None) -> None:
    """Refuses what a recipe may bring along and shards, which are read in sequence, cannot do."""
    if repeats != 1:
        raise ConfigError(
            f"repeats is {repeats}, and shards cannot repeat images across processes; pass `--data.repeats 1`, or "
            "train on files (ImageNet, ImageFolder)"
        )
    if multi_scale is not None:
        raise ConfigError(
            f"multi_scale is {multi_scale}, and shards have batches of one size; pass `--data.multi_scale null`, or "
            "train on files (ImageNet, ImageFolder)"
        )


def _expand(root: Path, patterns: str | list[str]) -> list[Path]:
    """Files of names with braces."""
    try:
        import webdataset  # noqa: F401 - here, so that workers inherit what takes a second to import
        from braceexpand import braceexpand  # comes with webdataset
    except ImportError as error:
        raise ConfigError("ImageShards needs webdataset: pip install 'effvit[shards]'") from error
    names = [patterns] if isinstance(patterns, str) else patterns
    shards = [root / name for pattern in names for name in braceexpand(pattern)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise DatasetError(
            f"{len(missing)} of {len(shards)} shards of {patterns!r} are missing in {root}"
            + (f", the first is {missing[0].name}" if missing else "")
        )
    return shards


def _class_names(root: Path, classes: str | list[str]) -> list[str]:
    """Class names by label."""
    if not isinstance(classes, str):
        names: Any = classes
    else:
        try:
            names = json.loads((root / classes).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DatasetError(f"cannot read the class names from {root / classes}: {error}") from error
    if isinstance(names, dict):
        labels = sorted(names, key=lambda label: int(label) if label.isdecimal() else -1)
        if labels != [str(label) for label in range(len(labels))]:
            raise DatasetError(
                f"{root / str(classes)} must name the labels 0 … {len(labels) - 1}, found {labels[:5]} …"
            )
        names = [names[label] for label in labels]
    if not isinstance(names, list) or len(names) < 2:
        raise DatasetError(f"a classifier needs two or more class names, found {names!r} ({classes})")
    return [str(name) for name in names]
