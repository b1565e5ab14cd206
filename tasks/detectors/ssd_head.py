"""The layers of SSDLite for MobileViT (apple/ml-cvnets): coarser levels, and a head of its own for each level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation


class _BatchNorm(nn.BatchNorm2d):
    """BatchNorm that takes its running statistics where a batch has one value a channel, of which there are none."""

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        if not self.training or x.numel() > x.shape[1]:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class SSDHead(nn.Module):
    """Boxes and classes of one level's anchors: projection, depthwise 3x3 convolution, then one pointwise for each.

    Source: apple/ml-cvnets ``cvnets/modules/ssd_heads.py``. There one pointwise convolution gives boxes and classes
    together; here they are two with the same values, of which a network for other classes can keep the first.

    Args:
        in_channels: Channels of the level.
        channels: Width of the head; a level of another width is projected to it.
        num_anchors: Anchors of a cell.
        num_outputs: Classes, the background counted.
        pointwise: Neither projection nor depthwise convolution, as for the one cell of the last level.
    """

    def __init__(
        self, in_channels: int, channels: int, num_anchors: int, num_outputs: int, *, pointwise: bool = False
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.project: nn.Module = nn.Identity()
        self.mix: nn.Module = nn.Identity()
        if not pointwise:
            if channels != in_channels:
                self.project = _pointwise(in_channels, channels)
                in_channels = channels
            self.mix = _depthwise(in_channels, stride=1)
        self.boxes = nn.Conv2d(in_channels, num_anchors * 4, 1)
        self.classes = nn.Conv2d(in_channels, num_anchors * num_outputs, 1)
        _initialise(self)
        bound = math.sqrt(6 / (in_channels + self.boxes.out_channels + self.classes.out_channels))
        for predictor in (self.boxes, self.classes):  # Xavier of the two as one
            nn.init.uniform_(predictor.weight, -bound, bound)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encoded boxes and class logits.

        Args:
            x: The level's map ``(B, in_channels, H, W)``.

        Returns:
            ``(B, H * W * num_anchors, 4)`` and ``(B, H * W * num_anchors, num_outputs)``.
        """
        x = self.mix(self.project(x))
        return _by_anchor(self.boxes(x), 4), _by_anchor(self.classes(x), self.num_outputs)


def make_coarser(in_channels: int, out_channels: int) -> nn.Module:
    """A level of twice the stride: ``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
    return _initialise(nn.Sequential(_depthwise(in_channels, stride=2), _pointwise(in_channels, out_channels)))


def make_global(in_channels: int, out_channels: int) -> nn.Module:
    """The level of one cell, which has seen all: ``(B, in_channels, H, W)`` to ``(B, out_channels, 1, 1)``."""
    convolution = Conv2dNormActivation(in_channels, out_channels, 1, norm_layer=None, bias=False)
    return _initialise(nn.Sequential(nn.AdaptiveAvgPool2d(1), convolution))


def _depthwise(channels: int, stride: int) -> nn.Module:
    """3x3, without an activation."""
    layer: nn.Module = Conv2dNormActivation(
        channels, channels, 3, stride, groups=channels, norm_layer=_BatchNorm, activation_layer=None
    )
    return layer


def _pointwise(in_channels: int, out_channels: int) -> nn.Module:
    layer: nn.Module = Conv2dNormActivation(in_channels, out_channels, 1, norm_layer=_BatchNorm)
    return layer


@torch.no_grad()
def _initialise(layers: nn.Module) -> nn.Module:
    """Xavier-uniform, biases 0, as ml-cvnets does in its detectors."""
    for module in layers.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return layers


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """``(B, anchors * values, H, W)`` to ``(B, H * W * anchors, values)``."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, values)
