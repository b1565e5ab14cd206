"""EfficientFormerV2-S0, S1, S2 and L (Snap).

Paper: "Rethinking Vision Transformers for MobileNet Size and Speed", ICCV 2023, arXiv:2212.08059.
Official code: github.com/snap-research/EfficientFormer (models/efficientformer_v2.py).

Parameters carry timm's names (``efficientformerv2_*``), and at 224x224 the outputs are timm's and Snap's. What differs:

* One network for every image size. Snap's classifier and timm's network only take the size that they were built for.
  Here the tables of attention biases, which hold one value for each absolute offset, are resized (bicubic) to the map
  as images, once per shape. A map of odd sides, which the official upsampling after attention does not fit, is
  upsampled to the next even sides and cropped.
* ``official_grid`` gives the dense networks of Snap's detection and segmentation files: new tables
  (``attention_biases_seg``) for a square image of a nominal size, whose expanded matrices, not the tables, are resized
  to the map. Their published detectors need it.
* Feature maps are the raw outputs of the stages, as in both dense files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._contract import FeatureMap, VariantInfo
from effvit.backbones._efficientformerv2_fused import FusedNorm, FusedStem, fused_blocks, fused_downsample
from effvit.backbones._efficientformerv2_heads import add_attended, map_to_heads, mix_heads, score
from effvit.backbones._layers import ConvNorm, DropPath, LayerScale, Stage, drop_paths, gelu, layers_of
from effvit.backbones._registry import register
from effvit.backbones._snap import DENSE_TABLE, HEADS, ORIGIN, PAGE, BiasTable, SnapNetwork

VALUE_RATIO = 4  # a head's value is as many times as wide as its key
GRID = 7  # side of the map of stride 32 of the published size


class FeedForward(nn.Module):
    """Inverted bottleneck: pointwise, depthwise 3x3, pointwise; this is also how the network mixes locally."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        hidden = channels * ratio
        self.fc1 = ConvNorm(channels, hidden, bias=True)
        self.mid = ConvNorm(hidden, hidden, 3, groups=hidden, bias=True)
        self.fc2 = ConvNorm(hidden, channels, bias=True)
        for part in (self.fc1, self.fc2):
            nn.init.trunc_normal_(part.conv.weight, std=0.02)
            nn.init.zeros_(cast("Tensor", part.conv.bias))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        out: Tensor = self.fc2(gelu(self.mid(gelu(self.fc1(x)))))
        return out


