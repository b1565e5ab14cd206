"""What MobileViT and MobileViTv2 share: Apple's CVNets trunk, its checkpoint names, and its 2x2 patches.

Both are MobileNetV2's inverted residuals (arXiv:1801.04381) with an attention block at the end of stages 3, 4 and 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._contract import Backbone, FeatureMap, InputSpec, VariantInfo
from effvit.backbones._cvnets_fused import FusedConv, FusedInvertedResidual
from effvit.backbones._cvnets_patches import resize
from effvit.backbones._layers import ConvNorm, depth_of, make_head
from effvit.backbones._windows import divide_up
from effvit.errors import ConfigError

ChannelOrder = Literal["auto", "rgb", "bgr"]

LICENCE = "Apple sample code licence (not OSI)"
ORIGIN = "timm's copy on the Hugging Face hub; Apple's on its own server"
PAGE = "https://github.com/apple/ml-cvnets/blob/main/docs/source/en/general/README-model-zoo.md"

_STEM_NAMES = ("stem.conv.weight", "conv_1.block.conv.weight")


class InvertedResidual(nn.Module):
    """Widens, mixes space in a depthwise convolution, narrows; residual where the shape stays.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        stride: 1 or 2.
        expansion: Width between them over `in_channels`.
        dilation: Of the depthwise convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, dilation: int = 1) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv1_1x1 = ConvNorm(in_channels, hidden)
        self.conv2_kxk = ConvNorm(hidden, hidden, 3, stride, groups=hidden, dilation=dilation)
        self.conv3_1x1 = ConvNorm(hidden, out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / stride), ceil(W / stride))``."""
        hidden = F.silu(self.conv1_1x1(x), inplace=True)
        hidden = F.silu(self.conv2_kxk(hidden), inplace=True)
        out: Tensor = self.conv3_1x1(hidden)
        return out.add_(x) if self.residual else out  # BatchNorm's backward does not read its output

    def fused(self) -> FusedInvertedResidual:
        """The deploy form."""
        return FusedInvertedResidual(
            self.conv1_1x1.fold(), self.conv2_kxk.fold(), self.conv3_1x1.fold(), residual=self.residual
        )


@dataclass(frozen=True, kw_only=True)
class CVNetVariant(VariantInfo):
    """What both families' tables have in common.

    Attributes:
        stem: Width of the first convolution.
        channels: Width of each stage.
        dims: Width of the attention in stages 3, 4 and 5.
        depths: Transformer layers there.
        residuals: Inverted residuals of each stage.
        expansion: Of the inverted residuals.
    """

    stem: int
    channels: tuple[int, int, int, int, int]
    dims: tuple[int, int, int]
    depths: tuple[int, int, int] = (2, 4, 3)
    residuals: tuple[int, int, int, int, int]
    expansion: int


class CVNet(Backbone):
    """The trunk of both families.

    Maps ``"c1"`` to ``"c5"`` are the outputs of the five stages, strides 2 to 32, or up to `output_stride`. A stage
    that would go beyond that keeps the size of its input, and the convolutions after it are dilated in its place, where
    Apple's are (``_make_mit_layer`` in apple/ml-cvnets): the depthwise one of the next stage's first block, and in
    MobileViTv2 that of the attention blocks. So at 16 nothing in MobileViT is dilated.

    Args:
        variant: A row of the family's table.
        channel_order: Order of the colours that a checkpoint's first convolution reads; it is turned to RGB at load.
            ``"auto"`` goes by the names in the file: Apple's are read in the order of `published_order`, timm's and
            ours in RGB.
        output_stride: Of the coarsest map: 8 or 16 for DeepLabv3, or 32.

    Attributes:
        published_order: Order that Apple's files of the family read.

    Raises:
        ConfigError: `channel_order` or `output_stride` is another one.
    """

    published_order: ClassVar[ChannelOrder]
    open_sides = range(64, 4097, 32)

    def __init__(self, variant: CVNetVariant, *, channel_order: ChannelOrder = "auto", output_stride: int = 32) -> None:
        super().__init__()
        if channel_order not in ("auto", "rgb", "bgr"):
            raise ConfigError(f"channel_order must be 'auto', 'rgb' or 'bgr', got {channel_order!r}")
        if output_stride not in (8, 16, 32):
            raise ConfigError(f"output_stride must be 8, 16 or 32, got {output_stride!r}")
        self.info = variant
        self.channel_order = channel_order
        self.stem: nn.Module = ConvNorm(3, variant.stem, 3, 2)
        stages = []
        before, dilation = variant.stem, 1
        for position, channels in enumerate(variant.channels):
            halves = bool(position) and 2 ** (position + 1) <= output_stride
            after = dilation if halves or not position else dilation * 2
            blocks: list[nn.Module] = []
            for number in range(variant.residuals[position]):
                stride = 2 if halves and not number else 1
                blocks.append(InvertedResidual(before, channels, stride, variant.expansion, dilation))
                before = channels
            if position >= 2:
                dim, depth = variant.dims[position - 2], variant.depths[position - 2]
                blocks.append(self.make_attention(channels, dim, depth, after))
            dilation = after
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.feature_maps = tuple(
            FeatureMap(f"c{level}", channels, min(2**level, output_stride))
            for level, channels in enumerate(variant.channels, start=1)
        )
        blocks_in = [
            f"stages.{position}.{number}." for position, stage in enumerate(stages) for number in range(len(stage))
        ]
        self.layers = ["stem.", *blocks_in]
        self.num_layers = len(self.layers)

    def make_attention(self, channels: int, dim: int, depth: int, dilation: int) -> nn.Module:
        """The family's attention block, with a method ``fused()`` that makes its deploy form.

        Args:
            channels: Channels in and out.
            dim: Width of the attention.
            depth: Its transformer layers.
            dilation: What a family that dilates its block dilates it by.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps ``"c1"`` to ``"c5"`` of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``."""
        height, width = images.shape[2:]
        return {
            spec.level: resize(x, divide_up(height, spec.stride), divide_up(width, spec.stride), align_corners=True)
            for spec, x in zip(self.feature_maps, self.stage_outputs(images), strict=True)
        }

    def stage_outputs(self, images: Tensor) -> list[Tensor]:
        """What each stage hands on, of normalised images ``(B, 3, H, W)``."""
        x = self.stem(images)
        if isinstance(self.stem, ConvNorm):
            x = F.silu(x, inplace=True)
        outputs = []
        for stage in self.stages:
            for block in stage.children():
                x = self.run(block, x)
            outputs.append(x)
        return outputs

    def make_classifier(self, num_classes: int) -> nn.Linear:
        """Linear."""
        return make_head(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        """None, as in the official recipes."""
        return set()

    def layer_of(self, parameter_name: str) -> int:
        """Stem 0, then each inverted residual and each attention block, its transformer layers together, one more."""
        return depth_of(parameter_name, self.layers, self.embed_only)

    def fuse(self) -> CVNet:
        """See ``Backbone.fuse``."""
        if isinstance(self.stem, ConvNorm):
            self.stem = FusedConv(self.stem.fold())
            for module in self.stages:
                stage = cast("nn.Sequential", module)
                for position, block in enumerate(stage):
                    stage[position] = cast("InvertedResidual", block).fused()
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """Apple's names to ours, which are timm's; timm's ``head.fc`` to ``head``."""
        key = re.sub(r"^layer_([1-5])\.", lambda found: f"stages.{int(found[1]) - 1}.", key)
        for pattern, replacement in _RENAMING:
            key = re.sub(pattern, replacement, key)
        return key

    def convert_value(self, key: str, value: Tensor) -> Tensor:
        """The first convolution's weight turned to RGB; see the class."""
        if key not in _STEM_NAMES or value.ndim != 4:
            return value
        order = self.channel_order
        if order == "auto":
            order = self.published_order if key == _STEM_NAMES[1] else "rgb"
        return value.flip(1) if order == "bgr" else value


