"""Opening the checkpoints of runs, and the networks that others have published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

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
    if not _is_run(content):
        raise CheckpointError(
            f"{path} is not a checkpoint of a run: it has no 'state_dict' with 'hyper_parameters'. Weights of a "
            "backbone alone are loaded with --model.pretrained."
        )
    run: dict[str, Any] = content
    return run


def _is_run(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("hyper_parameters"), Mapping):
        return False
    state = content.get("state_dict")
    return isinstance(state, Mapping) and len(_tensors(state)) == len(state)


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}


def read_published(
    path: str | Path | None, is_published: Callable[[dict[str, Tensor]], bool]
) -> dict[str, Tensor] | None:
    """Opens a checkpoint that MMDetection, mmsegmentation or ml-cvnets has written, never running what it holds.

    Args:
        path: The file.
        is_published: Tells by its weights whether it is one of theirs.

    Returns:
        Its weights, on the CPU; ``None`` where the file is no such checkpoint, or where there is none.

    Raises:
        CheckpointError: No such file, a truncated file, or a file that would run code.
    """
    if path is None:
        return None
    content = open_checkpoint(path)
    if not isinstance(content, dict) or "hyper_parameters" in content:
        return None
    inner = content.get("state_dict", content)
    state = _tensors(inner) if isinstance(inner, Mapping) else {}
    return state if is_published(state) else None
