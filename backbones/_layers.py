"""Small layers that several families share, under the names that timm's checkpoints give them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._windows import is_recording
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@torch.no_grad()
def _scale_and_shift(bn: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as ``x * scale + shift``, in double precision: the whole network inherits its error."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.double() - bn.running_mean.double() * scale


@torch.no_grad()
def fold_norm(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution with bias that equals `conv` followed by `bn` in eval mode."""
    scale, shift = _scale_and_shift(bn)
    folded = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        (conv.kernel_size[0], conv.kernel_size[1]),
        (conv.stride[0], conv.stride[1]),
        (int(conv.padding[0]), int(conv.padding[1])),
        (conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    folded.weight.copy_(conv.weight.double() * scale[:, None, None, None])
    assert folded.bias is not None
    folded.bias.copy_(shift if conv.bias is None else shift + conv.bias.double() * scale)
    return folded


def convolve_pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of stride 1, by the fastest of its equal forms.

    Args:
        conv: Kernel 1, stride 1, one group.
        x: ``(B, in_channels, H, W)``.

    Returns:
        ``(B, out_channels, H, W)`` in the memory format of `x`.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        # On CPUs up to twice as fast as the convolution, and never slower.
        return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)
    if x.shape[0] == 1 or x.device.type != "cpu" or torch.is_grad_enabled() or is_recording():
        out: Tensor = conv(x)
        return out
    # One matrix product for each image: on CPUs up to six times as fast. Its gradient would be of each image's own copy
    # of the weight, hence only without gradients.
    weight = conv.weight.flatten(1).expand(x.shape[0], -1, -1)
    cells = x.flatten(2)
    out = torch.bmm(weight, cells) if conv.bias is None else torch.baddbmm(conv.bias[:, None], weight, cells)
    return out.view(x.shape[0], -1, *x.shape[2:])


class ConvNorm(nn.Module):
    """Convolution, then BatchNorm; "same" padding.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Odd side of the kernel.
        stride: Stride.
        groups: Groups.
        scale: Start of BatchNorm's weight; 0 makes a residual branch start as nothing.
        bias: Whether the convolution has a bias, which BatchNorm makes needless and some published networks have.
        dilation: Distance of the kernel's cells.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        scale: float = 1.0,
        bias: bool = False,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups=groups, bias=bias)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.constant_(self.bn.weight, scale)
        self.pointwise = (kernel, stride, groups) == (1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        out: Tensor = self.bn(convolve_pointwise(self.conv, x) if self.pointwise else self.conv(x))
        return out

    def fold(self) -> nn.Conv2d:
        """One convolution with bias that equals this one in eval mode."""
        return fold_norm(self.conv, self.bn)


class Residual(nn.Module):
    """``x + m(x)``."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that `m` keeps."""
        # Every branch ends in a BatchNorm, whose output nothing else holds and whose backward does not read it.
        out: Tensor = self.m(x)
        return out.add_(x)


def gelu(x: Tensor) -> Tensor:
    """Exact GELU; in place where no gradient is recorded, so `x` must be the caller's own."""
    if torch.is_grad_enabled():
        return F.gelu(x)
    out: Tensor = torch.ops.aten.gelu_(x)  # which torch.nn.functional has no name for
    return out


class LayerScale(nn.Module):
    """A residual sum whose branch has a learned factor for each channel (arXiv:2103.17239), 1e-5 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-5))

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """``x + gamma * branch`` of maps ``(B, C, H, W)`` or tokens ``(B, N, C)``."""
        return torch.addcmul(x, branch, self.gamma[:, None, None] if x.ndim == 4 else self.gamma)


def check_rate(name: str, rate: object) -> None:
    """Refuses what is not the rate of a dropout.

    Args:
        name: The option.
        rate: Its value.

    Raises:
        ConfigError: `rate` is no number in ``[0, 1)``.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ConfigError(f"{name} must be a number of at least 0 and below 1, got {rate!r}")


