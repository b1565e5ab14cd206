"""Deploy form of MobileViTv2's attention block, equal to it but for rounding.

Three identities make it cheaper than the block it replaces:

* The scores of one patch position sum to one, so the context is the projection of the pooled cells,
  ``sum(score * (K x + b)) = K sum(score * x) + b``: keys of single cells are never made.
* A softmax does not see what is added to all of its scores, so the query has no bias.
* Scores of the other positions, masked to minus infinity, are zero: cells stay in the order of the map, and the pooling
  of all four positions is one product.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._cvnets_fused import FusedConv, add_product
from effvit.backbones._cvnets_patches import PATCH, even, resize
from effvit.backbones._fused import bias_of, frozen
from effvit.backbones._windows import ShapeCache, is_recording

if TYPE_CHECKING:
    from effvit.backbones.mobilevitv2 import MobileViTv2Block, TransformerLayer


class FusedSeparableAttention(nn.Module):
    """The attention half of ``TransformerLayer``, its norm included."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.norm = layer.norm1.requires_grad_(requires_grad=False)
        project, dim = layer.attn.qkv_proj, layer.norm1.num_channels
        query, key, value = torch.split(project.weight.flatten(1), [1, dim, dim])
        _, key_bias, value_bias = torch.split(bias_of(project), [1, dim, dim])
        self.query = frozen(query[0])
        self.key, self.key_bias = frozen(key), frozen(key_bias)
        self.value, self.value_bias = frozen(value), frozen(value_bias)
        self.output = frozen(layer.attn.out_proj.weight.flatten(1))
        self.output_bias = frozen(bias_of(layer.attn.out_proj))

    def forward(self, grid: Tensor, mask: Tensor) -> Tensor:
        """``(B, H, W, dim)``, the caller's own, to the same; see ``position_mask``."""
        batch, height, width, dim = grid.shape
        normed = self.norm(grid).reshape(batch, -1, dim)
        scores = (torch.matmul(normed, self.query)[:, None] + mask).softmax(2)
        context = F.linear(torch.bmm(scores, normed), self.key, self.key_bias)
        value = F.linear(normed, self.value, self.value_bias).relu_()
        value = value.view(batch, height // PATCH, PATCH, width // PATCH, PATCH, dim)
        mixed = value * context.view(batch, 1, PATCH, 1, PATCH, dim)
        return add_product(grid.view(-1, dim), self.output_bias, mixed, self.output).view(grid.shape)


class FusedFeedForward(nn.Module):
    """The other half."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.norm = layer.norm2.requires_grad_(requires_grad=False)
        widen, narrow = layer.mlp.fc1, layer.mlp.fc2
        self.widen, self.widen_bias = frozen(widen.weight.flatten(1)), frozen(bias_of(widen))
        self.narrow, self.narrow_bias = frozen(narrow.weight.flatten(1)), frozen(bias_of(narrow))

    def forward(self, grid: Tensor) -> Tensor:
        """``(B, H, W, dim)``, the caller's own, to the same."""
        hidden = F.silu(F.linear(self.norm(grid), self.widen, self.widen_bias), inplace=True)
        cells = add_product(grid.view(-1, grid.shape[3]), self.narrow_bias, hidden, self.narrow)
        return cells.view(grid.shape)


class FusedMobileViTv2Block(nn.Module):
    """``MobileViTv2Block``."""

    def __init__(self, block: MobileViTv2Block) -> None:
        super().__init__()
        self.local = FusedConv(block.conv_kxk.fold())
        self.enter = frozen(block.conv_1x1.weight.flatten(1))
        layers = [cast("TransformerLayer", layer) for layer in block.transformer]
        self.attentions = nn.ModuleList(FusedSeparableAttention(layer) for layer in layers)
        self.feed_forwards = nn.ModuleList(FusedFeedForward(layer) for layer in layers)
        self.norm = block.norm.requires_grad_(requires_grad=False)
        project = block.conv_proj.fold()
        self.leave, self.leave_bias = frozen(project.weight.flatten(1)), frozen(bias_of(project))
        self._masks: ShapeCache[Tensor] = ShapeCache()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H', W')``: each side, rounded up to even."""
        height, width = even(x.shape[2]), even(x.shape[3])
        local = self.local(resize(x, height, width, align_corners=True))
        grid = F.linear(local.permute(0, 2, 3, 1), self.enter)
        mask = self._mask(grid, height, width)
        for attend, feed in zip(self.attentions, self.feed_forwards, strict=True):
            grid = feed(attend(grid, mask))
        return F.linear(self.norm(grid), self.leave, self.leave_bias).permute(0, 3, 1, 2)

    def _mask(self, grid: Tensor, height: int, width: int) -> Tensor:
        if is_recording():
            return position_mask(grid, height, width)
        key = (height, width, grid.device, grid.dtype)
        return self._masks.get_or_make(key, lambda: position_mask(grid, height, width))


def position_mask(like: Tensor, height: int, width: int) -> Tensor:
    """``(4, height * width)``: zero at the cells of each patch position, elsewhere minus infinity; type of `like`."""
    rows = torch.arange(height, device=like.device) % PATCH
    columns = torch.arange(width, device=like.device) % PATCH
    position = (rows[:, None] * PATCH + columns).flatten()
    other = position != torch.arange(PATCH**2, device=like.device)[:, None]
    return torch.zeros(other.shape, device=like.device, dtype=like.dtype).masked_fill_(other, float("-inf"))
