"""Names beside the marks of a diagram, where they cover neither each other nor the lines."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from effvit.deploy._looks import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
    from matplotlib.transforms import Bbox

#: Where a name may stand, in points from its mark: on the right of it first, then ever further away.
_PLACES = tuple((x, y) for y in (0, 10, -10, 19, -19, 28, -28, 38, -38, 50, -50, 64, -64) for x in (7, -7))
_FAR = 12  # points, beyond which a thin line leads to the mark
_RADIUS = 6.0  # pixels of a mark
_LINE = 1.5  # pixels that a line takes on each side


class Mark(NamedTuple):
    """A point of a diagram: its name, its x with the reach of its interval on both sides, and its y."""

    name: str
    x: float
    low: float
    high: float
    y: float


def write_names(axes: Axes, marks: Sequence[Mark]) -> None:
    """Writes each name once, beside its rightmost mark, or close by where there is room.

    Args:
        axes: The diagram, drawn but for the names, with its final limits and place.
        marks: All its marks. Several may have one name.
    """
    ends: dict[str, Mark] = {}
    for mark in marks:
        ends[mark.name] = max(mark, ends.get(mark.name, mark), key=lambda other: other.x)
    taken = _taken(axes, marks)
    for end in sorted(ends.values(), key=lambda mark: -mark.y):
        taken.append(_write(axes, end, taken))


def _write(axes: Axes, mark: Mark, taken: Sequence[Bbox]) -> Bbox:
    """Writes one name where it covers least, and returns the box that it takes."""
    from matplotlib.patheffects import withStroke
    from matplotlib.text import Text

    text = axes.annotate(
        mark.name,
        (mark.x, mark.y),
        xytext=(0, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        zorder=4,
    )
    renderer = _renderer(axes)
    reach = [abs(side - axes.transData.transform((mark.x, mark.y))[0]) for side in _sides(axes, mark)]
    scale = 72 / axes.figure.dpi
    found = []
    for rank, (x, y) in enumerate(_PLACES):
        offset = x + scale * (reach[1] if x > 0 else -reach[0]) * (abs(y) <= _FAR)
        text.set_horizontalalignment("left" if x > 0 else "right")
        text.xyann = (offset, y)
        text.update_positions(renderer)
        box = Text.get_window_extent(text, renderer)
        found.append((_cost(axes, box, taken) + rank, offset, y, text.get_horizontalalignment(), box))
    _, offset, y, side, box = min(found, key=lambda place: place[0])
    text.set_horizontalalignment(side)
    text.xyann = (offset, y)
    if abs(y) > _FAR:
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
        axes.annotate("", (mark.x, mark.y), xytext=(offset, y), textcoords="offset points", arrowprops=line)
    return box


def _renderer(axes: Axes) -> RendererAgg:
    return cast("FigureCanvasAgg", axes.figure.canvas).get_renderer()  # type: ignore[no-untyped-call,no-any-return]


def _cost(axes: Axes, box: Bbox, taken: Sequence[Bbox]) -> float:
    frame = axes.get_window_extent()
    outside: float = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
    outside += max(0.0, frame.y0 - box.y0) + max(0.0, box.y1 - frame.y1)
    covered: float = sum(_overlap(box, other) for other in taken)
    return covered + 100 * outside


def _overlap(one: Bbox, other: Bbox) -> float:
    """Area that two boxes share, in square pixels."""
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return width * height if width > 0 and height > 0 else 0.0


def _sides(axes: Axes, mark: Mark) -> tuple[float, float]:
    """Where the interval of a mark begins and ends, in pixels."""
    low, high = (axes.transData.transform((x, mark.y))[0] for x in (mark.x - mark.low, mark.x + mark.high))
    return low, high


def _taken(axes: Axes, marks: Sequence[Mark]) -> list[Bbox]:
    """What the diagram shows: marks with their intervals, lines of horizontal and vertical pieces, the legend."""
    from matplotlib.transforms import Bbox

    boxes = []
    for mark in marks:
        x, y = axes.transData.transform((mark.x, mark.y))
        low, high = _sides(axes, mark)
        boxes.append(Bbox(((min(low, x - _RADIUS), y - _RADIUS), (max(high, x + _RADIUS), y + _RADIUS))))
    for line in axes.lines:
        drawn = line.get_linestyle() != "None"
        points: Any = line.get_transform().transform_path(line.get_path()).vertices if drawn else ()
        for (x, y), (u, v) in itertools.pairwise(points):
            corners = (min(x, u) - _LINE, min(y, v) - _LINE), (max(x, u) + _LINE, max(y, v) + _LINE)
            boxes.append(Bbox(corners))
    legend = axes.get_legend()
    if legend is not None:
        boxes.append(legend.get_window_extent(_renderer(axes)))
    return boxes
