"""Weights of the SSDLite that Apple has published for MobileViT, for ours.

Source: the names of apple/ml-cvnets ``cvnets/models/detection/ssd.py`` and ``cvnets/modules/ssd_heads.py``. The
background is the first class there and the last one here. The backbone reads its images as its family's classification
files do, BGR for MobileViT, and is turned to RGB with them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from effvit.backbones import LoadReport, load_state
from effvit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.tasks.detectors._contract import Detector
    from effvit.tasks.detectors.ssdlite import SSDLite

_PREDICTOR = re.compile(r"^ssd_heads\.(\d+)\.loc_cls_layer\.(?:pw_conv\.)?block\.conv\.(weight|bias)$")
_BOX = 4
# In this order.
_RENAMING = (
    (r"^extra_layers\.os_-1\.1\.block\.conv\.", "coarser.global.1.0."),
    (r"^extra_layers\.os_(\d+)\.", r"coarser.\1."),
    (r"^ssd_heads\.(\d+)\.proj_layer\.", r"heads.\1.project."),
    (r"^ssd_heads\.(\d+)\.loc_cls_layer\.dw_conv\.", r"heads.\1.mix."),
    (r"^(coarser\.\d+)\.dw_conv\.", r"\1.0."),
    (r"^(coarser\.\d+)\.pw_conv\.", r"\1.1."),
    (r"\.block\.conv\.", ".0."),
    (r"\.block\.norm\.", ".1."),
)


def is_cvnets(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of an SSD of ml-cvnets."""
    return any(name.startswith("ssd_heads.") for name in state)


def load_cvnets(detector: Detector, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Loads the weights of an SSD of ml-cvnets into one of ours, all of them.

    Args:
        detector: An SSDLite on a MobileViT or a MobileViTv2, not fused.
        state: The file's entries.
        source: The file, for messages.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: The detector is no SSDLite, or the file is of another backbone or number of classes, or not
            complete.
    """
    from effvit.tasks.detectors.ssdlite import SSDLite

    if not isinstance(detector, SSDLite):
        raise CheckpointError(f"{source} holds an SSDLite of ml-cvnets: build that detector (--model.detector ssdlite)")
    encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
    rest = {name: value for name, value in state.items() if name not in encoder}
    values = _renamed(rest, detector)
    own = {
        name: value
        for name, value in detector.state_dict().items()
        if not name.startswith("backbone.") and not (name.endswith("num_batches_tracked") and name not in values)
    }
    odd = [name for name in own if name not in values or own[name].shape != values[name].shape]
    odd += [name for name in values if name not in own]
    if odd:
        raise CheckpointError(f"{source} {_difference(odd, values, detector)}")
    report = load_state(detector.backbone, encoder, source)
    detector.load_state_dict(values, strict=False)
    inside = tuple(f"backbone.{name}" for name in report.matched)
    missing = tuple(f"backbone.{name}" for name in report.missing)
    return LoadReport((*inside, *values), missing, report.unexpected, (), ())


def _renamed(state: Mapping[str, Tensor], detector: SSDLite) -> dict[str, Tensor]:
    """The layers after the backbone under our names."""
    anchors = dict(enumerate(detector.anchors.num_anchors_per_location()))
    values = {}
    for key, value in state.items():
        predictor = _PREDICTOR.match(key)
        count = anchors.get(int(predictor[1])) if predictor is not None else None
        if predictor is not None and count is not None and not len(value) % count:
            level = f"heads.{predictor[1]}"
            by_anchor = value.reshape(count, -1, *value.shape[1:])
            classes = torch.cat([by_anchor[:, _BOX + 1 :], by_anchor[:, _BOX : _BOX + 1]], dim=1)
            values[f"{level}.boxes.{predictor[2]}"] = by_anchor[:, :_BOX].flatten(0, 1)
            values[f"{level}.classes.{predictor[2]}"] = classes.flatten(0, 1)
            continue
        for pattern, replacement in _RENAMING:
            key = re.sub(pattern, replacement, key)  # noqa: PLW2901 - one rule after the other
        values[key] = value
    return values


def _difference(odd: list[str], values: Mapping[str, Tensor], detector: SSDLite) -> str:
    """Why a file does not fit, for the message."""
    bias = values.get("heads.0.classes.bias")
    if bias is not None and all(name.startswith(detector.class_parameters) for name in odd):
        given = bias.numel() // detector.anchors.num_anchors_per_location()[0] - 1
        return (
            f"was trained on {given} classes and this detector is for {detector.num_classes}: use data with the same "
            "classes, or start from a backbone alone with --model.pretrained"
        )
    return (
        f"does not fit an SSDLite on {detector.backbone.info.name}: {len(odd)} layers are missing, unknown or of "
        f"another shape, first {odd[0]}"
    )
