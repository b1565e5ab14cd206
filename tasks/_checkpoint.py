"""Opening the checkpoints of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effvit.backbones import open_checkpoint
from effvit.errors import CheckpointError


def read_run(path: str | Path) -> dict[str, Any]:
    """Opens a checkpoint that a run has written, never running what it holds.

    Args:
        path: The file.

    Returns:
        What the file holds, tensors on the CPU. ``state_dict`` are the weights to evaluate: the averaged ones if the
        run averaged weights.

    Raises:
        CheckpointError: No such file, a truncated file, a file that would run code, or not a checkpoint of a run.
    """
    content = open_checkpoint(path)
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise CheckpointError(
            f"{path} is not a checkpoint of a run: it has no 'state_dict' with 'hyper_parameters'. Weights of a "
            "backbone alone are loaded with --model.pretrained."
        )
    return content
