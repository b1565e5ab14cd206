"""Deploy forms of the convolutional parts of MobileViT and MobileViTv2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen
from effvit.backbones._windows import cells_to_map, is_recording, map_to_cells

# Bytes. What is larger, glibc maps anew for each tensor, whatever was freed before, and the kernel clears page by page.
LARGE = 32 * 2**20


def add_product(onto: Tensor, bias: Tensor, cells: Tensor, weight: Tensor) -> Tensor:
    """``onto + linear(cells)`` for cells ``(..., C)``; `onto`, ``(cells, C')``, must be the caller's own."""
    biased = onto + bias if torch.is_grad_enabled() else onto.add_(bias)
    return accumulate(biased, cells.reshape(-1, weight.shape[1]), weight.t())


class FusedConv(nn.Module):
    """A convolution and its SiLU."""

    def __init__(self, folded: nn.Conv2d) -> None:
        super().__init__()
        self.conv = channels_last(folded)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        return F.silu(self.conv(x), inplace=True)


class FusedPointwise(nn.Module):
    """A pointwise convolution as a product on the cells."""

    def __init__(self, folded: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = frozen(folded.weight.flatten(1)), frozen(bias_of(folded))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        return cells_to_map(F.linear(map_to_cells(x), self.weight, self.bias), x)


class FusedInvertedResidual(nn.Module):
    """``InvertedResidual``.

    On CPUs a batch whose widened map is large is worked off in parts that the allocator can keep memory for.
    """

    def __init__(self, widen: nn.Conv2d, depthwise: nn.Conv2d, narrow: nn.Conv2d, *, residual: bool) -> None:
        super().__init__()
        self.widen, self.widen_bias = frozen(widen.weight.flatten(1)), frozen(bias_of(widen))
        self.depthwise = channels_last(depthwise)
        self.narrow, self.narrow_bias = frozen(narrow.weight.flatten(1)), frozen(bias_of(narrow))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        if x.device.type == "cpu" and not is_recording():
            image = self.widen_bias.numel() * x.shape[2] * x.shape[3] * x.element_size()
            parts = -(-x.shape[0] // max(LARGE // image, 1))
            if parts > 1:
                return torch.cat([self._mix(part) for part in x.chunk(parts)])
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        cells = map_to_cells(x)
        hidden = F.silu(F.linear(cells, self.widen, self.widen_bias), inplace=True)
        hidden = F.silu(self.depthwise(cells_to_map(hidden, x)), inplace=True)
        mixed = map_to_cells(hidden)
        if self.residual:
            return cells_to_map(accumulate(cells + self.narrow_bias, mixed, self.narrow.t()), x)
        return cells_to_map(F.linear(mixed, self.narrow, self.narrow_bias), hidden)