def initialise(network: nn.Module) -> None:
    """As Apple's recipes: normal by fan-out in convolutions, truncated normal of 0.02 in linears, no bias."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


def eval_spec(interpolation: str) -> InputSpec:
    """Both families: shorter side 288, centre 256, values in [0, 1] as they are."""
    return InputSpec((256, 256), 256 / 288, interpolation, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


# In this order. `block.` before a layer's name is CVNets' wrapper around convolution, norm and activation.
_RENAMING = (
    (r"^conv_1\.", "stem."),
    (r"^conv_1x1_exp\.", "final_conv."),
    (r"^(?:classifier\.(?:fc|1)|head\.fc)\.", "head."),
    (r"\.block\.exp_1x1\.", ".conv1_1x1."),
    (r"\.block\.conv_3x3\.", ".conv2_kxk."),
    (r"\.block\.red_1x1\.", ".conv3_1x1."),
    (r"\.local_rep\.(?:conv_3x3|0)\.", ".conv_kxk."),
    (r"\.local_rep\.(?:conv_1x1|1)\.block\.conv\.", ".conv_1x1."),
    (r"\.fusion\.", ".conv_fusion."),
    (r"\.global_rep\.\d+\.(weight|bias)$", r".norm.\1"),
    (r"\.global_rep\.", ".transformer."),
    (r"\.pre_norm_(?:mha|attn)\.0\.", ".norm1."),
    (r"\.pre_norm_mha\.1\.qkv_proj\.", ".attn.qkv."),
    (r"\.pre_norm_mha\.1\.out_proj\.", ".attn.proj."),
    (r"\.pre_norm_attn\.1\.(qkv_proj|out_proj)\.block\.conv\.", r".attn.\1."),
    (r"\.pre_norm_ffn\.0\.", ".norm2."),
    (r"\.pre_norm_ffn\.1\.(?:block\.conv\.)?", ".mlp.fc1."),
    (r"\.pre_norm_ffn\.(?:4|3\.block\.conv)\.", ".mlp.fc2."),
    (r"\.block\.conv\.", ".conv."),
    (r"\.block\.norm\.", ".bn."),
)
