"""Detections of two runs of one network, each beside its partner; and how many may be without one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

#: Overlap from which two boxes of a class are the same detection. Where suppression kept another one of two boxes that
#: lie almost alike, what comes out of it is another detection, not a rounded one.
SAME = 0.99
#: Pixels added at each side of a box: the border may have cut it down to a line, which has no area to overlap.
_MARGIN = (-0.05, -0.05, 0.05, 0.05)
#: Rounding can turn the order of two scores, or an overlap or a score at the threshold, and with it what non-maximum
#: suppression keeps. One such turn leaves two without a partner, one of either side.
_ONE_TURN = 2


@dataclass(frozen=True)
class Matched:
    """How many detections of two runs say the same.

    Attributes:
        detections: How many were expected.
        paired: How many of them have a partner.
        unmatched: How many of either side have none.
    """

    detections: int = 0
    paired: int = 0
    unmatched: int = 0

    def __add__(self, other: Matched) -> Matched:
        """Those of further images."""
        return Matched(self.detections + other.detections, self.paired + other.paired, self.unmatched + other.unmatched)

    def allowed(self, share: float) -> int:
        """How many of either side may be without a partner.

        Args:
            share: Of all detections of both sides. One turn of the suppression may be too, where at least one detection
                has a partner: a file of which none has is wrong, or gives nothing.
        """
        turn = _ONE_TURN if self.paired else _ONE_TURN // 2
        return max(turn, math.floor(share * 2 * self.detections))


@dataclass(frozen=True)
class Partners:
    """The detections of one image in two runs, beside each other.

    Attributes:
        found: Outputs but the labels, of the detections that have a partner.
        expected: The same of their partners, in the same order.
        matched: How many have one.
    """

    found: Mapping[str, Tensor]
    expected: Mapping[str, Tensor]
    matched: Matched


def partners(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], least_overlap: float = SAME
) -> Iterator[Partners]:
    """Puts the detections of each image beside their partners.

    Rounding may turn the order of two that score alike, which would compare each with the other.

    Args:
        found: ``boxes`` ``(B, D, 4)``, ``labels`` ``(B, D)``, -1 where empty, and others ``(B, D, ...)``.
        expected: The same of another run.
        least_overlap: See `match_detections`.
    """
    names = [name for name in expected if name != "labels"]
    for image in range(len(expected["labels"])):
        own, other = (
            {name: tensor[image][side["labels"][image] >= 0] for name, tensor in side.items()}
            for side in (found, expected)
        )
        rows, columns = match_detections(own, other, least_overlap)
        alone = len(own["labels"]) + len(other["labels"]) - 2 * len(rows)
        yield Partners(
            {name: own[name][rows] for name in names},
            {name: other[name][columns] for name in names},
            Matched(len(other["labels"]), len(rows), alone),
        )


def match_detections(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], least_overlap: float = SAME
) -> tuple[Tensor, Tensor]:
    """Pairs the detections of one image by class and overlap, each with the partner it overlaps most.

    Args:
        found: ``boxes`` ``(N, 4)`` xyxy and ``labels`` ``(N,)``.
        expected: The same of ``M`` detections.
        least_overlap: Overlap (IoU) that partners have at least.

    Returns:
        Positions among `found` and positions among `expected`, of the same length.
    """
    overlap = box_iou(*(side["boxes"].double() + side["boxes"].new_tensor(_MARGIN) for side in (found, expected)))
    overlap[found["labels"][:, None] != expected["labels"]] = 0
    pairs = []
    for _ in range(min(overlap.shape)):
        best = int(overlap.argmax())
        row, column = divmod(best, overlap.shape[1])
        if not overlap[row, column] >= least_overlap:
            break
        pairs.append((row, column))
        overlap[row], overlap[:, column] = -1, -1
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.long)
    return rows, torch.tensor([column for _, column in pairs], dtype=torch.long)
