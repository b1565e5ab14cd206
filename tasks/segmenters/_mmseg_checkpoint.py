"""Weights of Semantic FPN that mmsegmentation has trained, for ours.

Files of mmsegmentation 0.x and 1.x name the layers alike. The published ones are EfficientFormer's of both versions
(github.com/snap-research/EfficientFormer, ``segmentation``), trained on RGB images normalised with ImageNet's mean and
deviation, as our backbones are fed.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

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
from effvit.tasks.segmenters._checks import check_classes
from effvit.tasks.segmenters.semantic_fpn import SemanticFPN

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.backbones import LoadReport
    from effvit.tasks.segmenters._contract import Segmenter

#: The classifier of a decode head there, after any prefix such as DistributedDataParallel's.
_ROOT = re.compile(r"^((?:\w+\.)*?)decode_head\.")
_BACKBONE = "backbone."
_HEADS = (
    (r"^head\.", "decode_head."),
    (r"^auxiliary\.conv\.", "auxiliary_head.convs.0."),
    (r"^auxiliary\.", "auxiliary_head."),
)


def is_mmseg(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of a segmenter of mmsegmentation, of any kind."""
    return any(_ROOT.match(name) for name in state)


def load_mmseg(segmenter: Segmenter, state: Mapping[str, Tensor], source: str | Path) -> LoadReport:
    """Loads the weights of a Semantic FPN of mmsegmentation into ours, all of them.

    An auxiliary head in the file is left out where ours has none.

    Args:
        segmenter: Ours, not fused; see also `backbone_options_in`.
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
    _check_kind(segmenter, entries, source)
    assert isinstance(segmenter, SemanticFPN)
    check_classes(segmenter, entries.get("decode_head.conv_seg.bias"), source)
    backbone = segmenter.backbone
    own = {name: value for name, value in segmenter.state_dict().items() if not name.startswith(_BACKBONE)}
    theirs = renamed(own, [*neck_rules(segmenter.neck, "neck.", entries), *_HEADS])
    trunk = {name: value for name, value in entries.items() if name.startswith(_BACKBONE)}
    if reads_other_maps(segmenter.neck, "neck.", theirs, entries):
        load_backbone(backbone, trunk, source)  # which fails, and says whose weights these are
    left_out = (_BACKBONE, "data_preprocessor.") + (() if segmenter.auxiliary is not None else ("auxiliary_head.",))
    heads = {name: value for name, value in entries.items() if not name.startswith(left_out)}
    wrong = differences(own, theirs, heads)
    if wrong:
        raise CheckpointError(
            f"{source} has another pyramid or head than this Semantic FPN, whose pyramid_channels, head_channels and "
            f"auxiliary head must be the file's, and whose backbone must have the same strides: {wrong}"
        )
    report = load_trunk(backbone, trunk, source, "a segmenter")
    loaded = {name: heads[key] for name, key in theirs.items() if key in heads}
    segmenter.load_state_dict(loaded, strict=False)
    return whole_report(report, _BACKBONE, loaded, prefix)


def _check_kind(segmenter: Segmenter, entries: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises `CheckpointError` where the file or the segmenter is no Semantic FPN."""
    if not any(name.startswith("decode_head.scale_heads.") for name in entries):
        layers = sorted({".".join(name.split(".")[:2]) for name in entries if name.startswith("decode_head.")})
        raise CheckpointError(
            f"{source} holds a decode head of mmsegmentation that is none of ours ({some(layers)}): only files of "
            "Semantic FPN (FPNHead) can be loaded"
        )
    if not isinstance(segmenter, SemanticFPN):
        raise CheckpointError(
            f"{source} holds a Semantic FPN of mmsegmentation: build that segmenter (--model.head semantic_fpn)"
        )
