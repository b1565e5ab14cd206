"""``effvit tables``: published numbers against measured ones, and what each network costs."""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effvit._cli.coco_rows import BOX_COLUMNS, DETECTOR_TITLES, MASK_COLUMNS, ROWS, CocoRow
from effvit._cli.coco_runs import LeftOut, Measured, find_runs
from effvit.errors import ConfigError, close_matches

_TABLES = ("coco",)
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


def tables(words: list[str]) -> int:
    """Runs ``effvit tables``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: There is no such table, backbone, detector or folder, or a file in the folder is damaged.
    """
    own = _parser().parse_args(words)
    if own.table not in _TABLES:
        raise ConfigError(f"there is no table {own.table!r}. {close_matches(own.table, _TABLES)}")
    rows = _select(own.pattern, own.detector)
    found, left_out = find_runs(own.results, ROWS) if own.results else ({}, [])
    lines = [_line(row, found.get(row, [])) for row in rows]
    text = _FORMATS[own.format](lines, left_out)
    if own.output is None:
        print(text, end="")
        return 0
    try:
        own.output.parent.mkdir(parents=True, exist_ok=True)
        own.output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {own.output} cannot be written: {error}") from error
    print(f"{len(lines)} rows in {own.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effvit tables",
        description="Print what was published on COCO against what your runs reached, and what each detector costs.",
        allow_abbrev=False,
    )
    parser.add_argument("table", help=f"which table: {', '.join(_TABLES)}")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="part of a backbone's name, or a wildcard: mobilevitv2, '*_m4'"
    )
    parser.add_argument("--detector", metavar="NAME", help=f"only one of {', '.join(DETECTOR_TITLES)}")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders to search for evaluations, such as runs/",
    )
    parser.add_argument("--format", choices=sorted(_FORMATS), default="markdown", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write into a file instead of printing")
    return parser


def _select(pattern: str, detector: str | None) -> tuple[CocoRow, ...]:
    """The rows that are asked for."""
    if detector is not None and detector not in DETECTOR_TITLES:
        raise ConfigError(f"the table has no detector {detector!r}. {close_matches(detector, DETECTOR_TITLES)}")
    rows = [row for row in ROWS if detector in (None, row.detector)]
    known = sorted({row.backbone for row in rows})
    names = set(fnmatch.filter(known, pattern))
    if not names and not set(pattern) & set("*?["):
        names = {name for name in known if pattern.lower() in name}
    if not names:
        under = f" under {DETECTOR_TITLES[detector]}" if detector else ""
        raise ConfigError(f"the table has no backbone {pattern!r}{under}. {close_matches(pattern, known)}")
    return tuple(row for row in rows if row.backbone in names)


def _line(row: CocoRow, runs: Sequence[Measured]) -> Line:
    return Line(row, _count(row), runs[0] if runs else None, len(runs))


def _count(row: CocoRow) -> Cost:
    """Builds the network of a row as its configuration does, without memory for its weights, and counts."""
    import torch

    from effvit._cli.shipped import merged_config, shipped_configs
    from effvit.backbones import create_backbone, without_memory
    from effvit.deploy.flops import count_parts
    from effvit.tasks.detectors.factory import DetectorSettings, make_detector

    model = merged_config(shipped_configs()[row.config])["model"]["init_args"]
    with without_memory():
        backbone = create_backbone(row.backbone, **model.get("backbone_options", {}))
        detector = make_detector(row.detector, backbone, 80, DetectorSettings()).eval()
        image = torch.zeros(1, 3, *row.image_size)
    place = next(name for name, module in detector.named_modules() if module is backbone)
    backbone_macs, macs = count_parts(detector, image, parts=(place, ""))
    return Cost(_parameters(backbone), _parameters(detector), backbone_macs, macs)


def _parameters(network: Any) -> int:
    """Parameters that are trained: detectors freeze those of a backbone that none of their maps depends on."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _differences(measured: Sequence[float | None], published: Sequence[float | None]) -> list[float | None]:
    pairs = zip(measured, published, strict=False)
    return [None if ours is None or theirs is None else ours - theirs for ours, theirs in pairs]


def _markdown(lines: list[Line], left_out: list[LeftOut]) -> str:
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


def _markdown_table(lines: list[Line]) -> Iterator[str]:
    masks = lines[0].row.detector == "mask_rcnn"
    head = ["backbone", "params", "with detector", "FLOPs", "with detector", "numbers", *BOX_COLUMNS]
    head += [f"mask {name}" for name in MASK_COLUMNS] if masks else []
    head += ["checkpoint"]
    body = [cells for line in lines for cells in _markdown_cells(line, masks)]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    left = {0, head.index("numbers"), len(head) - 1}
    yield _join(head, widths, left)
    yield (
        "|"
        + "|".join("-" * (width + 2) if i in left else "-" * (width + 1) + ":" for i, width in enumerate(widths))
        + "|"
    )
    yield from (_join(cells, widths, left) for cells in body)


def _join(cells: Sequence[str], widths: Sequence[int], left: set[int]) -> str:
    padded = [
        f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"


def _markdown_cells(line: Line, masks: bool) -> Iterator[list[str]]:
    """Published numbers, and under them the measured ones and the difference where there are any."""
    row, cost = line.row, line.cost
    costs = [
        _millions(cost.backbone_params),
        _millions(cost.params),
        _billions(cost.backbone_macs),
        _billions(cost.macs),
    ]
    published = row.published
    by = "not published" if published is None else f"published ({published.by})"
    yield [
        row.backbone,
        *costs,
        by,
        *_numbers(published.box if published else (), len(BOX_COLUMNS)),
        *(_numbers(published.mask if published else (), len(MASK_COLUMNS)) if masks else []),
        "published" if row.checkpoint else "none",
    ]
    if line.measured is None:
        return
    box, mask = line.differences()
    for title, boxes, own_masks, form in (
        ("measured", line.measured.box, line.measured.mask, "{:.1f}"),
        ("difference", box, mask, "{:+.1f}"),
    ):
        cells = [
            *_numbers(boxes, len(BOX_COLUMNS), form),
            *(_numbers(own_masks, len(MASK_COLUMNS), form) if masks else []),
        ]
        if title == "measured" or any(cell != _DASH for cell in cells):
            yield ["", "", "", "", "", title, *cells, ""]


def _numbers(values: Iterable[float | None], count: int, form: str = "{:.1f}") -> list[str]:
    given = [_DASH if value is None else form.format(value) for value in values]
    return given + [_DASH] * (count - len(given))


def _notes(lines: list[Line]) -> Iterator[str]:
    """A line for each network of which there is more to say."""
    for line in lines:
        row, parts = line.row, []
        if row.published is not None:
            parts.append(f"numbers: {row.published.source}")
        if row.params is not None:
            parts.append(f"{row.params} M parameters published")
        if row.checkpoint is not None:
            parts.append(f"checkpoint: <{row.checkpoint}>")
        if row.remark:
            parts.append(row.remark)
        if line.measured is not None:
            best = f", the best of {line.runs}" if line.runs > 1 else ""
            parts.append(f"measured: {line.measured.folder}{best}")
        if parts:
            yield f"- {row.backbone}: " + "; ".join(parts)


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}"


def _billions(count: int) -> str:
    value = count / 1e9
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _records(lines: list[Line]) -> list[dict[str, Any]]:
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


def _json(lines: list[Line], left_out: list[LeftOut]) -> str:
    content = {
        "rows": _records(lines),
        "left_out": [{"folder": str(entry.folder), "reason": entry.reason} for entry in left_out],
        "units": _UNITS,
    }
    return json.dumps(content, indent=1) + "\n"


def _csv(lines: list[Line], left_out: list[LeftOut]) -> str:  # noqa: ARG001 - a table has no place for remarks
    records = _records(lines)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


_FORMATS = {"markdown": _markdown, "csv": _csv, "json": _json}
