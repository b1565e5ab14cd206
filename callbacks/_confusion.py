"""The picture of what a network takes for what, and of how far a classifier's confidence can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from effvit.deploy._files import whole_file
from effvit.deploy._looks import BLUE, GREY, ORANGE, plain, style

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

_MOST_NUMBERS = 25  # classes up to which each cell has its count
_MOST_CELLS = 150  # classes up to which there is a matrix
_PAIRS = 30
_LONGEST_NAME = 24
_PANEL = 3.4  # side of the reliability panel, inches


def draw_confusion(path: Path, confusion: Tensor, names: Sequence[str], calibration: Tensor | None, title: str) -> None:
    """Writes a confusion matrix and a reliability diagram as PNG.

    The cells of up to 150 classes are drawn, with their counts for up to 25; of more classes the pairs that are
    confused most often, since a thousand rows cannot be read. Pixels are given in percent of the true class's.

    Args:
        path: Where to write.
        confusion: ``(K, K)``, images, or pixels, by true class (row) and chosen class (column).
        names: Class name of each label.
        calibration: ``(bins, 3)``: images, mean confidence and accuracy in equal bins of confidence. ``None`` for
            pixels, which have none.
        title: Heading.
    """
    # A Figure of its own, not pyplot: no global state, no window system, nothing for the user's own plots to meet.
    from matplotlib.figure import Figure

    labels = [short(name) for name in names]
    whole = len(labels) <= _MOST_CELLS
    figure = Figure(dpi=110)
    # Margins and sizes in inches, from the longest name: several times as fast as a layout engine.
    size = _text_size(len(labels)) if whole else 9
    pairs = [] if whole else _most_confused(confusion)
    written = labels if whole else [f"{labels[truth]} → {labels[chosen]}" for truth, chosen, _, _ in pairs]
    width = 0.0088 * size * max(map(len, written), default=0)  # of a text in DejaVu Sans
    cell = 0.4 if len(labels) <= _MOST_NUMBERS else 0.022 * size
    side = max(_PANEL, cell * len(labels)) if whole else 5.0
    height = side if whole else max(0.22 * len(pairs) + 0.3, _PANEL)
    left, bottom = width + 0.5, (width if whole else 0.2) + 0.45
    pixels = calibration is None
    total = (max(left + side + (0.3 if pixels else 1.4 + _PANEL), 0.1 * len(title)), bottom + height + 0.6)
    figure.set_size_inches(*total)

    def place(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / total[0], y / total[1], w / total[0], h / total[1]))

    if whole:
        _matrix(place(left, bottom, side, side), confusion, labels, size, percent=pixels)
    else:
        _pairs(place(left, bottom, side, height), pairs, written, size, percent=pixels)
    if calibration is not None:
        _reliability(place(left + side + 1.0, bottom + height - _PANEL, _PANEL, _PANEL), calibration)
    figure.text(0.12 / total[0], 1 - 0.12 / total[1], title, fontsize=11, fontweight="bold", va="top")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def short(name: str) -> str:
    """A name that fits, as matplotlib takes it."""
    return plain(name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…")


def _text_size(classes: int) -> float:
    """Size in points at which the names of all classes stand beside each other: at 6 pt they can still be read."""
    return max(6.0, min(10.0, 240 / classes))


def _most_confused(confusion: Tensor) -> list[tuple[int, int, int, float]]:
    """Truth, choice, images and share of the true class's images, the most frequent mistakes first."""
    wrong = confusion.clone().fill_diagonal_(0)
    counts, cells = wrong.flatten().topk(min(_PAIRS, wrong.numel()))
    totals = confusion.sum(1)
    found = []
    for count, cell in zip(counts.tolist(), cells.tolist(), strict=True):
        truth, chosen = divmod(cell, len(confusion))
        if count:
            found.append((truth, chosen, count, count / int(totals[truth])))
    return found


def _matrix(axes: Axes, confusion: Tensor, labels: Sequence[str], size: float, *, percent: bool) -> None:
    shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1)).numpy()
    # By the square root, so that a twentieth of a class in a wrong place can be seen.
    axes.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    ticks = range(len(labels))
    axes.set_xticks(ticks, labels, rotation=90, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.set_xlabel("predicted, % of the true class's pixels" if percent else "predicted", color=GREY)
    axes.set_ylabel("true", color=GREY)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color("#c9ccd0")
    if len(labels) > _MOST_NUMBERS:
        return
    for row, column in confusion.nonzero().tolist():
        colour = "white" if shares[row, column] > 0.35 else "black"
        text = f"{100 * shares[row, column]:.0f}" if percent else str(int(confusion[row, column]))
        if percent and text == "0":
            continue
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=min(size, 26 / len(text)))


def _pairs(
    axes: Axes, pairs: Sequence[tuple[int, int, int, float]], written: Sequence[str], size: float, *, percent: bool
) -> None:
    places = range(len(pairs))
    axes.barh(places, [100 * share for *_, share in pairs], color=BLUE, height=0.7)
    axes.set_yticks(places, written, fontsize=size)
    for place, (_, _, count, share) in enumerate(pairs):
        text = f"{100 * share:.1f}" if percent else f"{count}"
        axes.annotate(text, (100 * share, place), xytext=(4, 0), textcoords="offset points", va="center", color=GREY)
    axes.set_ylim(max(len(pairs), 1) - 0.4, -0.6)
    axes.margins(x=0.1)
    pixels, images = (
        "% of the true class's pixels, most pixels first",
        "% of the true class's images (and their number)",
    )
    style(axes, "most confused, true → predicted", pixels if percent else images)


def _reliability(axes: Axes, calibration: Tensor) -> None:
    count, confidence, accuracy = calibration.unbind(1)
    bins = len(count)
    edges = (torch.arange(bins) / bins).tolist()
    axes.bar(edges, accuracy.nan_to_num().tolist(), 1 / bins, align="edge", color=BLUE, edgecolor="white")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
    used = count > 0
    # Large marks where the images are: a bin of three images says little.
    areas = (6 + 90 * count[used] / count.sum().clamp(min=1)).tolist()
    axes.scatter(confidence[used].tolist(), accuracy[used].tolist(), areas, color=ORANGE, zorder=3)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    style(axes, "accuracy by confidence", "confidence (mark size: number of images)")
