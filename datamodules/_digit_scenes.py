"""Scenes composed from scikit-learn's 1,797 real handwritten digits (8x8 pixels), written in COCO layout."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_api

Array = np.ndarray[Any, np.dtype[Any]]

# Part of the cache folder's name: to be raised with every change to what a scene looks like.
VERSION = 5
# Images of digits that only validation scenes use, one in five.
_HELD_OUT = 5
# How much the 8x8 digits are enlarged smoothly before they are turned.
_FINE = 8
# Heights of digits before they are turned, as shares of the scene.
_SMALLEST, _LARGEST = 0.34, 0.75


@dataclass(frozen=True)
class SceneOptions:
    """What the scenes depend on.

    Attributes:
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        scene_size: Width and height of a scene in pixels.
        seed: Seed of everything random.
    """

    num_train: int
    num_val: int
    scene_size: int
    seed: int

    @property
    def folder_name(self) -> str:
        """A name that no other options share."""
        return f"digits-v{VERSION}-{self.num_train}-{self.num_val}-{self.scene_size}px-seed{self.seed}"


def make_scenes(folder: Path, options: SceneOptions) -> Path:
    """Writes all scenes and their annotations, unless they are there already.

    The work is done in a temporary folder that is renamed at the end: a folder of this name is complete, however many
    processes make it at once.

    Args:
        folder: What to make.
        options: What to put in.

    Returns:
        ``folder``.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # pictures this small only wait for a thread pool
    try:
        work.chmod(0o755)  # mkdtemp makes private folders; a cache may be shared
        for split, number in (("train", options.num_train), ("val", options.num_val)):
            _write_split(work, split, number, options)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, with the same result
                raise
    finally:
        cv2.setNumThreads(threads)
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_split(root: Path, split: str, number: int, options: SceneOptions) -> None:
    from sklearn.datasets import (
        load_digits,
    )  # here, as scikit-learn takes a second to import and a cached set needs none

    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % _HELD_OUT == 0
    chosen = held_out if split == "val" else ~held_out
    digits, labels = bunch.images[chosen].astype(np.float32) / 16.0, bunch.target[chosen]
    side = 2 * options.scene_size
    grain = np.random.default_rng(options.seed).standard_normal((side, side, 3), dtype=np.float32)
    (root / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, number + 1):
        # One generator a scene: a scene does not depend on how many come before it.
        random = np.random.default_rng((options.seed, split == "val", image_id))
        pixels, objects = _compose(random, digits, labels, grain)
        name = f"{image_id:06d}.jpg"
        cv2.imwrite(str(root / split / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": image_id, "file_name": name, "width": pixels.shape[1], "height": pixels.shape[0]})
        for label, mask in objects:
            annotations.append(_annotation(len(annotations) + 1, image_id, label, mask))
    data = {
        "info": {
            "description": "Scenes of handwritten digits (scikit-learn's digits data set)",
            "version": str(VERSION),
        },
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit, "name": str(digit)} for digit in range(10)],
    }
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


def _annotation(number: int, image_id: int, label: int, mask: Array) -> dict[str, Any]:
    rle = mask_api.encode(np.asfortranarray(mask))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label,
        "bbox": [float(value) for value in mask_api.toBbox(rle)],
        "area": float(mask_api.area(rle)),
        "iscrowd": 0,
        "segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode()},
    }


def _compose(
    random: np.random.Generator, digits: Array, labels: Array, grain: Array
) -> tuple[Array, list[tuple[int, Array]]]:
    """One scene: pixels ``(size, size, 3)``, and label and mask of each digit.

    Grain is noise ``(2 size, 2 size, 3)`` of which every scene shows another part: fresh noise would take longer than
    all the rest.
    """
    size = len(grain) // 2
    paper, ink_is_dark = _paper(random, size)
    _clutter(random, paper, digits, ink_is_dark)
    objects: list[tuple[int, Array]] = []
    taken = np.zeros((size, size), dtype=bool)
    for _ in range(int(random.integers(1, 6))):
        index = int(random.integers(len(digits)))
        # Heights spread evenly over their logarithm, so that small digits are as frequent as large ones.
        height = size * math.exp(random.uniform(math.log(_SMALLEST), math.log(_LARGEST)))
        placed = _place(random, digits[index], height, taken)
        if placed is None:
            continue
        row, column, ink = placed
        box = slice(row, row + ink.shape[0]), slice(column, column + ink.shape[1])
        _blend(paper[box], ink, _ink_colour(random, ink_is_dark))
        mask = np.zeros((size, size), dtype=np.uint8)
        mask[box] = ink > 0.5
        taken[box] = True
        objects.append((int(labels[index]), mask))
    row, column = random.integers(0, size, 2)
    paper += np.float32(random.uniform(0.0, 6.0)) * grain[row : row + size, column : column + size]
    return np.clip(paper, 0, 255, out=paper).astype(np.uint8), objects


def _place(random: np.random.Generator, digit: Array, height: float, taken: Array) -> tuple[int, int, Array] | None:
    """A free place for a digit, and its ink; None where eight tries find none."""
    ink = _write(random, digit, height)
    h, w = ink.shape
    size = len(taken)
    for _ in range(8):
        if h >= size or w >= size:
            return None
        row, column = int(random.integers(size - h)), int(random.integers(size - w))
        if not taken[row : row + h, column : column + w].any():
            return row, column, ink
    return None


