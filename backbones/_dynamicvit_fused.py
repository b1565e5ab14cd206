"""The deploy form of DynamicViT's blocks and predictors: the same function with fewer passes over memory.

DeiT is matrix products already, so there is little to fold (a LayerNorm's scale and shift are better left where they
are: torch's LayerNorm is slower without):

* weights lie in memory as the matrix library reads few rows fastest, which is what one pruned image has;
* a product accumulates onto its residual instead of being made, then added;
* a predictor reads the mean of all tokens once for each image, not once for each token: its first linear layer behind
  the mean is split into the half that reads the token and the half that reads the mean;
* a rank only needs the difference of the two logits, so the last layer is one row, without bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._fused import frozen
from effvit.backbones._layers import gelu

if TYPE_CHECKING:
    from effvit.backbones._deit import Block
    from effvit.backbones.dynamicvit import ScorePredictor


def as_matrix(weight: Tensor) -> nn.Parameter:
    """A linear layer's weight ``(out, in)`` as a constant ``(in, out)`` to multiply from the right.

    Row by row in memory, products with 60 to 140 rows are 1.2 to 1.7 times as fast on CPUs, and those with more the
    same. Not where a row is a multiple of 2 KiB, all of whose starts fall into the same few sets of the cache.
    """
    matrix = weight.detach().t()
    return frozen(matrix if matrix.shape[1] % 512 == 0 else matrix.contiguous())


class LayerNormLinear(nn.Module):
    """LayerNorm and the linear layer behind it."""

    def __init__(self, norm: nn.LayerNorm, linear: nn.Linear) -> None:
        super().__init__()
        self.eps = norm.eps
        self.scale, self.shift = frozen(norm.weight), frozen(norm.bias)
        self.weight, self.bias = as_matrix(linear.weight), frozen(linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """``(rows, in)`` to ``(rows, out)``."""
        normal = F.layer_norm(rows, rows.shape[-1:], self.scale, self.shift, self.eps)
        return torch.addmm(self.bias, normal, self.weight)


class ResidualLinear(nn.Module):
    """``onto + linear(rows)``."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = as_matrix(linear.weight)
        self.bias = frozen(linear.bias)

    def forward(self, onto: Tensor, rows: Tensor) -> Tensor:
        """``(rows, out)`` and ``(rows, in)`` to ``(rows, out)``; in place where no gradient is recorded."""
        if torch.is_grad_enabled() or not onto.dtype == rows.dtype == self.weight.dtype:
            return onto + torch.addmm(self.bias, rows, self.weight)
        return onto.add_(self.bias).addmm_(rows, self.weight)


class FusedBlock(nn.Module):
    """``Block`` without a mask; `x` must be the caller's own."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.heads = block.attn.heads
        self.qkv = LayerNormLinear(block.norm1, block.attn.qkv)
        self.proj = ResidualLinear(block.attn.proj)
        self.fc1 = LayerNormLinear(block.norm2, block.mlp.fc1)
        self.fc2 = ResidualLinear(block.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, C)`` to the same."""
        batch, count, channels = x.shape
        rows: Tensor = x.reshape(-1, channels)
        query, key, value = self.qkv(rows).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(query, key, value)
        rows = self.proj(rows, mixed.transpose(1, 2).reshape(-1, channels))
        rows = self.fc2(rows, gelu(self.fc1(rows)))
        return rows.view(batch, count, channels)


class FusedScorePredictor(nn.Module):
    """``ScorePredictor.rank``."""

    def __init__(self, predictor: ScorePredictor) -> None:
        super().__init__()
        norm, first = predictor.in_conv[0], predictor.in_conv[1]
        second, third, last = (cast("nn.Linear", predictor.out_conv[index]) for index in (0, 2, 4))
        self.first = LayerNormLinear(cast("nn.LayerNorm", norm), cast("nn.Linear", first))
        self.local, self.overall = (as_matrix(half) for half in second.weight.chunk(2, 1))
        self.second_bias = frozen(second.bias)
        self.third, self.third_bias = as_matrix(third.weight), frozen(third.bias)
        self.difference = frozen((last.weight[0].double() - last.weight[1].double()).to(last.weight.dtype))

    def rank(self, x: Tensor) -> Tensor:
        """``(B, 1 + N, C)`` to ``(B, N)``; larger is better, no more: the constant part is left out."""
        batch, total, channels = x.shape
        # With the class token, whose rank is thrown away: without it, all others would have to be copied.
        hidden = gelu(self.first(x.reshape(-1, channels)))
        local, overall = hidden.chunk(2, 1)
        mean = overall.view(batch, total, -1)[:, 1:].mean(1)
        shift = torch.addmm(self.second_bias, mean, self.overall)
        hidden = torch.mm(local, self.local).view(batch, total, -1) + shift[:, None]
        hidden = torch.addmm(self.third_bias, gelu(hidden).flatten(0, 1), self.third)
        rank: Tensor = torch.matmul(gelu(hidden), self.difference).view(batch, total)[:, 1:]
        return rank
