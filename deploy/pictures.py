"""Pictures of measurements: where the time goes, and accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from effvit.deploy import _picture_pareto, _picture_profile
from effvit.deploy._files import whole_file
from effvit.deploy.profiling import Profile
from effvit.deploy.records import Record
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_profile(profile: Profile, path: Path) -> None:
    """Writes a PNG: the kinds of work by type of block, and the latency of each stage.

    The bar of a type of block is as long as its share of the time; blues compute, warm colours wait for memory.

    Args:
        profile: What `effvit.deploy.profiling.profile` found.
        path: Where to write.
    """
    figure = _empty()
    _picture_profile.draw(figure, profile)
    _write(figure, path)


def draw_pareto(records: Sequence[Record], path: Path) -> None:
    """Writes a PNG: accuracy against latency, and the Pareto front of each runtime, a panel a batch size.

    Latency is that of an image, on a logarithmic axis with its 95 % interval: a batch that did not fit and was halved
    stays comparable. The steps of a runtime join the models that no other is both as fast as and more accurate than, in
    that runtime, which is the choice that its user has. Models without accuracy are left out and named below. Where no
    record has one, latency is drawn as bars.

    Args:
        records: What was measured.
        path: Where to write.

    Raises:
        ConfigError: No record has a latency.
    """
    if all(record.latency is None for record in records):
        raise ConfigError("there is nothing to draw: no model could be measured")
    figure = _empty()
    _picture_pareto.draw(figure, records)
    _write(figure, path)


def _empty() -> Figure:
    # A Figure of its own, not pyplot: no global state, no window system, nothing for the user's own plots to meet.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: Path) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")
