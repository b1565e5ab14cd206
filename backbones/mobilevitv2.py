"""MobileViTv2 of width 0.5 … 2.0 (Apple).

Paper: "Separable Self-attention for Mobile Vision Transformers", TMLR 2023, arXiv:2206.02680.
Official code: github.com/apple/ml-cvnets.

Parameters carry timm's names (``mobilevitv2_*``), and the logits are timm's and Apple's at every size. What differs:

* A map with an odd side grows by one in an attention block and stays so, as in both. Where that gives a map another
  size than ``ceil(image / stride)``, what is returned is resized to that; what the next stage and the classifier read
  is not.
* No dropout inside, as in timm and in the published recipe.

Colours: Apple introduced these weights with version 0.2 of CVNets, and trained them with its data set ``imagenet``
(``config/classification/imagenet/mobilevit_v2.yaml`` at commit 5f5dbc7), which reads RGB with Pillow there; the loader
of the first version, which kept BGR, had become ``imagenet_opencv``. So a file with Apple's names is taken to read RGB.
This is read off their code, no file could be compared, and Hugging Face's page on the model says BGR: set
``channel_order="bgr"`` if a file proves to be so. ``pretrained=True`` takes timm's copy, whose accuracy timm measured
in RGB.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._cvnets import LICENCE, ORIGIN, PAGE, ChannelOrder, CVNet, CVNetVariant, eval_spec, initialise
from effvit.backbones._cvnets_patches import cut_patches, even, merge_patches, resize
from effvit.backbones._layers import ConvNorm
from effvit.backbones._mobilevitv2_fused import FusedMobileViTv2Block
from effvit.backbones._registry import register


def pointwise(convolution: nn.Conv2d, cells: Tensor) -> Tensor:
    """A 1x1 convolution over ``(..., C)``."""
    return F.linear(cells, convolution.weight.flatten(1), convolution.bias)


class SeparableAttention(nn.Module):
    """Attention of linear cost: one score for each cell, and one context for all cells (paper §3.2).

    Args:
        dim: Channels in and out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Conv2d(dim, 1 + 2 * dim, 1)
        self.out_proj = nn.Conv2d(dim, dim, 1)

    def forward(self, cells: Tensor) -> Tensor:
        """Attends among the cells of one patch position.

        Args:
            cells: ``(B, 4, N, dim)``.

        Returns:
            The same shape.
        """
        dim = cells.shape[3]
        query, key, value = torch.split(pointwise(self.qkv_proj, cells), [1, dim, dim], 3)
        context = (key * query.softmax(2)).sum(2, keepdim=True)
        return pointwise(self.out_proj, value.relu() * context)


class FeedForward(nn.Module):
    """Two pointwise convolutions, twice as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, dim * 2, 1)
        self.fc2 = nn.Conv2d(dim * 2, dim, 1)

    def forward(self, cells: Tensor) -> Tensor:
        """``(..., dim)`` to the same."""
        return pointwise(self.fc2, F.silu(pointwise(self.fc1, cells), inplace=True))


class WholeNorm(nn.GroupNorm):
    """Normalises all cells and channels of an image together, scales and shifts each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, h, w, dim)`` to the same."""
        return super().forward(cells.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TransformerLayer(nn.Module):
    """Separable attention and feed-forward, each normalised first and residual."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = WholeNorm(dim)
        self.attn = SeparableAttention(dim)
        self.norm2 = WholeNorm(dim)
        self.mlp = FeedForward(dim)

    def forward(self, cells: Tensor) -> Tensor:
        """``(B, 4, N, dim)`` to the same."""
        cells = cells + self.attn(self.norm1(cells))
        out: Tensor = cells + self.mlp(self.norm2(cells))
        return out


class MobileViTv2Block(nn.Module):
    """Local mixing, then separable attention among the cells at equal positions of 2x2 patches; no residual.

    Args:
        channels: Channels in and out.
        dim: Width of the transformer.
        depth: Its layers.
        dilation: Of the depthwise convolution.
    """

    def __init__(self, channels: int, dim: int, depth: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv_kxk = ConvNorm(channels, channels, 3, groups=channels, dilation=dilation)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerLayer(dim) for _ in range(depth)))
        self.norm = WholeNorm(dim)
        self.conv_proj = ConvNorm(dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, H', W')``: each side, rounded up to even."""
        height, width = even(x.shape[2]), even(x.shape[3])
        x = resize(x, height, width, align_corners=True)
        grid = pointwise(self.conv_1x1, F.silu(self.conv_kxk(x), inplace=True).permute(0, 2, 3, 1))
        cells = self.norm(self.transformer(cut_patches(grid)))
        out: Tensor = self.conv_proj(merge_patches(cells, height, width).permute(0, 3, 1, 2))
        return out

    def fused(self) -> FusedMobileViTv2Block:
        """The deploy form."""
        return FusedMobileViTv2Block(self)


class MobileViTv2(CVNet):
    """The network; see ``CVNet`` for maps and arguments."""

    input_spec = eval_spec("bicubic")
    published_order: ClassVar[ChannelOrder] = "rgb"

    def __init__(self, variant: CVNetVariant, *, channel_order: ChannelOrder = "auto", output_stride: int = 32) -> None:
        super().__init__(variant, channel_order=channel_order, output_stride=output_stride)
        self.num_features = variant.channels[-1]
        initialise(self)

    def make_attention(self, channels: int, dim: int, depth: int, dilation: int) -> nn.Module:
        """See ``CVNet.make_attention``."""
        return MobileViTv2Block(channels, dim, depth, dilation)

    def embed(self, images: Tensor) -> Tensor:
        """The mean over the last stage's output, ``(B, num_features)``."""
        return self.stage_outputs(images)[-1].mean((2, 3))


def _row(width: float, params: int, macs: int, top1: float) -> CVNetVariant:
    unit = int(32 * width)
    name = f"mobilevitv2_{int(width * 100):03d}"
    return CVNetVariant(
        name=name,
        family="MobileViTv2",
        params=params,
        macs=macs,
        top1=top1,
        top5=None,
        paper="2206.02680",
        source="github.com/apple/ml-cvnets, README-model-zoo.md (accuracy); parameters and MACs counted",
        licence=LICENCE,
        origin=ORIGIN,
        url=f"https://huggingface.co/timm/{name}.cvnets_in1k/resolve/main/model.safetensors",
        page=PAGE,
        stem=unit,
        channels=(unit * 2, unit * 4, unit * 8, unit * 12, unit * 16),
        dims=(unit * 4, unit * 6, unit * 8),
        residuals=(1, 2, 1, 1, 1),
        expansion=2,
    )


# width, parameters, MACs, top-1
VARIANTS = (
    _row(0.5, 1_370_593, 464_594_944, 70.18),
    _row(0.75, 2_866_009, 1_027_980_288, 75.56),
    _row(1.0, 4_901_841, 1_812_090_880, 78.09),
    _row(1.25, 7_478_089, 2_816_926_720, 79.65),
    _row(1.5, 10_594_753, 4_042_487_808, 80.38),
    _row(1.75, 14_251_833, 5_488_774_144, 80.84),
    _row(2.0, 18_449_329, 7_155_785_728, 81.17),
)

register(MobileViTv2, VARIANTS)
