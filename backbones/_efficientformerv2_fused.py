"""The deploy form of EfficientFormerV2's blocks: the same function in fewer, larger and better placed operations.

* Maps stay in channels-last memory, where a pointwise convolution is a plain matrix product on the cells.
* BatchNorm and layer scales are in the weights, and so are attention's scale (in the queries), the queries' second path
  (a 1 in the centre of their depthwise kernel) and the first talking head's part in the attention biases:
  ``W (q k + bias) + b = W q k + (W bias + b)``, where the latter is again a table.
* A feed-forward's last product accumulates onto the residual stream. Its bias is not added there: it waits, already
  counted in by the pointwise convolutions that read the stream next, until something else reads the stream.
* Memory, not arithmetic, bounds the middle of a feed-forward, which is four times as wide as the stream. On CPUs a
  batch goes through it in parts of a few megabytes, which stay in the cache and in memory that the process has.

All of it is plain torch: it compiles, runs on any device, and in any floating type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen
from effvit.backbones._layers import fold_norm, gelu
from effvit.backbones._windows import AttentionBias, cells_to_map, is_recording, map_to_cells

if TYPE_CHECKING:
    from effvit.backbones._layers import ConvNorm, LayerScale
    from effvit.backbones.efficientformerv2 import (
        Attention,
        AttentionDownsample,
        Block,
        Downsample,
        FeedForward,
        Stem,
    )

_PART_BYTES = 6 * 2**20


class FusedStem(nn.Module):
    """``Stem``."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.conv1, self.conv2 = channels_last(stem.conv1.fold()), channels_last(stem.conv2.fold())

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 4), ceil(W / 4))``."""
        return gelu(self.conv2(gelu(self.conv1(images))))


class Pointwise(nn.Module):
    """A folded pointwise convolution, or several of one input, on cells.

    Args:
        *parts: The convolutions; their outputs follow one another.
        late: A constant ``(in_channels,)`` that the input lacks.
        scale: Factor of the output: a number, or one for each channel.
    """

    def __init__(self, *parts: nn.Conv2d, late: Tensor | None = None, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        weight = torch.cat([part.weight.detach().flatten(1) for part in parts]).double()
        bias = torch.cat([bias_of(part).detach() for part in parts]).double()
        if late is not None:
            bias = bias + weight @ late.double()
        factor = torch.as_tensor(scale, dtype=torch.float64, device=weight.device).detach()
        kind = parts[0].weight.dtype
        self.weight = frozen((weight * factor.view(-1, 1)).to(kind))
        self.bias = frozen((bias * factor).to(kind))

    def forward(self, cells: Tensor) -> Tensor:
        """``(cells, in_channels)`` to ``(cells, out_channels)``."""
        return F.linear(cells, self.weight, self.bias)

    def add_to(self, onto: Tensor, cells: Tensor) -> Tensor:
        """``onto + self(cells)`` without the bias, in place where no gradient is recorded."""
        return accumulate(onto, cells, self.weight.t())


class FusedFeedForward(nn.Module):
    """A residual ``FeedForward`` and its layer scale, which leaves its last bias to the next reader.

    Args:
        mlp: The feed-forward.
        scale: Its layer scale.
        late: Bias ``(C,)`` that the stream lacks on entry.
    """

    def __init__(self, mlp: FeedForward, scale: LayerScale, late: Tensor) -> None:
        super().__init__()
        self.widen = Pointwise(mlp.fc1.fold(), late=late)
        self.depthwise = channels_last(mlp.mid.fold())
        self.narrow = Pointwise(mlp.fc2.fold(), scale=scale.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        per_image = self.widen.weight.shape[0] * x.shape[2] * x.shape[3] * x.element_size()
        parts = in_place_parts(x, per_image)
        if len(parts) == 1:
            return self._mix(x)
        for part in parts:
            self._mix(part)
        return x

    def _mix(self, x: Tensor) -> Tensor:
        cells = map_to_cells(x)
        hidden = cells_to_map(gelu(self.widen(cells)), x)
        hidden = gelu(self.depthwise(hidden))
        return cells_to_map(self.narrow.add_to(cells, map_to_cells(hidden)), x)


def in_place_parts(x: Tensor, bytes_per_image: int) -> tuple[Tensor, ...]:
    """Views of a batch small enough for the cache; the batch itself where working in place on views is not possible."""
    count = max(1, _PART_BYTES // bytes_per_image)
    if (
        x.device.type != "cpu"
        or x.shape[0] <= count
        or is_recording()
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return (x,)
    return torch.split(x, count)


class FusedAttention(nn.Module):
    """A residual ``Attention`` and its layer scale, which leaves its last bias to the next reader.

    Args:
        attention: The attention.
        scale: Its layer scale.
        late: Bias ``(C,)`` that the stream lacks on entry.
    """

    def __init__(self, attention: Attention, scale: LayerScale, late: Tensor) -> None:
        super().__init__()
        self.heads = attention.heads
        self.late: nn.Parameter | None = None
        self.stride_conv: nn.Conv2d | None = None
        if attention.stride_conv is not None:  # whose zero padding is of the whole stream
            self.late = frozen(late.to(scale.gamma.dtype))
            self.stride_conv = channels_last(attention.stride_conv.fold())
            late = torch.zeros_like(late)
        self.query = Pointwise(attention.q.fold(), late=late, scale=attention.key_dim**-0.5)
        self.key = Pointwise(attention.k.fold(), late=late)
        self.value = Pointwise(attention.v.fold(), late=late)
        self.local = channels_last(attention.v_local.fold())
        self.mix = HeadMixing(attention)
        self.output = Pointwise(attention.proj.fold(), scale=scale.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        stream = map_to_cells(x)
        reduced = x
        if self.stride_conv is not None and self.late is not None:
            stream = stream + self.late
            reduced = self.stride_conv(cells_to_map(stream, x))
        out = self._attend(reduced)
        if self.stride_conv is not None:
            out = F.interpolate(out, scale_factor=2, mode="bilinear")[:, :, : x.shape[2], : x.shape[3]]
        return cells_to_map(self.output.add_to(stream, map_to_cells(gelu(out))), x)

    def _attend(self, x: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, values, h, w)``."""
        cells = map_to_cells(x)
        values = self.value(cells)
        local = self.local(cells_to_map(values, x))
        query, key = split_heads(self.query(cells), x, self.heads), split_heads(self.key(cells), x, self.heads)
        return add_attended(local, self.mix(query, key, x.shape[2], x.shape[3]), split_heads(values, x, self.heads))