class Attention(BiasTable):
    """Attention over all cells, with heads that talk to each other and a local path beside it (paper §3.1).

    In the third stage it works on half the sides: a strided depthwise convolution before, bilinear upsampling after.

    Args:
        channels: Channels in and out.
        halved: Whether it works on half the sides.
        grid: Side of the map that the bias table is made for.
        official: See `BiasTable`.
    """

    def __init__(self, channels: int, *, halved: bool, grid: int, official: bool) -> None:
        super().__init__(grid, official=official)
        self.heads, self.key_dim = HEADS, 32
        width, keys = HEADS * VALUE_RATIO * self.key_dim, HEADS * self.key_dim
        self.stride_conv = ConvNorm(channels, channels, 3, 2, groups=channels, bias=True) if halved else None
        self.q = ConvNorm(channels, keys, bias=True)
        self.k = ConvNorm(channels, keys, bias=True)
        self.v = ConvNorm(channels, width, bias=True)
        self.v_local = ConvNorm(width, width, 3, groups=width, bias=True)
        self.talking_head1 = nn.Conv2d(HEADS, HEADS, 1)
        self.talking_head2 = nn.Conv2d(HEADS, HEADS, 1)
        self.proj = ConvNorm(width, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        reduced = x if self.stride_conv is None else self.stride_conv(x)
        height, width = reduced.shape[-2:]
        query = map_to_heads(self.q(reduced) * self.key_dim**-0.5, self.heads)
        key, values = map_to_heads(self.k(reduced), self.heads), self.v(reduced)
        attention = score(query, key, self.biases(height, width))
        attention = mix_heads(attention, self.talking_head1.weight, self.talking_head1.bias).softmax(-1)
        attention = mix_heads(attention, self.talking_head2.weight, self.talking_head2.bias)
        out = add_attended(self.v_local(values), attention, map_to_heads(values, self.heads))
        if self.stride_conv is not None:
            out = F.interpolate(out, scale_factor=2, mode="bilinear")[:, :, : x.shape[2], : x.shape[3]]
        projected: Tensor = self.proj(gelu(out))
        return projected


class LocalGlobalQuery(nn.Module):
    """Queries of half the sides: a strided depthwise convolution plus every second cell as it is."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 3, 2, 1, groups=channels)
        self.proj = ConvNorm(channels, out_channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.proj(self.local(x) + x[:, :, ::2, ::2])
        return out


class AttentionDownsample(BiasTable):
    """Attention whose queries lie on every second cell, which halves the sides.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        grid: Side of the map, before halving, that the bias table is made for.
        official: See `BiasTable`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, grid: int, official: bool) -> None:
        super().__init__(grid, 2, official=official)
        self.heads, self.key_dim = HEADS, 16
        width, keys = HEADS * VALUE_RATIO * self.key_dim, HEADS * self.key_dim
        self.q = LocalGlobalQuery(in_channels, keys)
        self.k = ConvNorm(in_channels, keys, bias=True)
        self.v = ConvNorm(in_channels, width, bias=True)
        self.v_local = ConvNorm(width, width, 3, 2, groups=width, bias=True)
        self.proj = ConvNorm(width, out_channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        query = map_to_heads(self.q(x) * self.key_dim**-0.5, self.heads)
        key, values = map_to_heads(self.k(x), self.heads), self.v(x)
        attention = score(query, key, self.biases(x.shape[2], x.shape[3]))
        out = add_attended(self.v_local(values), attention.softmax(-1), map_to_heads(values, self.heads))
        projected: Tensor = self.proj(gelu(out))
        return projected


class Block(nn.Module):
    """A feed-forward, in the last blocks of the deep stages after an attention; both residual, scaled and dropped.

    Args:
        channels: Channels in and out.
        ratio: Width of the feed-forward's middle, in channels.
        attention: Token mixer, if any.
        drop_path: Share of samples that skip a branch in training.
    """

    def __init__(self, channels: int, ratio: int, attention: Attention | None, drop_path: float) -> None:
        super().__init__()
        self.token_mixer = attention
        if attention is not None:
            self.ls1 = LayerScale(channels)
        self.mlp = FeedForward(channels, ratio)
        self.ls2 = LayerScale(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        if self.token_mixer is not None:
            x = self.ls1(x, self.drop_path(self.token_mixer(x)))
        out: Tensor = self.ls2(x, self.drop_path(self.mlp(x)))
        return out


class Downsample(nn.Module):
    """A strided convolution; before the last stage with attention beside it."""

    def __init__(self, in_channels: int, out_channels: int, attention: AttentionDownsample | None) -> None:
        super().__init__()
        self.conv = ConvNorm(in_channels, out_channels, 3, 2, bias=True)
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.conv(x)
        return out if self.attn is None else self.attn(x) + out


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(3, channels // 2, 3, 2, bias=True)
        self.conv2 = ConvNorm(channels // 2, channels, 3, 2, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 4), ceil(W / 4))``."""
        # In channels-last memory pointwise convolutions are matrix products, and cells of heads need no copies.
        images = images.contiguous(memory_format=torch.channels_last)
        return gelu(self.conv2(gelu(self.conv1(images))))


@dataclass(frozen=True, kw_only=True)
class EfficientFormerV2Variant(VariantInfo):
    """A row of the paper's Table 1, with the searched structure that only the code gives.

    Attributes:
        channels: Width of each stage.
        ratios: Of each stage, the width of each block's feed-forward, in channels of the stage.
        attentions: How many of the last blocks of the third and of the fourth stage have attention.
        drop_path: Share of samples that skip a branch of the last block in training; it grows linearly from 0.
    """

    channels: tuple[int, int, int, int]
    ratios: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    attentions: int
    drop_path: float


class EfficientFormerV2(SnapNetwork):
    """The network.

    Maps ``"c2"`` to ``"c5"`` are the raw outputs of the four stages (strides 4 to 32).

    Args:
        variant: Its row of the table.
        official_grid: Side of the map of stride 32 for which Snap's dense files make their bias tables: 25 for their
            detectors (images of 800x800), 16 for their segmentation (512x512). By default the tables are the
            classifier's.
        drop_path_rate: Share of samples that skip a branch of the last block in training; it grows linearly from 0.
            By default as published.

    Raises:
        ConfigError: `official_grid` is no int of at least 1, or `drop_path_rate` not in ``[0, 1)``.
    """

    def __init__(
        self,
        variant: EfficientFormerV2Variant,
        *,
        official_grid: int | None = None,
        drop_path_rate: float | None = None,
    ) -> None:
        super().__init__(official_grid)
        official, grid = official_grid is not None, official_grid or GRID
        self.stem = Stem(variant.channels[0])
        stages = []
        rate = variant.drop_path if drop_path_rate is None else drop_path_rate
        rates = iter(drop_paths(rate, sum(map(len, variant.ratios))))
        before = 0
        for position, (channels, ratios) in enumerate(zip(variant.channels, variant.ratios, strict=True)):
            downsample: nn.Module = nn.Identity()
            if position:
                attend = (
                    AttentionDownsample(before, channels, grid=2 * grid, official=official) if position == 3 else None
                )
                downsample = Downsample(before, channels, attend)
            blocks = []
            for index, ratio in enumerate(ratios):
                mixes = position >= 2 and index >= len(ratios) - variant.attentions
                mixer = Attention(channels, halved=position == 2, grid=grid, official=official) if mixes else None
                blocks.append(Block(channels, ratio, mixer, next(rates)))
            stages.append(Stage(downsample, blocks))
            before = channels
        self.stages = nn.ModuleList(stages)
        self.norm: nn.Module = nn.BatchNorm2d(variant.channels[-1])
        self.feature_maps = tuple(
            FeatureMap(f"c{level}", channels, 2**level) for level, channels in enumerate(variant.channels, start=2)
        )
        self.num_features = variant.channels[-1]
        self.layers = layers_of("stem.", self.stages)
        self.num_layers = len(self.layers)
        self.info = variant
        if official_grid is not None:
            self.info = _of_dense_network(variant, official_grid)
            # Snap's dense networks start from the classifier's weights with new tables.
            self.fresh_allowed = tuple(name for name, _ in self.named_parameters() if name.endswith(DENSE_TABLE))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps ``{"c2", "c3", "c4", "c5"}`` of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``."""
        return {spec.level: x for spec, x in zip(self.feature_maps, self.stage_outputs(images), strict=True)}

    def embed(self, images: Tensor) -> Tensor:
        """The last stage's normed map, its mean, ``(B, num_features)``."""
        normed: Tensor = self.norm(self.stage_outputs(images)[-1])
        return normed.mean((2, 3))

    def fuse(self) -> EfficientFormerV2:
        """See ``Backbone.fuse``; the deploy form is in ``_efficientformerv2_fused``."""
        if isinstance(self.stem, Stem):
            self.stem = FusedStem(self.stem)
            for module in self.stages:
                stage = cast("Stage", module)
                if isinstance(stage.downsample, Downsample):
                    stage.downsample = fused_downsample(stage.downsample)
                stage.blocks = fused_blocks(stage.blocks)
            self.norm = FusedNorm(cast("nn.BatchNorm2d", self.norm))
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """Snap's names (classification and dense files) to ours, which are timm's."""
        if key.endswith(("attention_bias_idxs", "attention_bias_idxs_seg")):
            return None
        for pattern, name in _OFFICIAL_NAMES:
            key = re.sub(pattern, name, key)
        return key


# In this order: a later rule may read what an earlier one wrote. None changes a name that is already ours.
_OFFICIAL_NAMES = (
    (r"^dist_head\.", "head_dist."),
    (r"^patch_embed\.0\.", "stem.conv1.conv."),
    (r"^patch_embed\.1\.", "stem.conv1.bn."),
    (r"^patch_embed\.3\.", "stem.conv2.conv."),
    (r"^patch_embed\.4\.", "stem.conv2.bn."),
    (r"^network\.0\.", "stages.0.blocks."),
    (r"^network\.2\.", "stages.1.blocks."),
    (r"^network\.4\.", "stages.2.blocks."),
    (r"^network\.6\.", "stages.3.blocks."),
    (r"^network\.1\.", "stages.1.downsample."),
    (r"^network\.3\.", "stages.2.downsample."),
    (r"^network\.5\.", "stages.3.downsample."),
    (r"\.downsample\.(?:proj|conv)\.(weight|bias)$", r".downsample.conv.conv.\1"),
    (r"\.downsample\.(?:norm|bn)\.", ".downsample.conv.bn."),
    (r"\.q\.local\.0\.", ".q.local."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.0\.", r".\1.conv."),
    (r"\.(q\.proj|q|k|v|v_local|stride_conv)\.1\.", r".\1.bn."),
    (r"\.(attn|token_mixer)\.proj\.1\.", r".\1.proj.conv."),
    (r"\.(attn|token_mixer)\.proj\.2\.", r".\1.proj.bn."),
    (r"\.mlp\.(fc1|mid|fc2)\.(weight|bias)$", r".mlp.\1.conv.\2"),
    (r"\.mlp\.norm1\.", ".mlp.fc1.bn."),
    (r"\.mlp\.mid_norm\.", ".mlp.mid.bn."),
    (r"\.mlp\.norm2\.", ".mlp.fc2.bn."),
    (r"\.layer_scale_([12])$", r".ls\1.gamma"),
)


def _of_dense_network(variant: EfficientFormerV2Variant, grid: int) -> EfficientFormerV2Variant:
    """The row of the network with other tables, for which no accuracy was published."""
    tables = 2 * variant.attentions + 4  # the downsampling attention's is four times as large
    return replace(variant, params=variant.params + HEADS * tables * (grid**2 - GRID**2), top1=None, top5=None)


def _row(
    name: str,
    channels: tuple[int, int, int, int],
    ratios: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]],
    training: tuple[int, float],
    published: tuple[int, int, float],
) -> EfficientFormerV2Variant:
    attentions, drop_path = training
    params, macs, top1 = published
    return EfficientFormerV2Variant(
        name=f"efficientformerv2_{name}",
        family="EfficientFormerV2",
        params=params,
        macs=macs,
        top1=top1,
        top5=None,
        paper="2212.08059",
        source="github.com/snap-research/EfficientFormer, README.md (accuracy after 450 epochs, whose weights timm's "
        "copies are); parameters and MACs counted",
        licence="Apache-2.0",
        origin=ORIGIN,
        url=f"https://huggingface.co/timm/efficientformerv2_{name}.snap_dist_in1k/resolve/main/model.safetensors",
        page=PAGE,
        channels=channels,
        ratios=ratios,
        attentions=attentions,
        drop_path=drop_path,
    )


# name, channels, feed-forward ratios, (attention blocks, drop path), (parameters, MACs, top-1)
VARIANTS = (
    _row(
        "s0",
        (32, 48, 96, 176),
        ((4,) * 2, (4,) * 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4)),
        (2, 0.0),
        (3_600_256, 395_892_544, 76.2),
    ),
    _row(
        "s1",
        (32, 48, 120, 224),
        ((4,) * 3, (4,) * 3, (4, 4, 3, 3, 3, 3, 4, 4, 4), (4, 4, 3, 3, 4, 4)),
        (2, 0.0),
        (6_185_560, 651_969_640, 79.7),
    ),
    _row(
        "s2",
        (32, 64, 144, 288),
        ((4,) * 4, (4,) * 4, (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 3, 3, 3, 3, 4, 4)),
        (4, 0.02),
        (12_710_112, 1_246_863_952, 82.0),
    ),
    _row(
        "l",
        (40, 80, 192, 384),
        ((4,) * 5, (4,) * 5, (4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4), (4, 4, 4, 3, 3, 3, 3, 4, 4, 4)),
        (6, 0.1),
        (26_322_288, 2_552_546_880, 83.5),
    ),
)

register(EfficientFormerV2, VARIANTS)
