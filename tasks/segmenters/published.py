"""Published weights of segmenters: files of mmsegmentation and of ml-cvnets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effvit.backbones import outline
from effvit.tasks.segmenters._cvnets_checkpoint import is_cvnets, load_cvnets, of_first_version
from effvit.tasks.segmenters._mmseg_checkpoint import is_mmseg, load_mmseg

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.backbones import LoadReport
    from effvit.tasks.segmenters._contract import Segmenter


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of a segmenter of mmsegmentation or ml-cvnets, of any kind."""
    return is_mmseg(state) or is_cvnets(state)


def backbone_options_in(state: Mapping[str, Tensor], backbone_name: str) -> dict[str, Any]:
    """Options that a backbone has to be built with, see ``create_backbone``, to take the weights of a segmenter.

    Args:
        state: The segmenter's weights.
        backbone_name: The backbone that they are to be loaded into.

    Returns:
        Such as ``{"official_grid": 16}`` for the files of Snap's segmenters, or ``{"channel_order": "rgb"}`` for a
        MobileViT of a version of ml-cvnets that no longer reads BGR.

    Raises:
        ConfigError: There is no such backbone.
    """
    backbone = outline(backbone_name)
    if is_cvnets(state) and not of_first_version(state) and getattr(backbone, "published_order", "rgb") == "bgr":
        return {"channel_order": "rgb"}
    return backbone.options_in(state)


def load_published(segmenter: Segmenter, state: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """Loads the weights of a published segmenter into one of ours, all of them.

    Args:
        segmenter: Ours, not fused, on a backbone that was built with the file's options (`backbone_options_in`).
        state: The file's entries, of which `is_published` holds.
        path: The file, for messages.

    Returns:
        What was loaded. `unexpected` can only hold entries of the backbone that it does not read.

    Raises:
        CheckpointError: The file is of another segmenter, backbone or number of classes, or not complete.
    """
    load = load_cvnets if is_cvnets(state) else load_mmseg
    return load(segmenter, state, path)
