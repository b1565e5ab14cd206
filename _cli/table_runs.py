"""Evaluations in the folders of runs, for ``effvit tables``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effvit.errors import ConfigError, close_matches

#: The line that data modules write into ``log.txt`` when they have read a split.
SPLIT_READ = re.compile(r"(val|test) split: (\d+) of (\d+) images, (\d+) categories$", re.MULTILINE)

#: The line that a task writes where weights of another project tell options of the backbone, as JSON.
OPTIONS_READ = re.compile(r"backbone options with those of the weights: (\{.*\})$", re.MULTILINE)

#: Options of backbones that act in training only, or that follow from the weights and name no other network.
_NO_OTHER_NETWORK = frozenset({"dropout", "classifier_dropout", "drop_path_rate", "channel_order"})


@dataclass(frozen=True)
class LeftOut:
    """A folder whose numbers are not shown, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What ``effvit validate`` or ``effvit test`` left in a folder.

    Attributes:
        folder: Where its ``metrics.json`` is.
        metrics: Metrics without ``val/`` or ``test/``, in percent; ``None`` where there was nothing to measure.
        model: Arguments of the task, of ``config.yaml``.
        data: Those of the data module.
        trainer: Those of the Trainer.
        log: Text of ``log.txt``.
    """

    folder: Path
    metrics: Mapping[str, float | None]
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    trainer: Mapping[str, Any]
    log: str


def find_evaluations(folders: list[Path], metric: str) -> tuple[list[Evaluation], list[LeftOut]]:
    """All evaluations below some folders that have a metric, and those whose configuration is not there.

    Args:
        folders: Where to look, at any depth.
        metric: Name of the metric, without ``val/`` or ``test/``.

    Raises:
        ConfigError: A folder does not exist, or a file in it is damaged.
    """
    found, left_out = [], []
    for file in sorted({file for folder in folders for file in _metrics_files(folder)}):
        metrics = _read_metrics(file)
        if metric not in metrics:
            continue  # the run of another task
        folder = file.parent
        if not (folder / "config.yaml").is_file():
            left_out.append(LeftOut(folder, "no config.yaml, so that nobody knows what was evaluated"))
            continue
        config = _read_config(folder / "config.yaml")
        model, data = _options(config, "model"), _options(config, "data")
        found.append(Evaluation(folder, metrics, model, data, config.get("trainer") or {}, _read_log(folder)))
    return found, left_out


def other_options(evaluation: Evaluation, published: dict[str, Any] | None) -> str:
    """Says where the backbone has other options than the published one."""
    read = OPTIONS_READ.findall(evaluation.log)
    own = _network_options(json.loads(read[-1]) if read else evaluation.model.get("backbone_options"))
    theirs = _network_options(published)
    if own != theirs:
        return f"another network: backbone_options are {own or 'none'}, published {theirs or 'none'}"
    return ""


def other_value(what: str, given: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """Says which of the published settings has another value."""
    for name, value in published.items():
        if given.get(name, value) != value:
            return f"another {what}: {name} is {given[name]}, published {value}"
    return ""


def other_data(evaluation: Evaluation, published: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What makes it another evaluation than the published one: other images, or a part of them only."""
    for name in names:
        if name in published and evaluation.data.get(name) != published[name]:
            return f"other images: {name} is {evaluation.data.get(name)}, published {published[name]}"
    for name in ("limit_val_batches", "limit_test_batches"):
        if evaluation.trainer.get(name) not in {None, 1.0}:
            return f"a part of the images only ({name}: {evaluation.trainer[name]})"
    return ""


def other_images(log: str, data_set: str, images: int, categories: int) -> str:
    """Says what was evaluated where that is not a data set's validation split, as far as the log tells.

    Args:
        log: Text of ``log.txt``.
        data_set: What the data set is called.
        images: What its validation split is told by: its images.
        categories: And its categories.
    """
    read = SPLIT_READ.findall(log)
    if not read:
        return f"not known to be {data_set}: log.txt does not say how many images and categories were evaluated"
    found = int(read[-1][1]), int(read[-1][3])
    if found != (images, categories):
        return f"other data than {data_set}'s validation images: {found[0]} images, {found[1]} categories"
    return ""


def _metrics_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        hint = close_matches(folder.name, beside) if beside else ""
        raise ConfigError(f"--results {folder}: there is no such folder. {hint}".rstrip())
    return list(folder.rglob("metrics.json"))


def _read_metrics(file: Path) -> dict[str, float | None]:
    """Metrics without ``val/`` or ``test/``, in percent; COCO's -1 (nothing to find) is no number."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as JSON: {error}. Evaluate again, or delete it.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no metrics, which are a mapping of names to numbers")
    metrics: dict[str, float | None] = {}
    for name, value in content.items():
        stage, _, metric = str(name).partition("/")
        if stage not in {"val", "test"} or not isinstance(value, int | float):
            continue
        metrics[metric] = None if value < 0 else 100 * float(value)
    return metrics


def _read_config(file: Path) -> dict[str, Any]:
    import yaml

    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} holds no settings")
    return config


def _options(config: dict[str, Any], part: str) -> dict[str, Any]:
    options = (config.get(part) or {}).get("init_args")
    return options if isinstance(options, dict) else {}


def _read_log(folder: Path) -> str:
    log = folder / "log.txt"
    return log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""


def _network_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those that make a network another one."""
    given = (options or {}).items()
    return {name: value for name, value in given if value is not None and name not in _NO_OTHER_NETWORK}
