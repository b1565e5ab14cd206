"""The deploy form of EfficientViT's blocks: the same function in far fewer, larger operations.

EfficientViT is many small convolutions, and on CPUs each call of a convolution costs more than its arithmetic (a
depthwise one about 100 microseconds, however small). So here

* maps stay in channels-last memory, where a pointwise convolution is a plain matrix product on the cells;
* a residual depthwise convolution has the identity added to its kernel's centre, ``x + dw(x) = (dw + 1)(x)``;
* a feed-forward's second product accumulates onto its residual, whose bias the depthwise convolution before it has
  already added (and the first product's bias takes back);
* a query's depthwise convolution in a window of N cells is one batched product with an N x N matrix for each channel,
  made once per window shape, attention scale included;
* heads work channel-major, so that queries, keys and values are views of one product.

All of it is plain torch: it compiles, runs on any device, and in any floating type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen
from effvit.backbones._windows import ShapeCache, cells_to_map, cut, expand_bias, is_recording, map_to_cells, merge

if TYPE_CHECKING:
    from effvit.backbones._layers import ConvNorm, Residual
    from effvit.backbones.efficientvit import (
        Block,
        CascadedGroupAttention,
        Downsample,
        FeedForward,
        PatchMerging,
        Stem,
        WindowAttention,
    )


class FusedStem(nn.Module):
    """``Stem`` with BatchNorm folded."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        parts = (stem.conv1, stem.conv2, stem.conv3, stem.conv4)
        self.convs = nn.ModuleList(channels_last(part.fold()) for part in parts)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 16), ceil(W / 16))``."""
        x = images
        for position, convolution in enumerate(self.convs):
            x = convolution(x.relu_() if position else x)
        return x


class FusedLocalMix(nn.Module):
    """A residual depthwise convolution and the residual feed-forward after it.

    Args:
        depthwise: Folded 3x3 depthwise convolution.
        widen: Folded first pointwise convolution of the feed-forward.
        narrow: Its second.
    """

    def __init__(self, depthwise: nn.Conv2d, widen: nn.Conv2d, narrow: nn.Conv2d) -> None:
        super().__init__()
        late_bias = bias_of(narrow)
        with torch.no_grad():
            depthwise.weight[:, 0, 1, 1] += 1
            bias_of(depthwise).add_(late_bias)
            first = widen.weight.flatten(1)
            self.widen_bias = frozen(bias_of(widen) - first @ late_bias)
        self.depthwise = channels_last(depthwise)
        self.widen = frozen(first)
        self.narrow = frozen(narrow.weight.flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        x = self.depthwise(x)
        cells = map_to_cells(x)
        hidden = F.linear(cells, self.widen, self.widen_bias).relu_()
        return cells_to_map(accumulate(cells, hidden, self.narrow.t()), x)


class _WindowConstants(NamedTuple):
    """What attention needs for one window shape of N cells: each head's query mixers and biases."""

    mixers: tuple[Tensor, ...]  # (16, N, N), applied from the right
    biases: tuple[Tensor, ...]  # (N, N)


class FusedAttention(nn.Module):
    """``x + WindowAttention(x)``."""

    def __init__(self, attention: CascadedGroupAttention, window: int) -> None:
        super().__init__()
        self.window = window
        self.scale = attention.scale
        self.split = attention.split
        projections = [cast("ConvNorm", part).fold() for part in attention.qkvs]
        mixers = [cast("ConvNorm", part).fold() for part in attention.dws]
        output = cast("ConvNorm", attention.proj["1"]).fold()
        self.table = frozen(attention.attention_biases)
        self.qkv_weights = nn.ParameterList(frozen(part.weight.flatten(1)) for part in projections)
        self.qkv_biases = nn.ParameterList(frozen(bias_of(part)[:, None]) for part in projections)
        self.mixer_weights = nn.ParameterList(frozen(part.weight[:, 0]) for part in mixers)
        self.mixer_biases = nn.ParameterList(frozen(bias_of(part)[:, None, None] * self.scale) for part in mixers)
        self.output_weight = frozen(output.weight.flatten(1))
        self.output_bias = frozen(bias_of(output))
        self._cache: ShapeCache[_WindowConstants] = ShapeCache()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        grid = x.permute(0, 2, 3, 1)
        windows = cut(grid, self.window)
        outputs = self._attend(windows)
        attended = F.linear(torch.cat(outputs, 1).relu_(), self.output_weight, self.output_bias)
        return merge(attended.view(windows.shape), grid, self.window).add_(grid).permute(0, 3, 1, 2)

    def _attend(self, windows: Tensor) -> list[Tensor]:
        """Each head's output ``(cells, C / heads)`` for windows ``(count, h, w, C)``."""
        count, height, width, channels = windows.shape
        constants = self._constants(height, width)
        size = height * width
        shares = torch.split(windows.view(-1, channels), self.split[2], 1)
        share = shares[0]
        outputs: list[Tensor] = []
        heads = zip(self.qkv_weights, self.qkv_biases, self.mixer_biases, *constants, strict=True)
        for head, (weight, bias, mixer_bias, mixer, attention_bias) in enumerate(heads):
            if head:
                share = outputs[-1] + shares[head]
            projected = torch.addmm(bias, weight, share.t()).view(-1, count, size)
            query, key, value = torch.split(projected, list(self.split))
            query = torch.baddbmm(mixer_bias, query, mixer).permute(1, 2, 0)
            attention = torch.baddbmm(attention_bias, query, key.transpose(0, 1)).softmax(-1)
            outputs.append(torch.bmm(attention, value.permute(1, 2, 0)).view(count * size, -1))
        return outputs

    def _constants(self, height: int, width: int) -> _WindowConstants:
        if is_recording():
            return self._make_constants(height, width)
        key = (height, width, self.table.device, self.table.dtype)
        return self._cache.get_or_make(key, lambda: self._make_constants(height, width))

    def _make_constants(self, height: int, width: int) -> _WindowConstants:
        mixers = tuple(mixer_matrix(weight * self.scale, height, width) for weight in self.mixer_weights)
        return _WindowConstants(mixers, expand_bias(self.table, height, width).unbind())

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        self._cache.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: object, **kwargs: object) -> FusedAttention:
        self._cache.clear()
        moved: FusedAttention = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return moved


