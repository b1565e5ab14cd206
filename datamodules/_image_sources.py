"""Where the images of a classification set come from: files or arrays, each with its label and its name."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._decode import PREDICT_REMEDY, read_image

Labels = np.ndarray[Any, np.dtype[np.int64]]

#: What to do about a damaged file of a data set.
REMEDY = "restore or remove the file, or pass `--data.unreadable skip` to leave out such files"


class ImageSource(ABC):
    """Images of one split; their position is their image id.

    Args:
        labels: Label of each image, ``(N,)``; -1 for unknown.
    """

    def __init__(self, labels: Sequence[int] | Labels) -> None:
        self.labels: Labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in results and messages."""

    @abstractmethod
    def read(self, index: int) -> Pixels:
        """An image as uint8 RGB ``(H, W, 3)``.

        Raises:
            DatasetError: The file is missing or damaged.
        """


class FileImages(ImageSource):
    """Image files below one folder.

    Args:
        root: The folder.
        names: Paths relative to it.
        labels: Label of each file.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int] | Labels) -> None:
        super().__init__(labels)
        self.root = root
        # One array instead of a million objects, whose reference counts each worker would copy page by page.
        self._names = np.array([os.fsencode(name) for name in names])

    def name(self, index: int) -> str:
        """Path relative to the root, with forward slashes."""
        return Path(os.fsdecode(bytes(self._names[index]))).as_posix()

    def read(self, index: int) -> Pixels:
        """The decoded file, turned as its EXIF orientation says."""
        return _read(self.root / self.name(index), REMEDY)


class ListedFiles(ImageSource):
    """Image files from anywhere, of unknown class.

    Args:
        files: The files.
        names: What each is called in the results.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str]) -> None:
        super().__init__([-1] * len(files))
        self._files = files
        self._names = names

    def name(self, index: int) -> str:
        """The name that was given."""
        return self._names[index]

    def read(self, index: int) -> Pixels:
        """The decoded file, turned as its EXIF orientation says."""
        return _read(self._files[index], PREDICT_REMEDY)


class ArrayImages(ImageSource):
    """Images in memory.

    Args:
        pixels: uint8 ``(N, H, W, 3)``, RGB.
        labels: Label of each.
        prefix: First part of their names, such as ``"digits/train"``.
    """

    def __init__(self, pixels: Pixels, labels: Sequence[int] | Labels, prefix: str) -> None:
        super().__init__(labels)
        self._pixels = pixels
        self._prefix = prefix

    def name(self, index: int) -> str:
        """The prefix and the number."""
        return f"{self._prefix}/{index}"

    def read(self, index: int) -> Pixels:
        """A copy of the image, that a transform may write to."""
        return np.array(self._pixels[index])


def _read(path: Path, remedy: str) -> Pixels:
    pixels: Pixels = read_image(path, remedy=remedy).permute(1, 2, 0).numpy()
    return pixels


@cache
def image_endings() -> frozenset[str]:
    """File name endings of the image formats that can be read, in lower case."""
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN)


def stratified_split(labels: Sequence[int] | Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Splits images so that each class keeps its share in both parts.

    Unlike scikit-learn's splitter, every class of at least two images is in both parts, and what is drawn of a class
    does not depend on the other classes.

    Args:
        labels: Label of each image.
        share: Share of the second part, in ``(0, 1)``.
        seed: Seed of the choice.

    Returns:
        Indices of the first and of the second part, ascending.
    """
    labels = np.asarray(labels)
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        number = min(max(round(len(members) * share), 1), len(members) - 1)
        second[np.random.default_rng((seed, int(label))).permutation(members)[:number]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)
