"""Checks of files that both origins share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effvit.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from effvit.tasks.segmenters._contract import Segmenter


def check_classes(segmenter: Segmenter, bias: Tensor | None, source: str | Path) -> None:
    """Refuses a file of another number of classes.

    Args:
        segmenter: Ours.
        bias: That of the file's classifier, one value for each class.
        source: The file, for messages.

    Raises:
        CheckpointError: It is, with both numbers.
    """
    if bias is not None and bias.numel() != segmenter.num_classes:
        raise CheckpointError(
            f"{source} was trained on {bias.numel()} classes and this segmenter is for {segmenter.num_classes}: use "
            "data with the same classes, or start from a backbone alone with --model.pretrained"
        )
