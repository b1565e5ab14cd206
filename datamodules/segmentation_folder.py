"""Semantic segmentation on any folder of images and masks."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from effvit.datamodules._class_folders import name_some
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_layout import CLASSES, Listing, find_folders, pair_up, read_classes, split_pairs
from effvit.datamodules.segmentation import Faults, MaskFilesData, Resize, Unknown
from effvit.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_log = logging.getLogger(__name__)

#: What is ignored unless the classes declare it.
_VOID = 255
#: Classes of these names, in any case, are none.
_NO_CLASS = {"unlabeled", "unlabelled", "void", "ignore", "ignored"}


class SegmentationFolder(MaskFilesData):
    """Images and masks in folders, with ``classes.json``: with splits, or one tree that is split by a seed.

    ``root/images/train/…`` with ``root/masks/train/…`` (the same of ``val``, ``test``), or ``root/train/images/…`` with
    ``root/train/masks/…``. Where there is no validation folder, a share of the training images is held out by
    ``split_seed``; without any split, ``root/images`` and ``root/masks`` are that one tree. Folders are searched in
    depth; a mask has the path of its image, with the ending ``.png``.

    ``root/classes.json`` names the classes: ``{id: name}``, or a list of ``{"id", "name", "color"}``. The id is the
    pixel value of a mask, of 8 or 16 bits. Of a PNG with a palette the indices are the values. Where classes have a
    ``color`` [red, green, blue], masks may hold these colours instead.

    Pixels of the value 255 have no label (unless that is a class, or ``ignore`` names other values), nor have those of
    classes named "unlabeled", "void" or "ignore": such names are no classes. Labels follow the ascending ids of the
    others.

    Batches, order and augmentation are as in ``SegmentationData``.

    Args:
        root: Folder of the data set.
        ignore: Pixel values without a label; None for 255, unless ``classes.json`` declares it.
        merge: Category id by pixel value that counts as it, such as ``{8: 7}``; a merged class is no class any more.
        val_share: Share of the images that is held out where there is no validation folder, in (0, 1).
        split_seed: Seed of that choice.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Limits of the long and the short side in pixels, or width and height where ``resize`` is "squash".
        resize: "keep_ratio"; "align" to bring both sides up to a multiple of ``pad_divisor`` in evaluation; or "squash"
            to give images exactly ``image_size``.
        crop_size: Height and width of training images in pixels.
        scale_range: Range of a random factor on ``image_size`` in training.
        short_side: Range of a random short side in training, in place of ``image_size`` and ``scale_range``.
        class_limit: Largest share of one class in a crop, which is drawn again up to ten times; 1 for any.
        flip: Probability of a horizontal flip in training.
        photometric: Distort brightness, contrast, saturation and hue in training.
        pad_divisor: Height and width of a batch are multiples of this.
        faults: What to do about images without a mask or of another size, and unreadable files: "error" stops and
            lists them all, "skip" leaves them out.
        unknown: What to do about pixel values that are no class: "error", or "ignore" to leave them without a label.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
        DatasetError: A folder is not there.
    """

    def __init__(
        self,
        root: str,
        *,
        ignore: list[int] | None = None,
        merge: dict[int, int] | None = None,
        val_share: float = 0.2,
        split_seed: int = 0,
        batch_size: int = 16,
        val_batch_size: int = 1,
        num_workers: int = 4,
        image_size: tuple[int, int] = (2048, 512),
        resize: Resize = "align",
        crop_size: tuple[int, int] = (512, 512),
        scale_range: tuple[float, float] = (0.5, 2.0),
        short_side: tuple[int, int] | None = None,
        class_limit: float = 0.75,
        flip: float = 0.5,
        photometric: bool = True,
        pad_divisor: int = 32,
        faults: Faults = "error",
        unknown: Unknown = "error",
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            resize=resize,
            crop_size=crop_size,
            scale_range=scale_range,
            short_side=short_side,
            class_limit=class_limit,
            flip=flip,
            photometric=photometric,
            pad_divisor=pad_divisor,
            faults=faults,
            unknown=unknown,
            seed=seed,
        )
        if not 0 < val_share < 1:
            raise ConfigError(f"val_share must lie between 0 and 1, found {val_share}")
        self.ignore = ignore
        self.merge = merge
        self.val_share = val_share
        self.split_seed = split_seed
        self._folders = find_folders(self.root)
        self._trees: dict[str, Listing] = {}

    def _declare(self) -> MaskClasses:
        return folder_classes(self.root, self.ignore, self.merge)

    def _has(self, split: str) -> bool:
        return split in self._folders or (split == "val" and "train" in self._folders)

    @property
    def splits(self) -> list[str]:
        """The splits that are there, or that a part of the images is held out for."""
        return [split for split in ("train", "val", "test") if self._has(split)]

    def list_pairs(self, split: str) -> Listing:
        """The pairs of a split, and what lacks a partner."""
        if not self._has(split):
            raise DatasetError(
                f"{self.root} has no {split} split, only {' and '.join(self._folders)}; it needs images/{split} and "
                f"masks/{split}, or {split}/images and {split}/masks"
            )
        if split in self._folders and (split != "train" or "val" in self._folders):
            return pair_up(self.root, self._folders[split])
        return self._part_of_tree(split)

    def _part_of_tree(self, split: str) -> Listing:
        """What the seed makes a split of the training images; what lacks a partner counts as training's."""
        if not self._trees:
            folders = self._folders["train"]
            pairs, faults = pair_up(self.root, folders)
            train, val = split_pairs(pairs, self.val_share, self.split_seed, folders.images)
            _log.info(
                "%s has no validation folder: %d of its %d images are held out, by split_seed %d",
                self.root, len(val), len(pairs), self.split_seed,
            )  # fmt: skip
            self._trees = {"train": Listing(train, faults), "val": Listing(val, [])}
        return self._trees[split]


def folder_classes(root: Any, ignore: list[int] | None, merge: dict[int, int] | None) -> MaskClasses:
    """The classes that ``classes.json`` declares.

    Args:
        root: Folder of the data set.
        ignore: Pixel values without a label; None for 255, unless it is declared.
        merge: Category id by pixel value that counts as it.

    Raises:
        DatasetError: The file is missing or faulty.
    """
    path = root / CLASSES
    names, colours = read_classes(path)
    nameless = [key for key, name in names.items() if name.strip().lower() in _NO_CLASS and key not in (merge or {})]
    if nameless:
        shown = name_some([f"{key} ({names[key]!r})" for key in nameless])
        _log.info("%s: pixels of %s have no label, by the name", path, shown)
    if ignore is None:
        ignore = [_VOID] if _VOID not in {*names, *(merge or {})} else []
    try:
        classes = MaskClasses(names, ignored={*nameless, *ignore}, merge=merge, colours=colours)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    _check_names(path, classes.categories.to_dict())
    return classes


def _check_names(path: Path, names: Mapping[int, str]) -> None:
    first: dict[str, int] = {}
    for key, name in names.items():
        if first.setdefault(name, key) != key:
            raise DatasetError(
                f"{path}: the classes {first[name]} and {key} are both called {name!r}: rename one, or count it as "
                f"the other with --data.merge {{{key}:{first[name]}}}"
            )
