"""Evaluations on COCO in the folders of runs, for ``effvit tables coco``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effvit._cli.coco_rows import BOX_COLUMNS, MASK_COLUMNS, CocoRow, config_of
from effvit.errors import ConfigError, close_matches

#: What the validation images of COCO 2017 are told by: their number, and that of the categories.
COCO_IMAGES, COCO_CATEGORIES = 5000, 80

#: The line that `CocoDetection` writes into ``log.txt`` when it has read a split.
_SPLIT_READ = re.compile(r"(val|test) split: (\d+) of (\d+) images, (\d+) categories$", re.MULTILINE)

#: The line that `Detection` writes where weights of another project tell options of the backbone, as JSON.
_OPTIONS_READ = re.compile(r"backbone options with those of the weights: (\{.*\})$", re.MULTILINE)

#: Options of backbones that act in training only, or that follow from the weights and name no other network.
_NO_OTHER_NETWORK = frozenset({"dropout", "classifier_dropout", "drop_path_rate", "channel_order"})


@dataclass(frozen=True)
class Measured:
    """One evaluation of one row, in percent.

    Attributes:
        folder: Where its ``metrics.json`` is.
        box: AP, AP50, AP75, APs, APm, APl.
        mask: AP, AP50, AP75, or nothing where masks were not evaluated.
    """

    folder: Path
    box: tuple[float | None, ...]
    mask: tuple[float | None, ...]


@dataclass(frozen=True)
class LeftOut:
    """A folder whose numbers are not shown, and why."""

    folder: Path
    reason: str


def find_runs(folders: list[Path], rows: tuple[CocoRow, ...]) -> tuple[dict[CocoRow, list[Measured]], list[LeftOut]]:
    """All evaluations of detectors below some folders, by the row of the table that they are of.

    An evaluation is a ``metrics.json`` as ``effvit validate`` and ``effvit test`` write it, with the ``config.yaml``
    and the ``log.txt`` beside it. It counts only where the log says that all 5000 validation images of COCO with their
    80 categories were evaluated, and where the configuration is that of the row: its network, its image size, and the
    published limits of what is detected.

    Args:
        folders: Where to look, at any depth.
        rows: Rows of the table.

    Returns:
        Evaluations of each row, best AP first; and what looked like an evaluation of a detector but is not shown.

    Raises:
        ConfigError: A folder does not exist, or a file in it is damaged.
    """
    found: dict[CocoRow, list[Measured]] = {}
    left_out = []
    for file in sorted({file for folder in folders for file in _metrics_files(folder)}):
        metrics = _read_metrics(file)
        if "AP" not in metrics:
            continue  # the run of a classifier
        outcome = _judge(file.parent, rows)
        if isinstance(outcome, str):
            left_out.append(LeftOut(file.parent, outcome))
            continue
        box = tuple(metrics.get(name) for name in BOX_COLUMNS)
        mask = tuple(metrics.get(f"mask_{name}") for name in MASK_COLUMNS) if "mask_AP" in metrics else ()
        found.setdefault(outcome, []).append(Measured(file.parent, box, mask))
    for measured in found.values():
        measured.sort(key=lambda entry: -1.0 if entry.box[0] is None else entry.box[0], reverse=True)
    return found, left_out


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


def _judge(folder: Path, rows: tuple[CocoRow, ...]) -> CocoRow | str:
    """The row that an evaluation is of, or why it is of none."""
    file = folder / "config.yaml"
    if not file.is_file():
        return "no config.yaml, so that nobody knows what was evaluated"
    config = _read_config(file)
    model, data, trainer = _options(config, "model"), _options(config, "data"), config.get("trainer") or {}
    detector, backbone = model.get("detector"), model.get("backbone")
    row = next((row for row in rows if (row.detector, row.backbone) == (detector, backbone)), None)
    if row is None:
        return f"{detector} on {backbone} is no row of the table"
    log = _read_log(folder)
    return (
        _other_network(row, model, log)
        or _other_limits(row, model)
        or _other_data(row, data, trainer)
        or _other_images(log)
        or row
    )


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


def _other_network(row: CocoRow, model: dict[str, Any], log: str) -> str:
    """Which setting makes it another network than the published one."""
    from effvit.tasks.detectors.factory import DetectorSettings

    published = {field.name: field.default for field in fields(DetectorSettings)}
    for name in ("pyramid_channels", "head_convs", "head_channels"):
        if model.get(name, published[name]) != published[name]:
            return f"another network: {name} is {model[name]}, published {published[name]}"
    read = _OPTIONS_READ.findall(log)
    own = _network_options(json.loads(read[-1]) if read else model.get("backbone_options"))
    theirs = _network_options(config_of(row)["model"]["init_args"].get("backbone_options"))
    if own != theirs:
        return f"another network: backbone_options are {own or 'none'}, published {theirs or 'none'}"
    return ""


def _network_options(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those that make a network another one."""
    given = (options or {}).items()
    return {name: value for name, value in given if value is not None and name not in _NO_OTHER_NETWORK}


def _other_limits(row: CocoRow, model: dict[str, Any]) -> str:
    """Which limit on detections is another one than the detector's published one, which ``null`` stands for."""
    from effvit.tasks.detectors.factory import detector_kind

    kind = detector_kind(row.detector)
    for name in ("score_threshold", "nms_threshold", "detections_per_image"):
        if model.get(name) not in {None, getattr(kind, name)}:
            return f"other limits: {name} is {model[name]}, published {getattr(kind, name)}"
    return ""


def _other_data(row: CocoRow, data: dict[str, Any], trainer: dict[str, Any]) -> str:
    """What makes it another evaluation than the published one: other images, or a part of them only."""
    published = config_of(row)["data"]["init_args"]
    for name in ("image_size", "resize"):
        if name in published and data.get(name) != published[name]:
            return f"other images: {name} is {data.get(name)}, published {published[name]}"
    for name in ("limit_val_batches", "limit_test_batches"):
        if trainer.get(name) not in {None, 1.0}:
            return f"a part of the images only ({name}: {trainer[name]})"
    return ""


def _other_images(log: str) -> str:
    """Says what was evaluated where that is not COCO, as far as the log tells."""
    read = _SPLIT_READ.findall(log)
    if not read:
        return "not known to be COCO: log.txt does not say how many images and categories were evaluated"
    _, images, _, categories = read[-1]
    if (int(images), int(categories)) != (COCO_IMAGES, COCO_CATEGORIES):
        return f"other data than COCO's validation images: {images} images, {categories} categories"
    return ""
