"""EfficientFormer-L1, L3 and L7 (Snap).

Paper: "EfficientFormer: Vision Transformers at MobileNet Speed", NeurIPS 2022, arXiv:2206.01191.
Official code: github.com/snap-research/EfficientFormer.

Parameters carry timm's names (``efficientformer_l*``), and at 224x224 the outputs are timm's and Snap's. What differs:

* Any image size. Snap's and timm's classifiers only take 224x224: a bias table of 7x7 offsets is written into their
  attention. Here the table is resized in offset space (bicubic) to the map it meets.
* Snap's detectors and segmenters do something else: they ignore the published tables, learn others for a nominal square
  grid, and stretch the gathered matrix to the number of cells in every forward. ``official_grid=25`` (detection) or
  ``official_grid=16`` (segmentation) is that network, output norms included, so that their files can be loaded; the
  stretched matrix is made once per shape.
* Maps stay maps: with channels-last memory, the tokens of the last stage are the cells of its map as they lie. So the
  whole network works in that memory, whichever the images are in; on CPUs it is also the faster one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._contract import FeatureMap, VariantInfo
from effvit.backbones._deit import Mlp
from effvit.backbones._efficientformer_fused import FusedAttentionBlock, FusedDownsample, FusedPoolBlock, FusedStem
from effvit.backbones._layers import (
    DropPath,
    LayerScale,
    attend,
    convolve_pointwise,
    drop_paths,
    gelu,
    layers_of,
    split_heads,
)
from effvit.backbones._registry import register
from effvit.backbones._snap import DENSE_TABLE, HEADS, ORIGIN, PAGE, BiasTable, SnapNetwork

KEY_DIM = 32
VALUE_DIM = 128
MLP_RATIO = 4
TABLE_SIZE = 7


class ConvMlp(nn.Module):
    """Two pointwise convolutions with BatchNorm, the map four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels * MLP_RATIO, 1)
        self.norm1 = nn.BatchNorm2d(channels * MLP_RATIO)
        self.fc2 = nn.Conv2d(channels * MLP_RATIO, channels, 1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        hidden = gelu(self.norm1(convolve_pointwise(self.fc1, x)))
        out: Tensor = self.norm2(convolve_pointwise(self.fc2, hidden))
        return out


class PoolBlock(nn.Module):
    """The paper's 4D block: mixes neighbours by their mean, then channels by an MLP.

    Args:
        channels: Channels in and out.
        drop_path: Share of samples that skip a branch in training.
    """

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.ls1 = LayerScale(channels)
        self.mlp = ConvMlp(channels)
        self.ls2 = LayerScale(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        mixed = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False) - x
        x = self.ls1(x, self.drop_path(mixed))
        out: Tensor = self.ls2(x, self.drop_path(self.mlp(x)))
        return out


class Attention(BiasTable):
    """Attention of all cells of a map to all others, with a learned bias for each head and offset.

    Args:
        channels: Channels in and out.
        official_grid: See `EfficientFormer`.
    """

    def __init__(self, channels: int, official_grid: int | None) -> None:
        super().__init__(official_grid or TABLE_SIZE, official=official_grid is not None)
        self.split = (KEY_DIM, KEY_DIM, VALUE_DIM)
        self.scale = KEY_DIM**-0.5
        # Each head's query, key and value lie together, as published.
        self.qkv = nn.Linear(channels, HEADS * sum(self.split))
        self.proj = nn.Linear(HEADS * VALUE_DIM, channels)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Attends.

        Args:
            tokens: ``(B, N, C)`` with ``N = height * width``, row by row.
            height: Rows of the map.
            width: Columns of the map.

        Returns:
            The same shape.
        """
        projected: Tensor = self.qkv(tokens)
        query, key, value = split_heads(projected, self.split)
        out: Tensor = self.proj(attend(query * self.scale, key, value, self.biases(height, width)))
        return out


class AttentionBlock(nn.Module):
    """The paper's 3D block: attention and MLP over the cells of a map, as in any vision transformer.

    Args:
        channels: Channels in and out.
        official_grid: See `EfficientFormer`.
        drop_path: Share of samples that skip a branch in training.
    """

    def __init__(self, channels: int, official_grid: int | None, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.token_mixer = Attention(channels, official_grid)
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)
        self.ls2 = LayerScale(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same, in channels-last memory."""
        height, width = x.shape[2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        tokens = self.ls1(tokens, self.drop_path(self.token_mixer(self.norm1(tokens), height, width)))
        out: Tensor = self.ls2(tokens, self.drop_path(self.mlp(self.norm2(tokens))))
        return out.view(-1, height, width, x.shape[1]).permute(0, 3, 1, 2)


class Downsample(nn.Module):
    """Halves the map in an overlapping 3x3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, H, W)`` to ``(B, out_channels, ceil(H / 2), ceil(W / 2))``."""
        out: Tensor = self.norm(self.conv(x))
        return out


class Stage(nn.Module):
    """Blocks at one width, after a downsampling in all stages but the first.

    Args:
        downsample: What comes first.
        channels: Width.
        rates: For each block, the share of samples that skip a branch in training.
        attention: How many of the last blocks attend.
        official_grid: See `EfficientFormer`.
    """

    def __init__(
        self,
        downsample: nn.Module,
        channels: int,
        rates: Sequence[float],
        attention: int,
        official_grid: int | None,
    ) -> None:
        super().__init__()
        self.downsample = downsample
        pooling = len(rates) - attention
        blocks: list[nn.Module] = [PoolBlock(channels, rate) for rate in rates[:pooling]]
        if attention:
            # In the published networks the map is flattened here, and that step counts in the names.
            blocks.append(nn.Identity())
        blocks += [AttentionBlock(channels, official_grid, rate) for rate in rates[pooling:]]
        self.blocks = nn.Sequential(*blocks)


class Stem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, 3, 2, 1)
        self.norm1 = nn.BatchNorm2d(channels // 2)
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, 2, 1)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, C, ceil(H / 4), ceil(W / 4))`` in channels-last memory."""
        x = self.norm1(self.conv1(images.contiguous(memory_format=torch.channels_last))).relu_()
        out: Tensor = self.norm2(self.conv2(x)).relu_()
        return out


@dataclass(frozen=True, kw_only=True)
class EfficientFormerVariant(VariantInfo):
    """A row of the paper's Table 1.

    Attributes:
        channels: Width of each stage.
        depth: Blocks of each stage.
        attention: How many of the last stage's blocks attend; those are its last ones.
    """

    channels: tuple[int, int, int, int]
    depth: tuple[int, int, int, int]
    attention: int


class EfficientFormer(SnapNetwork):
    """The network.

    Maps ``"c2"`` … ``"c5"`` are the raw outputs of the four stages (strides 4, 8, 16, 32).

    Args:
        variant: Its row of the table.
        official_grid: Builds the network as Snap's detectors (25) and segmenters (16) have it: bias tables that start
            at zero, are learned for a square grid of this side and stretched to the map, and a GroupNorm on each
            output. `embed` reads the last stage before that norm. A classifier's file fills the rest.
        drop_path_rate: Share of samples that skip a branch of the last block in training; it grows linearly from 0.
            The published networks were trained without.

    Raises:
        ConfigError: `official_grid` is no int of at least 1, or `drop_path_rate` not in ``[0, 1)``.
    """

    def __init__(
        self, variant: EfficientFormerVariant, *, official_grid: int | None = None, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__(official_grid)
        self.info = variant if official_grid is None else _with_grid(variant, official_grid)
        self.stem = Stem(variant.channels[0])
        stages: list[nn.Module] = []
        rates = drop_paths(drop_path_rate, sum(variant.depth))
        before = 0
        for channels, depth in zip(variant.channels, variant.depth, strict=True):
            downsample = Downsample(before, channels) if stages else nn.Identity()
            attention = variant.attention if len(stages) == 3 else 0
            stages.append(Stage(downsample, channels, rates[:depth], attention, official_grid))
            rates = rates[depth:]
            before = channels
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(before)
        if official_grid is not None:
            for position, channels in enumerate(variant.channels):
                self.add_module(f"norm{2 * position}", nn.GroupNorm(1, channels))
            # Snap's dense networks start from the classifier's weights with new tables and norms.
            new = tuple(name for name, _ in self.named_parameters() if name.endswith(DENSE_TABLE))
            self.fresh_allowed = ("norm0.", "norm2.", "norm4.", "norm6.", *new)
        self.feature_maps = tuple(
            FeatureMap(f"c{level}", channels, 2**level) for level, channels in enumerate(variant.channels, start=2)
        )
        self.num_features = before
        self.layers = layers_of("stem.", self.stages)
        self.num_layers = len(self.layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps ``{"c2", "c3", "c4", "c5"}`` of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``."""
        outputs = self.stage_outputs(images)
        if self.official_grid is not None:
            outputs = [self.get_submodule(f"norm{2 * position}")(x) for position, x in enumerate(outputs)]
        return {spec.level: output for spec, output in zip(self.feature_maps, outputs, strict=True)}

    def embed(self, images: Tensor) -> Tensor:
        """The last stage after LayerNorm, its mean over the map, ``(B, num_features)``."""
        cells: Tensor = self.norm(self.stage_outputs(images)[-1].permute(0, 2, 3, 1))
        return cells.mean((1, 2))

    def fuse(self) -> EfficientFormer:
        """See ``Backbone.fuse``; the deploy form is in ``_efficientformer_fused``."""
        if isinstance(self.stem, Stem):
            self.stem = FusedStem(self.stem)
            for module in self.stages:
                stage = cast("Stage", module)
                if isinstance(stage.downsample, Downsample):
                    stage.downsample = FusedDownsample(stage.downsample)
                stage.blocks = nn.Sequential(*(_fused(block) for block in stage.blocks))
            self.requires_grad_(requires_grad=False)
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """Snap's names (classification, detection and segmentation files) to ours, which are timm's."""
        if re.search(r"\.attention_bias_idxs(_seg)?$", key):
            return None
        key = re.sub(r"^dist_head\.", "head_dist.", key)
        key = re.sub(r"^patch_embed\.([0134])\.", lambda found: f"stem.{_STEM[int(found[1])]}.", key)
        key = re.sub(
            r"^network\.([0246])\.(\d+)\.", lambda found: f"stages.{int(found[1]) // 2}.blocks.{found[2]}.", key
        )
        key = re.sub(r"^network\.([135])\.", lambda found: f"stages.{(int(found[1]) + 1) // 2}.downsample.", key)
        key = key.replace(".downsample.proj.", ".downsample.conv.")
        return re.sub(r"\.layer_scale_([12])$", r".ls\1.gamma", key)


