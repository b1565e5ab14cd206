"""``effvit tables``: published numbers against measured ones, and what each network costs."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effvit._cli import coco_formats, coco_rows, coco_runs, segmentation_formats, segmentation_rows, segmentation_runs
from effvit._cli.table_costs import Cost, count
from effvit.errors import ConfigError, close_matches


@dataclass(frozen=True)
class _Table:
    """A table that can be asked for.

    Attributes:
        kind: What its rows have beside a backbone, and the option that chooses one: ``detector`` or ``head``.
        titles: How each of these is called in print.
        rows: Its rows.
        find_runs: Evaluations below some folders, by row, and those that are not shown.
        line: Makes a line of a row, its cost, its best evaluation and the number of these.
        build: The whole network of a row and its backbone, without memory for their weights.
        image_size: Height and width in pixels at which the network of a row is counted.
        formats: Writers by name.
    """

    kind: str
    titles: Mapping[str, str]
    rows: tuple[Any, ...]
    find_runs: Callable[[list[Path]], tuple[dict[Any, list[Any]], list[Any]]]
    line: Callable[[Any, Cost, Any, int], Any]
    build: Callable[[Any], tuple[Any, Any]]
    image_size: Callable[[Any], tuple[int, int]]
    formats: Mapping[str, Callable[[Any, Any], str]]


def _build_detector(row: coco_rows.CocoRow) -> tuple[Any, Any]:
    from effvit.backbones import create_backbone
    from effvit.tasks.detectors.factory import DetectorSettings, make_detector

    model = coco_rows.config_of(row)["model"]["init_args"]
    backbone = create_backbone(row.backbone, **model.get("backbone_options", {}))
    return make_detector(row.detector, backbone, 80, DetectorSettings()), backbone


def _build_segmenter(row: segmentation_rows.SegmentationRow) -> tuple[Any, Any]:
    from effvit.tasks.segmenters.factory import SegmenterSettings, make_segmenter

    model = segmentation_rows.config_of(row)["model"]["init_args"]
    classes = segmentation_rows.DATA_SETS[row.data_set].classes
    options = model.get("backbone_options")
    segmenter = make_segmenter(row.head, row.backbone, classes, SegmenterSettings(), backbone_options=options)
    return segmenter, segmenter.backbone


_FORMATS = ("csv", "json", "markdown")
_TABLES = {
    "coco": _Table(
        kind="detector",
        titles=coco_rows.DETECTOR_TITLES,
        rows=coco_rows.ROWS,
        find_runs=coco_runs.find_runs,
        line=coco_formats.Line,
        build=_build_detector,
        image_size=lambda row: coco_rows.IMAGE_SIZES[row.detector],
        formats={
            "markdown": coco_formats.markdown,
            "csv": coco_formats.as_csv,
            "json": coco_formats.as_json,
        },
    ),
    "segmentation": _Table(
        kind="head",
        titles=segmentation_rows.HEAD_TITLES,
        rows=segmentation_rows.ROWS,
        find_runs=segmentation_runs.find_runs,
        line=segmentation_formats.Line,
        build=_build_segmenter,
        image_size=lambda row: segmentation_rows.IMAGE_SIZE,  # noqa: ARG005 - one for all rows
        formats={
            "markdown": segmentation_formats.markdown,
            "csv": segmentation_formats.as_csv,
            "json": segmentation_formats.as_json,
        },
    ),
}


def tables(words: list[str]) -> int:
    """Runs ``effvit tables``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: There is no such table, backbone, detector, head or folder, or a file in the folder is damaged.
    """
    own = _parser().parse_intermixed_args(words)
    if own.table not in _TABLES:
        raise ConfigError(f"there is no table {own.table!r}. {close_matches(own.table, _TABLES)}")
    table = _TABLES[own.table]
    rows = _select(table, own)
    found, left_out = table.find_runs(own.results) if own.results else ({}, [])
    lines = [_line(table, row, found.get(row, [])) for row in _watched(rows)]
    text = table.formats[own.format](lines, left_out)
    if own.format == "csv":  # which has no place for them
        for entry in left_out:
            print(f"not in the table: {entry.folder}: {entry.reason}", file=sys.stderr)
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
        description="Print what was published against what your runs reached, and what each network costs.",
        allow_abbrev=False,
    )
    parser.add_argument("table", help=f"which table: {', '.join(_TABLES)}")
    parser.add_argument(
        "pattern", nargs="?", default="*", help="part of a backbone's name, or a wildcard: mobilevitv2, '*_m4'"
    )
    for name, table in _TABLES.items():
        help_text = f"{name}: only one of {', '.join(table.titles)}"
        parser.add_argument(f"--{table.kind}", metavar="NAME", help=help_text)
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders to search for evaluations, such as runs/",
    )
    parser.add_argument("--format", choices=_FORMATS, default="markdown", help="default: %(default)s")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write into a file instead of printing")
    return parser


def _select(table: _Table, own: argparse.Namespace) -> tuple[Any, ...]:
    """The rows that are asked for."""
    for other in _TABLES.values():
        if other.kind != table.kind and getattr(own, other.kind) is not None:
            raise ConfigError(
                f"--{other.kind} is for another table: that of {own.table} is chosen from with --{table.kind}"
            )
    chosen = getattr(own, table.kind)
    if chosen is not None and chosen not in table.titles:
        raise ConfigError(f"the table has no {table.kind} {chosen!r}. {close_matches(chosen, table.titles)}")
    known = _backbones_of(table, chosen)
    names = _matching(own.pattern, known)
    if not names:
        raise ConfigError(_explain_pattern(table, own.pattern, chosen, known))
    return tuple(row for row in table.rows if row.backbone in names and chosen in (None, getattr(row, table.kind)))


def _matching(pattern: str, known: Iterable[str]) -> set[str]:
    """The names that a wildcard fits, or that a plain word is a part of unless it is one of them."""
    names = set(fnmatch.filter(known, pattern))
    if not names and not set(pattern) & set("*?["):
        names = {name for name in known if pattern.lower() in name}
    return names


def _explain_pattern(table: _Table, pattern: str, chosen: str | None, known: Iterable[str]) -> str:
    """Says that no row fits, and under what else there are rows of that backbone, or which names are close."""
    if chosen is None:
        return f"the table has no backbone {pattern!r}. {close_matches(pattern, known)}"
    missing = f"the table has no backbone {pattern!r} under {table.titles[chosen]}"
    elsewhere = [name for name in table.titles if _matching(pattern, _backbones_of(table, name))]
    if elsewhere:
        return f"{missing}. Its rows are under --{table.kind} {' and '.join(elsewhere)}"
    return f"{missing}. {close_matches(pattern, known)}"


def _backbones_of(table: _Table, chosen: str | None) -> list[str]:
    return sorted({row.backbone for row in table.rows if chosen in (None, getattr(row, table.kind))})


def _watched(rows: tuple[Any, ...]) -> Iterable[Any]:
    """The rows, with a bar in the terminal: counting takes a second or two each."""
    from rich.console import Console
    from rich.progress import track

    quiet = not sys.stderr.isatty() or len(rows) == 1
    return track(rows, "counting", console=Console(stderr=True), transient=True, disable=quiet)


def _line(table: _Table, row: Any, runs: list[Any]) -> Any:
    return table.line(row, _count(table, row), runs[0] if runs else None, len(runs))


def _count(table: _Table, row: Any) -> Cost:
    """Builds the network of a row as its configuration does, without memory for its weights, and counts."""
    from effvit.backbones import without_memory

    with without_memory():
        network, backbone = table.build(row)
        return count(network.eval(), backbone, table.image_size(row))
