"""The picture of a run's history: loss, metrics and learning rate over steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from effvit.deploy._files import whole_file
from effvit.deploy._looks import BLUE, GREEN, GREY, ORANGE, style

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes


def draw_curves(
    path: Path,
    steps: Sequence[int],
    losses: Sequence[float],
    rates: Sequence[float],
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
    metrics: Sequence[str],
) -> None:
    """Writes the curves of a run as PNG.

    Args:
        path: Where to write.
        steps: Optimizer step of each training record.
        losses: Mean training loss up to each record.
        rates: Learning rate at each record.
        evaluations: Step and metrics of each validation.
        metrics: Names of the metrics to draw, of those in ``evaluations``.
    """
    # A Figure of its own, not pyplot: no global state, no window system, nothing for the user's own plots to meet.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), dpi=110)
    figure.subplots_adjust(
        left=0.045, right=0.985, bottom=0.15, top=0.9, wspace=0.2
    )  # twice as fast as a layout engine
    loss_axes, metric_axes, rate_axes = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    _loss(loss_axes, steps, losses)
    _metrics(metric_axes, evaluations, metrics)
    unit = 10.0 ** math.floor(math.log10(max(rates, default=0.0) or 1.0))
    rate_axes.plot(steps, [rate / unit for rate in rates], color=GREEN, linewidth=1.6)
    rate_axes.set_ylim(bottom=0)
    rate_title = f"learning rate  [{unit:.0e}]"
    for axes, title in ((loss_axes, "training loss"), (metric_axes, "validation"), (rate_axes, rate_title)):
        style(axes, title, "step")
        if steps:
            axes.set_xlim(left=0)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over a twentieth of the values, at most ten, without the pull towards its start.

    The correction at the start is that of Adam's moments (arXiv 1412.6980, section 3).
    """
    share = 1 - 1 / min(max(1.0, len(values) / 20), 10.0)
    result, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = share * mean + (1 - share) * value
        weight = share * weight + (1 - share)
        result.append(mean / weight)
    return result


def _loss(axes: Axes, steps: Sequence[int], losses: Sequence[float]) -> None:
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1)
    axes.plot(steps, smooth(losses), color=BLUE, linewidth=1.8)
    if losses:
        # The first steps of a detector can be ten times the rest; they would flatten everything that matters.
        # A run that diverges has losses without a place on any axis.
        ordered = sorted(filter(math.isfinite, smooth(losses))) or [0.0]
        top = ordered[math.ceil(0.98 * (len(ordered) - 1))] * 1.15
        bottom = min(0.0, *filter(math.isfinite, losses), 0.0)
        if top > bottom:
            axes.set_ylim(bottom, top)


def _metrics(axes: Axes, evaluations: Sequence[tuple[int, Mapping[str, float]]], metrics: Sequence[str]) -> None:
    ends: list[tuple[float, int, str]] = []
    for name, colour in zip(metrics, (BLUE, ORANGE, GREEN, GREY), strict=False):
        points = [(step, row[name]) for step, row in evaluations if row.get(name, -1.0) >= 0]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name.replace("_", " "))
            ends.append((y[-1], x[-1], colour))
    if axes.lines:
        axes.legend(frameon=False, loc="best")
        axes.margins(x=0.14)
        if all(row.get(name, 0.0) <= 1 for _, row in evaluations for name in metrics):
            axes.set_ylim(0, min(1.02, max(axes.get_ylim()[1], 0.1)))
        _write_values(axes, ends)


def _write_values(axes: Axes, ends: Sequence[tuple[float, int, str]]) -> None:
    """Writes the last value of each line beside it, values that are close one above the other."""
    low, high = axes.get_ylim()
    line, lowest = 0.055 * (high - low), -math.inf
    for value, step, colour in sorted(ends):
        lowest = max(value, lowest + line)
        axes.annotate(
            f"{value:.3f}",
            (step, lowest),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )
