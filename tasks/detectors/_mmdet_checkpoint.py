"""Weights of detectors that MMDetection has trained, for ours.

Files of MMDetection 2.x and 3.x name the layers alike: ``backbone``, ``neck`` and the heads, of which the background is
the last class. The published ones are EfficientViT-M4's RetinaNet and Mask R-CNN (github.com/microsoft/Cream,
``EfficientViT/downstream``) and the Mask R-CNN of both EfficientFormers (github.com/snap-research/EfficientFormer,
``detection``). All were trained on RGB images normalised with ImageNet's mean and deviation, as our backbones are fed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from effvit.backbones import FeaturePyramid, LoadReport, outline
from effvit.backbones import load_state as load_backbone
from effvit.errors import CheckpointError
from effvit.tasks._published import (
    differences,
    load_trunk,
    neck_rules,
    reads_other_maps,
    renamed,
    some,
    whole_report,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.tasks.detectors._contract import Detector

#: The heads of a detector there, after any prefix such as DistributedDataParallel's; torchvision has roi_heads.
_ROOT = re.compile(r"^((?:(?!roi_heads\.)\w+\.)*?)(?:roi_head|rpn_head|bbox_head|mask_head|panoptic_head)\.")
_BACKBONE = "pyramid.backbone."

# What our heads, which are torchvision's, are called there.
_HEADS = (
    (r"^head\.classification_head\.conv\.(\d+)\.0\.", r"bbox_head.cls_convs.\1.conv."),
    (r"^head\.regression_head\.conv\.(\d+)\.0\.", r"bbox_head.reg_convs.\1.conv."),
    (r"^head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
    (r"^head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask_head\.(\d+)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
)

# Which layers tell a detector, the first that fits; what we call it, and how it is chosen.
_KINDS = (
    ("roi_head.mask_head.conv_logits.", "a Mask R-CNN", "mask_rcnn"),
    ("roi_head.bbox_head.fc_cls.", "a Faster R-CNN", "faster_rcnn"),
    ("bbox_head.retina_cls.", "a RetinaNet", "retinanet"),
)


class _Kind(NamedTuple):
    title: str
    option: str


def is_mmdet(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of a detector of MMDetection, of any kind."""
    return any(_ROOT.match(name) for name in state)


def backbone_options_in(state: Mapping[str, Tensor], backbone_name: str) -> dict[str, Any]:
    """Options that a backbone has to be built with, see ``create_backbone``, to take the weights of a detector.

    Args:
        state: The detector's weights.
        backbone_name: The backbone that they are to be loaded into.

    Returns:
        Such as ``{"official_grid": 25}`` for the files of Snap's detectors.
    """
    return outline(backbone_name).options_in(state)


def load_mmdet(detector: Detector, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Loads the weights of a detector of MMDetection into one of ours, all of them.

    Args:
        detector: A RetinaNet, Faster R-CNN or Mask R-CNN of ours, not fused; see also `backbone_options_in`.
        state: The file's entries.
        source: The file, for messages.

    Returns:
        What was loaded. `unexpected` can only hold entries of the backbone that it does not read.

    Raises:
        CheckpointError: The file holds another detector, backbone or number of classes, or not all of the weights; the
            detector may then have those of the backbone.
    """
    prefix = next((found[1] for name in state if (found := _ROOT.match(name))), None)
    if prefix is None:
        raise CheckpointError(f"{source} holds no detector of MMDetection: it has no entries of a head")
    entries = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    theirs = _counterparts(detector, entries)
    _check_kind(theirs.values(), entries, source, type(detector).__name__)
    _check_classes(detector, theirs, entries, source)
    pyramid = detector.get_submodule("pyramid")
    assert isinstance(pyramid, FeaturePyramid)
    backbone = pyramid.backbone
    trunk = {name: value for name, value in entries.items() if name.startswith("backbone.")}
    if reads_other_maps(pyramid, "pyramid.", theirs, entries):
        load_backbone(backbone, trunk, source)  # which fails, and says whose weights these are
    _check_layers(detector, theirs, entries, source)
    report = load_trunk(backbone, trunk, source, "a detector")
    detector.load_state_dict({name: entries[key] for name, key in theirs.items()}, strict=False)
    return whole_report(report, _BACKBONE, theirs, prefix)


def _counterparts(detector: Detector, entries: Iterable[str]) -> dict[str, str]:
    """For each entry of ours outside the backbone, its name there; our own where there is none."""
    pyramid = getattr(detector, "pyramid", None)
    neck = neck_rules(pyramid, "pyramid.", entries) if isinstance(pyramid, FeaturePyramid) else []
    return renamed((name for name in detector.state_dict() if not name.startswith(_BACKBONE)), [*neck, *_HEADS])


def _kind_of(names: Iterable[str]) -> _Kind | None:
    names = list(names)
    for layer, title, option in _KINDS:
        if any(name.startswith(layer) for name in names):
            return _Kind(title, option)
    return None


def _check_kind(ours: Iterable[str], entries: Mapping[str, Tensor], source: str | Path, detector: str) -> None:
    """Refuses a file of another detector, naming what it is where that can be told.

    Raises:
        CheckpointError: It is.
    """
    wanted, given = _kind_of(ours), _kind_of(entries)
    if wanted is None:
        raise CheckpointError(f"{source} is a file of MMDetection, whose weights {detector} cannot take")
    if given is None:
        heads = sorted({".".join(name.split(".")[:2]) for name in entries if _ROOT.match(name)})
        raise CheckpointError(
            f"{source} holds a detector of MMDetection that is none of ours ({some(heads)}): use it with its "
            "configuration, --model.detector mmdet --model.mmdet_config FILE"
        )
    if given != wanted:
        raise CheckpointError(
            f"{source} holds {given.title} of MMDetection, not {wanted.title}: build that detector "
            f"(--model.detector {given.option})"
        )


def _check_classes(
    detector: Detector, theirs: Mapping[str, str], entries: Mapping[str, Tensor], source: str | Path
) -> None:
    """Refuses a file of other classes.

    Raises:
        CheckpointError: It is, with both numbers.
    """
    for key in theirs.values():
        if not key.endswith(("retina_cls.bias", "fc_cls.bias")) or key not in entries:
            continue
        background = key.endswith("fc_cls.bias")
        boxes = entries.get(key.replace("retina_cls", "retina_reg"))  # of every anchor, also of another number of them
        anchors = 1 if background or boxes is None else max(1, boxes.numel() // 4)
        given = entries[key].numel() // anchors - background
        if given != detector.num_classes:
            raise CheckpointError(
                f"{source} was trained on {given} classes and this detector is for {detector.num_classes}: use data "
                "with the same classes, or start from a backbone alone with --model.pretrained"
            )


def _check_layers(
    detector: Detector, theirs: Mapping[str, str], entries: Mapping[str, Tensor], source: str | Path
) -> None:
    """Refuses a file whose neck or heads have other layers than ours.

    Raises:
        CheckpointError: It has; missing, additional or of another shape.
    """
    heads = {name: value for name, value in entries.items() if not name.startswith(("backbone.", "data_preprocessor."))}
    wrong = differences(detector.state_dict(), theirs, heads)
    if wrong:
        raise CheckpointError(
            f"{source} has another pyramid or other heads than this detector, whose pyramid_channels, head_convs and "
            f"head_channels must be the file's, and whose backbone must have the same strides: {wrong}"
        )
