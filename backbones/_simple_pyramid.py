"""ViTDet's simple feature pyramid, for a backbone with one map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same, in channels-last memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimplePyramid(nn.ModuleDict):
    """Several levels from one map, each on its own (arXiv:2203.16527 §3; Detectron2's ``SimpleFeaturePyramid``).

    Four times finer through two 2x2 stride-2 transposed convolutions, which halve the channels each, with LayerNorm and
    GELU between; twice finer through one; the map itself; twice coarser by 2x2 max-pooling, rounded up. Then for each
    level a 1x1 and a 3x3 convolution without bias, each with a LayerNorm over the channels. Weights start as torch's
    modules do, as in Detectron2.

    Args:
        channels: Channels of the map.
        level: Its number, 4 for stride 16.
        levels: Numbers of the levels wanted, from ``level - 2`` to ``level + 1``.
        out_channels: Channels of every level.
    """

    #: Levels finer and coarser than the map that there can be.
    FINER, COARSER = 2, 1

    def __init__(self, channels: int, level: int, levels: Sequence[int], out_channels: int) -> None:
        super().__init__(
            {
                f"p{n}": nn.Sequential(*_resize(channels, level - n), *_mix(channels, level - n, out_channels))
                for n in levels
            }
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, channels, H, W)`` to ``{level: (B, out_channels, h, w)}``."""
        return {name: level(x) for name, level in self.items()}


def _resize(channels: int, octaves: int) -> list[nn.Module]:
    """From the map to the size of a level that is finer by so many octaves; the channels are halved by each."""
    if octaves < 0:
        return [nn.MaxPool2d(2, 2, ceil_mode=True)]
    layers: list[nn.Module] = []
    for octave in range(octaves):
        if octave:
            layers += [ChannelNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels //= 2
    return layers


def _mix(channels: int, octaves: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels >> max(octaves, 0), out_channels, 1, bias=False),
        ChannelNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        ChannelNorm(out_channels),
    ]