def mixer_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """A depthwise convolution with "same" zero padding, written as one matrix for each channel.

    Args:
        weight: Odd square kernels ``(C, k, k)``.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        ``(C, N, N)`` with ``N = height * width``: the convolution of ``(C, B, N)`` is the batched product with it.
    """
    channels, kernel, _ = weight.shape
    reach = kernel // 2
    y = torch.arange(height, device=weight.device).repeat_interleave(width)
    x = torch.arange(width, device=weight.device).repeat(height)
    dy, dx = y[:, None] - y, x[:, None] - x  # from output (column) to input (row)
    outside = (dy.abs() > reach) | (dx.abs() > reach)
    index = ((dy + reach) * kernel + dx + reach).masked_fill(outside, kernel * kernel)
    padded = F.pad(weight.flatten(1), (0, 1))  # one more entry, zero, for cells out of reach
    return padded.index_select(1, index.flatten()).view(channels, height * width, height * width)


class FusedBlock(nn.Module):
    """``Block``."""

    def __init__(self, block: Block, window: int) -> None:
        super().__init__()
        self.before = local_mix(block.dw0, block.ffn0)
        self.attention = FusedAttention(cast("WindowAttention", block.mixer.m).attn, window)
        self.after = local_mix(block.dw1, block.ffn1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        out: Tensor = self.after(self.attention(self.before(x)))
        return out


class FusedPatchMerging(nn.Module):
    """``PatchMerging``."""

    def __init__(self, merging: PatchMerging) -> None:
        super().__init__()
        widen, depthwise, narrow = merging.conv1.fold(), merging.conv2.fold(), merging.conv3.fold()
        self.widen, self.widen_bias = frozen(widen.weight.flatten(1)), frozen(bias_of(widen))
        self.depthwise = channels_last(depthwise)
        squeeze, excite = merging.se.fc1, merging.se.fc2
        self.squeeze, self.squeeze_bias = frozen(squeeze.weight.flatten(1)), frozen(bias_of(squeeze))
        self.excite, self.excite_bias = frozen(excite.weight.flatten(1)), frozen(bias_of(excite))
        self.narrow, self.narrow_bias = frozen(narrow.weight.flatten(1)), frozen(bias_of(narrow))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        hidden = cells_to_map(F.linear(map_to_cells(x), self.widen, self.widen_bias).relu_(), x)
        hidden = self.depthwise(hidden).relu_()
        gate = F.linear(hidden.mean((2, 3)), self.squeeze, self.squeeze_bias).relu_()
        gate = F.linear(gate, self.excite, self.excite_bias).sigmoid_()
        hidden = hidden * gate[:, :, None, None]
        return cells_to_map(F.linear(map_to_cells(hidden), self.narrow, self.narrow_bias), hidden)


class FusedDownsample(nn.Module):
    """``Downsample``."""

    def __init__(self, downsample: Downsample) -> None:
        super().__init__()
        self.before = local_mix(*downsample.res1)
        self.merging = FusedPatchMerging(downsample.patchmerge)
        self.after = local_mix(*downsample.res2)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.after(self.merging(self.before(x)))
        return out


def local_mix(depthwise: nn.Module, feed_forward: nn.Module) -> FusedLocalMix:
    """The fused form of a residual depthwise convolution followed by a residual feed-forward."""
    mixing = cast("ConvNorm", cast("Residual", depthwise).m)
    feeding = cast("FeedForward", cast("Residual", feed_forward).m)
    return FusedLocalMix(mixing.fold(), feeding.pw1.fold(), feeding.pw2.fold())
