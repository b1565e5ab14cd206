"""Checks of the options that detectors share."""

from __future__ import annotations

from effvit.errors import ConfigError


def at_least(name: str, value: int, minimum: int) -> None:
    """Raises `ConfigError` where `value` is below `minimum`."""
    if value < minimum:
        raise ConfigError(f"{name} must be at least {minimum}, not {value}")


def within_unit(name: str, value: float) -> None:
    """Raises `ConfigError` where `value` is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in [0, 1], not {value}")
