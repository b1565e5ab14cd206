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

from effvit.backbones._cvnets_fused import absorb_affine
from effvit.backbones._cvnets_patches import PATCH, even, resize
from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen
from effvit.backbones._windows import ShapeCache, is_recording, map_to_cells

if TYPE_CHECKING:
    from effvit.backbones.mobilevitv2 import MobileViTv2Block, TransformerLayer


class FusedSeparableAttention(nn.Module):
    """The attention half of ``TransformerLayer``, its norm included."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        norm, attention = layer.norm1, layer.attn
        self.eps = norm.eps
        weight, bias = absorb_affine(norm, attention.qkv_proj.weight.flatten(1), bias_of(attention.qkv_proj))
        query, key, value = torch.split(weight, [1, norm.num_channels, norm.num_channels])
        _, key_bias, value_bias = torch.split(bias, [1, norm.num_channels, norm.num_channels])
        self.query = frozen(query[0])
        self.key, self.key_bias = frozen(key), frozen(key_bias)
        self.value, self.value_bias = frozen(value), frozen(value_bias)
        self.output = frozen(attention.out_proj.weight.flatten(1))
        self.output_bias = frozen(bias_of(attention.out_proj))

    def forward(self, cells: Tensor, mask: Tensor, width: int) -> Tensor:
        """``(B, H * W, dim)`` to the same; see ``position_mask``."""
        batch, count, dim = cells.shape
        normed = F.layer_norm(cells, (count, dim), eps=self.eps)
        scores = (torch.matmul(normed, self.query)[:, None] + mask).softmax(2)
        context = F.linear(torch.bmm(scores, normed), self.key, self.key_bias)
        value = F.linear(normed, self.value, self.value_bias).relu_()
        value = value.view(batch, -1, PATCH, width // PATCH, PATCH, dim)
        mixed = value * context.view(batch, 1, PATCH, 1, PATCH, dim)
        return add_product(cells + self.output_bias, mixed, self.output)


class FusedFeedForward(nn.Module):
    """The other half."""

    def __init__(self, layer: TransformerLayer) -> None:
        super().__init__()
        self.eps = layer.norm2.eps
        widen, narrow = layer.mlp.fc1, layer.mlp.fc2
        self.widen, self.widen_bias = map(frozen, absorb_affine(layer.norm2, widen.weight.flatten(1), bias_of(widen)))
        self.narrow, self.narrow_bias = frozen(narrow.weight.flatten(1)), frozen(bias_of(narrow))

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, H * W, dim)`` to the same."""
        normed = F.layer_norm(cells, cells.shape[1:], eps=self.eps)
        hidden = F.silu(F.linear(normed, self.widen, self.widen_bias), inplace=True)
        return add_product(cells + self.narrow_bias, hidden, self.narrow)


class FusedMobileViTv2Block(nn.Module):
    """``MobileViTv2Block``."""

    def __init__(self, block: MobileViTv2Block) -> None:
        super().__init__()
        self.local = channels_last(block.conv_kxk.fold())
        self.enter = frozen(block.conv_1x1.weight.flatten(1))
        layers = [cast("TransformerLayer", layer) for layer in block.transformer]
        self.attentions = nn.ModuleList(FusedSeparableAttention(layer) for layer in layers)
        self.feed_forwards = nn.ModuleList(FusedFeedForward(layer) for layer in layers)
        project = block.conv_proj.fold()
        self.eps = block.norm.eps
        self.leave, self.leave_bias = map(
            frozen, absorb_affine(block.norm, project.weight.flatten(1), bias_of(project))
        )
        self._masks: ShapeCache[Tensor] = ShapeCache()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H', W')``: each side, rounded up to even."""
        batch, height, width = x.shape[0], even(x.shape[2]), even(x.shape[3])
        x = F.silu(self.local(resize(x, height, width, align_corners=True)), inplace=True)
        cells = F.linear(map_to_cells(x), self.enter).view(batch, height * width, -1)
        mask = self._mask(cells, height, width)
        for attend, feed in zip(self.attentions, self.feed_forwards, strict=True):
            cells = feed(attend(cells, mask, width))
        cells = F.linear(F.layer_norm(cells, cells.shape[1:], eps=self.eps), self.leave, self.leave_bias)
        return cells.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _mask(self, cells: Tensor, height: int, width: int) -> Tensor:
        if is_recording():
            return position_mask(cells, height, width)
        key = (height, width, cells.device, cells.dtype)
        return self._masks.get_or_make(key, lambda: position_mask(cells, height, width))

    def _apply(self, *args: object, **kwargs: object) -> FusedMobileViTv2Block:
        self._masks.clear()
        moved: FusedMobileViTv2Block = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return moved


def position_mask(like: Tensor, height: int, width: int) -> Tensor:
    """``(4, height * width)``: zero at the cells of each patch position, elsewhere minus infinity; type of `like`."""
    rows = torch.arange(height, device=like.device) % PATCH
    columns = torch.arange(width, device=like.device) % PATCH
    position = (rows[:, None] * PATCH + columns).flatten()
    other = position != torch.arange(PATCH**2, device=like.device)[:, None]
    return torch.zeros(other.shape, device=like.device, dtype=like.dtype).masked_fill_(other, float("-inf"))


def add_product(onto: Tensor, cells: Tensor, weight: Tensor) -> Tensor:
    """``onto + linear(cells)`` for ``(B, N, dim)``; `onto` must be the caller's own."""
    dim = onto.shape[2]
    return accumulate(onto.view(-1, dim), cells.reshape(-1, weight.shape[1]), weight.t()).view(onto.shape)
