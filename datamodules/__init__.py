"""Data: detection sets in COCO format, classified images, the embedded digits, and the check of a data set.

The names below load on first use, so that a command pays only for what it uses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effvit.datamodules._layout import find_split, has_split
    from effvit.datamodules.augmentation import Augmentation
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
    from effvit.datamodules.segmented_digits import SegmentedDigits
    from effvit.datamodules.transfer import Transfer

__all__ = [
    "Augmentation",
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
    "SegmentationData",
    "SegmentationFolder",
    "SegmentedDigits",
    "Transfer",
    "find_split",
    "has_split",
    "inspect_coco",
    "inspect_image_folder",
]

_HOMES = {
    "Augmentation": "augmentation",
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
    "SegmentationData": "segmentation",
    "SegmentationFolder": "segmentation_folder",
    "SegmentedDigits": "segmented_digits",
    "Transfer": "transfer",
    "find_split": "_layout",
    "has_split": "_layout",
    "inspect_coco": "inspection",
    "inspect_image_folder": "image_inspection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"effvit.datamodules.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'effvit.datamodules' has no attribute {name!r}")
