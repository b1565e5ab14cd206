"""The picture of how well each class is found."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from effvit.callbacks._confusion import short
from effvit.deploy._files import whole_file
from effvit.deploy._looks import BLUE, FRAME, GREY, ORANGE, style

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

_COLUMN = 50  # classes below each other
_MOST = 150
_LINE = 0.19  # inches
_BARS = 3.2


def draw_iou_bars(path: Path, per_class: Mapping[int, float], names: Sequence[str], title: str) -> None:
    """Writes the IoU of each class as PNG, the best first, with the mean of all as a line.

    Of more than 150 classes the 75 best and the 75 worst are shown. Classes that occur neither in the truth nor in a
    prediction have no IoU; they are left out and counted.

    Args:
        path: Where to write.
        per_class: IoU by label, in ``[0, 1]``, or NaN.
        names: Class name of each label.
        title: Heading.
    """
    # A Figure of its own, not pyplot: no global state, no window system, nothing for the user's own plots to meet.
    from matplotlib.figure import Figure

    known = sorted(
        ((value, short(names[label])) for label, value in per_class.items() if not math.isnan(value)), reverse=True
    )
    mean = sum(value for value, _ in known) / len(known) if known else math.nan
    notes = [title]
    if len(known) < len(per_class):
        notes.append(f"occur nowhere: {len(per_class) - len(known)} of {len(per_class)} classes")
    if len(known) > _MOST:
        notes.append(f"{len(known) - _MOST} in the middle left out")
        known = known[: _MOST // 2] + known[-_MOST // 2 :]
    columns = max(1, -(-len(known) // _COLUMN))
    rows = max(1, -(-len(known) // columns))
    text = 0.08 * max((len(name) for _, name in known), default=0) + 0.2
    total = (columns * (text + _BARS + 0.3) + 0.1, rows * _LINE + 1.3)
    figure = Figure(dpi=110, figsize=total)
    for column in range(columns):
        left = (column * (text + _BARS + 0.3) + text) / total[0]
        axes = figure.add_axes((left, 0.55 / total[1], _BARS / total[0], rows * _LINE / total[1]))
        _bars(axes, known[column * rows :][:rows], rows, mean)
    figure.text(0.12 / total[0], 1 - 0.12 / total[1], "   ".join(notes), fontsize=11, fontweight="bold", va="top")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _bars(axes: Axes, classes: Sequence[tuple[float, str]], rows: int, mean: float) -> None:
    places = range(len(classes))
    axes.barh(places, [1.0] * len(classes), color="#f1f2f4", height=0.72)
    axes.barh(places, [value for value, _ in classes], color=BLUE, height=0.72)
    style(axes, "", "IoU")
    axes.set_yticks(places, [name for _, name in classes], fontsize=8.5, color="black")
    for place, (value, _) in enumerate(classes):
        # At the end of the bar; inside it where there is no room behind.
        inside = value > 0.86
        axes.annotate(
            f"{value:.3f}",
            (value, place),
            xytext=(-3 if inside else 3, -0.5),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=7.5,
            color="white" if inside else GREY,
        )
    if not math.isnan(mean):
        axes.axvline(mean, color=ORANGE, linewidth=1.3)
        axes.annotate(
            f"mean {mean:.3f}",
            (mean, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=ORANGE,
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(visible=False)
    axes.spines["left"].set_color(FRAME)
