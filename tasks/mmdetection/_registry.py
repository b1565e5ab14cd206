"""effvit's backbones and pyramid for configurations of MMDetection.

Importing ``effvit.tasks.mmdetection`` fills the registry, so a configuration for MMDetection's own ``Runner`` has
``custom_imports = dict(imports=["effvit.tasks.mmdetection"])``; ``type="effvit.Backbone"`` is then found from anywhere,
since this registry is a child of MMEngine's, under the scope ``effvit``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry
from torch import Tensor, nn

from effvit.backbones import FeatureMap, PyramidNeck, create_backbone, freeze_unread, without_memory
from effvit.errors import ConfigError
from effvit.tasks._task import freeze_norm_statistics

MODELS = Registry("model", parent=ROOT, scope="effvit")


@MODELS.register_module(name="Backbone")
class RegisteredBackbone(nn.Module):
    """Any backbone of effvit as MMDetection wants it: images to a tuple of maps, finest first.

    Args:
        name: One of ``effvit backbones``.
        pretrained: ``True`` for the published weights, or the path of a file.
        levels: The maps to hand over, such as ``("c3", "c4", "c5")``; all by default.
        options: Options of the family, such as ``dict(keep_ratio=0.5)``.
        norm_eval: Keep the statistics of BatchNorm fixed in training, as the published detection recipes do.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
        init_cfg: Of MMEngine's; not taken, since weights come through `pretrained`.

    Raises:
        ConfigError: There is no such backbone, option or map, or there is an `init_cfg`.
        CheckpointError: The weights cannot be had or do not fill the network.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool | str = False,
        levels: Sequence[str] | None = None,
        options: dict[str, Any] | None = None,
        norm_eval: bool = True,
        gradient_checkpointing: bool = False,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise ConfigError("effvit.Backbone takes no init_cfg: give the file of its weights as `pretrained`")
        self.network = create_backbone(name, pretrained=pretrained, **(options or {}))
        self.network.set_grad_checkpointing(gradient_checkpointing)
        self.network.prepare_for_dense()
        self.levels = _levels_of(name, self.network.feature_maps, levels)
        freeze_unread(self.network, self.levels)
        self.norm_eval = norm_eval

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """``(B, 3, H, W)`` to one ``(B, channels, h, w)`` a level."""
        maps = self.network(images)
        return tuple(maps[level] for level in self.levels)

    def train(self, mode: bool = True) -> RegisteredBackbone:
        """Training or eval mode; with ``norm_eval`` the statistics of BatchNorm stay fixed in both."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_norm_statistics(self.network)
        return self


@MODELS.register_module(name="FeaturePyramid")
class RegisteredPyramid(nn.Module):
    """effvit's pyramid as a neck of MMDetection: it makes levels that the backbone does not have.

    MMDetection's FPN wants a map of each stride from 4 or 8 on; EfficientViT starts at 16, and a plain ViT has one map.

    Args:
        backbone: Name of the backbone below, of type ``effvit.Backbone``.
        levels: Levels to make, finest first; ``"p3"`` has the stride 8.
        out_channels: Channels of each.
        in_levels: What the backbone was given as `levels`; all of its maps by default.
        backbone_options: What the backbone was given as `options`.
        extra: How levels coarser than the backbone's maps are made: ``on_input``, convolutions on its coarsest map, as
            RetinaNet has them; ``on_output``, convolutions on the level before, as FCOS and ATSS have them; ``pool``,
            every second cell of the level before, as Faster R-CNN has them. ViTDet's pyramid, of a backbone with one
            map, has ``on_output`` for ``on_input``.
        relu: Whether a ReLU comes before each convolution on a level, but for the first one with ``on_input``.

    Raises:
        ConfigError: There is no such backbone or level, or the pyramid cannot be made of its maps.
    """

    def __init__(
        self,
        backbone: str,
        levels: Sequence[str] = ("p3", "p4", "p5", "p6", "p7"),
        out_channels: int = 256,
        in_levels: Sequence[str] | None = None,
        backbone_options: dict[str, Any] | None = None,
        extra: Literal["on_input", "on_output", "pool"] = "on_input",
        relu: bool = False,
    ) -> None:
        super().__init__()
        if extra not in {"on_input", "on_output", "pool"}:
            raise ConfigError(f"extra must be on_input, on_output or pool, not {extra!r}")
        maps = maps_of(backbone, backbone_options)
        self.in_levels = _levels_of(backbone, maps, in_levels)
        coarsest = next(spec for spec in maps if spec.level == self.in_levels[-1])
        # ViTDet's pyramid of a backbone with one map has a level that is coarser than it.
        last = int(coarsest.level[1:]) + (len(maps) == 1)
        own = [level for level in levels if extra == "pool" or int(level[1:]) <= last]
        self.pyramid = PyramidNeck(maps, tuple(own), out_channels, coarser="pool")
        self.on_input = extra == "on_input" and len(maps) > 1
        self.relu = relu
        widths = [coarsest.channels if self.on_input else out_channels, *[out_channels] * len(levels)]
        self.extra = nn.ModuleList(
            _stride_2(width, out_channels) for width, _ in zip(widths, levels[len(own) :], strict=False)
        )

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map ``(B, channels, h, w)`` an input level to one ``(B, out_channels, h, w)`` a level."""
        pyramid: dict[str, Tensor] = self.pyramid(dict(zip(self.in_levels, maps, strict=True)))
        levels = list(pyramid.values())
        for number, convolution in enumerate(self.extra):
            source = maps[-1] if number == 0 and self.on_input else levels[-1]
            plain = not self.relu or (number == 0 and self.on_input)
            levels.append(convolution(source if plain else F.relu(source)))
        return tuple(levels)


def _stride_2(channels: int, out_channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, out_channels, 3, 2, 1)
    nn.init.xavier_uniform_(convolution.weight)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
    return convolution


def maps_of(backbone: str, options: dict[str, Any] | None = None) -> tuple[FeatureMap, ...]:
    """The maps that a backbone makes, finest first, without building it.

    Raises:
        ConfigError: There is no such backbone or option.
    """
    with without_memory():
        return create_backbone(backbone, **(options or {})).feature_maps


def _levels_of(name: str, maps: Sequence[FeatureMap], levels: Sequence[str] | None) -> tuple[str, ...]:
    there = [spec.level for spec in maps]
    chosen = tuple(there if levels is None else levels)
    if not chosen or list(chosen) != [level for level in there if level in chosen]:
        raise ConfigError(f"levels of {name} must be some of {', '.join(there)}, finest first, not {list(chosen)}")
    return chosen
