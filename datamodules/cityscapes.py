"""Cityscapes, fine annotations: 19 classes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from effvit.datamodules._loaders import check_choice
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_files import MaskPair
from effvit.datamodules._mask_layout import Listing, existing_pairs
from effvit.datamodules.segmentation import Faults, MaskFilesData, Resize, Unknown
from effvit.errors import DatasetError

_IMAGES, _MASKS = "leftImg8bit", "gtFine"
#: The classes that are evaluated, by their ``id`` in cityscapesScripts (``helpers/labels.py``).
CATEGORIES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
#: All ids of that list; those beside the classes have no label.
_IDS = range(34)
_VOID = 255


class Cityscapes(MaskFilesData):
    """Cityscapes: 2,975 training and 500 validation images of 2048x1024 pixels, 19 classes.

    Category ids are those of ``labelIds`` (7 to 33), which the evaluation server wants; labels 0 to 18 follow them in
    ascending order and are the train ids. The labels of the test images are not public: the validation split is tested
    on. There is no public address to fetch the set from.

    Batches, order and augmentation are as in ``SegmentationData``; the defaults are mmsegmentation's.

    Args:
        root: Folder with ``leftImg8bit/`` and ``gtFine/``.
        mask_kind: Which of the mask files to read: "labelIds", or "labelTrainIds" (category ids are then 0 to 18).
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
        faults: "error" stops at missing masks, masks of another size and unreadable files; "skip" leaves them out.
        unknown: What to do about pixel values that are no id: "error", or "ignore" to leave them without a label.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        mask_kind: Literal["labelIds", "labelTrainIds"] = "labelIds",
        batch_size: int = 8,
        val_batch_size: int = 1,
        num_workers: int = 4,
        image_size: tuple[int, int] = (2048, 1024),
        resize: Resize = "keep_ratio",
        crop_size: tuple[int, int] = (512, 1024),
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
        check_choice("mask_kind", mask_kind, ("labelIds", "labelTrainIds"))
        self.mask_kind = mask_kind

    def _declare(self) -> MaskClasses:
        if self.mask_kind == "labelTrainIds":
            return MaskClasses(dict(enumerate(CATEGORIES.values())), ignored={_VOID})
        return MaskClasses(CATEGORIES, ignored={*_IDS, _VOID} - set(CATEGORIES))

    def _has(self, split: str) -> bool:
        return split != "test"

    @property
    def splits(self) -> list[str]:
        """The splits that are there and have labels."""
        return [split for split in ("train", "val") if (self.root / _IMAGES / split).is_dir()]

    def list_pairs(self, split: str) -> Listing:
        """The pairs of a split, and what lacks a partner."""
        ending = f"_{_IMAGES}.png"
        images = sorted((self.root / _IMAGES / split).glob(f"*/*{ending}"))
        if not images:
            raise DatasetError(
                f"{self.root / _IMAGES / split} has no images <city>/*{ending}; `--data.root` must be the folder with "
                f"{_IMAGES}/ and {_MASKS}/, from {_IMAGES}_trainvaltest.zip and {_MASKS}_trainvaltest.zip of "
                "cityscapes-dataset.com (free after registration)"
            )
        pairs = []
        for image in images:
            name = image.name.removesuffix(ending)
            mask = f"{_MASKS}/{split}/{image.parent.name}/{name}_{_MASKS}_{self.mask_kind}.png"
            pairs.append(MaskPair(image.relative_to(self.root).as_posix(), mask))
        return existing_pairs(self.root, pairs)


def is_cityscapes(root: Path) -> bool:
    """Whether a folder has the layout of Cityscapes."""
    return (root / _IMAGES).is_dir() and (root / _MASKS).is_dir()
