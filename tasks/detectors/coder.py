"""Boxes as offsets from anchors, with MMDetection's bounds and its order of operations."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder


class SymmetricBoxCoder(BoxCoder):  # type: ignore[misc]
    """torchvision's coder with the size offsets bounded on both sides, to the last bit MMDetection's.

    torchvision bounds dw and dh from above only; MMDetection's ``DeltaXYWHBBoxCoder`` also from below, at
    ``±log(1000 / 16)`` (``wh_ratio_clip=16 / 1000``), and it multiplies by standard deviations, the inverse of the
    weights here, where torchvision divides. A difference in the last bit decides which of two near boxes survives a
    suppression and on which side of one half a pixel of a mask lies, so the operations are done in its order.

    Source: MMDetection 3.3 ``mmdet/models/task_modules/coders/delta_xywh_bbox_coder.py``.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """Offsets that lead from anchors to boxes.

        Args:
            reference_boxes: Boxes ``(N, 4)``, xyxy.
            proposals: Anchors ``(N, 4)``, xyxy.

        Returns:
            Offsets ``(N, 4)``: dx, dy in anchor sides, dw, dh as logarithms, times the weights.
        """
        centres, sides = _centres_and_sides(proposals)
        wanted_centres, wanted_sides = _centres_and_sides(reference_boxes)
        offsets = torch.cat([(wanted_centres - centres) / sides, (wanted_sides / sides).log()], dim=-1)
        return offsets / _deviations(self.weights, offsets.dtype, offsets.device)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes that offsets stand for.

        Args:
            rel_codes: Offsets ``(N, 4)``: dx, dy in anchor sides, dw, dh as logarithms, times the weights.
            boxes: Anchors ``(N, 4)``, xyxy.

        Returns:
            Boxes ``(N, 4)``, xyxy.
        """
        offsets = rel_codes * _deviations(self.weights, rel_codes.dtype, rel_codes.device)
        shift, growth = offsets[..., :2], offsets[..., 2:].clamp(-self.bbox_xform_clip, self.bbox_xform_clip)
        centres, sides = _centres_and_sides(boxes)
        centres = centres + sides * shift
        half = sides * growth.exp() * 0.5
        return torch.cat([centres - half, centres + half], dim=-1)


def _deviations(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():  # what a tracer makes has no values, and must not be found again
        return _make_deviations(weights, dtype, device)
    return _kept_deviations(weights, dtype, device)


def _make_deviations(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.cat([torch.full((1,), 1 / weight, dtype=dtype, device=device) for weight in weights])


@lru_cache(maxsize=64)  # every copy to a GPU would wait for all that it has to do
def _kept_deviations(weights: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):  # validation may fill the cache that training reads
        return _make_deviations(weights, dtype, device)


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]
