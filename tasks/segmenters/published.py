"""Published weights of segmenters, of any origin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from effvit.backbones import LoadReport
    from effvit.tasks.segmenters._contract import Segmenter


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the entries of a checkpoint are those of a segmenter of mmsegmentation or ml-cvnets."""
    return any("decode_head." in name or "seg_head." in name for name in state)


def backbone_options_in(state: Mapping[str, Tensor], backbone_name: str) -> dict[str, Any]:
    """Options that a backbone has to be built with to take the weights of a segmenter, see ``create_backbone``."""
    raise NotImplementedError


def load_published(segmenter: Segmenter, state: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """Loads the weights of a published segmenter into one of ours, all of them.

    Raises:
        CheckpointError: The file is of another segmenter, backbone or number of classes, or not complete.
    """
    raise NotImplementedError
