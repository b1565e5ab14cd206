"""Colours of classes, as far apart as so many can be."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from effvit.callbacks._canvas import Colour

_COLOURS = 256
# Hues by hand where a data set has few classes: far apart, and readable on photographs and on white.
_FIRST: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 122, 214),
    (42, 157, 85),
    (245, 130, 32),
    (142, 68, 214),
    (0, 168, 181),
    (233, 30, 140),
    (176, 137, 0),
    (121, 85, 72),
    (94, 114, 228),
)


def class_colour(label: int) -> Colour:
    """Colour (R, G, B) of a class, the same in every picture; those of 256 classes differ, then they repeat.

    Args:
        label: Contiguous label, 0 or more.
    """
    return _palette()[label % _COLOURS]


@lru_cache(maxsize=1)
def _palette() -> tuple[Colour, ...]:
    """The first colours, then always that one which is farthest from all before, as the eye sees it (CIELAB)."""
    axis = np.arange(0, 256, 15, dtype=np.float32)
    candidates = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    seen = _lab(candidates)
    # Neither nearly black, white nor grey, which photographs are full of.
    usable = (seen[:, 0] > 28) & (seen[:, 0] < 85) & (np.hypot(seen[:, 1], seen[:, 2]) > 28)
    candidates, seen = candidates[usable], seen[usable]
    nearest = np.linalg.norm(seen[:, None] - _lab(np.array(_FIRST, np.float32)), axis=-1).min(1)
    chosen = list(_FIRST)
    while len(chosen) < _COLOURS:
        farthest = int(nearest.argmax())
        red, green, blue = (int(value) for value in candidates[farthest])
        chosen.append((red, green, blue))
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[farthest], axis=1))
    return tuple(chosen)


def _lab(colours: np.ndarray) -> np.ndarray:
    """CIELAB of RGB colours ``(N, 3)`` in 0 to 255."""
    return np.asarray(cv2.cvtColor(colours[None] / np.float32(255), cv2.COLOR_RGB2LAB)[0])
