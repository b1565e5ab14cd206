"""The COCO table as Markdown, CSV and JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effvit._cli.coco_rows import BOX_COLUMNS, DETECTOR_TITLES, MASK_COLUMNS, CocoRow
from effvit._cli.coco_runs import Measured
from effvit._cli.table_costs import Cost
from effvit._cli.table_runs import LeftOut
from effvit._cli.table_text import (
    DASH,
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
    "AP in percent, on COCO's 5000 validation images. Parameters in millions, with 80 classes and without the layers "
    "that only a classifier reads. FLOPs in billions, counted here for one image of the size above: one "
    "multiply-accumulate is one FLOP, as in the papers; convolutions, linear layers and attention products count. An "
    "R-CNN's box head counts for 1000 regions and its mask head for 100."
)


@dataclass(frozen=True)
class Line:
    """One row of the table with all that is known of it; ``measured`` is the best of ``runs`` evaluations."""

    row: CocoRow
    cost: Cost
    measured: Measured | None
    runs: int

    def differences(self) -> tuple[list[float | None], list[float | None]]:
        """Measured less published, of boxes and of masks; ``None`` where one of them is missing."""
        published, measured = self.row.published, self.measured
        if published is None or measured is None:
            return [None] * len(BOX_COLUMNS), [None] * len(MASK_COLUMNS)
        return differences(measured.box, published.box), differences(measured.mask, published.mask)


def markdown(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:
    """One table for each detector, and below it who published what, and where the files are."""
    parts = []
    for detector, title in DETECTOR_TITLES.items():
        chosen = [line for line in lines if line.row.detector == detector]
        if chosen:
            height, width = chosen[0].row.image_size
            parts += [
                f"## {title}, {width}x{height}\n",
                *_markdown_table(chosen),
                "",
                *notes((line.row.backbone, fact) for line in chosen for fact in _facts(line)),
                "",
            ]
    parts += [_UNITS, *not_shown(left_out)]
    return "\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Line]) -> Iterator[str]:
    masks = lines[0].row.detector == "mask_rcnn"
    head = ["backbone", "params M", "total M", "FLOPs G", "total G", "numbers", *BOX_COLUMNS]
    head += [f"mask {name.removeprefix('AP') or name}" for name in MASK_COLUMNS] if masks else []
    head += ["checkpoint"]
    body = [cells for line in lines for cells in _markdown_cells(line, masks)]
    yield from aligned(head, body, ("backbone", "numbers", "checkpoint"))


def _markdown_cells(line: Line, masks: bool) -> Iterator[list[str]]:
    """Published numbers, and under them the measured ones and the difference where there are any."""
    row, cost, published = line.row, line.cost, line.row.published
    yield [
        row.backbone,
        f"{cost.backbone_params / 1e6:.2f}",
        f"{cost.params / 1e6:.2f}",
        billions(cost.backbone_macs),
        billions(cost.macs),
        "not published" if published is None else published.by,
        *numbers(published.box if published else (), len(BOX_COLUMNS), as_printed),
        *(numbers(published.mask if published else (), len(MASK_COLUMNS), as_printed) if masks else []),
        checkpoint_cell(row.checkpoint),
    ]
    if line.measured is None:
        return
    for title, (boxes, own_masks), form in (
        ("measured", (line.measured.box, line.measured.mask), "{:.1f}"),
        ("difference", line.differences(), "{:+.1f}"),
    ):
        cells = numbers(boxes, len(BOX_COLUMNS), form.format)
        cells += numbers(own_masks, len(MASK_COLUMNS), form.format) if masks else []
        if any(cell != DASH for cell in cells):
            yield ["", "", "", "", "", title, *cells, ""]


def _facts(line: Line) -> Iterator[str]:
    row = line.row
    if row.published is not None:
        yield f"numbers from: {row.published.source}"
    if row.params is not None:
        yield f"{row.params} M parameters published"
    if row.checkpoint is not None:
        yield f"checkpoint <{row.checkpoint}>"
    if row.remark:
        yield row.remark
    if line.measured is not None:
        best = f", the best of {line.runs}" if line.runs > 1 else ""
        yield f"measured in {line.measured.folder}{best}"


def _records(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One flat mapping for each row, for programs; numbers that do not exist are ``None``."""
    records = []
    for line in lines:
        row, cost, published, measured = line.row, line.cost, line.row.published, line.measured
        box, mask = line.differences()
        record: dict[str, Any] = {
            "detector": row.detector,
            "backbone": row.backbone,
            "config": row.config,
            "image_height": row.image_size[0],
            "image_width": row.image_size[1],
            "backbone_params": cost.backbone_params,
            "params": cost.params,
            "backbone_macs": cost.backbone_macs,
            "macs": cost.macs,
            "published_by": published.by if published else None,
            "source": published.source if published else None,
            "published_params_millions": row.params,
            "checkpoint": row.checkpoint,
            "remark": row.remark or None,
            "run": str(measured.folder) if measured else None,
            "runs": line.runs,
        }
        record |= _named("published", published.box if published else (), published.mask if published else ())
        record |= _named("measured", measured.box if measured else (), measured.mask if measured else ())
        record |= _named("difference", box, mask)
        records.append(record)
    return records


def _named(kind: str, box: Iterable[float | None], mask: Iterable[float | None]) -> dict[str, float | None]:
    names = [f"{kind}_{name}" for name in BOX_COLUMNS] + [f"{kind}_mask_{name}" for name in MASK_COLUMNS]
    values = _padded(box, len(BOX_COLUMNS)) + _padded(mask, len(MASK_COLUMNS))
    return dict(zip(names, values, strict=True))


def _padded(values: Iterable[float | None], count: int) -> list[float | None]:
    given = [None if value is None else round(value, 4) for value in values]
    return given + [None] * (count - len(given))


def as_json(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:
    """All that is known, unrounded, and what was left out."""
    return json_text(_records(lines), left_out, _UNITS)


def as_csv(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:  # noqa: ARG001 - no place for it
    """The rows as in JSON, a column for each name."""
    return csv_text(_records(lines))
