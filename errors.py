"""The errors that a user may see, and the close matches that their messages offer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffvitError(Exception):
    """Base of every error raised on purpose by effvit."""


class ConfigError(EffvitError, ValueError):
    """A name or an option that does not exist, or a value out of its range."""


class DatasetError(EffvitError, ValueError):
    """Images or annotations that cannot be used as they are."""


class CheckpointError(EffvitError, RuntimeError):
    """A checkpoint that is damaged, unsafe to open, or made for something else."""


class ExportError(EffvitError, RuntimeError):
    """A model that cannot be exported, or an exported model that disagrees with its source."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """``"Did you mean 'a' or 'b'?"``, or nothing where no choice is close to ``name``."""
    near = difflib.get_close_matches(name, sorted(choices), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(choice) for choice in near)}?" if near else ""


def close_matches(name: str, choices: Iterable[str]) -> str:
    """Words the tail of an error message about an unknown name.

    Args:
        name: What the user typed.
        choices: What exists.

    Returns:
        ``"Did you mean 'a' or 'b'?"`` where something is close, otherwise ``"Choose from: a, b, c."``.
    """
    known = sorted(choices)
    return did_you_mean(name, known) or "Choose from: " + ", ".join(known) + "."
