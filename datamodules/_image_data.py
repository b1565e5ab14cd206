"""What all data modules of classification share: options, loaders and the published input."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from effvit.datamodules._image_samples import EvalImages, NetworkInput, TrainImages, collate
from effvit.datamodules._image_sources import ImageSource
from effvit.datamodules._loaders import DataModule, check_at_least, check_unreadable
from effvit.datamodules._samplers import MultiScaleBatches, SquareBatches, SquareViews
from effvit.datamodules.augmentation import Augmentation, train_transform
from effvit.errors import ConfigError

_log = logging.getLogger(__name__)

#: The augmentation where none is configured.
PLAIN = Augmentation()
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ClassifiedData(DataModule, ABC):
    """Base of all data modules of classification: their options, their classes, and what a batch is.

    A batch is ``(images, targets)``: uint8 RGB images ``(B, 3, S, S)`` in channels_last memory, and one dictionary
    with ``labels`` (int64 ``(B,)``, -1 for an image that could not be read), ``image_ids`` (int64 ``(B,)``, position
    in the split) and ``file_names`` (a list).

    Args:
        root: Folder of the data set.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        augmentation: What is done to training images.
        unreadable: "error" stops at an image that cannot be read; "skip" trains on the next one in its place, and
            leaves it out of the evaluation.
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line: size, crop, interpolation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        image_size: int | None,
        augmentation: Augmentation,
        unreadable: Literal["error", "skip"],
        seed: int,
        published: dict[str, Any] | None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, collate=collate)
        self.root = Path(root)
        check_at_least(0, seed=seed)
        if image_size is not None:
            check_at_least(1, image_size=image_size)
        check_unreadable(unreadable)
        self.image_size = image_size
        self.augmentation = augmentation
        self.unreadable = unreadable
        self.seed = seed
        self.published = published

    @property
    @abstractmethod
    def categories(self) -> dict[int, str]:
        """Class name of each label; works before ``setup``."""

    @abstractmethod
    def _has(self, split: str) -> bool:
        """Whether there is a split of this name."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.categories)

    @property
    def network_input(self) -> NetworkInput:
        """Size, crop and interpolation that images are evaluated with.

        Raises:
            ConfigError: ``published`` has an unknown key.
        """
        return NetworkInput.of(self.image_size, self.published)

    def _resolve(self, split: str) -> str:
        """The split itself, or "val" where there is no test split."""
        return "val" if split == "test" and not self._has("test") else split


class ImageData(ClassifiedData):
    """Base of those that read one image at a time, in any order.

    The order of training images and their augmentation depend on ``seed``, the epoch and the image alone, not on
    workers or on what ran before; a run resumed within an epoch goes on with the next batch. The last training batch
    is left out where it would hold a single image, which BatchNorm cannot be trained on.

    A subclass says what the classes are, which splits there are, and what is in them.

    Args:
        root: Folder of the data set.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        augmentation: What is done to training images.
        repeats: How often an image comes in an epoch of training, each time augmented anew (repeated augmentation); an
            epoch keeps its length.
        multi_scale: Sizes in pixels, one of which is drawn for each training batch (MobileViT); ``batch_size`` is for
            ``image_size``.
        unreadable: "error" stops at an image that cannot be read; "skip" trains on the next one in its place, and
            leaves it out of the evaluation.
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line: size, crop, interpolation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        image_size: int | None,
        augmentation: Augmentation,
        repeats: int,
        multi_scale: list[int] | None,
        unreadable: Literal["error", "skip"],
        seed: int,
        published: dict[str, Any] | None,
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
        check_at_least(1, repeats=repeats)
        if multi_scale is not None and (not multi_scale or min(multi_scale) < 1):
            raise ConfigError(f"multi_scale must list sizes of 1 pixel or more, found {multi_scale}")
        self.repeats = repeats
        self.multi_scale = sorted(set(multi_scale)) if multi_scale is not None else None
        self._sources: dict[str, ImageSource] = {}
        self._in_use: dict[str, TrainImages | EvalImages] = {}

    @abstractmethod
    def _open(self, split: str) -> ImageSource:
        """Lists the images of a split.

        Raises:
            DatasetError: They are missing or not as they should be.
        """

    @property
    def num_train_images(self) -> int:
        """Number of training images."""
        return len(self._source("train"))

    def setup(self, stage: str) -> None:
        """Lists the images of a stage; they are opened later, one by one.

        Raises:
            DatasetError: Images are missing, or splits do not fit each other.
        """
        cv2.setNumThreads(0)  # OpenCV's threads would compete with torch's, and are no faster for one picture
        for split in _STAGE_SPLITS[stage]:
            self._source(split)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in the order of this epoch."""
        source = self._source("train")
        transform = train_transform(self.augmentation, self.network_input.interpolation)
        dataset = TrainImages(source, transform, self.seed, skip=self.unreadable == "skip")
        self._in_use["train"] = dataset
        return self._make_train_loader(dataset, self._train_batches(len(source)))

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in the order of the split."""
        return self._make_eval_loader(self._eval_dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in the order of the split; of the validation split where there is no other."""
        return self._make_eval_loader(self._eval_dataset("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, to predict on."""
        return self._make_predict_loader(self._eval_dataset("test"))

    def read_original(self, split: str, image_id: int) -> torch.Tensor:
        """An image of a split as it was before any transform.

        Args:
            split: "train", "val" or "test".
            image_id: Its position in the split.

        Returns:
            uint8 ``(3, H, W)``, RGB.

        Raises:
            DatasetError: It cannot be read.
        """
        return torch.from_numpy(self._source(split).read(image_id)).permute(2, 0, 1)

    def teardown(self, stage: str) -> None:
        """Says how many images were skipped."""
        del stage
        for split, dataset in self._in_use.items():
            number = len(dataset.unreadable) if dataset.unreadable is not None else 0
            if number:
                _log.warning("%d of %d images of the %s split could not be read", number, len(dataset), split)
        self._in_use.clear()

    def _source(self, split: str) -> ImageSource:
        split = self._resolve(split)
        if split not in self._sources:
            source = self._open(split)
            _log.info("%s split: %d images in %d classes", split, len(source), self.num_classes)
            self._sources[split] = source
        return self._sources[split]

    def _train_batches(self, num_images: int) -> SquareViews:
        size = self.network_input.size
        if self.multi_scale is not None:
            return MultiScaleBatches(
                num_images, self.batch_size, size, self.multi_scale,
                repeats=self.repeats, seed=self.seed, ranks=self._ranks(),
            )  # fmt: skip
        batches = SquareBatches(
            num_images, self.batch_size, size, repeats=self.repeats, seed=self.seed, ranks=self._ranks()
        )
        if batches.leaves_one_out:
            _log.info("the last batch of an epoch would hold a single image and is left out, another one each epoch")
        return batches

    def _eval_dataset(self, split: str) -> EvalImages:
        dataset = EvalImages(self._source(split), self.network_input, skip=self.unreadable == "skip")
        self._in_use[self._resolve(split)] = dataset
        return dataset
