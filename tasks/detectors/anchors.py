"""Anchors of MMDetection's RetinaNet, on torchvision's generator."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

if TYPE_CHECKING:
    from collections.abc import Sequence

_CACHED_GRIDS = 16  # multi-scale training meets many shapes; at 1333x800 one entry holds 3.6 MB


class Anchors(AnchorGenerator):  # type: ignore[misc]
    """Unrounded anchors on fixed strides, bitwise those of MMDetection's ``AnchorGenerator``.

    torchvision rounds the corners of its anchors and takes the stride of a level from the padded image divided by
    the map, which gives 61 and 114 in place of 64 and 128 on P6 and P7 of an 800-pixel image. Here sizes are
    ``octave_base * stride * 2**(i / scales_per_octave)`` as they are, and strides are the nominal ones.

    Source: Lin et al., Focal Loss for Dense Object Detection (arXiv 1708.02002), section 4; MMDetection 3.3
    ``configs/_base_/models/retinanet_r50_fpn.py``.

    Args:
        strides: Stride of each level in pixels, finest first.
        octave_base: Side of the smallest square anchor, in strides.
        scales_per_octave: Anchor sizes between one level and the next.
        ratios: Height divided by width. The anchors of one location are listed ratio by ratio.
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        octave_base: float = 4.0,
        scales_per_octave: int = 3,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        octaves = [octave_base * 2 ** (i / scales_per_octave) for i in range(scales_per_octave)]
        sizes = tuple(tuple(stride * octave for octave in octaves) for stride in strides)
        super().__init__(sizes, (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)
        self._grids: OrderedDict[tuple[tuple[tuple[int, int], ...], torch.device], Tensor] = OrderedDict()

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors around the origin.

        Args:
            scales: Square roots of the anchors' areas, in pixels.
            aspect_ratios: Height divided by width.
            dtype: Type of the result.
            device: Device of the result.

        Returns:
            Corners ``(len(aspect_ratios) * len(scales), 4)``, xyxy in pixels.
        """
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        heights = (roots[:, None] * sides[None, :]).flatten()
        widths = ((1 / roots)[:, None] * sides[None, :]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2

    def forward(self, map_sizes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Anchors of all levels, the same for every image of a batch.

        Args:
            map_sizes: ``(height, width)`` of each level's feature map, finest first.
            device: Device of the result.

        Returns:
            Corners ``(sum(H * W * A), 4)``, float32 xyxy in pixels of the padded image, in the order level, row,
            column, anchor. The tensor is cached: do not write into it.
        """
        if torch.compiler.is_compiling():  # what a tracer makes has no values, and must not be found again
            return self._grid([cell.to(device) for cell in self.cell_anchors], map_sizes)
        key = (tuple(map_sizes), device)
        if key in self._grids:
            self._grids.move_to_end(key)
            return self._grids[key]
        with torch.inference_mode(mode=False):  # validation may fill the cache that training reads
            self.set_cell_anchors(torch.float32, device)
            grid = self._grid(self.cell_anchors, map_sizes)
        self._grids[key] = grid
        if len(self._grids) > _CACHED_GRIDS:
            self._grids.popitem(last=False)
        return grid

    def _grid(self, cells: Sequence[Tensor], map_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """`forward`, from the anchors of one location of each level."""
        levels = []
        for cell, (height, width), stride in zip(cells, map_sizes, self.strides, strict=True):
            rows = torch.arange(height, dtype=torch.int32, device=cell.device)[:, None].expand(height, width) * stride
            columns = torch.arange(width, dtype=torch.int32, device=cell.device).expand(height, width) * stride
            shifts = torch.stack([columns, rows, columns, rows], dim=2)
            levels.append((shifts[:, :, None] + cell).flatten(0, 2))
        return torch.cat(levels)

    def inside(
        self, map_sizes: Sequence[tuple[int, int]], size: tuple[int, int], pad_divisor: int, device: torch.device
    ) -> Tensor | None:
        """Which anchors have their location inside an image's own padded area.

        In a batch of unequal images the smaller ones end before the maps do. MMDetection leaves the anchors out there
        out of the assignment and of the loss (``valid_flags``); anchors that only reach over the border stay.

        Args:
            map_sizes: ``(height, width)`` of each level's feature map.
            size: ``(height, width)`` of the image before padding, in pixels.
            pad_divisor: The image as it would be padded alone has sides that are multiples of this.
            device: Device of the result.

        Returns:
            Flags ``(sum(H * W * A),)`` in the order of ``forward``, or ``None`` where every anchor is inside.
        """
        padded_height, padded_width = (math.ceil(side / pad_divisor) * pad_divisor for side in size)
        extents = [
            (min(height, math.ceil(padded_height / stride)), min(width, math.ceil(padded_width / stride)))
            for (height, width), stride in zip(map_sizes, self.strides, strict=True)
        ]
        if extents == [tuple(size) for size in map_sizes]:
            return None
        flags = []
        for map_size, (height, width), per_location in zip(
            map_sizes, extents, self.num_anchors_per_location(), strict=True
        ):
            level = torch.zeros(*map_size, per_location, dtype=torch.bool, device=device)
            level[:height, :width] = True
            flags.append(level.flatten())
        return torch.cat(flags)
