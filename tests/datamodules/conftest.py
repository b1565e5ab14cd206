"""Small trees of classified images, and of images with masks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Tree = dict[str, int]


def write_tree(folder: Path, classes: Tree, size: tuple[int, int] = (40, 32), ending: str = "jpg") -> Path:
    """Writes so many images of each class; a class has its own colour, an image its own brightness."""
    for number, (kind, count) in enumerate(sorted(classes.items())):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for image in range(count):
            pixels = np.full((size[1], size[0], 3), 20 + 5 * image, dtype=np.uint8)
            pixels[..., number % 3] = 200
            cv2.imwrite(str(folder / kind / f"{image:03d}.{ending}"), pixels)
    return folder


@pytest.fixture
def image_tree() -> Callable[..., Path]:
    """``image_tree(folder, {class: number of images})``: writes a folder per class and gives the folder back."""
    return write_tree


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """A folder with ``train/`` (7 cats, 6 dogs) and ``val/`` (3 cats, 2 dogs)."""
    write_tree(tmp_path / "train", {"cat": 7, "dog": 6})
    write_tree(tmp_path / "val", {"cat": 3, "dog": 2})
    return tmp_path


def write_mask_tree(
    root: Path,
    splits: dict[str, int],
    classes: object = None,
    size: tuple[int, int] = (40, 32),
    *,
    inside: bool = False,
) -> Path:
    """Writes so many images with index masks of each split ("" for none), and ``classes.json``.

    A mask has the values 1 (left), 3 (right) and 255 (the topmost rows); the image is red where it is 1.
    """
    for split, number in splits.items():
        folders = [root / split / kind if inside else root / kind / split for kind in ("images", "masks")]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for image in range(number):
            mask = np.full((size[1], size[0]), 3, dtype=np.uint8)
            mask[:, : size[0] // 2 + image] = 1
            mask[:2] = 255
            pixels = np.full((size[1], size[0], 3), 10 * image, dtype=np.uint8)
            pixels[mask == 1] = (0, 0, 200)  # BGR
            cv2.imwrite(str(folders[0] / f"{image:03d}.png"), pixels)
            cv2.imwrite(str(folders[1] / f"{image:03d}.png"), mask)
    (root / "classes.json").write_text(json.dumps(classes if classes is not None else {"1": "left", "3": "right"}))
    return root


@pytest.fixture
def mask_tree() -> Callable[..., Path]:
    """``mask_tree(folder, {split: number of images}, classes)``: writes images with masks; gives the folder back."""
    return write_mask_tree


@pytest.fixture
def mask_root(tmp_path: Path) -> Path:
    """A folder with ``images`` and ``masks`` of ``train`` (7) and ``val`` (3)."""
    return write_mask_tree(tmp_path, {"train": 7, "val": 3})
