"""Weights of DeepLabv3 that Apple has published for MobileViT, for ours.

Source: the names of apple/ml-cvnets ``cvnets/models/segmentation``. Version 0.1 (commit d38a116), which the files of
the MobileViT paper are of, reads images with OpenCV, in BGR, and enlarges logits with corners not aligned. Later
versions read RGB and align corners. They can be told apart by the name of the classifier.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from effvit.errors import CheckpointError
from effvit.tasks._published import differences, load_trunk, renamed, whole_report
from effvit.tasks.segmenters._checks import check_classes
from effvit.tasks.segmenters.deeplabv3 import DeepLabV3

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.backbones import LoadReport
    from effvit.tasks.segmenters._contract import Segmenter

_ROOT = re.compile(r"^((?:\w+\.)*?)seg_head\.")
_ASPP = "seg_head.aspp.aspp_layer."
_CLASSIFIER = "seg_head.classifier."
_AUXILIARY = "seg_head.aux_head."
#: How the two versions call the layers of the classifier and of the auxiliary head.
_OLD = ("classifier.", "aux_projection.", "aux_classifier.")
_NEW = ("", "0.", "2.")


def is_cvnets(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of a segmenter of ml-cvnets, of any kind."""
    return any(_ROOT.match(name) for name in state)


def of_first_version(state: Mapping[str, Tensor]) -> bool:
    """Whether a file is one of version 0.1, see the module's docstring."""
    return any(f"{_CLASSIFIER}{_OLD[0]}" in name for name in state)


def load_cvnets(segmenter: Segmenter, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Loads the weights of a DeepLabv3 of ml-cvnets into ours, all of them, and enlarges logits as its version does.

    An auxiliary head in the file is left out where ours has none. The output stride and the rates cannot be told from
    the weights: they must be those of the file's recipe.

    Args:
        segmenter: A DeepLabv3 on a MobileViT or a MobileViTv2, not fused; see also `backbone_options_in`.
        state: The file's entries.
        source: The file, for messages.

    Returns:
        What was loaded.

    Raises:
        CheckpointError: The file holds another segmenter, backbone or number of classes, or not all of the weights; the
            segmenter may then have those of the backbone.
    """
    prefix = next(found[1] for name in state if (found := _ROOT.match(name)))
    entries = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not isinstance(segmenter, DeepLabV3) or not any(name.startswith(_ASPP) for name in entries):
        kind = "a DeepLabv3" if any(name.startswith(_ASPP) for name in entries) else "a segmenter other than DeepLabv3"
        raise CheckpointError(
            f"{source} holds {kind} of ml-cvnets: only DeepLabv3 can be loaded, into that segmenter (--model.head "
            "deeplabv3)"
        )
    first = of_first_version(entries)
    rules = _rules(_OLD if first else _NEW, len(segmenter.head.branches))
    check_classes(segmenter, entries.get(f"{_CLASSIFIER}{(_OLD if first else _NEW)[0]}block.conv.bias"), source)
    own = {name: value for name, value in segmenter.state_dict().items() if not name.startswith("backbone.")}
    theirs = renamed(own, rules)
    heads = {name: value for name, value in entries.items() if name.startswith("seg_head.")}
    if segmenter.auxiliary is None:
        heads = {name: value for name, value in heads.items() if not name.startswith(_AUXILIARY)}
    trunk = {name: value for name, value in entries.items() if name.startswith("encoder.")}
    wrong = differences(own, theirs, heads)
    if wrong and segmenter.backbone.feature_maps[-1].channels != _width(heads):
        load_trunk(segmenter.backbone, trunk, source, "a segmenter")  # which fails, and says whose weights these are
    if wrong:
        raise CheckpointError(
            f"{source} has another head than this DeepLabv3, whose head_channels and auxiliary head must be the file's "
            f"and whose backbone must be dilated: {wrong}"
        )
    report = load_trunk(segmenter.backbone, trunk, source, "a segmenter")
    loaded = {name: heads[key] for name, key in theirs.items() if key in heads}
    segmenter.load_state_dict(loaded, strict=False)
    segmenter.align_corners = not first
    return whole_report(report, "backbone.", loaded, prefix)


def _rules(names: tuple[str, str, str], branches: int) -> list[tuple[str, str]]:
    classifier, projection, auxiliary = names
    layers = [
        (r"^head\.branches\.(\d+)\.", rf"{_ASPP}convs.\1."),
        (r"^head\.pool\.", f"{_ASPP}convs.{branches}.aspp_pool.conv_1x1."),
        (r"^head\.project\.", f"{_ASPP}project."),
        (r"^auxiliary\.conv\.", f"{_AUXILIARY}{projection}"),
    ]
    parts = [("conv.", "block.conv."), ("bn.", "block.norm.")]
    return [
        *((old + re.escape(part), new + there) for old, new in layers for part, there in parts),
        (r"^head\.conv_seg\.", f"{_CLASSIFIER}{classifier}block.conv."),
        (r"^auxiliary\.conv_seg\.", f"{_AUXILIARY}{auxiliary}block.conv."),
    ]


def _width(heads: Mapping[str, Tensor]) -> int | None:
    """Channels of the map that the file's head reads."""
    weight = heads.get(f"{_ASPP}convs.0.block.conv.weight")
    return None if weight is None else weight.shape[1]
