"""Layers that the heads share; they have the names of mmcv's ``ConvModule``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from effvit.errors import ConfigError


class ConvNormReLU(nn.Module):
    """Convolution without bias, BatchNorm, ReLU; "same" padding. Weights start Kaiming-normal by fan-out.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: Odd side of the kernel.
        dilation: Distance of the kernel's cells.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def enlarge(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C, *size)``, bilinearly, corners not aligned; the map itself where it has that size."""
    if (x.shape[-2], x.shape[-1]) == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def check_channels(name: str, value: int) -> None:
    """Raises `ConfigError` where `value` is below 1."""
    if value < 1:
        raise ConfigError(f"{name} must be at least 1, not {value}")


def check_dropout(value: float) -> None:
    """Raises `ConfigError` where `value` is not in ``[0, 1)``."""
    if not 0 <= value < 1:
        raise ConfigError(f"dropout must be at least 0 and below 1, not {value}")
