"""The picture of a profile: kinds of work by type of block on the left, seconds by stage on the right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from effvit.deploy._looks import BLUE, FRAME, GREY, plain, style
from effvit.deploy.profiling import MEMORY_BOUND, WORK, Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which colour-blind people tell apart: blues compute, warm ones wait for memory.
_COLOURS = {
    "convolution": "#0072b2",
    "matrix": "#56b4e9",
    "normalisation": "#d55e00",
    "elementwise": "#e69f00",
    "reshape": "#f0d65a",
    "activation": "#009e73",
    "pooling": "#cc79a7",
    "selection": "#8a8f98",
    "other": "#3c4046",
}
_DARK = ("convolution", "normalisation", "activation", "other")  # white text on these
_GROUPS = (
    ("compute-bound", ("convolution", "matrix")),
    ("memory-bound", MEMORY_BOUND),
    ("other", ("activation", "pooling", "selection", "other")),
)
_MOST_BLOCKS = 8
_MOST_STAGES = 22
_SMALL = 0.005  # of the whole: stages below this one share a bar
_SMALL_BLOCK = 0.02  # of the whole: how memory-bound it is says nothing then
_ROW = 0.36  # inches
_STAGE = 0.72  # rows
_HEAD, _LEGEND = 0.85, 1.65  # inches above and below the bars


def draw(figure: Figure, profile: Profile) -> None:
    """Draws a profile onto an empty figure."""
    blocks = _largest(profile.blocks)
    stages = _gathered(profile.stages, profile.seconds)
    inches = _HEAD + max((len(blocks) + 1) * _ROW + _LEGEND, _STAGE * len(stages) * _ROW + 0.6)
    figure.set_size_inches(13, inches)

    def place(left: float, right: float, rows: float) -> Axes:
        height = rows * _ROW / inches
        return figure.add_axes((left, 1 - _HEAD / inches - height, right - left, height))

    names = 0.0068 * max(len(_with_count(profile, name)) for name in ("all", *blocks)) + 0.012
    _work(place(names, 0.57, len(blocks) + 1), profile, blocks)
    left = 0.68 + 0.0062 * max(map(len, stages), default=0)
    _stages(place(left, 0.99, _STAGE * len(stages)), stages, profile.seconds)
    _title(figure, profile, inches)
    _legend(figure, profile, names, 1 - (_HEAD + (len(blocks) + 1) * _ROW + 0.62) / inches)


def _with_count(profile: Profile, name: str) -> str:
    """Name of a type of block, and how many there are of several."""
    count = profile.counts.get(name, 0)
    return plain(name) + (f"  x{count}" if count > 1 else "")


def _title(figure: Figure, profile: Profile, height: float) -> None:
    size = "x".join(map(str, profile.size))
    threads = f", {profile.threads} thread{'s' * (profile.threads > 1)}" if profile.device == "cpu" else ""
    head = f"{profile.model}   {size}, batch {profile.batch}, {profile.device}{threads}"
    share = f"{100 * profile.memory_bound:.0f} % memory-bound"
    text = f"{head}:  {_milliseconds(profile.seconds)} ms a pass,  {share}"
    figure.text(0.012, 1 - 0.12 / height, plain(text), fontsize=12, fontweight="bold", va="top")


def _work(axes: Axes, profile: Profile, blocks: Mapping[str, Mapping[str, float]]) -> None:
    rows = {"all": profile.work, **blocks}
    for place, (name, work) in enumerate(rows.items()):
        _bar(axes, place, work)
        whole = sum(work.values())
        bound = sum(work.get(kind, 0.0) for kind in MEMORY_BOUND) / whole if whole else 0.0
        axes.annotate(
            ""
            if name == "all"
            else f"{100 * whole:.0f} %" + f"  (memory {100 * bound:.0f} %)" * (whole >= _SMALL_BLOCK),
            (100 * whole, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=GREY,
        )
    labels = [_with_count(profile, name) for name in rows]
    style(axes, "work by type of block", "% of the time in operators (memory: share of it that is memory-bound)")
    axes.set_yticks(range(len(rows)), labels, fontsize=9.5, color="black")
    axes.axhline(0.5, color=FRAME, linewidth=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")


def _bar(axes: Axes, place: int, work: Mapping[str, float]) -> None:
    start = 0.0
    for kind in WORK:
        share = 100 * work.get(kind, 0.0)
        if not share:
            continue
        axes.barh(place, share, left=start, height=0.68, color=_COLOURS[kind], edgecolor="white", linewidth=0.6)
        if share >= 3.5:
            colour = "white" if kind in _DARK else "black"
            axes.text(start + share / 2, place, f"{share:.0f}", ha="center", va="center", fontsize=8, color=colour)
        start += share


def _legend(figure: Figure, profile: Profile, left: float, top: float) -> None:
    """The kinds of work that there are, under the name of their group: two groups in a row."""
    from matplotlib.patches import Patch

    for place, (title, kinds) in enumerate(_GROUPS):
        present = [kind for kind in kinds if profile.work.get(kind, 0.0) > 0]
        share = 100 * sum(profile.work.get(kind, 0.0) for kind in kinds)
        legend = figure.legend(
            [Patch(color=_COLOURS[kind]) for kind in present],
            present,
            title=f"{title}, {share:.0f} %",
            loc="upper left",
            bbox_to_anchor=(left + 0.2 * (place % 2), top - 0.46 * (place // 2) / figure.get_figheight()),
            ncols=max(len(present), 1),
            frameon=False,
            fontsize=8.5,
            title_fontsize=9,
            alignment="left",
            handlelength=1.0,
            handletextpad=0.4,
            columnspacing=0.9,
            borderpad=0.0,
            borderaxespad=0.0,
        )
        legend.get_title().set_fontweight("bold")


def _stages(axes: Axes, stages: Mapping[str, float], whole: float) -> None:
    places = range(len(stages))
    axes.barh(places, [1e3 * seconds for seconds in stages.values()], color=BLUE, height=0.68)
    for place, seconds in zip(places, stages.values(), strict=True):
        axes.annotate(
            f"{_milliseconds(seconds)}  ({100 * seconds / whole:.0f} %)",
            (1e3 * seconds, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=GREY,
        )
    style(axes, "latency by stage", "ms, measured without the profiler")
    axes.set_yticks(places, [plain(name) for name in stages], fontsize=9, color="black")
    axes.set_ylim(len(stages) - 0.4, -0.6)
    axes.set_xlim(0, 1.33e3 * max(stages.values(), default=1.0))
    axes.grid(visible=False, axis="y")


def _largest(blocks: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The most expensive types of block, the others in one row."""
    names = list(blocks)
    if len(names) <= _MOST_BLOCKS:
        return dict(blocks)
    rest = names[_MOST_BLOCKS - 1 :]
    shown: dict[str, Mapping[str, float]] = {name: blocks[name] for name in names[: _MOST_BLOCKS - 1]}
    shown[f"{len(rest)} others"] = {kind: sum(blocks[name].get(kind, 0.0) for name in rest) for kind in WORK}
    return shown


def _gathered(stages: Mapping[str, float], whole: float) -> dict[str, float]:
    """The stages in their order; the small ones in one row, and of too many the smallest."""
    least = max(_SMALL * whole, *sorted(stages.values(), reverse=True)[_MOST_STAGES - 1 : _MOST_STAGES], 0.0)
    small = [name for name, seconds in stages.items() if seconds < least]
    if len(small) < 2:
        return dict(stages)
    shown = {name: seconds for name, seconds in stages.items() if name not in small}
    return {**shown, f"{len(small)} others": sum(stages[name] for name in small)}


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
