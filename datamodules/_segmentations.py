"""What can be wrong in a COCO segmentation: pycocotools checks little, and reads beyond its memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

# Polygons may reach beyond the image by its size, as pycocotools cuts them off; far beyond, it runs out of memory.
_MOST_BEYOND = 1


def segmentation_fault(segmentation: Any, size: tuple[int, int] | None) -> str:
    """What is wrong with a segmentation, or nothing.

    Args:
        segmentation: Polygons, or run lengths as list or as text.
        size: Height and width of the image in pixels, if known.
    """
    if isinstance(segmentation, dict):
        return _run_length_fault(segmentation, size)
    if not (isinstance(segmentation, list) and all(map(_is_polygon, segmentation))):
        shown = shorten(segmentation)
        return f"segmentation must be polygons of at least 3 points [x, y, …] or run lengths, found {shown}"
    if size is None:
        return ""
    for polygon in segmentation:
        for side, coordinates in zip(reversed(size), (polygon[::2], polygon[1::2]), strict=True):
            if min(coordinates) < -_MOST_BEYOND * side or max(coordinates) > (1 + _MOST_BEYOND) * side:
                span = f"{min(coordinates):g} to {max(coordinates):g}"
                return f"a polygon goes from {span}, far beyond the image of {size[1]}x{size[0]} pixels"
    return ""


def _is_polygon(part: Any) -> bool:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        return False
    # Both without a loop in Python, as COCO has forty million coordinates; a sum is finite if all its terms are.
    return set(map(type, part)) <= {int, float} and math.isfinite(sum(part))


def _run_length_fault(segmentation: dict[str, Any], size: tuple[int, int] | None) -> str:
    own, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(counts, str | list) or not isinstance(own, list) or len(own) != 2:
        return f"a run-length segmentation needs 'size' and 'counts', it has {shorten(sorted(segmentation))}"
    if size is not None and own != list(size):
        return f"segmentation of size {own} on an image of {list(size)} (h, w)"
    runs = _read_counts(counts) if isinstance(counts, str) else counts
    if runs is None or not set(map(type, runs)) <= {int} or min(runs, default=0) < 0:
        return f"the run lengths must be integers of 0 or more, or COCO's text of them, found {shorten(counts)}"
    if size is not None and sum(runs) != size[0] * size[1]:
        return f"the run lengths add up to {sum(runs)} pixels, the image has {size[1]}x{size[0]}"
    return ""


def _read_counts(text: str) -> list[int] | None:
    """Run lengths from COCO's text, or nothing where it is none.

    Characters from "0" on hold five bits each, lowest first, and a sixth that says that more follow; the highest of the
    five bits in the last character is the sign. From the fourth number on, each is the difference to the one two before
    (pycocotools, ``rleFrString``).
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    ends = np.flatnonzero(codes < 32)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or ends[-1:].tolist() != [len(codes) - 1]:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more pixels than any image has
        return None
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & 31) << (5 * places), starts)
    values -= np.where(codes[ends] & 16, 1 << (5 * lengths), 0)
    values[1::2] = values[1::2].cumsum()
    values[2::2] = values[2::2].cumsum()
    counts: list[int] = values.tolist()
    return counts


def shorten(value: object, most: int = 120) -> str:
    """A value as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
