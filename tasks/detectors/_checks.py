"""Checks of the options that detectors share."""

from __future__ import annotations

from effvit.errors import ConfigError


def at_least(name: str, value: int, minimum: int) -> None:
    """Raises `ConfigError` where `value` is below `minimum`."""
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, not {value}")


def check_thresholds(score: float | None, nms: float | None) -> None:
    """Raises `ConfigError` where the score is not in [0, 1] or the IoU not in (0, 1]; ``None`` stands for a default."""
    if score is not None and not 0 <= score <= 1:
        raise ConfigError(f"score_threshold must be in [0, 1], not {score}")
    if nms is not None and not 0 < nms <= 1:
        raise ConfigError(f"nms_threshold must be in (0, 1], not {nms}")
