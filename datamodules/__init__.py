"""Data: detection sets in COCO format, classified images, images with masks, the digits, and the check of a data set.

The names below load on first use, so that a command pays only for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effvit.datamodules._layout import find_split, has_split
    from effvit.datamodules.ade20k import ADE20K
    from effvit.datamodules.augmentation import Augmentation
    from effvit.datamodules.cityscapes import Cityscapes
    from effvit.datamodules.coco import CocoDetection
    from effvit.datamodules.digit_images import DigitImages
    from effvit.datamodules.digits import HandwrittenDigits
    from effvit.datamodules.image_folder import ImageFolder
    from effvit.datamodules.image_inspection import ImageFolderReport, inspect_image_folder
    from effvit.datamodules.image_shards import ImageShards
    from effvit.datamodules.imagenet import ImageNet
    from effvit.datamodules.images import ClassifiedFiles, ImageFiles
    from effvit.datamodules.inspection import DatasetReport, inspect_coco
    from effvit.datamodules.segmentation import SegmentationData
    from effvit.datamodules.segmentation_folder import SegmentationFolder
    from effvit.datamodules.segmentation_inspection import MaskSetReport, inspect_masks
    from effvit.datamodules.segmented_digits import SegmentedDigits
    from effvit.datamodules.transfer import Transfer
    from effvit.datamodules.voc import PascalVOC

__all__ = [
    "ADE20K",
    "Augmentation",
    "Cityscapes",
    "ClassifiedFiles",
    "CocoDetection",
    "DatasetReport",
    "DigitImages",
    "HandwrittenDigits",
    "ImageFiles",
    "ImageFolder",
    "ImageFolderReport",
    "ImageNet",
    "ImageShards",
    "MaskSetReport",
    "PascalVOC",
    "SegmentationData",
    "SegmentationFolder",
    "SegmentedDigits",
    "Transfer",
    "find_split",
    "has_split",
    "inspect_coco",
    "inspect_image_folder",
    "inspect_masks",
]

_HOMES = {
    "ADE20K": "ade20k",
    "Augmentation": "augmentation",
    "Cityscapes": "cityscapes",
    "ClassifiedFiles": "images",
    "CocoDetection": "coco",
    "DatasetReport": "inspection",
    "DigitImages": "digit_images",
    "HandwrittenDigits": "digits",
    "ImageFiles": "images",
    "ImageFolder": "image_folder",
    "ImageFolderReport": "image_inspection",
    "ImageNet": "imagenet",
    "ImageShards": "image_shards",
    "MaskSetReport": "segmentation_inspection",
    "PascalVOC": "voc",
    "SegmentationData": "segmentation",
    "SegmentationFolder": "segmentation_folder",
    "SegmentedDigits": "segmented_digits",
    "Transfer": "transfer",
    "find_split": "_layout",
    "has_split": "_layout",
    "inspect_coco": "inspection",
    "inspect_image_folder": "image_inspection",
    "inspect_masks": "segmentation_inspection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"effvit.datamodules.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'effvit.datamodules' has no attribute {name!r}")