def drop_paths(rate: float, blocks: int) -> list[float]:
    """The rate of each block's `DropPath`, from 0 linearly to `rate` for the last.

    Raises:
        ConfigError: `rate` is no number in ``[0, 1)``.
    """
    check_rate("drop_path_rate", rate)
    return [rate * block / max(blocks - 1, 1) for block in range(blocks)]


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, zeroes whole samples and scales the others up to keep the mean.

    Args:
        rate: Share of the samples.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """``(B, ...)`` to the same."""
        if not self.training or not self.rate:
            return branch
        keep = 1 - self.rate
        kept = branch.new_empty((branch.shape[0],) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return branch * kept.div_(keep)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias, all cells to all cells.

    Args:
        query: ``(B, heads, N, D)``, already scaled.
        key: The same shape.
        value: ``(B, heads, N, V)``.
        bias: ``(heads, N, N)``.

    Returns:
        ``(B, N, heads * V)``.
    """
    if query.is_cpu and not is_recording():
        # torch's fused attention on CPUs wants values as long as keys, and for others makes three passes over all
        # scores at once. Head by head, the scores stay in the cache: twice as fast from a few hundred cells on.
        outputs = []
        for head in range(query.shape[1]):
            scores = torch.baddbmm(bias[head], query[:, head], key[:, head].transpose(1, 2))
            outputs.append(torch.bmm(scores.softmax(-1), value[:, head]))
        return torch.cat(outputs, -1)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=1.0)
    return mixed.transpose(1, 2).flatten(2)


def split_heads(projected: Tensor, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value for `attend`, where those of one head lie together.

    Args:
        projected: ``(B, N, heads * sum(sizes))``.
        sizes: Length of a query, a key and a value.

    Returns:
        ``(B, heads, N, size)`` of each.
    """
    batch, count, _ = projected.shape
    heads = projected.view(batch, count, -1, sum(sizes)).transpose(1, 2)
    query, key, value = torch.split(heads, list(sizes), -1)
    return query, key, value


class SqueezeExcite(nn.Module):
    """Channel gate (arXiv:1709.01507), reduction 4."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 4, 1)
        self.fc2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        gate: Tensor = self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu_())
        return x * gate.sigmoid()


class NormLinear(nn.Module):
    """BatchNorm and linear: the published classifier.

    Args:
        num_features: Length of the vectors.
        num_classes: Number of logits.
    """

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.bn: nn.Module = nn.BatchNorm1d(num_features)
        self.linear = make_head(num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """``(B, num_features)`` to ``(B, num_classes)``."""
        logits: Tensor = self.linear(self.bn(features))
        return logits

    @torch.no_grad()
    def fuse(self) -> None:
        """Folds the BatchNorm into the linear, in place."""
        bn, linear = self.bn, self.linear
        if not isinstance(bn, nn.BatchNorm1d):
            return
        scale, shift = _scale_and_shift(bn)
        weight = linear.weight.double()
        linear.bias.copy_(linear.bias + weight @ shift)
        linear.weight.copy_(weight * scale)
        self.bn = nn.Identity()
        self.requires_grad_(requires_grad=False)


def make_head(num_features: int, num_classes: int) -> nn.Linear:
    """A linear classifier, untrained: weights truncated normal of 0.02, biases zero."""
    head = nn.Linear(num_features, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


class Stage(nn.Module):
    """Blocks at one width, after a downsampling in all stages but the first."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)


def layers_of(stem: str, stages: Iterable[nn.Module]) -> list[str]:
    """What the names of each layer's parameters start with, in the order of the layers, for `depth_of`.

    Args:
        stem: What those of layer 0 start with.
        stages: The modules of ``stages``. Each has a ``downsample``, which counts in all but the first, and ``blocks``,
            which count unless they are an ``nn.Identity``.
    """
    layers = [stem]
    for position, stage in enumerate(stages):
        if position:
            layers.append(f"stages.{position}.downsample.")
        for name, block in stage.get_submodule("blocks").named_children():
            if not isinstance(block, nn.Identity):
                layers.append(f"stages.{position}.blocks.{name}.")
    return layers


def depth_of(parameter_name: str, layers: Sequence[str], embed_only: tuple[str, ...] = ()) -> int:
    """The layer that a parameter is of, the last for those of `embed_only`; ``len(layers)`` for one that is of none."""
    if parameter_name.startswith(embed_only):
        return len(layers) - 1
    return next((depth for depth, layer in enumerate(layers) if parameter_name.startswith(layer)), len(layers))
