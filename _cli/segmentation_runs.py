"""Evaluations on ADE20K and PASCAL VOC in the folders of runs, for ``effvit tables segmentation``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from effvit._cli.segmentation_rows import DATA_SETS, ROWS, SegmentationRow, config_of
from effvit._cli.table_runs import (
    Evaluation,
    LeftOut,
    find_evaluations,
    other_data,
    other_images,
    other_options,
    other_value,
)

#: What is measured, in percent.
COLUMNS = ("mIoU", "mAcc", "aAcc")

#: Settings of the task that make another way of looking at an image.
_INFERENCE = {"inference": "whole", "flip_test": False, "test_scales": [1.0]}


@dataclass(frozen=True)
class Measured:
    """One evaluation of one row, in percent.

    Attributes:
        folder: Where its ``metrics.json`` is.
        values: Mean IoU, mean accuracy of the classes, accuracy of the pixels.
    """

    folder: Path
    values: tuple[float | None, ...]


def find_runs(folders: list[Path]) -> tuple[dict[SegmentationRow, list[Measured]], list[LeftOut]]:
    """All evaluations of segmentation below some folders, by the row of the table that they are of.

    They are found as `coco_runs.find_runs` finds those of detectors. One counts only where the log says that the whole
    validation split of the row's data set was evaluated, where network and image size are the row's, and where images
    were looked at once and whole.

    Args:
        folders: Where to look, at any depth.

    Returns:
        Evaluations of each row, best mIoU first; and what looked like an evaluation but is not shown.

    Raises:
        ConfigError: A folder does not exist, or a file in it is damaged.
    """
    found: dict[SegmentationRow, list[Measured]] = {}
    evaluations, left_out = find_evaluations(folders, "mIoU")
    for evaluation in evaluations:
        outcome = _judge(evaluation)
        if isinstance(outcome, str):
            left_out.append(LeftOut(evaluation.folder, outcome))
            continue
        values = tuple(evaluation.metrics.get(name) for name in COLUMNS)
        found.setdefault(outcome, []).append(Measured(evaluation.folder, values))
    for measured in found.values():
        measured.sort(key=lambda entry: entry.values[0] or -1.0, reverse=True)
    return found, sorted(left_out, key=lambda entry: entry.folder)


def _judge(evaluation: Evaluation) -> SegmentationRow | str:
    """The row that an evaluation is of, or why it is of none."""
    head, backbone = evaluation.model.get("head"), evaluation.model.get("backbone")
    row = next((row for row in ROWS if (row.head, row.backbone) == (head, backbone)), None)
    if row is None:
        return f"{head} on {backbone} is no row of the table"
    published, data_set = config_of(row), DATA_SETS[row.data_set]
    model = published["model"]["init_args"]
    return (
        _other_network(row, evaluation)
        or other_options(evaluation, model.get("backbone_options"))
        or other_value("inference", evaluation.model, _INFERENCE)
        or other_data(evaluation, published["data"]["init_args"], ("image_size", "resize"))
        or other_images(evaluation.log, data_set.title, data_set.images, data_set.classes)
        or row
    )


def _other_network(row: SegmentationRow, evaluation: Evaluation) -> str:
    """Which setting makes it another network than the published one, which ``null`` stands for."""
    from effvit.tasks.segmenters.factory import published_settings

    given = {name: value for name, value in evaluation.model.items() if value is not None}
    return other_value("network", given, published_settings(row.head))
