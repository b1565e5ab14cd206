"""The task of a run, rebuilt from its checkpoint without its data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from effvit._cli.launch import open_run, stored_config

if TYPE_CHECKING:
    from effvit.tasks import Task


@dataclass(frozen=True)
class RebuiltRun:
    """A run's task with its weights.

    Attributes:
        task: In eval mode, on the CPU.
        path: The checkpoint.
        config: The configuration that it carries.
        inputs: How its data turned files into network inputs, see `launch.INPUT_SETTINGS`.
        score: What the task's ``monitor`` was when these weights were validated; ``None`` where they were not.
    """

    task: Task
    path: Path
    config: dict[str, Any]
    inputs: dict[str, Any]
    score: float | None


def rebuild(source: str, verb: str) -> RebuiltRun:
    """Rebuilds the task that a checkpoint is of.

    Args:
        source: A checkpoint of a run, or the run's folder.
        verb: What it is wanted for, for messages.

    Raises:
        CheckpointError: The file is missing, damaged, or no checkpoint of a run.
        ConfigError: No effvit command has written it.
    """
    from effvit import tasks

    path, checkpoint = open_run(source, verb)
    config = yaml.safe_load(stored_config(checkpoint, path, verb))
    name = str(config["model"]["class_path"]).rpartition(".")[2]
    stored = checkpoint["hyper_parameters"]
    kind: type[Task] = getattr(tasks, name)
    # Lightning notes more than the settings: the name of the class, and what the command line linked in vain.
    settings = {key: stored[key] for key in inspect.signature(kind).parameters if key in stored}
    task = kind(**settings | {"pretrained": False, "checkpoint": None})  # the weights inside supersede any other
    task.load_weights(checkpoint["state_dict"], str(path), stored)
    return RebuiltRun(
        task.eval(), path, config, checkpoint["effvit"].get("inputs", {}), _score(checkpoint, task.monitor)
    )


def _score(checkpoint: dict[str, Any], monitor: str) -> float | None:
    """The monitored metric of the validation at the very step of a checkpoint."""
    evaluations = checkpoint.get("callbacks", {}).get("RunReport", {}).get("evaluations", [])
    if not evaluations or evaluations[-1][0] != checkpoint["global_step"]:
        return None
    score: float | None = evaluations[-1][1].get(monitor.partition("/")[2])
    return score
