"""``effvit tables``: published numbers against measured ones, and what each network costs."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effvit._cli.coco_formats import Cost, Line, as_csv, as_json, markdown
from effvit._cli.coco_rows import DETECTOR_TITLES, ROWS, CocoRow, config_of
from effvit._cli.coco_runs import Measured, find_runs
from effvit.errors import ConfigError, close_matches

_TABLES = ("coco",)
_FORMATS = {"markdown": markdown, "csv": as_csv, "json": as_json}


def tables(words: list[str]) -> int:
    """Runs ``effvit tables``.

    Args:
        words: What follows the verb on the command line.

    Returns:
        Exit status.

    Raises:
        ConfigError: There is no such table, backbone, detector or folder, or a file in the folder is damaged.
    """
    own = _parser().parse_intermixed_args(words)
    if own.table not in _TABLES:
        raise ConfigError(f"there is no table {own.table!r}. {close_matches(own.table, _TABLES)}")
    rows = _select(own.pattern, own.detector)
    found, left_out = find_runs(own.results, ROWS) if own.results else ({}, [])
    lines = [_line(row, found.get(row, [])) for row in _watched(rows)]
    text = _FORMATS[own.format](lines, left_out)
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
    names = _matching(pattern, known)
    if not names:
        raise ConfigError(_explain_pattern(pattern, detector, known))
    return tuple(row for row in rows if row.backbone in names)


def _matching(pattern: str, known: Iterable[str]) -> set[str]:
    """The names that a wildcard fits, or that a plain word is a part of unless it is one of them."""
    names = set(fnmatch.filter(known, pattern))
    if not names and not set(pattern) & set("*?["):
        names = {name for name in known if pattern.lower() in name}
    return names


def _explain_pattern(pattern: str, detector: str | None, known: Iterable[str]) -> str:
    """Says that no row fits, and which detectors have rows of that backbone, or which names are close."""
    if detector is None:
        return f"the table has no backbone {pattern!r}. {close_matches(pattern, known)}"
    missing = f"the table has no backbone {pattern!r} under {DETECTOR_TITLES[detector]}"
    elsewhere = [name for name in DETECTOR_TITLES if _matching(pattern, _backbones_of(name))]
    if elsewhere:
        return f"{missing}. Its rows are under --detector {' and '.join(elsewhere)}"
    return f"{missing}. {close_matches(pattern, known)}"


def _backbones_of(detector: str) -> list[str]:
    return [row.backbone for row in ROWS if row.detector == detector]


def _watched(rows: tuple[CocoRow, ...]) -> Iterable[CocoRow]:
    """The rows, with a bar in the terminal: counting takes a second or two each."""
    from rich.console import Console
    from rich.progress import track

    quiet = not sys.stderr.isatty() or len(rows) == 1
    return track(rows, "counting", console=Console(stderr=True), transient=True, disable=quiet)


def _line(row: CocoRow, runs: list[Measured]) -> Line:
    return Line(row, _count(row), runs[0] if runs else None, len(runs))


def _count(row: CocoRow) -> Cost:
    """Builds the network of a row as its configuration does, without memory for its weights, and counts."""
    import torch

    from effvit.backbones import create_backbone, without_memory
    from effvit.deploy.flops import count_parts
    from effvit.tasks.detectors.factory import DetectorSettings, make_detector

    model = config_of(row)["model"]["init_args"]
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
