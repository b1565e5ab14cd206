"""Features of regions, each from the pyramid level that fits its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.ops import roi_align

if TYPE_CHECKING:
    from collections.abc import Sequence

_COARSEST_STRIDE = 32
_FINEST_SCALE = 14  # in strides of the finest level: there a region up to twice as large is pooled


class RoIPooling:
    """RoIAlign as in MMDetection's ``SingleRoIExtractor``: aligned, with as many samples as a bin has pixels.

    torchvision's ``MultiScaleRoIAlign`` shifts regions by half a pixel, takes four samples a bin, and rounds the choice
    of a level otherwise.

    Source: MMDetection 3.3 ``mmdet/models/roi_heads/roi_extractors/single_level_roi_extractor.py``; the rule of the
    level is equation 1 of Lin et al., Feature Pyramid Networks, arXiv 1612.03144.

    Args:
        strides: Stride of each pyramid level in pixels, finest first. Levels beyond stride 32 are not pooled from.
    """

    def __init__(self, strides: Sequence[int]) -> None:
        self.strides = [stride for stride in strides if stride <= _COARSEST_STRIDE] or [strides[0]]

    def levels(self, boxes: Tensor) -> Tensor:
        """Index of the level of each region ``(R,)``, int64.

        Args:
            boxes: Regions ``(R, 4)``, xyxy in pixels.
        """
        scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = (scale / (_FINEST_SCALE * self.strides[0]) + 1e-6).log2().floor()
        return level.clamp(0, len(self.strides) - 1).long()

    def __call__(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> Tensor:
        """Pooled features, in float32 inside and of the maps' type outside.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
            boxes: Regions of each image ``(R_b, 4)``, float32 xyxy in pixels.
            size: Side of the result.

        Returns:
            ``(sum of R_b, C, size, size)``, image by image.
        """
        regions = with_image_index(boxes)
        levels = self.levels(regions[:, 1:])
        order = levels.argsort(stable=True)
        counts = torch.bincount(levels, minlength=len(self.strides)).tolist()
        pooled = [
            self._pool_level(maps, own, number, size)
            for number, own in enumerate(torch.split(regions[order], counts))
            if len(own)
        ]
        if not pooled:
            return maps[0].new_zeros(0, maps[0].shape[1], size, size)
        return torch.cat(pooled)[order.argsort()]

    def by_selection(self, maps: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
        """The same without any look at numbers: shapes follow from shapes.

        Every level pools all regions. Those that are another level's are shrunk to a point there, for which RoIAlign
        takes no sample and gives zeros, so that the sum over the levels has the digits of the one that fits.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
            boxes: Regions ``(B, R, 4)``, float32 xyxy in pixels.
            size: Side of the result.

        Returns:
            ``(B * R, C, size, size)``, image by image.
        """
        image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes.dtype)[:, None, None]
        image = image.expand(-1, boxes.shape[1], 1).flatten(0, 1)
        flat = boxes.flatten(0, 1)
        levels = self.levels(flat)[:, None]
        total: Tensor | None = None
        for number in range(len(self.strides)):
            regions = torch.cat([image, flat * (levels == number).to(flat.dtype)], dim=1)
            pooled = self._pool_level(maps, regions, number, size)
            pooled = pooled.where((levels == number)[:, :, None, None], 0)  # OpenVINO samples a point too
            total = pooled if total is None else total + pooled
        assert total is not None
        return total

    def whole(self, maps: Sequence[Tensor], size: int) -> Tensor:
        """Features of each whole image, which needs no look at numbers: it goes on the meta device too.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
            size: Side of the result.

        Returns:
            ``(B, C, size, size)``.
        """
        coarsest = len(self.strides) - 1
        level = maps[coarsest]
        corners = [0.0, 0.0, level.shape[3] * self.strides[coarsest], level.shape[2] * self.strides[coarsest]]
        box = torch.tensor([corners], device=level.device)
        return self._pool_level(maps, with_image_index([box] * len(level)), coarsest, size)

    def _pool_level(self, maps: Sequence[Tensor], regions: Tensor, number: int, size: int) -> Tensor:
        """Features ``(R, C, size, size)`` of regions ``(R, 5)``, image and xyxy, from one level."""
        level = maps[number]
        pooled: Tensor = roi_align(level.float(), regions, (size, size), 1 / self.strides[number], -1, True)
        return pooled.to(level.dtype)


def with_image_index(boxes: Sequence[Tensor]) -> Tensor:
    """Regions of all images ``(R, 5)``: index of the image, xyxy.

    Args:
        boxes: Regions of each image ``(R_b, 4)``.
    """
    return torch.cat([torch.cat([own.new_full((len(own), 1), index), own], dim=1) for index, own in enumerate(boxes)])
