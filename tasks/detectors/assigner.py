"""Which anchor or proposal learns which object: MMDetection's ``MaxIoUAssigner``."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops.boxes import _box_inter_union

BACKGROUND = -1
IGNORED = -2

_OVERLAPS_AT_ONCE = 4_000_000  # bounds the memory of a crowded image: 16 MB for each float32 matrix
_SMALLEST_UNION = 1e-6  # in square pixels, as there: two boxes without an area overlap by nothing


def assign(
    anchors: Tensor,
    boxes: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    min_pos_iou: float = 0.0,
    match_low_quality: bool = True,
    inside: Tensor | None = None,
) -> Tensor:
    """Gives every anchor an object, the background, or nothing.

    An anchor takes the object that it overlaps most if their IoU is at least ``positive_iou``, the background if it is
    below ``negative_iou``, and is left out of the loss in between. Then every object takes the anchors of its own
    highest IoU, ties included, whatever they had: these go to *that* object (torchvision's ``Matcher`` gives them to
    the anchor's own best object), and where two objects claim one anchor the later one has it. An object that
    overlaps no anchor at all takes none; MMDetection would hand it every anchor that touches nothing.

    Source: MMDetection 3.3 ``mmdet/models/task_modules/assigners/max_iou_assigner.py``.

    Args:
        anchors: Corners ``(A, 4)``, float32 xyxy.
        boxes: Objects ``(N, 4)``, float32 xyxy.
        positive_iou: Lowest IoU of a positive anchor.
        negative_iou: Below this IoU an anchor is background.
        min_pos_iou: Lowest IoU at which an object takes the anchors that are its own best.
        match_low_quality: Whether objects take the anchors that are their own best at all.
        inside: Flags ``(A,)`` of the anchors that take part; the others are left out of the loss.

    Returns:
        Index of the object of each anchor ``(A,)``, int64, or ``BACKGROUND``, or ``IGNORED``.
    """
    if inside is not None:
        assigned = torch.full((len(anchors),), IGNORED, dtype=torch.int64, device=anchors.device)
        assigned[inside] = assign(
            anchors[inside],
            boxes,
            positive_iou=positive_iou,
            negative_iou=negative_iou,
            min_pos_iou=min_pos_iou,
            match_low_quality=match_low_quality,
        )
        return assigned
    best_iou, best_box, claimed = _overlaps(anchors, boxes, min_pos_iou)
    assigned = torch.full_like(best_box, IGNORED)
    assigned[best_iou < negative_iou] = BACKGROUND
    assigned = torch.where(best_iou >= positive_iou, best_box, assigned)
    return torch.where(claimed >= 0, claimed, assigned) if match_low_quality else assigned


def _overlaps(anchors: Tensor, boxes: Tensor, min_pos_iou: float) -> tuple[Tensor, Tensor, Tensor]:
    """The highest IoU of each anchor, the object it has it with, and the object whose own best it is (or -1)."""
    device = anchors.device
    best_iou = torch.zeros(len(anchors), device=device)
    best_box = torch.zeros(len(anchors), dtype=torch.int64, device=device)
    claimed = torch.full((len(anchors),), BACKGROUND, dtype=torch.int64, device=device)
    rows = max(1, _OVERLAPS_AT_ONCE // max(1, len(anchors)))
    for start in range(0, len(boxes) if len(anchors) else 0, rows):
        shared, union = _box_inter_union(boxes[start : start + rows], anchors)
        iou = shared / union.clamp(min=_SMALLEST_UNION)
        chunk_iou, chunk_box = iou.max(dim=0)
        better = chunk_iou > best_iou  # strictly: between equals the earlier object wins
        best_iou = torch.where(better, chunk_iou, best_iou)
        best_box = torch.where(better, chunk_box + start, best_box)
        highest = iou.max(dim=1, keepdim=True).values
        own_best = (iou == highest) & (highest > 0) & (highest >= min_pos_iou)
        object_index, anchor_index = torch.nonzero(own_best, as_tuple=True)
        claimed.scatter_reduce_(0, anchor_index, object_index + start, reduce="amax")
    return best_iou, best_box, claimed
