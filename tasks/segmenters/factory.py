"""Segmenters by the name that a configuration gives."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from effvit.backbones import Backbone, can_dilate, create_backbone
from effvit.errors import ConfigError, close_matches
from effvit.tasks.segmenters.deeplabv3 import OUTPUT_STRIDES, RATES, DeepLabV3, check_output_stride
from effvit.tasks.segmenters.semantic_fpn import SemanticFPN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from effvit.tasks.segmenters._contract import Segmenter

HEADS = ("semantic_fpn", "deeplabv3")

_COMMON = frozenset({"pyramid_channels", "head_channels", "dropout", "auxiliary"})
_READS = {"semantic_fpn": _COMMON, "deeplabv3": _COMMON | {"output_stride", "rates"}}
_HEAD_CHANNELS = {"semantic_fpn": 128, "deeplabv3": 256}
_OUTPUT_STRIDE = 16


@dataclass(frozen=True, kw_only=True)
class SegmenterSettings:
    """What segmenters can be told; each reads its own part, see `unread_settings`.

    Attributes:
        pyramid_channels: Channels of every pyramid level.
        head_channels: Channels of the head's branches; ``None`` for the published 128 of Semantic FPN, 256 of
            DeepLabv3.
        dropout: Share of the channels that are zero in training before the classifier.
        output_stride: Stride of the map that DeepLabv3 reads, 8, 16 or 32; ``None`` for the published 16.
        rates: Of DeepLabv3's atrous convolutions; ``None`` for 6, 12 and 18, of output stride 8 twice as much.
        auxiliary: Whether there is an auxiliary head.
    """

    pyramid_channels: int = 256
    head_channels: int | None = None
    dropout: float = 0.1
    output_stride: int | None = None
    rates: tuple[int, ...] | None = None
    auxiliary: bool = False


def make_segmenter(
    head: str,
    backbone_name: str,
    num_classes: int,
    settings: SegmenterSettings,
    *,
    pretrained: bool | str | Path = False,
    backbone_options: Mapping[str, Any] | None = None,
) -> Segmenter:
    """Builds a backbone and a segmenter on it.

    Args:
        head: One of `HEADS`.
        backbone_name: As for ``create_backbone``.
        num_classes: Number of classes.
        settings: What the user chose; what the head does not read is ignored.
        pretrained: As for ``create_backbone``.
        backbone_options: Options of the backbone's family by name.

    Raises:
        ConfigError: There is no such head or backbone, or a setting is out of its range.
        CheckpointError: The backbone's weights cannot be had.
    """
    check_head(head)
    options = dict(backbone_options or {})
    channels = _HEAD_CHANNELS[head] if settings.head_channels is None else settings.head_channels
    if head == "semantic_fpn":
        backbone = create_backbone(backbone_name, pretrained=pretrained, **options)
        return SemanticFPN(
            backbone, num_classes, settings.pyramid_channels, channels, settings.dropout, settings.auxiliary
        )
    stride = _OUTPUT_STRIDE if settings.output_stride is None else settings.output_stride
    check_output_stride(stride)
    return DeepLabV3(
        _with_stride(backbone_name, pretrained, options, stride),
        num_classes,
        channels,
        settings.rates,
        settings.dropout,
        stride,
        settings.auxiliary,
        settings.pyramid_channels,
    )


def check_head(head: str) -> None:
    """Refuses a head that there is not.

    Raises:
        ConfigError: There is no such head; the message offers close matches.
    """
    if head not in HEADS:
        raise ConfigError(f"there is no segmentation head {head!r}. {close_matches(head, list(HEADS))}")


def published_settings(head: str) -> dict[str, Any]:
    """What the settings that decide on the network's layers are where nobody says otherwise.

    Raises:
        ConfigError: There is no such head.
    """
    check_head(head)
    published: dict[str, Any] = {
        "pyramid_channels": SegmenterSettings.pyramid_channels,
        "head_channels": _HEAD_CHANNELS[head],
    }
    if head == "deeplabv3":
        published |= {"output_stride": _OUTPUT_STRIDE, "rates": list(RATES[_OUTPUT_STRIDE])}
    return published


def unread_settings(head: str, settings: SegmenterSettings) -> list[str]:
    """Settings that were given another value than their default although the head does not read them.

    Raises:
        ConfigError: There is no such head.
    """
    check_head(head)
    changed = [field.name for field in fields(settings) if getattr(settings, field.name) != field.default]
    return [name for name in changed if name not in _READS[head]]


def _with_stride(name: str, pretrained: bool | str | Path, options: dict[str, Any], stride: int) -> Backbone:
    """The backbone, dilated to an output stride where its family can be and the stride is not what it has."""
    given = options.get("output_stride", stride)
    if given != stride:
        raise ConfigError(
            f"backbone_options says output_stride {given} and the head's output_stride is {stride}: they must be the "
            "same, and --model.output_stride alone is enough"
        )
    if stride < max(OUTPUT_STRIDES) and can_dilate(name, stride):
        options["output_stride"] = stride
    return create_backbone(name, pretrained=pretrained, **options)
