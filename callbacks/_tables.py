"""The tables at the end of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DASH = "\N{EN DASH}"
COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
#: Columns of tasks other than detection, by the metric that tells them.
_COLUMNS = {"top1": ("top1", "top5", "loss", "ece"), "mIoU": ("mIoU", "mAcc", "aAcc")}
_MOST_CLASSES = 100
_EXTREMES = 10


def format_metric(value: float | None) -> str:
    """A metric with three decimals; COCO's -1 (nothing to find in this range) and a missing value as a dash."""
    return DASH if value is None or math.isnan(value) or value < 0 else f"{value:.3f}"


def format_seconds(seconds: float) -> str:
    """A duration as ``41 s``, ``4 min 07 s`` or ``3 h 25 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(number: int) -> str:
    """A number of images as ``950``, ``12.3k`` or ``1.28M``, three digits."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            whole = len(str(number // size))
            return f"{number / size:.{3 - whole}f}{unit}"
    return str(number)


def metrics_table(metrics: Mapping[str, float], title: str, hardware: Mapping[str, float] | None = None) -> Table:
    """One row for boxes, and one for masks (``mask_AP50``); one of a classifier or a segmenter; else name and value.

    Args:
        metrics: Values by name, without ``val/`` or ``test/``.
        title: Heading.
        hardware: What `HardwareBenchmark` has logged, without ``hardware/``: latency and memory of each batch size get
            columns of their own, ``ms b1`` and ``tensor MB b1``: tensors alive at once, and on a GPU what torch's
            allocator gave for them, not the memory of a whole process.
    """
    costs = _costs(hardware or {})
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=len(title)
    )  # else a narrow table breaks its title into lines
    own = next((columns for first, columns in _COLUMNS.items() if first in metrics), None)
    if own is not None:
        names = [name for name in own if name in metrics]
        for name in (*names, *costs):
            table.add_column(name, justify="right")
        table.add_row(*(format_metric(metrics[name]) for name in names), *costs.values())
        return table
    if "AP" not in metrics:
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, text in ({name: format_metric(value) for name, value in metrics.items()} | costs).items():
            table.add_row(name, text)
        return table
    rows = {"boxes": ""} | ({"masks": "mask_"} if "mask_AP" in metrics else {})
    if len(rows) > 1:
        table.add_column("")
    for name in (*COCO_COLUMNS, *costs):
        table.add_column(name, justify="right")
    for row, prefix in rows.items():
        values = [format_metric(metrics.get(prefix + name)) for name in COCO_COLUMNS]
        values += costs.values() if prefix == "" else []  # boxes and masks come from one pass
        table.add_row(*([row] if len(rows) > 1 else []), *values)
    return table


def _costs(hardware: Mapping[str, float]) -> dict[str, str]:
    """Columns of latency, then of memory, with three digits."""
    units = {"latency_ms_": "ms", "peak_memory_mb_": "tensor MB"}
    return {
        f"{unit} {name.removeprefix(prefix)}": _three_digits(value)
        for prefix, unit in units.items()
        for name, value in hardware.items()
        if name.startswith(prefix)
    }


def _three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{min(max(decimals, 0), 3)}f}"


def class_table(per_class: Sequence[tuple[str, Sequence[float]]], measures: Sequence[str]) -> Table:
    """Metrics of each class; many classes take several columns, very many are cut to the worst and the best ten.

    Args:
        per_class: Class names and their values; NaN or negative for a class without objects or images. The first value
            is the one that worst and best are judged by.
        measures: Names of the values.
    """
    cells = [_cells(name, values) for name, values in per_class]
    side_by_side = 3 if len(measures) == 1 else 2  # in 80 characters names have sixteen or more
    heads = ["class"] * (1 if len(cells) <= 20 else side_by_side)
    if len(cells) > _MOST_CLASSES:
        known = [item for item in per_class if item[1][0] >= 0]  # NaN is left out too
        ranked = [_cells(name, values) for name, values in sorted(known, key=lambda item: item[1][0])]
        cells = ranked[:_EXTREMES] + ranked[: -_EXTREMES - 1 : -1]
        heads = ["worst classes", "best classes"]
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head)
        for measure in measures:
            table.add_column(measure, justify="right")
    columns = len(heads)
    height = -(-len(cells) // columns)
    for row in range(height):
        picked = [cells[row + height * column] for column in range(columns) if row + height * column < len(cells)]
        table.add_row(*(text for cell in picked for text in cell))
    return table


def _cells(name: str, values: Sequence[float]) -> tuple[str, ...]:
    return escape(name), *map(format_metric, values)
