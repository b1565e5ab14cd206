"""The tables at the end of a run."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

DASH = "\N{EN DASH}"
COCO_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


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


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """One row for each kind of result (``AP50`` is a box metric, ``segm/AP50`` a row of its own), or name and value.

    Args:
        metrics: Values by name, without ``val/`` or ``test/``.
        title: Heading.
    """
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    groups = sorted({name.rpartition("/")[0] for name in metrics if name.rpartition("/")[2] == "AP"})
    if not groups:
        table.add_column("metric")
        table.add_column("value", justify="right")
        for name, value in metrics.items():
            table.add_row(name, format_metric(value))
        return table
    if groups != [""]:
        table.add_column("")
    for name in COCO_COLUMNS:
        table.add_column(name, justify="right")
    for group in groups:
        prefix = f"{group}/" if group else ""
        values = [format_metric(metrics.get(prefix + name)) for name in COCO_COLUMNS]
        table.add_row(*([group or "boxes"] if groups != [""] else []), *values)
    return table


def class_table(per_class: Mapping[str, float]) -> Table:
    """AP of each class; many classes take several columns."""
    columns = 1 if len(per_class) <= 20 else 3
    table = Table(box=box.SIMPLE_HEAD)
    for _ in range(columns):
        table.add_column("class")
        table.add_column("AP", justify="right")
    cells = [(name, format_metric(value)) for name, value in per_class.items()]
    height = -(-len(cells) // columns)
    for row in range(height):
        picked = [cells[row + height * column] for column in range(columns) if row + height * column < len(cells)]
        table.add_row(*(text for cell in picked for text in cell))
    return table
