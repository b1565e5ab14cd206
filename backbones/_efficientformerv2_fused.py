"""The deploy form of EfficientFormerV2's blocks: the same function in fewer, larger and better placed operations.

* Maps stay in channels-last memory, where a pointwise convolution is a plain matrix product on the cells.
* BatchNorm and layer scales are in the weights, and so are attention's scale (in the queries), the queries' second path
  (a 1 in the centre of their depthwise kernel) and the first talking head's part in the attention biases:
  ``W (q k + bias) + b = W q k + (W bias + b)``, where the latter is again a table.
* A feed-forward's last product accumulates onto the residual stream. Its bias is not added there: it waits, already
  counted in by the pointwise convolutions that read the stream next, until something else reads the stream.
* Memory, not arithmetic, bounds the middle of a feed-forward, which is four times as wide as the stream. On CPUs a
  batch goes through it in parts of some megabytes, for which the allocator need not ask the system each time.

All of it is plain torch: it compiles, runs on any device, and in any floating type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._efficientformerv2_heads import add_attended, map_to_heads, mix_heads, score
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

_PART_BYTES = 12 * 2**20  # of the widest map; measured best of 1.5 to 12 MB


class FusedStem(nn.Module):
    """``Stem``."""

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        self.conv1, self.conv2 = channels_last(stem.conv1.fold()), channels_last(stem.conv2.fold())

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 4), ceil(W / 4))``."""
        return gelu(self.conv2(gelu(self.conv1(images))))


class Pointwise(nn.Module):
    """A folded pointwise convolution as a product on the cells of a map.

    Args:
        convolution: The convolution.
        late: A constant ``(in_channels,)`` that the input lacks.
        scale: Factor of the output: a number, or one for each channel.
    """

    def __init__(self, convolution: nn.Conv2d, late: Tensor | None = None, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        weight = convolution.weight.detach().flatten(1).double()
        bias = bias_of(convolution).detach().double()
        if late is not None:
            bias = bias + weight @ late.double()
        factor = torch.as_tensor(scale, dtype=torch.float64, device=weight.device).detach()
        kind = convolution.weight.dtype
        self.weight = frozen((weight * factor.view(-1, 1)).to(kind))
        self.bias = frozen((bias * factor).to(kind))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        # On CPUs faster than `addmm`, which copies the bias to every cell first.
        return cells_to_map(torch.mm(map_to_cells(x), self.weight.t()).add_(self.bias), x)

    def add_to(self, onto: Tensor, x: Tensor) -> Tensor:
        """``onto + self(x)`` without the bias, in place where no gradient is recorded."""
        return cells_to_map(accumulate(map_to_cells(onto), map_to_cells(x), self.weight.t()), onto)


class InParts(nn.Module):
    """Works in place on one part of a batch after the other, each small enough for the cache, where that is possible.

    Subclasses define `mix`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same; `x` is overwritten where no gradient is recorded."""
        if (
            is_recording()  # asked first: a graph for any batch must not compare its size
            or x.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not x.is_contiguous(memory_format=torch.channels_last)
        ):
            return self.mix(x)
        count = max(1, _PART_BYTES // (self.widest() * x.shape[2] * x.shape[3] * x.element_size()))
        if x.shape[0] <= count:
            return self.mix(x)
        for part in torch.split(x, count):
            self.mix(part)
        return x

    def widest(self) -> int:
        """Channels of the largest map inside."""
        raise NotImplementedError

    def mix(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same, in place where no gradient is recorded."""
        raise NotImplementedError


class FusedFeedForward(InParts):
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

    def widest(self) -> int:
        """See ``InParts``."""
        return self.depthwise.in_channels

    def mix(self, x: Tensor) -> Tensor:
        """See ``InParts``."""
        return self.narrow.add_to(x, gelu(self.depthwise(gelu(self.widen(x)))))


class FusedAttention(InParts):
    """A residual ``Attention`` and its layer scale, which leaves its last bias to the next reader.

    Args:
        attention: The attention.
        scale: Its layer scale.
        late: Bias ``(C,)`` that the stream lacks on entry.
    """

    def __init__(self, attention: Attention, scale: LayerScale, late: Tensor) -> None:
        super().__init__()
        self.heads = attention.heads
        self.late: AddBias | None = None
        self.stride_conv: nn.Conv2d | None = None
        if attention.stride_conv is not None:  # whose zero padding is of the whole stream
            self.late = AddBias(late.to(scale.gamma.dtype))
            self.stride_conv = channels_last(attention.stride_conv.fold())
            late = torch.zeros_like(late)
        self.query = Pointwise(attention.q.fold(), late=late, scale=attention.key_dim**-0.5)
        self.key = Pointwise(attention.k.fold(), late=late)
        self.value = Pointwise(attention.v.fold(), late=late)
        self.local = channels_last(attention.v_local.fold())
        self.talk = TalkingHeads(attention)
        self.output = Pointwise(attention.proj.fold(), scale=scale.gamma)

    def widest(self) -> int:
        """See ``InParts``."""
        return self.local.in_channels

    def mix(self, x: Tensor) -> Tensor:
        """See ``InParts``."""
        if self.stride_conv is None or self.late is None:
            return self.output.add_to(x, gelu(self._attend(x)))
        x = self.late(x)
        out = F.interpolate(self._attend(self.stride_conv(x)), scale_factor=2, mode="bilinear")
        return self.output.add_to(x, gelu(out[:, :, : x.shape[2], : x.shape[3]]))

    def _attend(self, x: Tensor) -> Tensor:
        """``(B, C, h, w)`` to ``(B, values, h, w)``."""
        values = self.value(x)
        local = self.local(values)
        query, key = map_to_heads(self.query(x), self.heads), map_to_heads(self.key(x), self.heads)
        return add_attended(local, self.talk(query, key, x.shape[2], x.shape[3]), map_to_heads(values, self.heads))


class TalkingHeads(nn.Module):
    """Queries and keys to attention, talking heads included."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        before, after = attention.talking_head1, attention.talking_head2
        self.before, self.after, self.after_bias = frozen(before.weight), frozen(after.weight), frozen(bias_of(after))
        table = attention.table.detach()
        mixed = before.weight.detach().flatten(1).double() @ table.double() + bias_of(before).detach().double()[:, None]
        self.table = frozen(mixed.to(table.dtype))
        self.bias = AttentionBias(stretched=attention.official)

    def forward(self, query: Tensor, key: Tensor, height: int, width: int) -> Tensor:
        """``(B, heads, N, D)`` twice to ``(B, heads, N, N)``, N being ``height * width``."""
        bias = self.bias(self.table, height, width)
        attention = mix_heads(query @ key.transpose(2, 3), self.before, bias).softmax(-1)
        return mix_heads(attention, self.after, self.after_bias)


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
        beside, values = self.beside(x), self.value(x)
        query, key = map_to_heads(self.query(self.local_query(x)), self.heads), map_to_heads(self.key(x), self.heads)
        logits = score(query, key, self.bias(self.table, x.shape[2], x.shape[3]))
        out = add_attended(self.local(values), logits.softmax(-1), map_to_heads(values, self.heads))
        return self.output.add_to(beside, gelu(out))


class AddBias(nn.Module):
    """What a stream still lacks, added in place where no gradient is recorded."""

    def __init__(self, late: Tensor) -> None:
        super().__init__()
        self.late = frozen(late[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        return x + self.late if torch.is_grad_enabled() else x.add_(self.late)


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
