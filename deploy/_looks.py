"""The looks that all diagrams share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GREY = "#1d7ad6", "#f58220", "#2a9d55", "#6e7278"
FRAME = "#c9ccd0"


def style(axes: Axes, title: str, label: str) -> None:
    """Gives all diagrams of a run the same looks.

    Args:
        axes: The diagram.
        title: Its heading.
        label: What its x axis shows.
    """
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(label, color=GREY)
    axes.grid(visible=True, color="#e8e9eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FRAME)


def plain(text: str) -> str:
    """A text without what matplotlib takes for a formula."""
    return text.replace("$", r"\$")
