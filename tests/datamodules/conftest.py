"""Small trees of classified images."""

from __future__ import annotations

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
