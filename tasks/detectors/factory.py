"""Detectors by the name that a configuration gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from effvit.backbones import Backbone, FeaturePyramid
from effvit.errors import ConfigError, close_matches
from effvit.tasks.detectors._contract import Detector


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """What detectors can be told; each reads its own part, see `unread_settings`.

    Attributes:
        pyramid_channels: Channels of every pyramid level.
        head_convs: Stacked 3x3 convolutions: in each branch of RetinaNet's head, in Mask R-CNN's mask head.
        head_channels: Hidden units of the two layers of the box head of an R-CNN.
        roi_samples: Regions of each image that an R-CNN's heads learn from.
        score_threshold: Detections need a score above this one; ``None`` for the detector's published value.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped; ``None`` likewise.
        detections_per_image: Most detections of an image; ``None`` likewise.
        pad_divisor: Each image counts as padded to a multiple of this.
    """

    pyramid_channels: int = 256
    head_convs: int = 4
    head_channels: int = 1024
    roi_samples: int = 512
    score_threshold: float | None = None
    nms_threshold: float | None = None
    detections_per_image: int | None = None
    pad_divisor: int = 32


class _Kind(NamedTuple):
    """One detector: how to build it, and which settings change it."""

    make: Callable[[Backbone, int, DetectorSettings], Detector]
    reads: frozenset[str]
    score_threshold: float
    nms_threshold: float
    detections_per_image: int


_LIMITS = frozenset({"score_threshold", "nms_threshold", "detections_per_image"})
_R_CNN = _LIMITS | {"pyramid_channels", "head_channels", "roi_samples", "pad_divisor"}


def make_detector(name: str, backbone: Backbone, num_classes: int, settings: DetectorSettings) -> Detector:
    """Builds a detector on a backbone.

    Args:
        name: One of `DETECTORS`.
        backbone: The network; it is brought to its dense form.
        num_classes: Number of object classes.
        settings: What the user chose; what the detector does not read is ignored.

    Raises:
        ConfigError: There is no such detector, or a setting is out of its range.
    """
    kind = detector_kind(name)
    published = {limit: getattr(kind, limit) for limit in _LIMITS if getattr(settings, limit) is None}
    return kind.make(backbone, num_classes, replace(settings, **published))


def unread_settings(name: str, settings: DetectorSettings) -> list[str]:
    """Settings that were given another value than their default although the detector does not read them.

    MMDetection's engine reads none: its own configuration says all.
    """
    own = frozenset() if name == "mmdet" else detector_kind(name).reads
    reads = own | {"pad_divisor"}  # the command line takes that one from the data
    changed = [field.name for field in fields(settings) if getattr(settings, field.name) != field.default]
    return [field for field in changed if field not in reads]


def detector_kind(name: str) -> _Kind:
    """The row of a detector.

    Raises:
        ConfigError: There is no such detector; the message offers close matches.
    """
    if name not in DETECTORS:
        raise ConfigError(f"there is no detector {name!r}. {close_matches(name, [*DETECTORS, 'mmdet'])}")
    return DETECTORS[name]


def _limits(settings: DetectorSettings) -> tuple[float, float, int]:
    score, overlap, most = settings.score_threshold, settings.nms_threshold, settings.detections_per_image
    assert score is not None
    assert overlap is not None
    assert most is not None
    return score, overlap, most


def _retinanet(backbone: Backbone, num_classes: int, settings: DetectorSettings) -> Detector:
    from effvit.tasks.detectors.retinanet import RetinaNet

    score, overlap, most = _limits(settings)
    return RetinaNet(
        FeaturePyramid(backbone, ("p3", "p4", "p5", "p6", "p7"), settings.pyramid_channels),
        num_classes,
        head_convs=settings.head_convs,
        score_threshold=score,
        nms_threshold=overlap,
        detections_per_image=most,
        pad_divisor=settings.pad_divisor,
    )


def _r_cnn_pyramid(backbone: Backbone, settings: DetectorSettings) -> FeaturePyramid:
    return FeaturePyramid(backbone, ("p2", "p3", "p4", "p5", "p6"), settings.pyramid_channels, coarser="pool")


def _faster_rcnn(backbone: Backbone, num_classes: int, settings: DetectorSettings) -> Detector:
    from effvit.tasks.detectors.rcnn import FasterRCNN

    score, overlap, most = _limits(settings)
    return FasterRCNN(
        _r_cnn_pyramid(backbone, settings),
        num_classes,
        head_channels=settings.head_channels,
        roi_samples=settings.roi_samples,
        score_threshold=score,
        nms_threshold=overlap,
        detections_per_image=most,
        pad_divisor=settings.pad_divisor,
    )


def _mask_rcnn(backbone: Backbone, num_classes: int, settings: DetectorSettings) -> Detector:
    from effvit.tasks.detectors.rcnn import MaskRCNN

    score, overlap, most = _limits(settings)
    return MaskRCNN(
        _r_cnn_pyramid(backbone, settings),
        num_classes,
        head_channels=settings.head_channels,
        head_convs=settings.head_convs,
        roi_samples=settings.roi_samples,
        score_threshold=score,
        nms_threshold=overlap,
        detections_per_image=most,
        pad_divisor=settings.pad_divisor,
    )


def _ssdlite(backbone: Backbone, num_classes: int, settings: DetectorSettings) -> Detector:
    from effvit.tasks.detectors.ssdlite import SSDLite

    score, overlap, most = _limits(settings)
    return SSDLite(backbone, num_classes, score_threshold=score, nms_threshold=overlap, detections_per_image=most)


#: The built-in detectors, each with its published thresholds. Their modules are imported when one is built.
DETECTORS = {
    "retinanet": _Kind(_retinanet, _LIMITS | {"pyramid_channels", "head_convs", "pad_divisor"}, 0.05, 0.5, 100),
    "faster_rcnn": _Kind(_faster_rcnn, _R_CNN, 0.05, 0.5, 100),
    "mask_rcnn": _Kind(_mask_rcnn, _R_CNN | {"head_convs"}, 0.05, 0.5, 100),
    "ssdlite": _Kind(_ssdlite, _LIMITS, 0.01, 0.5, 200),
}
