"""The picture of many models: accuracy against latency, or latency alone where no accuracy is known."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effvit.deploy._looks import FRAME, GREY, plain, style
from effvit.deploy._names import Mark, write_names
from effvit.deploy.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people tell apart, and a marker for each as a second sign.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#3c4046", "#a6761d")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class _Series:
    """The points of one runtime.

    Attributes:
        name: What the legend calls it.
        colour: Of its marks and lines.
        marker: Of its marks.
        records: What was measured in it.
    """

    name: str
    colour: str
    marker: str
    records: Sequence[Record]


def draw(figure: Figure, records: Sequence[Record]) -> None:
    """Draws all records with a latency onto an empty figure, one panel a batch size."""
    measured = [record for record in records if record.latency is not None]
    rated = [record for record in measured if record.accuracy is not None]
    shown = rated or measured
    batches = list(dict.fromkeys(record.asked_batch for record in shown))
    models = list(dict.fromkeys(record.model for record in shown))
    series = _series(shown)
    inches = 5.6 if rated else max(2.2 + 0.2 * len(models) * (len(series) + 0.6), 3.0)
    figure.set_size_inches(8.6 * len(batches), inches)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        own = [_of_batch(one, batch) for one in series]
        own = [one for one in own if one.records]
        title = f"batch {batch}, {_circumstances(shown)}"
        if rated:
            _panel(axes, own, title)
        else:
            _bars(axes, own, title)
    _arrange(figure, inches, _footnote(records, shown, bool(rated)))
    for axes, batch in zip(figure.axes if rated else (), batches, strict=False):
        of_batch = [record for record in shown if record.asked_batch == batch]
        write_names(axes, [Mark(plain(one.model), *_milliseconds(one), one.accuracy or 0.0) for one in of_batch])


def _arrange(figure: Figure, inches: float, footnote: str) -> None:
    lines = footnote.count("\n") + 1 if footnote else 0
    figure.tight_layout(rect=(0, (0.1 + 0.17 * lines) / inches, 1, 1), w_pad=2.5)
    if footnote:
        figure.text(0.012, 0.09 / inches, plain(footnote), fontsize=8.5, color=GREY, va="bottom")


def _series(records: Sequence[Record]) -> list[_Series]:
    """The records by runtime, and by precision and device where those differ."""
    several_devices = len({record.device for record in records}) > 1
    groups: dict[str, list[Record]] = {}
    for record in records:
        precision = "" if record.precision == "fp32" else record.precision
        words = (record.runtime, precision, record.device if several_devices else "")
        groups.setdefault(" ".join(filter(None, words)), []).append(record)
    return [
        _Series(name, _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)], own)
        for index, (name, own) in enumerate(groups.items())
    ]


def _of_batch(series: _Series, batch: int) -> _Series:
    own = [record for record in series.records if record.asked_batch == batch]
    return _Series(series.name, series.colour, series.marker, own)


def _circumstances(records: Sequence[Record]) -> str:
    devices = sorted(
        {f"{r.device}, {r.threads} thread{'s' * (r.threads > 1)}" if r.device == "cpu" else r.device for r in records}
    )
    return " and ".join(devices)


def _milliseconds(record: Record) -> tuple[float, float, float]:
    """Latency of an image in milliseconds, and how far its interval reaches below and above."""
    assert record.latency is not None
    scale = 1e3 / record.batch
    low, high = record.latency.ci95
    median = record.latency.median
    return scale * median, scale * max(0.0, median - low), scale * max(0.0, high - median)


def _panel(axes: Axes, series: Sequence[_Series], title: str) -> None:
    """Marks with intervals, a line through the marks of each model, and the front of each runtime."""
    by_model: dict[str, list[tuple[float, float]]] = {}
    for one in series:
        points = [(*_milliseconds(record), record.accuracy or 0.0) for record in one.records]
        x, low, high, y = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            xerr=(low, high),
            fmt=one.marker,
            color=one.colour,
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.7,
            elinewidth=1.4,
            capsize=2.5,
            zorder=3,
            label=one.name,
        )
        front = pareto_front([(milliseconds, accuracy) for milliseconds, _, _, accuracy in points])
        corners = [front[0], *(corner for (_, y), end in itertools.pairwise(front) for corner in ((end[0], y), end))]
        axes.plot(*zip(*corners, strict=True), color=one.colour, linewidth=1.3, alpha=0.55, zorder=2)
        for record, point in zip(one.records, points, strict=True):
            by_model.setdefault(record.model, []).append((point[0], point[3]))
    for own in by_model.values():
        axes.plot(*zip(*sorted(own), strict=True), color=FRAME, linewidth=0.8, zorder=1)
    style(axes, title, "latency of an image, ms (95 % interval)")
    _logarithmic(axes)
    names = {record.accuracy_name for one in series for record in one.records} - {""}
    axes.set_ylabel(f"{names.pop()}, %" if len(names) == 1 else "accuracy, %", color=GREY)
    axes.margins(x=0.08, y=0.12)
    left, right = axes.get_xlim()
    wide = max(right / left, 4.0)  # a single model has no range of its own
    middle = (left * right) ** 0.5
    axes.set_xlim(middle / wide**0.53, middle * wide**0.66)  # names stand on the right
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower right", title="steps: the best of a runtime", title_fontsize=8.5)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other is as fast as and more accurate than, nor as accurate as and faster than.

    Args:
        points: Latency and accuracy.

    Returns:
        The fastest first.
    """
    front: list[tuple[float, float]] = []
    for latency, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((latency, accuracy))
    return front


def _logarithmic(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(axes: Axes, series: Sequence[_Series], title: str) -> None:
    """Latency of each model, a bar a runtime."""
    models = list(dict.fromkeys(record.model for one in series for record in one.records))
    height = 0.8 / len(series)
    for index, one in enumerate(series):
        places = [models.index(record.model) + (index - (len(series) - 1) / 2) * height for record in one.records]
        x, low, high = zip(*map(_milliseconds, one.records), strict=True)
        axes.barh(
            places,
            x,
            height=0.9 * height,
            xerr=(low, high),
            color=one.colour,
            label=one.name,
            error_kw={"elinewidth": 1.2, "capsize": 2, "ecolor": GREY},
        )
        for place, milliseconds, reach in zip(places, x, high, strict=True):
            axes.annotate(
                f"{milliseconds:.3g}",
                (milliseconds + reach, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=GREY,
            )
    style(axes, title, "latency of an image, ms (95 % interval)")
    axes.set_yticks(range(len(models)), [plain(model) for model in models], color="black")
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    if len(series) > 1:
        axes.legend(frameon=False, loc="best")


def _footnote(records: Sequence[Record], shown: Sequence[Record], rated: bool) -> str:
    """What is not in the picture, and why."""
    names = {record.model for record in shown}
    missing = list(dict.fromkeys(record.model for record in records if record.model not in names and record.latency))
    failed = [f"{record.model} in {record.runtime}" for record in records if record.latency is None]
    lines = []
    if not rated:
        lines.append("No accuracy is known, so that there is no front to draw.")
    if missing:
        lines.append(f"Without a known accuracy: {', '.join(missing)}")
    if failed:
        lines.append(f"Not measured: {', '.join(dict.fromkeys(failed))}")
    return "\n".join(lines)
