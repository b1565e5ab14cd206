"""The COCO table as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from effvit._cli.coco_rows import BOX_COLUMNS, DETECTOR_TITLES, MASK_COLUMNS, CocoRow
from effvit._cli.coco_runs import LeftOut, Measured

_UNITS = (
    "AP in percent, on COCO's 5000 validation images. Parameters in millions, with 80 classes and without the layers "
    "that only a classifier reads. FLOPs in billions, counted here for one image of the size above: one "
    "multiply-accumulate is one FLOP, as in the papers; convolutions, linear layers and attention products count. An "
    "R-CNN's box head counts for 1000 regions and its mask head for 100."
)
_DASH = "-"


@dataclass(frozen=True)
class Cost:
    """What a detector costs.

    Attributes:
        backbone_params: Parameters of the backbone that the detector reads.
        params: Those of the whole detector.
        backbone_macs: Multiply-accumulates of the backbone for one image.
        macs: Those of the whole detector.
    """

    backbone_params: int
    params: int
    backbone_macs: int
    macs: int


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
        return _differences(measured.box, published.box), _differences(measured.mask, published.mask)


def _differences(measured: Sequence[float | None], published: Sequence[float | None]) -> list[float | None]:
    pairs = zip(measured, published, strict=False)
    return [None if ours is None or theirs is None else ours - theirs for ours, theirs in pairs]


def markdown(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:
    """One table for each detector, and below it who published what, and where the files are."""
    parts = []
    for detector, title in DETECTOR_TITLES.items():
        chosen = [line for line in lines if line.row.detector == detector]
        if chosen:
            height, width = chosen[0].row.image_size
            parts += [f"## {title}, {width}x{height}\n", *_markdown_table(chosen), "", *_notes(chosen), ""]
    parts.append(_UNITS)
    if left_out:
        parts += ["", "Evaluations that are not in the table:", ""]
        parts += [f"- {entry.folder}: {entry.reason}" for entry in left_out]
    return "\n".join(parts) + "\n"


def _markdown_table(lines: Sequence[Line]) -> Iterator[str]:
    masks = lines[0].row.detector == "mask_rcnn"
    head = ["backbone", "params M", "total M", "FLOPs G", "total G", "numbers", *BOX_COLUMNS]
    head += [f"mask {name.removeprefix('AP') or name}" for name in MASK_COLUMNS] if masks else []
    head += ["checkpoint"]
    body = [cells for line in lines for cells in _markdown_cells(line, masks)]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    left = {0, head.index("numbers"), len(head) - 1}
    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    for cells in (head, rule, *body):
        padded = [
            f"{cell:<{width}}" if i in left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield "| " + " | ".join(padded) + " |"


def _markdown_cells(line: Line, masks: bool) -> Iterator[list[str]]:
    """Published numbers, and under them the measured ones and the difference where there are any."""
    row, cost, published = line.row, line.cost, line.row.published
    yield [
        row.backbone,
        f"{cost.backbone_params / 1e6:.2f}",
        f"{cost.params / 1e6:.2f}",
        _billions(cost.backbone_macs),
        _billions(cost.macs),
        "not published" if published is None else published.by,
        *_numbers(published.box if published else (), BOX_COLUMNS, _published),
        *(_numbers(published.mask if published else (), MASK_COLUMNS, _published) if masks else []),
        _checkpoint(row),
    ]
    if line.measured is None:
        return
    for title, (boxes, own_masks), form in (
        ("measured", (line.measured.box, line.measured.mask), "{:.1f}"),
        ("difference", line.differences(), "{:+.1f}"),
    ):
        cells = _numbers(boxes, BOX_COLUMNS, form.format)
        cells += _numbers(own_masks, MASK_COLUMNS, form.format) if masks else []
        if any(cell != _DASH for cell in cells):
            yield ["", "", "", "", "", title, *cells, ""]


def _checkpoint(row: CocoRow) -> str:
    if row.checkpoint is None:
        return "none"
    return "file" if row.checkpoint.endswith((".pt", ".pth")) else "folder"


def _published(value: float) -> str:
    """With the decimals that it was published with, one or two."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"


def _numbers(values: Iterable[float | None], columns: Sequence[str], form: Callable[[float], str]) -> list[str]:
    given = [_DASH if value is None else form(value) for value in values]
    return given + [_DASH] * (len(columns) - len(given))


def _notes(lines: Sequence[Line]) -> Iterator[str]:
    """Sources, remarks, checkpoints and folders, each once with the backbones that it is about."""
    about: dict[str, list[str]] = {}
    for line in lines:
        for fact in _facts(line):
            about.setdefault(fact, []).append(line.row.backbone)
    yield from (f"- {', '.join(names)}: {fact}" for fact, names in about.items())


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


def _billions(count: int) -> str:
    value = count / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


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
    content = {
        "rows": _records(lines),
        "left_out": [{"folder": str(entry.folder), "reason": entry.reason} for entry in left_out],
        "units": _UNITS,
    }
    return json.dumps(content, indent=1) + "\n"


def as_csv(lines: Sequence[Line], left_out: Sequence[LeftOut]) -> str:  # noqa: ARG001 - no place for it
    """The rows as in JSON, a column for each name."""
    records = _records(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
