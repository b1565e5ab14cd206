"""Pictures of measurements: where the time goes, and accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effvit.deploy.profiling import Profile
from effvit.deploy.records import Record


def draw_profile(profile: Profile, path: Path) -> None:
    """Writes a PNG: the kinds of work by type of block, and the latency of each stage.

    Args:
        profile: What `effvit.deploy.profiling.profile` found.
        path: Where to write.
    """
    raise NotImplementedError


def draw_pareto(records: Sequence[Record], path: Path) -> None:
    """Writes a PNG: accuracy against latency, a marker a runtime, and the Pareto front.

    Args:
        records: What was measured.
        path: Where to write.

    Raises:
        ConfigError: No record has a latency.
    """
    raise NotImplementedError
