"""``effvit check-data``: every fault of a data set in one report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from effvit.errors import ConfigError

_SPLITS = ("train", "val", "test")


def check_data(words: Sequence[str]) -> int:
    """Runs ``effvit check-data``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        0 if every split is sound, 1 if there are faults.
    """
    own = _parser().parse_args(list(words))
    from effvit.datamodules import inspect_coco

    faults = 0
    for number, (json_file, images) in enumerate(_files(own)):
        report = inspect_coco(json_file, images, decode_images=not own.skip_images)
        print(("\n" if number else "") + str(report))
        faults += len(report.faults)
    return 1 if faults else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit check-data",
        description="Find every fault of a data set in COCO format; exits with 1 if there is one.",
        allow_abbrev=False,
    )
    parser.add_argument("root", help="folder of the data set, or an annotation file")
    parser.add_argument("--images", help="image folder, where root is an annotation file")
    parser.add_argument("--split", choices=_SPLITS, nargs="+", help="splits to check (default: all that are there)")
    parser.add_argument("--skip_images", action="store_true", help="check the annotations only, open no image file")
    return parser


def _files(own: argparse.Namespace) -> list[tuple[Path, Path]]:
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
