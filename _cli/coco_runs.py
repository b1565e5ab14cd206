"""Evaluations on COCO in the folders of runs, for ``effvit tables coco``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from effvit._cli.coco_rows import BOX_COLUMNS, MASK_COLUMNS, ROWS, CocoRow, config_of
from effvit._cli.table_runs import (
    Evaluation,
    LeftOut,
    find_evaluations,
    other_data,
    other_images,
    other_options,
    other_value,
)

#: What the validation images of COCO 2017 are told by: their number, and that of the categories.
_IMAGES, _CATEGORIES = 5000, 80


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


def find_runs(folders: list[Path]) -> tuple[dict[CocoRow, list[Measured]], list[LeftOut]]:
    """All evaluations of detectors below some folders, by the row of the table that they are of.

    An evaluation is a ``metrics.json`` as ``effvit validate`` and ``effvit test`` write it, with the ``config.yaml``
    and the ``log.txt`` beside it. It counts only where the log says that all 5000 validation images of COCO with their
    80 categories were evaluated, and where the configuration is that of the row: its network, its image size, and the
    published limits of what is detected.

    Args:
        folders: Where to look, at any depth.

    Returns:
        Evaluations of each row, best AP first; and what looked like an evaluation of a detector but is not shown.

    Raises:
        ConfigError: A folder does not exist, or a file in it is damaged.
    """
    found: dict[CocoRow, list[Measured]] = {}
    evaluations, left_out = find_evaluations(folders, "AP")
    for evaluation in evaluations:
        outcome = _judge(evaluation)
        if isinstance(outcome, str):
            left_out.append(LeftOut(evaluation.folder, outcome))
            continue
        metrics = evaluation.metrics
        box = tuple(metrics.get(name) for name in BOX_COLUMNS)
        mask = tuple(metrics.get(f"mask_{name}") for name in MASK_COLUMNS) if "mask_AP" in metrics else ()
        found.setdefault(outcome, []).append(Measured(evaluation.folder, box, mask))
    for measured in found.values():
        measured.sort(key=lambda entry: -1.0 if entry.box[0] is None else entry.box[0], reverse=True)
    return found, sorted(left_out, key=lambda entry: entry.folder)


def _judge(evaluation: Evaluation) -> CocoRow | str:
    """The row that an evaluation is of, or why it is of none."""
    detector, backbone = evaluation.model.get("detector"), evaluation.model.get("backbone")
    row = next((row for row in ROWS if (row.detector, row.backbone) == (detector, backbone)), None)
    if row is None:
        return f"{detector} on {backbone} is no row of the table"
    published = config_of(row)
    return (
        _other_network(evaluation)
        or other_options(evaluation, published["model"]["init_args"].get("backbone_options"))
        or _other_limits(row, evaluation)
        or other_data(evaluation, published["data"]["init_args"], ("image_size", "resize"))
        or other_images(evaluation.log, "COCO", _IMAGES, _CATEGORIES)
        or row
    )


def _other_network(evaluation: Evaluation) -> str:
    """Which setting makes it another network than the published one."""
    from effvit.tasks.detectors.factory import DetectorSettings

    published = {field.name: field.default for field in fields(DetectorSettings)}
    names = ("pyramid_channels", "head_convs", "head_channels")
    return other_value("network", evaluation.model, {name: published[name] for name in names})


def _other_limits(row: CocoRow, evaluation: Evaluation) -> str:
    """Which limit on detections is another one than the detector's published one, which ``null`` stands for."""
    from effvit.tasks.detectors.factory import detector_kind

    kind = detector_kind(row.detector)
    for name in ("score_threshold", "nms_threshold", "detections_per_image"):
        if evaluation.model.get(name) not in {None, getattr(kind, name)}:
            return f"other limits: {name} is {evaluation.model[name]}, published {getattr(kind, name)}"
    return ""