class HeadMixing(nn.Module):
    """Queries and keys to attention, talking heads included."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        before, after = attention.talking_head1, attention.talking_head2
        self.before, self.after = frozen(before.weight.flatten(1)), frozen(after.weight.flatten(1))
        self.after_bias = frozen(bias_of(after)[:, None])
        table = attention.table.detach()
        mixed = before.weight.detach().flatten(1).double() @ table.double() + bias_of(before).detach().double()[:, None]
        self.table = frozen(mixed.to(table.dtype))
        self.bias = AttentionBias(stretched=attention.official)

    def forward(self, query: Tensor, key: Tensor, height: int, width: int) -> Tensor:
        """``(B, heads, N, D)`` twice to ``(B, heads, N, N)``, N being ``height * width``."""
        logits = query @ key.transpose(2, 3)
        shape = logits.shape
        bias = self.bias(self.table, height, width).flatten(1)
        logits = torch.baddbmm(bias, self.before.expand(shape[0], -1, -1), logits.flatten(2))
        weights = logits.view(shape).softmax(-1).flatten(2)
        return torch.baddbmm(self.after_bias, self.after.expand(shape[0], -1, -1), weights).view(shape)


def split_heads(cells: Tensor, like: Tensor, heads: int) -> Tensor:
    """``(B * N, heads * D)`` to ``(B, heads, N, D)``, with B of `like`; a view."""
    return cells.view(like.shape[0], -1, heads, cells.shape[1] // heads).transpose(1, 2)


def add_attended(local: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """``local + attention @ values``.

    Args:
        local: The local path ``(B, heads * D, h, w)``, the caller's own.
        attention: ``(B, heads, h * w, N)``.
        values: ``(B, heads, N, D)``.

    Returns:
        ``(B, heads * D, h, w)``.
    """
    attended = (attention @ values).transpose(1, 2)
    cells = map_to_cells(local)
    return cells_to_map(cells.view(attended.shape).add(attended).view(cells.shape), local)


class FusedAttentionDownsample(nn.Module):
    """``AttentionDownsample`` and the convolution beside it."""

    def __init__(self, attention: AttentionDownsample, beside: ConvNorm) -> None:
        super().__init__()
        self.heads = attention.heads
        output = attention.proj.fold()
        convolution = beside.fold()
        local_query = attention.q.local
        with torch.no_grad():
            bias_of(convolution).add_(bias_of(output))
            local_query.weight[:, 0, 1, 1] += 1
        self.beside = channels_last(convolution)
        self.local_query = channels_last(local_query)
        self.query = Pointwise(attention.q.proj.fold(), scale=attention.key_dim**-0.5)
        self.key, self.value = Pointwise(attention.k.fold()), Pointwise(attention.v.fold())
        self.local = channels_last(attention.v_local.fold())
        self.table = frozen(attention.table)
        self.bias = AttentionBias(2, stretched=attention.official)
        self.output = Pointwise(output)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        beside = self.beside(x)
        query = split_heads(self.query(map_to_cells(self.local_query(x))), x, self.heads)
        cells = map_to_cells(x)
        values = self.value(cells)
        local = self.local(cells_to_map(values, x))
        logits = query @ split_heads(self.key(cells), x, self.heads).transpose(2, 3)
        attention = (logits + self.bias(self.table, x.shape[2], x.shape[3])).softmax(-1)
        out = gelu(add_attended(local, attention, split_heads(values, x, self.heads)))
        return cells_to_map(self.output.add_to(map_to_cells(beside), map_to_cells(out)), beside)


class AddBias(nn.Module):
    """What the stream still lacks at the end of a stage."""

    def __init__(self, late: Tensor) -> None:
        super().__init__()
        self.late = frozen(late[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return x + self.late


class FusedNorm(nn.Module):
    """A BatchNorm where there is no convolution to fold it into: a factor and a term for each channel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        channels = norm.num_features
        identity = nn.Conv2d(channels, channels, 1, groups=channels, bias=False).to(norm.weight)
        nn.init.ones_(identity.weight)
        folded = fold_norm(identity, norm)
        self.scale, self.shift = frozen(folded.weight[:, 0]), frozen(bias_of(folded)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return torch.addcmul(self.shift, x, self.scale)


def fused_downsample(downsample: Downsample) -> nn.Module:
    """The deploy form of a ``Downsample``."""
    if downsample.attn is None:
        return channels_last(downsample.conv.fold())
    return FusedAttentionDownsample(downsample.attn, downsample.conv)


def fused_blocks(blocks: nn.Sequential) -> nn.Sequential:
    """The deploy form of a stage's blocks."""
    parts: list[nn.Module] = []
    late = torch.zeros_like(cast("Block", blocks[0]).ls2.gamma, dtype=torch.float64, requires_grad=False)
    for module in blocks:
        block = cast("Block", module)
        if block.token_mixer is not None:
            attention = FusedAttention(block.token_mixer, block.ls1, late)
            late = attention.output.bias.double() + (late if attention.late is None else 0)
            parts.append(attention)
        feed_forward = FusedFeedForward(block.mlp, block.ls2, late)
        late = late + feed_forward.narrow.bias.double()
        parts.append(feed_forward)
    parts.append(AddBias(late.to(feed_forward.narrow.bias.dtype)))
    return nn.Sequential(*parts)
