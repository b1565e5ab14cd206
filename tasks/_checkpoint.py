"""Opening checkpoints of tasks, never running what they hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from effvit.errors import CheckpointError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Opens a checkpoint that a run has written.

    Args:
        path: The file.

    Returns:
        What the file holds, tensors on the CPU. ``state_dict`` are the weights to evaluate: the averaged ones if the
        run averaged weights.

    Raises:
        CheckpointError: No such file, a truncated file, a file that would run code, or not a checkpoint of a run.
    """
    path = Path(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" In {path.parent} there is: {', '.join(there)}." if there else ""
        raise CheckpointError(f"there is no checkpoint {path}.{hint}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is not a plain checkpoint: opening it would need to run code that it holds, which effvit never "
            f"does. Ask its author for the weights alone (a state dict, or safetensors). Refused: {_reason(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) cannot be read: {_reason(error)}. The file is damaged or was not "
            "copied whole; use another checkpoint of the run."
        ) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{path} is not a checkpoint of a run: it has no 'state_dict'.")
    return content


def _reason(error: Exception) -> str:
    """The one informative line of torch's long explanations."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (telling or lines or [type(error).__name__])[0]
