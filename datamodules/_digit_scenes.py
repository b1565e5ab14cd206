"""Scenes composed from scikit-learn's 1,797 real handwritten digits (8x8 pixels), written in COCO layout."""

from __future__ import annotations

import json
import math
import os
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
VERSION = 1
# Images of digits that only validation scenes use, one in five.
_HELD_OUT = 5


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
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _write_split(root: Path, split: str, number: int, options: SceneOptions) -> None:
    from sklearn.datasets import load_digits  # here, as scikit-learn takes a second to import and a cached set needs none

    bunch = load_digits()
    held_out = np.arange(len(bunch.target)) % _HELD_OUT == 0
    chosen = held_out if split == "val" else ~held_out
    digits, labels = bunch.images[chosen].astype(np.float32) / 16.0, bunch.target[chosen]
    (root / split).mkdir()
    images, annotations = [], []
    for image_id in range(1, number + 1):
        # One generator a scene: a scene does not depend on how many come before it.
        random = np.random.default_rng((options.seed, split == "val", image_id))
        pixels, objects = _compose(random, digits, labels, options.scene_size)
        name = f"{image_id:06d}.jpg"
        cv2.imwrite(str(root / split / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        images.append({"id": image_id, "file_name": name, "width": pixels.shape[1], "height": pixels.shape[0]})
        for label, mask in objects:
            annotations.append(_annotation(len(annotations) + 1, image_id, label, mask))
    data = {
        "info": {"description": "Scenes of handwritten digits (scikit-learn's digits data set)", "version": str(VERSION)},
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


def _compose(random: np.random.Generator, digits: Array, labels: Array, size: int) -> tuple[Array, list[tuple[int, Array]]]:
    """One scene: pixels ``(size, size, 3)``, and label and mask of each digit."""
    paper, ink_is_dark = _paper(random, size)
    _clutter(random, paper, digits, ink_is_dark)
    objects: list[tuple[int, Array]] = []
    taken = np.zeros((size, size), dtype=bool)
    for _ in range(int(random.integers(1, 6))):
        index = int(random.integers(len(digits)))
        # Heights spread evenly over octaves, so that small digits are as frequent as large ones.
        height = size * 0.15 * 2 ** random.uniform(0.0, 2.0)
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
    grain = random.normal(0.0, random.uniform(0.0, 6.0), paper.shape).astype(np.float32)
    return (paper + grain).clip(0, 255).astype(np.uint8), objects


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
    """Ink of a digit in 0 … 1, ``(h, w)``, drawn smoothly, a little turned, slanted and stretched, cropped to the ink."""
    scale = height / 8.0
    angle, slant = random.uniform(-0.2, 0.2), random.uniform(-0.25, 0.25)
    stretch = random.uniform(0.85, 1.15)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[stretch, slant], [0.0, 1.0]]) * scale
    side = math.ceil(height * 2)
    offset = side / 2 - linear @ np.array([3.5, 3.5])
    smooth = cv2.warpAffine(digit, np.column_stack([linear, offset]), (side, side), flags=cv2.INTER_CUBIC)
    # The 8x8 grid blurs a stroke over its neighbours; a steep edge at half of the ink gives the stroke back.
    steepness = max(2.0, 0.6 * scale)
    ink = np.clip((smooth - 0.45) * steepness + 0.5, 0.0, 1.0).astype(np.float32)
    rows, columns = np.flatnonzero((ink > 0.5).any(1)), np.flatnonzero((ink > 0.5).any(0))
    cropped: Array = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return cropped


def _paper(random: np.random.Generator, size: int) -> tuple[Array, bool]:
    """Paper float32 ``(size, size, 3)`` in 0 … 255 with a light gradient and texture, and whether its ink is dark."""
    ink_is_dark = bool(random.random() < 0.75)
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
    return (tint[None, None] + shade[..., None]).astype(np.float32), ink_is_dark


def _clutter(random: np.random.Generator, paper: Array, digits: Array, ink_is_dark: bool) -> None:
    """Things that are no digits: ruled lines, blots, strokes, and fragments of digits."""
    size = len(paper)
    if random.random() < 0.35:
        spacing = int(random.integers(size // 12, size // 5))
        for y in range(int(random.integers(spacing)), size, spacing):
            _stroke(paper, [(0, y), (size, y)], 1, _ink_colour(random, ink_is_dark), 0.25)
    for _ in range(int(random.integers(0, 3))):
        points = random.integers(0, size, (3, 2))
        _stroke(paper, points.tolist(), int(random.integers(1, 3)), _ink_colour(random, ink_is_dark), random.uniform(0.2, 0.5))
    for _ in range(int(random.integers(0, 3))):
        blot = np.zeros((size, size), dtype=np.float32)
        centre, axes = random.integers(0, size, 2).tolist(), random.integers(size // 40 + 1, size // 10 + 2, 2).tolist()
        cv2.ellipse(blot, centre, axes, float(random.uniform(0, 180)), 0, 360, 1.0, -1, cv2.LINE_AA)
        _blend(paper, blot * random.uniform(0.15, 0.5), _ink_colour(random, ink_is_dark))
    for _ in range(int(random.integers(0, 3))):
        digit = digits[int(random.integers(len(digits)))]
        quarter = np.pad(digit[:4, :4] if random.random() < 0.5 else digit[4:, 4:], 1)
        if quarter.max() < 0.6:
            continue
        side = int(random.integers(size // 12, size // 5))
        ink = np.clip((cv2.resize(quarter, (side, side), interpolation=cv2.INTER_CUBIC) - 0.3) * 2, 0, 1)
        row, column = random.integers(0, size - side, 2)
        _blend(paper[row : row + side, column : column + side], ink * random.uniform(0.3, 0.8), _ink_colour(random, ink_is_dark))


def _stroke(paper: Array, points: list[Any], width: int, colour: Array, strength: float) -> None:
    layer = np.zeros(paper.shape[:2], dtype=np.float32)
    cv2.polylines(layer, [np.array(points, dtype=np.int32)], False, 1.0, width, cv2.LINE_AA)
    _blend(paper, layer * strength, colour)


def _blend(paper: Array, strength: Array, colour: Array) -> None:
    paper += strength[..., None] * (colour - paper)


def _ink_colour(random: np.random.Generator, dark: bool) -> Array:
    """A colour of ink, BGR; some contrast to the paper always remains."""
    colour = random.uniform(0, 120, 3) if dark else random.uniform(150, 255, 3)
    return colour.astype(np.float32)


def cache_folder() -> Path:
    """Where made data are kept: ``EFFVIT_CACHE``, or ``~/.cache/effvit``."""
    return Path(os.environ.get("EFFVIT_CACHE") or Path.home() / ".cache" / "effvit")