_STEM = {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2"}


def _initialise(module: nn.Module) -> None:
    """As published: truncated normal for all that is a matrix product, torch's own for the 3x3 convolutions."""
    if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


def _fused(block: nn.Module) -> nn.Module:
    if isinstance(block, PoolBlock):
        return FusedPoolBlock(block)
    return FusedAttentionBlock(block) if isinstance(block, AttentionBlock) else block


def _with_grid(variant: EfficientFormerVariant, official_grid: int) -> EfficientFormerVariant:
    """The row of a network whose tables and output norms were never published with its classifier."""
    tables = variant.attention * HEADS * (official_grid**2 - TABLE_SIZE**2)
    return dataclasses.replace(variant, params=variant.params + tables + 2 * sum(variant.channels), top1=None)


def _row(
    name: str, size: tuple[tuple[int, int, int, int], tuple[int, int, int, int], int], published: tuple[int, int, float]
) -> EfficientFormerVariant:
    channels, depth, attention = size
    params, macs, top1 = published
    return EfficientFormerVariant(
        name=f"efficientformer_{name}",
        family="EfficientFormer",
        params=params,
        macs=macs,
        top1=top1,
        top5=None,
        paper="2206.01191",
        source="github.com/snap-research/EfficientFormer, README.md (accuracy; of L1 after 1000 epochs, which timm's "
        "copy is by its measured 80.5 at crop 0.95); parameters and MACs counted",
        licence="Apache-2.0",
        origin=ORIGIN,
        url=f"https://huggingface.co/timm/efficientformer_{name}.snap_dist_in1k/resolve/main/model.safetensors",
        page=PAGE,
        channels=channels,
        depth=depth,
        attention=attention,
    )


# name, (channels, depth, attention blocks), (parameters, MACs, top-1)
VARIANTS = (
    _row("l1", ((48, 96, 224, 448), (3, 2, 6, 4), 1), (12_289_928, 1_291_284_736, 80.2)),
    _row("l3", ((64, 128, 320, 512), (4, 4, 12, 6), 4), (31_406_000, 3_906_573_312, 82.4)),
    _row("l7", ((96, 192, 384, 768), (6, 6, 18, 8), 8), (82_229_328, 10_119_325_696, 83.3)),
)

register(EfficientFormer, VARIANTS)
