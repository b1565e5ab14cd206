"""Classification on any tree with a folder per class."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from effvit.datamodules._image_data import PLAIN, ImageData, name_some
from effvit.datamodules._image_sources import FileImages, ImageSource, image_endings, stratified_split
from effvit.datamodules.augmentation import Augmentation
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)
_VAL_NAMES = ("val", "valid", "validation")
_TEST_NAMES = ("test",)


class ImageFolder(ImageData):
    """Images in a folder per class: with splits, or one tree that is split by a seed.

    ``root/train/<class>/…`` with ``root/val/<class>/…`` (or ``valid``, ``validation``) and, if there is one,
    ``root/test/<class>/…``; where there is no validation folder, each class of the training folder is split by
    ``split_seed``. Without ``root/train``, ``root`` itself holds the class folders. Class folders are searched in
    depth, hidden files and folders are passed over, and labels follow the sorted class names of the training split.

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
        self._folders = _find_splits(self.root, train, val, test)
        self._scanned: dict[Path, dict[str, list[str]]] = {}
        self._categories: dict[int, str] | None = None

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each label: the folders of the training split, sorted."""
        if self._categories is None:
            self._categories = dict(enumerate(class_folders(self._folders["train"])))
        return dict(self._categories)

    def _has(self, split: str) -> bool:
        return split in self._folders or split == "val"

    def _open(self, split: str) -> ImageSource:
        if split == "test" or "val" in self._folders:
            names, labels = self._list(self._folders[split])
        else:
            names, labels = self._list(self._folders["train"])
            kept = self._split(labels)[split == "val"]
            names, labels = [names[index] for index in kept], [labels[index] for index in kept]
        return FileImages(self.root, names, labels)

    def _list(self, folder: Path) -> tuple[list[str], list[int]]:
        """Names relative to the root, and labels, of the images of a split."""
        classes = self._scan(folder)
        expected = self.categories.values()
        _check_same_classes(folder, set(classes), self._folders["train"], set(expected))
        names = [name for kind in expected for name in classes[kind]]
        return names, [label for label, kind in self.categories.items() for _ in classes[kind]]

    def _scan(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._scanned:
            endings = image_endings()
            found = {kind: _images_below(self.root, folder / kind, endings) for kind in class_folders(folder)}
            others = sum(number for _, number in found.values())
            if others:
                _log.info("%s: %d files that are no images were passed over", folder, others)
            self._scanned[folder] = {kind: names for kind, (names, _) in found.items()}
            _check_none_empty(folder, self._scanned[folder])
        return self._scanned[folder]

    def _split(self, labels: list[int]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
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


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted.

    Raises:
        DatasetError: There are fewer than two, or images lie beside them.
    """
    endings = image_endings()
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in visible if entry.is_dir())
    stray = sorted(entry.name for entry in visible if entry.is_file() and Path(entry.name).suffix.lower() in endings)
    if stray:
        raise DatasetError(
            f"{len(stray)} images lie in {folder} itself, beside the class folders, so that their class is unknown: "
            f"{name_some(stray)}. Move each into the folder of its class, or away."
        )
    if not classes:
        found = sorted(entry.name for entry in visible)
        raise DatasetError(
            f"{folder} has no class folders; expected {folder}/<class>/<image>, "
            f"found {name_some(found) if found else 'nothing'}"
        )
    if len(classes) == 1:
        raise DatasetError(f"{folder} has one class only, {classes[0]!r}; a classifier needs two or more class folders")
    return classes


def _find_splits(root: Path, train: str, val: str | None, test: str | None) -> dict[str, Path]:
    """Folder of each split there is."""
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}; pass the folder of the data set as `--data.root`")
    found = {"val": _find_split(root, val, _VAL_NAMES), "test": _find_split(root, test, _TEST_NAMES)}
    folders = {split: folder for split, folder in found.items() if folder is not None}
    if (root / train).is_dir():
        return {"train": root / train, **folders}
    if train != "train":
        raise DatasetError(f"there is no folder {root / train} (`--data.train`); {_what_is_in(root)}")
    if folders:
        raise DatasetError(
            f"{root} has {' and '.join(folder.name for folder in folders.values())} but no folder train; name the "
            f"training folder with `--data.train`; {_what_is_in(root)}"
        )
    return {"train": root}


def _find_split(root: Path, asked: str | None, names: tuple[str, ...]) -> Path | None:
    if asked is None:
        return next((root / name for name in names if (root / name).is_dir()), None)
    if not (root / asked).is_dir():
        raise DatasetError(f"there is no folder {root / asked} (`--data.{names[0]}`); {_what_is_in(root)}")
    return root / asked


def _what_is_in(root: Path) -> str:
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    return f"folders in {root}: {name_some(inside) if inside else 'none'}"


def _images_below(root: Path, folder: Path, endings: set[str]) -> tuple[list[str], int]:
    """Image files below a class folder, sorted, relative to the root; and the number of other files."""
    images: list[str] = []
    others = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(root).as_posix()
        found = [f"{inside}/{name}" for name in files if not name.startswith(".") and _ending(name) in endings]
        images += found
        others += len(files) - len(found)
    return sorted(images), others


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million files takes seconds


def _check_none_empty(folder: Path, classes: Mapping[str, list[str]]) -> None:
    empty = [kind for kind, names in classes.items() if not names]
    if empty:
        raise DatasetError(
            f"{len(empty)} of {len(classes)} class folders in {folder} hold no image: {name_some(empty)}. "
            "Add images or remove the folders."
        )


def _check_same_classes(folder: Path, classes: set[str], train: Path, expected: set[str]) -> None:
    missing, extra = sorted(expected - classes), sorted(classes - expected)
    if missing or extra:
        parts = [f"missing: {name_some(missing)}"] if missing else []
        parts += [f"only there: {name_some(extra)}"] if extra else []
        raise DatasetError(f"the class folders in {folder} differ from those in {train}; {'; '.join(parts)}")
