"""Classification on any tree with a folder per class."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np

from effvit.datamodules._class_folders import (
    check_same_classes,
    class_folders,
    find_splits,
    list_classes,
    name_some,
    no_split,
)
from effvit.datamodules._image_data import PLAIN, ImageData
from effvit.datamodules._image_sources import FileImages, ImageSource, Labels, stratified_split
from effvit.datamodules.augmentation import Augmentation
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """Images in a folder per class: with splits, or one tree that is split by a seed.

    ``root/train/<class>/…`` with ``root/val/<class>/…`` (or ``valid``, ``validation``) and, if there is one,
    ``root/test/<class>/…``; where there is no validation folder, each class of the training folder is split by
    ``split_seed``. Without any of these, ``root`` itself holds the class folders. Class folders are searched in
    depth, hidden files and folders are passed over, and labels follow the sorted class names of the training split.

    A trained network can be evaluated on a set without ``train``: its classes are then those of ``val``, or of
    ``test`` without that. Of a tree without splits only the share that is held out is evaluated; ``val="."``
    (``--data.val .``) evaluates all of it.

    Batches, order and augmentation are as in ``ImageData``.

    Args:
        root: Folder of the data set.
        train: Folder of the training split, relative to ``root``.
        val: Folder of the validation split; None looks for one.
        test: Folder of the test split; None looks for one, and without any the validation split is tested on.
        val_share: Share of each class that is held out where there is no validation folder, in (0, 1).
        split_seed: Seed of that choice.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        augmentation: What is done to training images.
        repeats: How often an image comes in an epoch, each time augmented anew; an epoch keeps its length.
        multi_scale: Sizes in pixels, one of which is drawn for each training batch (MobileViT).
        unreadable: "error" stops at an image that cannot be read; "skip" trains on the next one in its place, and
            leaves it out of the evaluation.
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line.

    Raises:
        ConfigError: An option is out of its range.
        DatasetError: A folder is not there.
    """

    def __init__(
        self,
        root: str,
        *,
        train: str = "train",
        val: str | None = None,
        test: str | None = None,
        val_share: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 64,
        val_batch_size: int = 64,
        num_workers: int = 2,
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
            repeats=repeats,
            multi_scale=multi_scale,
            unreadable=unreadable,
            seed=seed,
            published=published,
        )
        if not 0 < val_share < 1:
            raise ConfigError(f"val_share must lie between 0 and 1, found {val_share}")
        self.val_share = val_share
        self.split_seed = split_seed
        self._folders = find_splits(self.root, train, val, test)
        self._tree: tuple[list[str], list[int], tuple[Labels, Labels]] | None = None
        self._categories: dict[int, str] | None = None

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each label: the folders of the training split, or without one of another, sorted."""
        if self._categories is None:
            self._categories = dict(enumerate(class_folders(self._reference)))
        return dict(self._categories)

    def setup(self, stage: str) -> None:
        """Lists the images of a stage.

        Raises:
            DatasetError: Images are missing, or splits do not fit each other.
        """
        super().setup(stage)
        evaluated = {"validate": "val", "test": self._resolve("test")}.get(stage)
        if evaluated == "val" and "val" not in self._folders:
            tree = self._folders["train"].relative_to(self.root)
            _log.info("only what is held out is evaluated; `--data.val %s` evaluates all images of the tree", tree)

    @property
    def _reference(self) -> Path:
        """The split that says what the classes are."""
        return next(iter(self._folders.values()))

    def _has(self, split: str) -> bool:
        return split in self._folders or (split == "val" and "train" in self._folders)

    def _open(self, split: str) -> ImageSource:
        if not self._has(split):
            raise no_split(self.root, split, self._folders)
        if split == "test" or "val" in self._folders:
            names, labels = self._list(self._folders[split])
        else:
            names, labels = self._part_of_tree(split)
        return FileImages(self.root, names, labels)

    def _list(self, folder: Path) -> tuple[list[str], list[int]]:
        """Names relative to the root, and labels, of the images of a split."""
        classes = list_classes(self.root, folder)
        expected = self.categories.values()
        check_same_classes(folder, classes, self._reference, expected)
        names = [name for kind in expected for name in classes[kind]]
        return names, [label for label, kind in self.categories.items() for _ in classes[kind]]

    def _part_of_tree(self, split: str) -> tuple[list[str], list[int]]:
        """What the seed makes a split of one tree."""
        if self._tree is None:
            names, labels = self._list(self._folders["train"])
            self._tree = names, labels, self._split(labels)
        names, labels, parts = self._tree
        kept = parts[split == "val"]
        return [names[index] for index in kept], [labels[index] for index in kept]

    def _split(self, labels: list[int]) -> tuple[Labels, Labels]:
        """Indices of training and validation images of one tree."""
        single = [self.categories[label] for label, number in enumerate(np.bincount(labels)) if number < 2]
        if single:
            raise DatasetError(
                f"{self._folders['train']} is to be split into training and validation, and these classes have one "
                f"image only: {name_some(single)}. Add images, or a folder {self.root / 'val'}."
            )
        train, val = stratified_split(labels, self.val_share, self.split_seed)
        _log.info(
            "%s has no validation folder: %d of its %d images are held out, %g of each class, by split_seed %d",
            self.root, len(val), len(labels), self.val_share, self.split_seed,
        )  # fmt: skip
        return train, val
