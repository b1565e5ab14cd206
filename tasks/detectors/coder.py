"""Boxes as offsets from anchors, with MMDetection's bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchvision.models.detection._utils import BoxCoder

if TYPE_CHECKING:
    from torch import Tensor


class SymmetricBoxCoder(BoxCoder):  # type: ignore[misc]
    """torchvision's coder with the size offsets bounded on both sides.

    torchvision bounds dw and dh from above only; MMDetection's ``DeltaXYWHBBoxCoder`` also from below, at
    ``±log(1000 / 16)`` (``wh_ratio_clip=16 / 1000``).
    """

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Boxes that offsets stand for.

        Args:
            rel_codes: Offsets ``(N, 4)``: dx, dy in anchor sides, dw, dh as logarithms.
            boxes: Anchors ``(N, 4)``, xyxy.

        Returns:
            Boxes ``(N, 4)``, xyxy.
        """
        bounded = rel_codes.clone()
        for side, weight in ((2, self.weights[2]), (3, self.weights[3])):
            bounded[:, side::4].clamp_(min=-self.bbox_xform_clip * weight)
        decoded: Tensor = super().decode_single(bounded, boxes)
        return decoded
