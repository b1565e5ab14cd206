"""EfficientViT-M0 … M5 (Microsoft).

Paper: "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention", CVPR 2023, arXiv:2305.07027.
Official code: github.com/microsoft/Cream, folder EfficientViT. (MIT-HAN-Lab's EfficientViT is another network.)

Parameters carry timm's names (``efficientvit_m*``), and at 224x224 the outputs are timm's and Microsoft's. What
differs:

* One network for every image size. Microsoft keeps two files: the classifier, which only takes the size it was built
  for, and the detection backbone, whose windows are 7x7 in every stage and which fails on maps smaller than that. Here
  a map of at most 7x7 is one window of its own size; a larger one is padded with zeros at the bottom and right,
  unmasked as in both files, and cut into 7x7 windows. A bias table made for another window is resized (bicubic, as
  Microsoft's loaders do). timm instead pads a small map to the window that the network was built for.
* ``dense=True`` (and ``prepare_for_dense``) makes all tables 7x7, as in Microsoft's detection file.
* Expanded biases are kept per shape, device and type, and only used where no gradient is wanted, so that moving,
  training or loading the network can never leave a stale one behind.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from effvit.backbones._contract import Backbone, FeatureMap, VariantInfo
from effvit.backbones._efficientvit_fused import FusedBlock, FusedDownsample, FusedStem
from effvit.backbones._layers import ConvNorm, NormLinear, Residual, SqueezeExcite, Stage, depth_of, layers_of
from effvit.backbones._registry import register
from effvit.backbones._windows import AttentionBias, cut, fit_bias_table, merge, resize_bias_table

WINDOW = 7
KEY_DIM = 16


class FeedForward(nn.Module):
    """Two pointwise convolutions, twice as wide between them."""

    def __init__(self, channels: int, scale: float = 0.0) -> None:
        super().__init__()
        self.pw1 = ConvNorm(channels, channels * 2)
        self.pw2 = ConvNorm(channels * 2, channels, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        out: Tensor = self.pw2(self.pw1(x).relu_())
        return out


class CascadedGroupAttention(nn.Module):
    """Attention inside one window; each head reads its share of the channels plus the head before it (paper §3.2).

    Args:
        channels: Channels in and out.
        heads: Number of heads.
        kernels: Kernel of the depthwise convolution on each head's query.
        table_size: Side of the bias table, which holds one value for each head and absolute offset (|dy|, |dx|).
    """

    def __init__(self, channels: int, heads: int, kernels: tuple[int, ...], table_size: int) -> None:
        super().__init__()
        self.scale = KEY_DIM**-0.5
        width = channels // heads
        self.split = (KEY_DIM, KEY_DIM, width)
        self.qkvs = nn.ModuleList(ConvNorm(width, KEY_DIM * 2 + width) for _ in range(heads))
        self.dws = nn.ModuleList(ConvNorm(KEY_DIM, KEY_DIM, kernel, groups=KEY_DIM) for kernel in kernels[:heads])
        # Index 1 because the official projection is Sequential(ReLU, ConvNorm), and its keys say so.
        self.proj = nn.ModuleDict({"1": ConvNorm(channels, channels, scale=0.0)})
        self.attention_biases = nn.Parameter(torch.zeros(heads, table_size**2))
        self.bias = AttentionBias()

    def forward(self, windows: Tensor) -> Tensor:
        """Attends.

        Args:
            windows: ``(B * windows, h, w, C)``.

        Returns:
            The same shape.
        """
        windows = windows.permute(0, 3, 1, 2)
        height, width = windows.shape[-2:]
        bias = self.bias(self.attention_biases, height, width)
        shares = windows.chunk(len(self.qkvs), 1)
        share = shares[0]
        outputs: list[Tensor] = []
        for head, (project, mix) in enumerate(zip(self.qkvs, self.dws, strict=True)):
            if head:
                share = outputs[-1] + shares[head]
            query, key, value = project(share).split(self.split, 1)
            query = mix(query).flatten(2).transpose(1, 2)
            attention = torch.baddbmm(bias[head], query, key.flatten(2), alpha=self.scale).softmax(-1)
            out = torch.bmm(attention, value.flatten(2).transpose(1, 2))
            outputs.append(out.view(-1, height, width, out.shape[-1]).permute(0, 3, 1, 2))
        merged: Tensor = self.proj["1"](torch.cat(outputs, 1).relu_())
        return merged.permute(0, 2, 3, 1)


class WindowAttention(nn.Module):
    """Cascaded group attention over a map of any size."""

    def __init__(self, channels: int, heads: int, kernels: tuple[int, ...], table_size: int) -> None:
        super().__init__()
        self.attn = CascadedGroupAttention(channels, heads, kernels, table_size)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        grid = x.permute(0, 2, 3, 1)
        return merge(self.attn(cut(grid, WINDOW)), grid, WINDOW).permute(0, 3, 1, 2)


class Block(nn.Module):
    """The paper's sandwich: local mixing and feed-forward on both sides of one attention, all residual."""

    def __init__(self, channels: int, heads: int, kernels: tuple[int, ...], table_size: int) -> None:
        super().__init__()
        self.dw0 = Residual(ConvNorm(channels, channels, 3, groups=channels, scale=0.0))
        self.ffn0 = Residual(FeedForward(channels))
        self.mixer = Residual(WindowAttention(channels, heads, kernels, table_size))
        self.dw1 = Residual(ConvNorm(channels, channels, 3, groups=channels, scale=0.0))
        self.ffn1 = Residual(FeedForward(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        out: Tensor = self.ffn1(self.dw1(self.mixer(self.ffn0(self.dw0(x)))))
        return out


class PatchMerging(nn.Module):
    """Halves the map in an inverted bottleneck with a channel gate."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = in_channels * 4
        self.conv1 = ConvNorm(in_channels, hidden)
        self.conv2 = ConvNorm(hidden, hidden, 3, 2, groups=hidden)
        self.se = SqueezeExcite(hidden)
        self.conv3 = ConvNorm(hidden, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.conv3(self.se(self.conv2(self.conv1(x).relu_()).relu_()))
        return out


class Downsample(nn.Module):
    """Patch merging between two residual pairs of depthwise convolution and feed-forward, one at each width."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.res1 = self._pair(in_channels)
        self.patchmerge = PatchMerging(in_channels, out_channels)
        self.res2 = self._pair(out_channels)

    @staticmethod
    def _pair(channels: int) -> nn.Sequential:
        depthwise = ConvNorm(channels, channels, 3, groups=channels)
        return nn.Sequential(Residual(depthwise), Residual(FeedForward(channels)))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.res2(self.patchmerge(self.res1(x)))
        return out


class Stem(nn.Module):
    """Four overlapping 3x3 convolutions of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, channels // 8, 3, 2)
        self.conv2 = ConvNorm(channels // 8, channels // 4, 3, 2)
        self.conv3 = ConvNorm(channels // 4, channels // 2, 3, 2)
        self.conv4 = ConvNorm(channels // 2, channels, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 16), ceil(W / 16))``."""
        x = self.conv1(images).relu_()
        x = self.conv2(x).relu_()
        x = self.conv3(x).relu_()
        out: Tensor = self.conv4(x)
        return out


@dataclass(frozen=True, kw_only=True)
class EfficientViTVariant(VariantInfo):
    """A row of the paper's Table 1.

    Attributes:
        channels: Width of each stage.
        depth: Blocks of each stage.
        heads: Attention heads of each stage.
        kernels: Kernel of the depthwise convolution on the query of head 0, 1, ...
    """

    channels: tuple[int, int, int]
    depth: tuple[int, int, int]
    heads: tuple[int, int, int]
    kernels: tuple[int, int, int, int]


class EfficientViT(Backbone):
    """The network.

    Maps ``"c4"``, ``"c5"`` and ``"c6"`` are the raw outputs of the three stages (strides 16, 32, 64), which is what the
    official pyramid reads.

    Args:
        variant: Its row of the table.
        dense: Make every bias table 7x7, as in the official detection file. By default they are as in the published
            classifier: 7x7, 7x7 and, for the third stage, 4x4.
    """

    def __init__(self, variant: EfficientViTVariant, *, dense: bool = False) -> None:
        super().__init__()
        self.info = variant
        self.patch_embed: nn.Module = Stem(variant.channels[0])
        table_sizes = (WINDOW, WINDOW, WINDOW if dense else 4)
        stages = []
        before = variant.channels[0]
        rows = zip(variant.channels, variant.depth, variant.heads, table_sizes, strict=True)
        for position, (channels, depth, heads, table_size) in enumerate(rows):
            downsample = Downsample(before, channels) if position else nn.Identity()
            stages.append(
                Stage(downsample, [Block(channels, heads, variant.kernels, table_size) for _ in range(depth)])
            )
            before = channels
        self.stages = nn.ModuleList(stages)
        self.feature_maps = tuple(
            FeatureMap(f"c{level}", channels, 2**level) for level, channels in enumerate(variant.channels, start=4)
        )
        self.num_features = variant.channels[-1]
        self.layers = layers_of("patch_embed.", self.stages)
        self.num_layers = len(self.layers)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps ``{"c4", "c5", "c6"}`` of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``."""
        x = self.patch_embed(images)
        maps = {}
        for spec, stage in zip(self.feature_maps, self.stages, strict=True):
            x = self.run(stage.get_submodule("downsample"), x)
            for block in stage.get_submodule("blocks").children():
                x = self.run(block, x)
            maps[spec.level] = x
        return maps

    def embed(self, images: Tensor) -> Tensor:
        """The third stage's mean over the map, ``(B, num_features)``."""
        maps: dict[str, Tensor] = self(images)
        return maps["c6"].mean((2, 3))

    def make_classifier(self, num_classes: int) -> NormLinear:
        """BatchNorm and linear."""
        return NormLinear(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        """The attention-bias tables, as in the official optimizer."""
        return {name for name, _ in self.named_parameters() if name.endswith("attention_biases")}

    def layer_of(self, parameter_name: str) -> int:
        """Stem 0, then each downsampling and each block one more; see ``Backbone.layer_of``."""
        return depth_of(parameter_name, self.layers)

    def prepare_for_dense(self) -> None:
        """Resizes the third stage's bias tables from 4x4 to 7x7, as the official detection code does at load."""
        super().prepare_for_dense()
        for module in self.modules():
            if isinstance(module, CascadedGroupAttention):
                table = module.attention_biases
                resized = resize_bias_table(table.detach(), WINDOW, WINDOW)
                if resized.shape != table.shape:
                    module.attention_biases = nn.Parameter(resized, requires_grad=table.requires_grad)

    def resize_table(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """Bicubic, see ``Backbone.resize_table``."""
        return fit_bias_table(table, shape) if name.endswith("attention_biases") else None

    def fuse(self) -> EfficientViT:
        """See ``Backbone.fuse``; the deploy form is in ``_efficientvit_fused``."""
        if isinstance(self.patch_embed, Stem):
            self.patch_embed = FusedStem(self.patch_embed)
            for module in self.stages:
                stage = cast("Stage", module)
                if isinstance(stage.downsample, Downsample):
                    stage.downsample = FusedDownsample(stage.downsample)
                stage.blocks = nn.Sequential(*(FusedBlock(cast("Block", block), WINDOW) for block in stage.blocks))
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """Microsoft's names (classification and detection files) to ours, which are timm's."""
        if key.endswith("attention_bias_idxs"):
            return None
        key = re.sub(r"\.c\.", ".conv.", key)
        key = re.sub(r"^(head|head_dist)\.l\.", r"\1.linear.", key)
        key = re.sub(r"^patch_embed\.([0246])\.", lambda found: f"patch_embed.conv{int(found[1]) // 2 + 1}.", key)
        return re.sub(r"^blocks([123])\.(\d+)\.", _stage_key, key)


def _stage_key(found: re.Match[str]) -> str:
    stage, index = int(found[1]) - 1, int(found[2])
    if stage == 0:
        return f"stages.0.blocks.{index}."
    if index < 3:
        return f"stages.{stage}.downsample.{('res1', 'patchmerge', 'res2')[index]}."
    return f"stages.{stage}.blocks.{index - 3}."


def _row(
    name: str,
    size: tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int], tuple[int, int, int, int]],
    published: tuple[int, int, float, float],
) -> EfficientViTVariant:
    channels, depth, heads, kernels = size
    params, macs, top1, top5 = published
    return EfficientViTVariant(
        name=f"efficientvit_{name}",
        family="EfficientViT",
        params=params,
        macs=macs,
        top1=top1,
        top5=top5,
        paper="2305.07027",
        source="github.com/microsoft/Cream, EfficientViT/README.md (accuracy); parameters and MACs counted",
        licence="MIT",
        origin="the authors' GitHub release",
        url=f"https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0/efficientvit_{name}.pth",
        channels=channels,
        depth=depth,
        heads=heads,
        kernels=kernels,
    )


# name, (channels, depth, heads, query kernels), (parameters, MACs, top-1, top-5)
VARIANTS = (
    _row("m0", ((64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)), (2_349_436, 79_193_600, 63.2, 85.2)),
    _row("m1", ((128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)), (2_980_560, 167_051_840, 68.4, 88.7)),
    _row("m2", ((128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)), (4_187_554, 201_035_712, 70.8, 90.2)),
    _row("m3", ((128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)), (6_900_722, 262_662_208, 73.4, 91.4)),
    _row("m4", ((128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)), (8_804_228, 299_308_544, 74.3, 91.8)),
    _row("m5", ((192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)), (12_473_772, 521_583_104, 77.1, 93.4)),
)

register(EfficientViT, VARIANTS)
