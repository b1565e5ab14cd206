"""Suppression of near duplicates within groups, to the digit that of mmcv."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

_TOGETHER = 10_000  # mmcv's `split_thr`: from this many boxes on it suppresses group by group
_FEW = 1_000  # beyond, a CPU is faster group by group too, with the same result: shifted groups do not overlap


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Drops every box that overlaps a better one of its own group too much.

    Groups are shifted apart by multiples of the largest coordinate plus one. Shifted boxes are rounded to float32, so
    the shift can decide between near ties; torchvision's ``batched_nms`` shifts only small sets of boxes.

    Source: mmcv 2.1 ``mmcv/ops/nms.py``, ``batched_nms``.

    Args:
        boxes: Corners ``(N, 4)``, float32 xyxy, none negative.
        scores: ``(N,)``, float32.
        groups: Group of each box ``(N,)``, int64: a class, or a level of the pyramid.
        threshold: IoU above which the weaker of two boxes is dropped.

    Returns:
        Indices of the boxes that are kept, best first, int64.
    """
    if len(boxes) == 0:
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    apart = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    if len(boxes) < _TOGETHER and (boxes.is_cuda or len(boxes) <= _FEW):
        together: Tensor = nms(apart, scores, threshold)
        return together
    kept = []
    for group in torch.unique(groups).tolist():
        own = torch.nonzero(groups == group).squeeze(1)
        kept.append(own[nms(apart[own], scores[own], threshold)])
    keep = torch.cat(kept).sort().values
    # Two sorts that differ in the order of equal scores: `nms` has a stable one, mmcv's own is not.
    return keep[scores[keep].sort(descending=True, stable=len(boxes) < _TOGETHER).indices]
