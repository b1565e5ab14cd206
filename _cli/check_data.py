"""``effvit check-data``: every fault of a data set in one report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import yaml

from effvit.errors import ConfigError, DatasetError

_SPLITS = ("train", "val", "test")


#: Seconds between two lines of progress.
_EVERY = 5.0


class _Progress:
    """Says on stderr, every few seconds, how far a long check is."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _EVERY

    def __call__(self, done: int, number: int) -> None:
        """Takes the number of files opened so far, and of all."""
        if time.monotonic() >= self._next and done < number:
            print(f"opened {done:,} of {number:,} images", file=sys.stderr)
            self._next = time.monotonic() + _EVERY


class _Report(Protocol):
    @property
    def ok(self) -> bool: ...


def check_data(words: Sequence[str]) -> int:
    """Runs ``effvit check-data``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        0 if every split is sound, 1 if there are faults.
    """
    own = _parser().parse_args(list(words))
    sound = True
    for number, report in enumerate(_reports(own)):
        print(("\n" if number else "") + str(report))
        sound = sound and report.ok
    return 0 if sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit check-data",
        description="Find every fault of a data set: in COCO format, with a folder per class, or of images with masks; "
        "exits with 1 if there is one.",
        allow_abbrev=False,
    )
    parser.add_argument("root", help="folder of the data set, or a COCO annotation file")
    parser.add_argument("--images", help="image folder, where root is an annotation file")
    parser.add_argument("--split", choices=_SPLITS, nargs="+", help="splits to check (default: all that are there)")
    parser.add_argument(
        "--skip_images",
        action="store_true",
        help="open no image file: check annotations or folders only (no damaged files, no duplicates, no masks)",
    )
    parser.add_argument(
        "--ignore", type=_ignored, metavar="[V,...]", help="of masks: pixel values without a class, as --data.ignore"
    )
    parser.add_argument(
        "--merge", type=_merged, metavar="{V:ID,...}", help="of masks: values that count as a class, as --data.merge"
    )
    return parser


def _ignored(text: str) -> list[int]:
    found = _read(text)
    if not isinstance(found, list) or not all(isinstance(value, int) for value in found):
        raise argparse.ArgumentTypeError(f"{text} is no list of pixel values, such as [0,255]")
    return found


def _merged(text: str) -> dict[int, int]:
    from effvit._cli.parser import spaced

    found = _read(spaced(text))
    if not isinstance(found, dict) or not all(isinstance(value, int) for pair in found.items() for value in pair):
        raise argparse.ArgumentTypeError(f"{text} does not say which pixel values are which class, such as {{8:7}}")
    return found


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def _reports(own: argparse.Namespace) -> Sequence[_Report]:
    """One report for each split in COCO format, or one of all class folders, or of all images with masks."""
    from effvit.datamodules import inspect_coco

    if _has_masks(Path(own.root)):
        from effvit.datamodules import inspect_masks

        if own.images is not None:
            raise ConfigError(f"--images goes with a COCO annotation file, and {own.root} holds images with masks")
        decode = not own.skip_images
        return [inspect_masks(own.root, own.split, decode, _Progress(), ignore=own.ignore, merge=own.merge)]
    if own.ignore is not None or own.merge is not None:
        raise ConfigError(f"--ignore and --merge are about masks, and {own.root} holds none")
    if _has_class_folders(Path(own.root)):
        from effvit.datamodules import inspect_image_folder

        if own.images is not None:
            raise ConfigError(f"--images goes with a COCO annotation file, and {own.root} holds class folders")
        return [inspect_image_folder(own.root, own.split, not own.skip_images, _Progress())]
    decode = not own.skip_images
    return [inspect_coco(json_file, images, decode_images=decode) for json_file, images in _coco_files(own)]


def _has_masks(root: Path) -> bool:
    """Whether a folder is a segmentation set; COCO annotations come first, as some sets have both."""
    from effvit.datamodules import has_split
    from effvit.datamodules.segmentation_inspection import has_masks

    return not any(has_split(root, split) for split in _SPLITS) and has_masks(root)


def _has_class_folders(root: Path) -> bool:
    """Tells the two formats apart: annotations make it COCO, images in folders a classification set.

    Raises:
        DatasetError: The folder is neither.
    """
    from effvit.datamodules import has_split
    from effvit.datamodules.image_inspection import has_class_folders

    if not root.is_dir() or any(has_split(root, split) for split in _SPLITS):
        return False
    if (root / "annotations").is_dir():
        return False
    # A plain tree beside a JSON may be anything.
    if ((root / "train").is_dir() or not any(root.glob("*.json"))) and has_class_folders(root):
        return True
    inside = sorted(entry.name for entry in root.iterdir())
    raise DatasetError(
        f"{root} is no data set that can be checked. Looked for\n"
        "  COCO annotations: annotations/instances_train2017.json, annotations/instances_train.json, "
        "train/_annotations.coco.json, and the same of val and test\n"
        "  class folders: train/<class>/<image>, or <class>/<image>; ImageNet's val/ with the devkit or Kaggle's file\n"
        "  images with masks: images/train/ with masks/train/, train/images/ with train/masks/, images/ with masks/; "
        "ADEChallengeData2016, VOCdevkit/VOC2012, Cityscapes\n"
        f"There is: {', '.join(inside[:12]) or 'nothing'}"
    )


def _coco_files(own: argparse.Namespace) -> list[tuple[Path, Path]]:
    """Annotation file and image folder of each split to check."""
    from effvit.datamodules import find_split, has_split

    root = Path(own.root)
    if root.is_file():
        if own.images is None or own.split is not None:
            raise ConfigError(f"{root} is a file: name its image folder with --images, and no --split")
        return [(root, Path(own.images))]
    if own.images is not None:
        raise ConfigError("--images goes with an annotation file; for a folder, the image folders are found by name")
    splits = own.split or [split for split in _SPLITS if root.is_dir() and has_split(root, split)] or ["train"]
    found = [find_split(root, split) for split in splits]
    return [(split.annotations, split.images) for split in found]
