"""Semantic FPN: a feature pyramid whose levels are brought to one size and summed.

Paper: Kirillov et al., Panoptic Feature Pyramid Networks (arXiv 1901.02446), section 3.1. The arithmetic is that of
mmsegmentation's ``FPN`` and ``FPNHead``, with which EfficientFormer's segmenters were trained
(github.com/snap-research/EfficientFormer, ``segmentation``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from effvit.backbones import Backbone, PyramidNeck, freeze_unread
from effvit.tasks.segmenters._contract import Segmenter
from effvit.tasks.segmenters._layers import ConvNormReLU, check_channels, check_dropout, enlarge
from effvit.tasks.segmenters.auxiliary import FCNHead

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Numbers of the finest level, and of the coarsest unless the backbone has coarser maps.
_FINEST, _COARSEST = 2, 5
_AUXILIARY_CHANNELS = 256


class SemanticFPN(Segmenter):
    """Segmenter on a feature pyramid from stride 4 on; logits have stride 4.

    Levels are p2 to p5, and p6 where the backbone has a map of stride 64, as EfficientViT. A level that the backbone
    lacks is made as in detection, see ``FeaturePyramid``: by transposed convolutions below EfficientViT's stride 16,
    from its one map for a plain ViT. The backbone is brought to its dense form, and those of its parameters that no
    level depends on are frozen.

    Args:
        backbone: Any backbone that is not dilated.
        num_classes: Number of classes.
        pyramid_channels: Channels of every pyramid level.
        head_channels: Channels of every branch of the head.
        dropout: Share of the channels that are zero in training before the classifier.
        auxiliary: Whether there is an auxiliary head of 256 channels on the map of the last stage but one.

    Raises:
        ConfigError: A value is out of its range, or the backbone is dilated.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        pyramid_channels: int = 256,
        head_channels: int = 128,
        dropout: float = 0.1,
        auxiliary: bool = False,
    ) -> None:
        super().__init__(backbone, num_classes)
        check_channels("head_channels", head_channels)
        check_dropout(dropout)
        own = [int(spec.level[1:]) for spec in backbone.feature_maps]
        levels = tuple(f"p{number}" for number in range(_FINEST, max(_COARSEST, own[-1]) + 1))
        backbone.prepare_for_dense()
        self.neck = PyramidNeck(backbone.feature_maps, levels, pyramid_channels)
        freeze_unread(backbone, [f"c{number}" for number in own if number >= _FINEST])
        self.head = FPNHead(pyramid_channels, self.neck.strides, head_channels, num_classes, dropout)
        self.stride = self.neck.strides[0]
        if auxiliary:
            self.auxiliary = FCNHead(self.auxiliary_map.channels, _AUXILIARY_CHANNELS, num_classes, dropout)

    def decode(self, maps: Mapping[str, Tensor]) -> Tensor:
        """See ``Segmenter.decode``."""
        logits: Tensor = self.head(list(self.neck(maps).values()))
        return logits


class FPNHead(nn.Module):
    """Each level through 3x3 convolutions and doublings to the size of the finest, their sum, and a 1x1 classifier.

    Args:
        in_channels: Channels of the levels.
        strides: Of the levels, finest first, each twice the one before.
        channels: Width of the head.
        num_classes: Number of classes.
        dropout: Share of the channels that are zero in training before the classifier.
    """

    def __init__(
        self, in_channels: int, strides: tuple[int, ...], channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.scale_heads = nn.ModuleList(_scale_head(in_channels, channels, octaves) for octaves in range(len(strides)))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, levels: list[Tensor]) -> Tensor:
        """``(B, in_channels, h, w)`` of each level, finest first, to logits ``(B, num_classes, h, w)`` of its size."""
        finest, *coarser = (head(level) for head, level in zip(self.scale_heads, levels, strict=True))
        size = (finest.shape[-2], finest.shape[-1])
        for level in coarser:
            finest = finest + enlarge(level, size)
        logits: Tensor = self.conv_seg(self.dropout(finest))
        return logits


def _scale_head(in_channels: int, channels: int, octaves: int) -> nn.Sequential:
    """One convolution for each doubling, one without any for the finest level."""
    layers: list[nn.Module] = [ConvNormReLU(in_channels, channels, 3)]
    for octave in range(octaves):
        if octave:
            layers.append(ConvNormReLU(channels, channels, 3))
        layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)
