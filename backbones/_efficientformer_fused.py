"""The deploy form of EfficientFormer's blocks: the same function in fewer and cheaper passes over memory.

Half of the network's time is matrix products and most of the rest is reading and writing maps, so here

* maps stay in channels-last memory, where a pointwise convolution is a plain matrix product on the cells;
* BatchNorm, LayerNorm's affine part, LayerScale and the attention scale are folded into those products;
* ``x + gamma * (mean of neighbours - x)`` is one depthwise convolution with the second product's bias in it. A zero
  border makes the outermost cells divide by too many neighbours, which is put right on those rows and columns alone;
* GELU works in place, and the second product accumulates onto the residual;
* where the hidden map is so large that the allocator would fetch it from the kernel, page by page, in every block, the
  cells are worked through in parts whose hidden map stays in the cache.

All of it is plain torch: it compiles, runs on any device, and in any floating type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen
from effvit.backbones._layers import attend, fold_norm, gelu, split_heads
from effvit.backbones._windows import AttentionBias, cells_to_map, is_recording, map_to_cells

if TYPE_CHECKING:
    from effvit.backbones._layers import LayerScale
    from effvit.backbones.efficientformer import AttentionBlock, Downsample, PoolBlock, Stem

# Numbers of values, from measurements on x86.
_SMALL_MAP = 2**16  # below, a convolution's fixed cost is more than the passes it saves
_LARGE_HIDDEN = 2**22
_PART_OF_HIDDEN = 2**19


class FusedStem(nn.Module):
    """``Stem`` with BatchNorm folded."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.conv1 = channels_last(fold_norm(stem.conv1, stem.norm1))
        self.conv2 = channels_last(fold_norm(stem.conv2, stem.norm2))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 4), ceil(W / 4))`` in channels-last memory."""
        out: Tensor = self.conv2(self.conv1(images).relu_()).relu_()
        return out


class FusedDownsample(nn.Module):
    """``Downsample`` with BatchNorm folded."""

    def __init__(self, downsample: Downsample) -> None:
        super().__init__()
        self.conv = channels_last(fold_norm(downsample.conv, downsample.norm))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.conv(x)
        return out


class FusedPoolBlock(nn.Module):
    """``PoolBlock``."""

    def __init__(self, block: PoolBlock) -> None:
        super().__init__()
        widen = fold_norm(block.mlp.fc1, block.mlp.norm1)
        narrow = fold_norm(block.mlp.fc2, block.mlp.norm2)
        with torch.no_grad():
            gamma, scale = block.ls1.gamma.double(), block.ls2.gamma.double()
            late_bias = bias_of(narrow).double() * scale
            first = widen.weight.flatten(1).double()
            kernel = (gamma / 9)[:, None, None, None].repeat(1, 1, 3, 3)
            kernel[:, 0, 1, 1] += 1 - gamma
            like = block.ls1.gamma
            self.mix = frozen(kernel.to(like.dtype).contiguous(memory_format=torch.channels_last))
            self.keep, self.spread = frozen((1 - gamma).to(like.dtype)), frozen(gamma.to(like.dtype))
            # Added while mixing, where it costs nothing; the first product must not see it.
            self.late_bias = frozen(late_bias.to(like.dtype))
            self.widen = frozen(widen.weight.flatten(1))
            self.widen_bias = frozen((bias_of(widen).double() - first @ late_bias).to(like.dtype))
            self.narrow = frozen((narrow.weight.flatten(1).double() * scale[:, None]).to(like.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        x = self._mix(x)
        return cells_to_map(self._feed_forward(map_to_cells(x)), x)

    def _mix(self, x: Tensor) -> Tensor:
        """``x`` with a part of each cell replaced by the mean around it, plus the block's late bias."""
        keep, late_bias = self.keep[:, None, None], self.late_bias[:, None, None]
        if is_recording() or x.numel() < _SMALL_MAP:
            mean = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
            return torch.addcmul(torch.addcmul(late_bias, x, keep), mean, self.spread[:, None, None])
        mixed = F.conv2d(x, self.mix, self.late_bias, padding=1, groups=x.shape[1])
        for edge, source, length in (
            (_ends(mixed, 2), _ends(x, 2), x.shape[2]),
            (_ends(mixed, 3), _ends(x, 3), x.shape[3]),
        ):
            # Of three rows, one lies outside the map (two if it has only one), and the sum was still divided by three.
            factor = 3 / min(length, 2)
            edge.lerp_(torch.addcmul(late_bias, source, keep).to(edge.dtype), 1 - factor)
        return mixed

    def _feed_forward(self, cells: Tensor) -> Tensor:
        hidden_size = cells.shape[0] * self.widen.shape[0]
        if _works_in_place(cells) and hidden_size > _LARGE_HIDDEN:  # no size is compared while a graph is recorded
            for part in cells.chunk(-(-hidden_size // _PART_OF_HIDDEN)):
                accumulate(part, gelu(F.linear(part, self.widen, self.widen_bias)), self.narrow.t())
            return cells
        return accumulate(cells, gelu(F.linear(cells, self.widen, self.widen_bias)), self.narrow.t())


class FusedAttentionBlock(nn.Module):
    """``AttentionBlock``."""

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        mixer = block.token_mixer
        self.split = mixer.split
        scale = torch.ones_like(mixer.qkv.bias, dtype=torch.float64).view(-1, sum(self.split))
        scale[:, : self.split[0]] = mixer.scale
        self.qkv, self.qkv_bias = _after_norm(block.norm1, mixer.qkv, scale.flatten())
        self.proj, self.proj_bias = _scaled(mixer.proj, block.ls1)
        self.widen, self.widen_bias = _after_norm(block.norm2, block.mlp.fc1)
        self.narrow, self.narrow_bias = _scaled(block.mlp.fc2, block.ls2)
        self.table = frozen(mixer.table)
        self.bias = AttentionBias(stretched=mixer.official)
        self.eps = (block.norm1.eps, block.norm2.eps)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same, in channels-last memory."""
        height, width = x.shape[2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        projected = F.linear(self._normalise(tokens, 0), self.qkv, self.qkv_bias)
        query, key, value = split_heads(projected, self.split)
        mixed = attend(query, key, value, self.bias(self.table, height, width))
        tokens = F.linear(mixed, self.proj, self.proj_bias).add_(tokens)
        hidden = gelu(F.linear(self._normalise(tokens, 1), self.widen, self.widen_bias))
        tokens = F.linear(hidden, self.narrow, self.narrow_bias).add_(tokens)
        return tokens.view(-1, height, width, x.shape[1]).permute(0, 3, 1, 2)

    def _normalise(self, tokens: Tensor, which: int) -> Tensor:
        """LayerNorm without its affine part."""
        return F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps[which])


@torch.no_grad()
def _after_norm(norm: nn.LayerNorm, linear: nn.Linear, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer with the affine part of the LayerNorm before it, and a scale on its outputs."""
    weight, bias = linear.weight.double(), linear.bias.double()
    bias = bias + weight @ norm.bias.double()
    weight = weight * norm.weight.double()
    if scale is not None:
        weight, bias = weight * scale[:, None], bias * scale
    return frozen(weight.to(linear.weight.dtype)), frozen(bias.to(linear.weight.dtype))


@torch.no_grad()
def _scaled(linear: nn.Linear, scale: LayerScale) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer with the LayerScale after it."""
    gamma = scale.gamma.double()
    weight, bias = linear.weight.double() * gamma[:, None], linear.bias.double() * gamma
    return frozen(weight.to(linear.weight.dtype)), frozen(bias.to(linear.weight.dtype))


def _works_in_place(cells: Tensor) -> bool:
    """Whether parts of the cells can be written over: on a GPU parts are slower, autocast only casts what is new."""
    return cells.is_cpu and not (is_recording() or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))


def _ends(x: Tensor, dim: int) -> Tensor:
    """The first and the last row (`dim` 2) or column (3) of a map as one view; one where there is only one."""
    step = max(x.shape[dim] - 1, 1)
    return x[:, :, ::step] if dim == 2 else x[:, :, :, ::step]