def _write(random: np.random.Generator, digit: Array, height: float) -> Array:
    """Ink of a digit in 0 … 1, ``(h, w)``, smooth, a little turned, slanted and stretched, cropped."""
    scale = height / 8 / _FINE
    angle, slant = random.uniform(-0.15, 0.15), random.uniform(-0.2, 0.2)
    stretch = random.uniform(0.85, 1.15)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[stretch, slant], [0.0, 1.0]]) * scale
    side = math.ceil(height * 1.7)  # room for the corners at the largest turn, slant and stretch
    offset = side / 2 - linear @ np.full(2, (10 * _FINE - 1) / 2)
    # One empty pixel around: strokes reach the border of the 8x8 grid, and would be cut off flat there.
    margin = cv2.copyMakeBorder(digit, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    fine = cv2.resize(margin, None, fx=_FINE, fy=_FINE, interpolation=cv2.INTER_CUBIC)
    smooth = cv2.warpAffine(fine, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_LINEAR)
    # The 8x8 grid blurs a stroke over its neighbours; a steep edge at about half of the ink gives the stroke back.
    steepness = max(2.0, 0.6 * height / 8)
    ink = np.clip((smooth - random.uniform(0.45, 0.6)) * steepness + 0.5, 0.0, 1.0)
    rows, columns = np.flatnonzero((ink > 0.5).any(1)), np.flatnonzero((ink > 0.5).any(0))
    cropped: Array = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cropped


def _paper(random: np.random.Generator, size: int) -> tuple[Array, bool]:
    """Paper float32 ``(size, size, 3)`` in 0 … 255 with a light gradient and texture, and whether its ink is dark."""
    ink_is_dark = bool(random.random() < 0.95)
    level = random.uniform(185, 245) if ink_is_dark else random.uniform(15, 75)
    tint = level + random.uniform(-22, 22, 3)
    ramp = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    direction = random.uniform(-math.pi, math.pi)
    gradient = math.cos(direction) * ramp[None, :] + math.sin(direction) * ramp[:, None]
    texture = np.zeros((size, size), dtype=np.float32)
    for cells in (3, 9, 27):
        coarse = random.normal(0.0, 7.0 / math.sqrt(cells), (cells, cells)).astype(np.float32)
        texture += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    shade = gradient * random.uniform(0, 22) + texture * random.uniform(0.5, 2.0)
    shade = shade.astype(np.float32)
    return cv2.merge([shade + np.float32(level) for level in tint]), ink_is_dark


def _clutter(random: np.random.Generator, paper: Array, digits: Array, ink_is_dark: bool) -> None:
    """Things that are no digits: ruled lines, blots, strokes, and fragments of digits."""
    size = len(paper)
    if random.random() < 0.35:
        spacing = int(random.integers(size // 12, size // 5))
        ink = _ink_colour(random, ink_is_dark)
        for y in range(int(random.integers(spacing)), size, spacing):
            paper[y] += 0.25 * (ink - paper[y])
    for _ in range(int(random.integers(0, 2))):
        curve = _curve(random.uniform(0, size, (3, 2)))
        _stroke(paper, curve, int(random.integers(1, 3)), _ink_colour(random, ink_is_dark), random.uniform(0.2, 0.6))
    for _ in range(int(random.integers(0, 2))):
        side = size // 4
        blot = np.zeros((side, side), dtype=np.float32)
        axes = random.integers(size // 40 + 1, size // 10, 2).tolist()
        cv2.ellipse(blot, (side // 2, side // 2), axes, float(random.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
        row, column = random.integers(0, size - side, 2)
        window = paper[row : row + side, column : column + side]
        _blend(window, blot * random.uniform(0.15, 0.5), _ink_colour(random, ink_is_dark))
    for _ in range(int(random.integers(0, 2))):
        digit = digits[int(random.integers(len(digits)))]
        quarter = cv2.copyMakeBorder(
            digit[:4, :4] if random.random() < 0.5 else digit[4:, 4:], 1, 1, 1, 1, cv2.BORDER_CONSTANT
        )
        if quarter.max() < 0.6:
            continue
        side = int(random.integers(size // 12, size // 5))
        ink = np.clip((cv2.resize(quarter, (side, side), interpolation=cv2.INTER_CUBIC) - 0.3) * 2, 0, 1)
        row, column = random.integers(0, size - side, 2)
        _blend(
            paper[row : row + side, column : column + side],
            ink * random.uniform(0.3, 0.8),
            _ink_colour(random, ink_is_dark),
        )


def _curve(corners: Array) -> Array:
    """Points of the quadratic Bezier curve over three corners, int32 ``(24, 2)``."""
    t = np.linspace(0.0, 1.0, 24)[:, None]
    points: Array = (1 - t) ** 2 * corners[0] + 2 * t * (1 - t) * corners[1] + t**2 * corners[2]
    return points.astype(np.int32)


def _stroke(paper: Array, points: Array, width: int, colour: Array, strength: float) -> None:
    left, top = points.min(0) - width
    shifted = points - (left, top)
    layer = np.zeros(shifted.max(0)[::-1] + width + 1, dtype=np.float32)
    cv2.polylines(layer, [shifted.astype(np.int32)], False, 1.0, width, cv2.LINE_AA)
    layer = layer[max(-top, 0) :, max(-left, 0) :]
    window = paper[max(top, 0) :, max(left, 0) :][: layer.shape[0], : layer.shape[1]]
    _blend(window, layer[: window.shape[0], : window.shape[1]] * np.float32(strength), colour)


def _blend(paper: Array, strength: Array, colour: Array) -> None:
    """Lays colour over paper in place; ``strength`` ``(h, w)`` is 0 for paper and 1 for colour."""
    strength = strength.astype(np.float32)
    paper += cv2.merge([strength, strength, strength]) * (colour - paper)


def _ink_colour(random: np.random.Generator, dark: bool) -> Array:
    """A colour of ink, BGR; some contrast to the paper always remains."""
    colour = random.uniform(0, 120, 3) if dark else random.uniform(150, 255, 3)
    return colour.astype(np.float32)
