"""The table of semantic segmentation as Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effvit._cli.segmentation_rows import DATA_SETS, HEAD_TITLES, IMAGE_SIZE, ROWS, SegmentationRow
from effvit._cli.segmentation_runs import COLUMNS, Measured
from effvit._cli.table_costs import Cost
from effvit._cli.table_runs import LeftOut
from effvit._cli.table_text import (
    aligned,
    as_printed,
    billions,
    checkpoint_cell,
    csv_text,
    differences,
    json_text,
    not_shown,
    notes,
    numbers,
)

_UNITS = (
    "mIoU, mAcc and aAcc in percent, on all validation images at their own size. Parameters in millions, with the "
    "classes of the data set and without the layers that only a classifier reads. FLOPs in billions, counted here for "
    "one image of the size above: one multiply-accumulate is one FLOP, as in the papers; convolutions, linear layers "
    "and attention products count."
)


@dataclass(frozen=True)
class Line:
    """One row of the table with all that is known of it; ``measured`` is the best of ``runs`` evaluations."""

    row: SegmentationRow
    cost: Cost
    measured: Measured | None
    runs: int

    def published(self) -> tuple[float | None, ...]:
        """Published numbers by `COLUMNS`: of the accuracies there are none."""
        found = self.row.published
        return (found.miou if found else None, *[None] * (len(COLUMNS) - 1))

    def values(self) -> tuple[float | None, ...]:
        """Measured numbers by `COLUMNS`."""
        return self.measured.values if self.measured else (None,) * len(COLUMNS)


def markdown(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:
    """One table for each head and data set, and below it who published what, and where the files are."""
    parts = []
    for head, data_set in dict.fromkeys((row.head, row.data_set) for row in ROWS):
        chosen = [line for line in lines if (line.row.head, line.row.data_set) == (head, data_set)]
        if chosen:
            facts = ((line.row.backbone, fact) for line in chosen for fact in _facts(line))
            title = f"{HEAD_TITLES[head]} on {DATA_SETS[data_set].title}, {IMAGE_SIZE[1]}x{IMAGE_SIZE[0]}"
            parts += [f"## {title}\n", *_markdown_table(chosen), "", *notes(facts), ""]
    parts += [_UNITS, *not_shown(left_out)]
    return "\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Line]) -> Iterator[str]:
    head = ["backbone", "params M", "total M", "FLOPs G", "total G", "numbers", *COLUMNS, "checkpoint"]
    body = [cells for line in lines for cells in _markdown_cells(line)]
    yield from aligned(head, body, ("backbone", "numbers", "checkpoint"))


def _markdown_cells(line: Line) -> Iterator[list[str]]:
    """Published numbers, and under them the measured ones and the difference where there are any."""
    row, cost = line.row, line.cost
    yield [
        row.backbone,
        f"{cost.backbone_params / 1e6:.2f}",
        f"{cost.params / 1e6:.2f}",
        billions(cost.backbone_macs),
        billions(cost.macs),
        "not published" if row.published is None else row.published.by,
        *numbers(line.published(), len(COLUMNS), as_printed),
        checkpoint_cell(row.checkpoint),
    ]
    if line.measured is not None:
        empty = [""] * 5
        yield [*empty, "measured", *numbers(line.values(), len(COLUMNS), "{:.1f}".format), ""]
        if row.published is not None:
            apart = differences(line.values(), line.published())
            yield [*empty, "difference", *numbers(apart, len(COLUMNS), "{:+.1f}".format), ""]


def _facts(line: Line) -> Iterator[str]:
    row = line.row
    if row.published is not None:
        yield f"number from: {row.published.source}"
    if row.params is not None:
        yield f"{row.params} M parameters published"
    if row.checkpoint is not None:
        yield f"checkpoint <{row.checkpoint}>"
    if row.remark:
        yield row.remark
    if line.measured is not None:
        best = f", the best of {line.runs}" if line.runs > 1 else ""
        yield f"measured in {line.measured.folder}{best}"


def _record(line: Line) -> dict[str, Any]:
    """A flat mapping, for programs; numbers that do not exist are ``None``."""
    row, cost, measured = line.row, line.cost, line.measured
    record: dict[str, Any] = {
        "head": row.head,
        "backbone": row.backbone,
        "data_set": row.data_set,
        "config": row.config,
        "image_height": IMAGE_SIZE[0],
        "image_width": IMAGE_SIZE[1],
        "backbone_params": cost.backbone_params,
        "params": cost.params,
        "backbone_macs": cost.backbone_macs,
        "macs": cost.macs,
        "published_by": row.published.by if row.published else None,
        "source": row.published.source if row.published else None,
        "published_params_millions": row.params,
        "checkpoint": row.checkpoint,
        "remark": row.remark or None,
        "run": str(measured.folder) if measured else None,
        "runs": line.runs,
    }
    kinds = {
        "published": line.published(),
        "measured": line.values(),
        "difference": differences(line.values(), line.published()),
    }
    for kind, values in kinds.items():
        for name, value in zip(COLUMNS, values, strict=True):
            record[f"{kind}_{name}"] = None if value is None else round(value, 4)
    return record


def as_json(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:
    """All that is known, unrounded, and what was left out."""
    return json_text([_record(line) for line in lines], left_out, _UNITS)


def as_csv(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:  # noqa: ARG001 - no place for it
    """The rows as in JSON, a column for each name."""
    return csv_text([_record(line) for line in lines])
