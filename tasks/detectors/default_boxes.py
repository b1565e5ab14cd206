"""SSD's anchors, which it calls default boxes, on torchvision's generator."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.ops import box_convert

from effvit.tasks.detectors._scales import of_corners

if TYPE_CHECKING:
    from collections.abc import Sequence

_CACHED_GRIDS = 16  # sizes of batches that a training may meet


class DefaultBoxes(DefaultBoxGenerator):  # type: ignore[misc]
    """Anchors whose sides are shares of the image, as wide as it at most, equal to ml-cvnets' ``SSDAnchorGenerator``.

    The scales of L levels are the first L of L + 1 equal steps. A cell has a square of its level's scale, one of the
    geometric mean of this scale and the next, and two boxes for each aspect ratio.

    Source: Liu et al., SSD (arXiv 1512.02325), section 2.2; the scales are those of apple/ml-cvnets
    ``config/detection/ssd_coco/mobilevit.yaml``.

    Args:
        ratios: Aspect ratios of each level, finest first, each taken wide and tall.
        smallest: Scale of the finest level, as a share of the image.
        largest: Scale after the coarsest one.
    """

    def __init__(self, ratios: Sequence[Sequence[int]], smallest: float = 0.1, largest: float = 1.05) -> None:
        step = (largest - smallest) / len(ratios)
        scales = [smallest + step * level for level in range(len(ratios) + 1)]
        super().__init__([list(own) for own in ratios], scales=scales, clip=True)
        self._grids: OrderedDict[tuple[tuple[tuple[int, int], ...], tuple[int, int], torch.device], Tensor] = (
            OrderedDict()
        )

    def forward(
        self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int], device: torch.device
    ) -> Tensor:
        """Anchors of all levels, the same for every image of a batch.

        Args:
            map_sizes: ``(height, width)`` of each level's map, finest first.
            image_size: ``(height, width)`` of the batch in pixels.
            device: Device of the result.

        Returns:
            Corners ``(sum(H * W * A), 4)``, float32 xyxy in pixels, in the order level, row, column, anchor. Anchors
            may reach beyond the image. The tensor is cached: do not write into it.
        """
        if torch.compiler.is_compiling():  # what a tracer makes has no values, and must not be found again
            return self._grid(map_sizes, image_size).to(device)
        key = (tuple(map_sizes), image_size, device)
        if key in self._grids:
            self._grids.move_to_end(key)
            return self._grids[key]
        with torch.inference_mode(mode=False):  # validation may fill the cache that training reads
            self._grids[key] = self._grid(map_sizes, image_size).to(device)
        if len(self._grids) > _CACHED_GRIDS:
            self._grids.popitem(last=False)
        return self._grids[key]

    def _grid(self, map_sizes: Sequence[tuple[int, int]], image_size: tuple[int, int]) -> Tensor:
        """`forward`, on the CPU."""
        shares = self._grid_default_boxes([list(size) for size in map_sizes], list(image_size))
        height, width = image_size
        grid: Tensor = box_convert(shares, "cxcywh", "xyxy") * of_corners(shares, width, height)
        return grid
