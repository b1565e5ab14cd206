"""MobileViT-XXS, XS and S (Apple).

Paper: "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision Transformer", ICLR 2022, arXiv:2110.02178.
Official code: github.com/apple/ml-cvnets.

Parameters carry timm's names (``mobilevit_*``), and the outputs are timm's and Apple's at every size. What differs:

* The dense map at stride 32 (``"c5"``) is the one that Apple's detectors and segmenters read, before the expansion
  convolution of the classifier (``final_conv``); timm's features are taken behind it.
* The two pointwise convolutions around the transformer work on its tokens, so that cells are sorted while there are
  fewer channels; a resize of an odd map commutes with them.
* No dropout unless asked for, as in timm. Apple trains with ``dropout`` of 0.05 (XXS) or 0.1 in the transformer and
  ``classifier_dropout`` of 0.1 (``config/classification/mobilevit_*.yaml`` of version 0.1).

Colours: the weights were trained by version 0.1 of CVNets, whose loader reads images with OpenCV and keeps BGR, scaled
to [0, 1] and not normalised (``data/datasets/dataset_base.py`` at commit d38a116). So the first convolution of a file
with Apple's names is turned to RGB at load; timm's files, which ``pretrained=True`` takes since timm measured their
accuracy in RGB and the hub publishes their hashes, read RGB already. The option ``channel_order`` says otherwise where
a file of either kind does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._cvnets import LICENCE, ORIGIN, PAGE, ChannelOrder, CVNet, CVNetVariant, eval_spec, initialise
from effvit.backbones._cvnets_fused import FusedPointwise
from effvit.backbones._cvnets_patches import cut_patches, even, merge_patches, resize
from effvit.backbones._layers import ConvNorm, check_rate
from effvit.backbones._mobilevit_fused import FusedMobileViTBlock
from effvit.backbones._registry import register

HEADS = 4


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of one sequence.

    Args:
        dim: Channels in and out.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(sequences, N, dim)`` to the same."""
        sequences, count, dim = tokens.shape
        qkv = self.qkv(tokens).view(sequences, count, 3, HEADS, dim // HEADS)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(sequences, count, dim))
        return out


class FeedForward(nn.Module):
    """Two linears, twice as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim * 2)
        self.fc2 = nn.Linear(dim * 2, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(..., dim)`` to the same."""
        out: Tensor = self.fc2(F.silu(self.fc1(tokens), inplace=True))
        return out


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each normalised first, residual, and with dropout at its end, which starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = FeedForward(dim)
        self.dropout = nn.Dropout(0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(sequences, N, dim)`` to the same."""
        tokens = tokens + self.dropout(self.attn(self.norm1(tokens)))
        out: Tensor = tokens + self.dropout(self.mlp(self.norm2(tokens)))
        return out


class MobileViTBlock(nn.Module):
    """Local mixing, then attention among the cells at equal positions of 2x2 patches, fused with the input (§3.1).

    A map with an odd side is resized up to whole patches before the attention and back after it.

    Args:
        channels: Channels in and out.
        dim: Width of the transformer.
        depth: Its layers.
    """

    def __init__(self, channels: int, dim: int, depth: int) -> None:
        super().__init__()
        self.conv_kxk = ConvNorm(channels, channels, 3)
        self.conv_1x1 = nn.Conv2d(channels, dim, 1, bias=False)
        self.transformer = nn.Sequential(*(TransformerLayer(dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.conv_proj = ConvNorm(dim, channels)
        self.conv_fusion = ConvNorm(channels * 2, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        height, width = x.shape[2:]
        full = (even(height), even(width))
        local = resize(F.silu(self.conv_kxk(x), inplace=True), *full, align_corners=False)
        tokens = F.linear(cut_patches(local.permute(0, 2, 3, 1)).flatten(0, 1), self.conv_1x1.weight.flatten(1))
        tokens = F.linear(self.norm(self.transformer(tokens)), self.conv_proj.conv.weight.flatten(1))
        attended = resize(merge_patches(tokens, *full).permute(0, 3, 1, 2), height, width, align_corners=False)
        attended = F.silu(self.conv_proj.bn(attended), inplace=True)
        return F.silu(self.conv_fusion(torch.cat((x, attended), 1)), inplace=True)

    def fused(self) -> FusedMobileViTBlock:
        """The deploy form."""
        return FusedMobileViTBlock(self, HEADS)


@dataclass(frozen=True, kw_only=True)
class MobileViTVariant(CVNetVariant):
    """A row of the paper's Table 4.

    Attributes:
        num_features: Width of the expansion before the classifier.
    """

    num_features: int


class MobileViT(CVNet):
    """The network; see ``CVNet`` for maps.

    Args:
        variant: Its row of the table.
        channel_order: See ``CVNet``.
        output_stride: See ``CVNet``.
        dropout: Share of the values that are zero in training at the end of each attention and each feed-forward.
        classifier_dropout: The same of what the classifier reads.

    Raises:
        ConfigError: `channel_order` or `output_stride` is unknown, or a dropout not in ``[0, 1)``.
    """

    input_spec = eval_spec("bilinear")
    embed_only = ("final_conv.",)
    published_order: ClassVar[ChannelOrder] = "bgr"

    def __init__(
        self,
        variant: MobileViTVariant,
        *,
        channel_order: ChannelOrder = "auto",
        output_stride: int = 32,
        dropout: float = 0.0,
        classifier_dropout: float = 0.0,
    ) -> None:
        super().__init__(variant, channel_order=channel_order, output_stride=output_stride)
        check_rate("dropout", dropout)
        check_rate("classifier_dropout", classifier_dropout)
        for module in self.modules():
            if isinstance(module, TransformerLayer):
                module.dropout.p = dropout
        self.classifier_dropout = classifier_dropout
        self.num_features = variant.num_features
        self.final_conv: nn.Module = ConvNorm(variant.channels[-1], variant.num_features)
        initialise(self)

    def make_attention(self, channels: int, dim: int, depth: int, dilation: int) -> nn.Module:
        """See ``CVNet.make_attention``; as Apple's, it is not dilated."""
        del dilation
        return MobileViTBlock(channels, dim, depth)

    def embed(self, images: Tensor) -> Tensor:
        """The mean over the expanded ``"c5"``, ``(B, num_features)``, after the classifier's dropout in training."""
        last = self.stage_outputs(images)[-1]
        mean = F.silu(self.final_conv(last), inplace=True).mean((2, 3))
        return F.dropout(mean, self.classifier_dropout, self.training)

    def fuse(self) -> MobileViT:
        """See ``Backbone.fuse``."""
        super().fuse()
        if isinstance(self.final_conv, ConvNorm):
            self.final_conv = FusedPointwise(self.final_conv.fold())
        return self


def _row(
    name: str,
    channels: tuple[int, int, int, int, int],
    dims: tuple[int, int, int],
    widths: tuple[int, int],
    published: tuple[int, int, float],
) -> MobileViTVariant:
    expansion, num_features = widths
    params, macs, top1 = published
    return MobileViTVariant(
        name=f"mobilevit_{name}",
        family="MobileViT",
        params=params,
        macs=macs,
        top1=top1,
        top5=None,
        paper="2110.02178",
        source="github.com/apple/ml-cvnets, README-model-zoo.md (accuracy); parameters and MACs counted",
        licence=LICENCE,
        origin=ORIGIN,
        url=f"https://huggingface.co/timm/mobilevit_{name}.cvnets_in1k/resolve/main/model.safetensors",
        page=PAGE,
        stem=16,
        channels=channels,
        dims=dims,
        residuals=(1, 3, 1, 1, 1),
        expansion=expansion,
        num_features=num_features,
    )


# name, channels, attention widths, (expansion of residuals, width of the last one), (parameters, MACs, top-1)
VARIANTS = (
    _row("xxs", (16, 24, 48, 64, 80), (64, 80, 96), (2, 320), (1_272_024, 407_364_096, 69.0)),
    _row("xs", (32, 48, 64, 80, 96), (96, 120, 144), (4, 384), (2_317_848, 1_025_911_808, 74.7)),
    _row("s", (32, 64, 96, 128, 160), (144, 192, 240), (4, 640), (5_578_632, 2_000_831_488, 78.3)),
)

register(MobileViT, VARIANTS)
