"""One feature pyramid for any backbone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._simple_pyramid import SimplePyramid
from effvit.backbones._unread import freeze_unread
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effvit.backbones._contract import Backbone, FeatureMap

#: How levels that are coarser than the backbone's are made.
Coarser = Literal["conv", "pool"]


class _Levels(nn.Module):
    """The layers that make the levels of a pyramid of the maps of a backbone, wherever that is."""

    levels: tuple[str, ...]
    strides: tuple[int, ...]
    out_channels: int
    coarser: Coarser
    returned: tuple[str, ...]
    simple: SimplePyramid | None
    laterals: nn.ModuleDict
    upsamplers: nn.ModuleDict
    outputs: nn.ModuleDict
    downsamplers: nn.ModuleDict

    def _make(
        self,
        feature_maps: Sequence[FeatureMap],
        levels: tuple[str, ...],
        out_channels: int,
        coarser: Coarser,
        returned: tuple[str, ...] | None = None,
    ) -> None:
        if out_channels < 1:
            raise ConfigError(f"out_channels of a pyramid must be at least 1, not {out_channels}")
        if coarser not in get_args(Coarser):
            raise ConfigError(f"coarser must be one of {', '.join(get_args(Coarser))}, not {coarser!r}")
        shared = _shared(feature_maps, levels)
        numbers = _level_numbers(levels)
        _refuse_dilated(feature_maps)
        channels = {int(spec.level[1:]): spec.channels for spec in feature_maps}
        self.levels = tuple(levels)
        self.strides = tuple(2**number for number in numbers)
        self.out_channels = out_channels
        self.coarser = coarser
        self.returned = tuple(levels) if returned is None else returned
        if len(channels) == 1:
            self._build_on_one_map(channels[shared[0]], shared[0], numbers)
        else:
            self._build(channels, shared, numbers)
        self._initialise()

    def _build_on_one_map(self, channels: int, level: int, numbers: list[int]) -> None:
        """ViTDet's levels, and those beyond."""
        finest, coarsest = level - SimplePyramid.FINER, level + SimplePyramid.COARSER
        if numbers[0] < finest:
            raise ConfigError(
                f"the pyramid levels {self.levels} start below p{finest}, the finest that ViTDet's pyramid makes of a "
                f"backbone whose one map is c{level}"
            )
        own = [number for number in numbers if number <= coarsest and f"p{number}" in self.returned]
        coarser = [number for number in numbers if number > coarsest]
        self.simple = SimplePyramid(channels, level, own, self.out_channels)
        self.laterals, self.upsamplers, self.outputs = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.downsamplers = self._stride_2(coarser, self.out_channels)

    def _build(self, channels: dict[int, int], shared: list[int], numbers: list[int]) -> None:
        out_channels = self.out_channels
        finer = [number for number in numbers if number < shared[0]]
        coarser = [number for number in numbers if number > shared[-1]]
        self.simple = None
        self.laterals = nn.ModuleDict({f"p{n}": nn.Conv2d(channels[n], out_channels, 1) for n in shared})
        self.upsamplers = nn.ModuleDict(
            {f"p{n}": nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for n in reversed(finer)}
        )
        self.outputs = nn.ModuleDict(
            {
                f"p{n}": nn.Conv2d(out_channels, out_channels, 3, padding=1)
                for n in [*finer, *shared]
                if f"p{n}" in self.returned
            }
        )
        self.downsamplers = self._stride_2(coarser, channels[shared[-1]])

    def _stride_2(self, numbers: list[int], channels: int) -> nn.ModuleDict:
        """A convolution for each level, the first of which reads `channels` channels; none where levels are pooled."""
        if self.coarser == "pool":
            return nn.ModuleDict()
        widths = [channels] + [self.out_channels] * len(numbers)
        return nn.ModuleDict(
            {f"p{n}": nn.Conv2d(width, self.out_channels, 3, 2, 1) for n, width in zip(numbers, widths, strict=False)}
        )

    def _initialise(self) -> None:
        for module in (self.laterals, self.upsamplers, self.outputs, self.downsamplers):
            for convolution in module.values():
                if isinstance(convolution, nn.ConvTranspose2d):
                    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
                elif isinstance(convolution, nn.Conv2d):
                    nn.init.xavier_uniform_(convolution.weight)
                if isinstance(convolution.bias, Tensor):
                    nn.init.zeros_(convolution.bias)

    def merge(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Pyramid of a backbone's maps.

        Args:
            maps: ``{level: (B, channels, h, w)}``, as ``Backbone.forward`` gives them.

        Returns:
            ``{level: (B, out_channels, h, w)}`` in the order of ``returned``.
        """
        pyramid, coarsest = self._own_levels(maps) if self.simple is None else self._levels_of(self.simple, maps)
        for level, downsample in self.downsamplers.items():
            coarsest = pyramid[level] = downsample(coarsest)
        for coarse, level in itertools.pairwise(self.returned):
            if level not in pyramid:  # it is pooled
                pyramid[level] = F.max_pool2d(pyramid[coarse], kernel_size=1, stride=2)
        return pyramid

    @staticmethod
    def _levels_of(simple: SimplePyramid, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The levels of a backbone with one map, and what the next coarser one is made of."""
        (only,) = maps.values()
        pyramid: dict[str, Tensor] = simple(only)
        return pyramid, list(pyramid.values())[-1]

    def _own_levels(self, maps: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The same of a backbone with several."""
        merged = self._top_down(maps)
        finest = next(iter(merged.values()))
        for level, upsample in self.upsamplers.items():
            finest = merged[level] = upsample(finest)
        pyramid = {level: output(merged[level]) for level, output in self.outputs.items()}
        return pyramid, maps["c" + list(self.laterals)[-1][1:]]

    def _top_down(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merged laterals, finest first."""
        merged = {level: lateral(maps["c" + level[1:]]) for level, lateral in self.laterals.items()}
        for coarse, fine in itertools.pairwise(reversed(merged)):
            size = (merged[fine].shape[-2], merged[fine].shape[-1])
            merged[fine] = merged[fine] + F.interpolate(merged[coarse], size=size, mode="nearest")
        return merged


class PyramidNeck(_Levels):
    """`FeaturePyramid` without its backbone, for maps that are made elsewhere, as by MMDetection's backbones.

    Args:
        feature_maps: What the backbone makes, finest first.
        levels: As for `FeaturePyramid`, like the other two.
        out_channels: Channels of every level.
        coarser: How levels coarser than the backbone's are made.
        returned: Those of the levels that the backbone has, or that are finer, which end in a convolution of their own
            and are handed out; the others are only merged into finer ones. All by default.

    Raises:
        ConfigError: As of `FeaturePyramid`.
    """

    def __init__(
        self,
        feature_maps: Sequence[FeatureMap],
        levels: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7"),
        out_channels: int = 256,
        coarser: Coarser = "conv",
        returned: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        self._make(feature_maps, levels, out_channels, coarser, returned)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same as `merge`."""
        return self.merge(maps)


class FeaturePyramid(_Levels):
    """Feature pyramid network (arXiv:1612.03144) whose levels need not be the backbone's.

    * A level that the backbone has gets a 1x1 lateral and the top-down sum (nearest neighbour).
    * Finer levels come from a chain of 2x2 stride-2 transposed convolutions on the finest merged lateral, as in
      EfficientViT's official ``EfficientViTFPN``: its backbone starts at stride 16.
    * Coarser levels come from 3x3 stride-2 convolutions, the first on the backbone's coarsest map, each further one on
      the level before it, without ReLU between, as in MMDetection's RetinaNet (``add_extra_convs="on_input"``); or each
      is every second row and column of the level before it, as in its Faster and Mask R-CNN.
    * Every level except the coarser ones ends in its own 3x3 convolution.

    A backbone with one map, a plain ViT, gets ViTDet's simple pyramid instead (`SimplePyramid`): two levels finer than
    its map, the map, and one coarser, each made of the map alone. Coarser ones still come from 3x3 stride-2
    convolutions, the first on the level before it, or from pooling, as ViTDet's Mask R-CNN has it.

    Outside the simple pyramid there is no normalisation and no activation, and convolutions start Xavier-uniform,
    transposed ones Kaiming-normal (fan out), as in MMDetection. The backbone is brought to its dense form
    (``Backbone.prepare_for_dense``), and those of its parameters that no level depends on are frozen, such as a
    classifier's last norm: they would never get a gradient, which distributed training takes for an error.

    Args:
        backbone: Any backbone.
        levels: Consecutive names, finest first; ``"p3"`` has the nominal stride 2**3.
        out_channels: Channels of every level.
        coarser: How levels coarser than the backbone's are made: ``"conv"`` or ``"pool"``, the latter without weights.

    Attributes:
        strides: Nominal stride of each level. Map sizes follow the tensors: a map of an odd-sized image is rounded up
            by each stride-2 convolution and doubled exactly by each transposed one.

    Raises:
        ConfigError: `levels` is empty or malformed, has a gap, shares no level with the backbone, or asks more of its
            one map than ViTDet's pyramid has; `out_channels` or `coarser` is out of its range; the backbone is dilated
            (``output_stride``), so that several of its maps have one stride.
    """

    def __init__(
        self,
        backbone: Backbone,
        levels: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7"),
        out_channels: int = 256,
        coarser: Coarser = "conv",
    ) -> None:
        super().__init__()
        shared = _shared(backbone.feature_maps, levels)
        _refuse_dilated(backbone.feature_maps)
        backbone.prepare_for_dense()
        freeze_unread(backbone, [f"c{number}" for number in shared])
        self.backbone = backbone
        self._make(backbone.feature_maps, levels, out_channels, coarser)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Pyramid of normalised images.

        Args:
            images: ``(B, 3, H, W)``.

        Returns:
            ``{level: (B, out_channels, h, w)}`` in the order of ``levels``.
        """
        maps: dict[str, Tensor] = self.backbone(images)
        return self.merge(maps)

    def fuse(self) -> FeaturePyramid:
        """Fuses the backbone in place for inference (neither pyramid has a BatchNorm); see ``Backbone.fuse``."""
        self.backbone.fuse()
        return self


def _refuse_dilated(feature_maps: Sequence[FeatureMap]) -> None:
    """Raises `ConfigError` where a map does not have the stride that its name says."""
    for spec in feature_maps:
        if spec.stride != 2 ** int(spec.level[1:]):
            raise ConfigError(
                f"a feature pyramid needs maps of different strides, and {spec.level} has stride {spec.stride}: the "
                "backbone was built with output_stride, which is for DeepLabv3 at that stride; build it without"
            )


def _shared(feature_maps: Sequence[FeatureMap], levels: tuple[str, ...]) -> list[int]:
    """Numbers of the levels that a backbone has a map for.

    Raises:
        ConfigError: There is none, or the levels are malformed.
    """
    offered = [spec.level for spec in feature_maps]
    shared = [number for number in _level_numbers(levels) if f"c{number}" in offered]
    if not shared:
        raise ConfigError(
            f"the pyramid levels {tuple(levels)} and the backbone's maps ({', '.join(offered)}) share no stride"
        )
    return shared


def _level_numbers(levels: tuple[str, ...]) -> list[int]:
    """``("p3", "p4")`` to ``[3, 4]``."""
    if not levels or not all(len(level) > 1 and level[0] == "p" and level[1:].isdecimal() for level in levels):
        raise ConfigError(f"pyramid levels are named 'p3', 'p4', ... finest first; got {tuple(levels)}")
    numbers = [int(level[1:]) for level in levels]
    if numbers != list(range(numbers[0], numbers[-1] + 1)):
        raise ConfigError(f"pyramid levels must be consecutive, finest first; got {tuple(levels)}")
    return numbers
