"""Mask files: their pixel values, and the pairs of an image and its mask that make a split."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._checks import Fault
from effvit.datamodules._decode import SizeMismatchError, read_image, read_orientation
from effvit.datamodules._mask_classes import Array, Labels, MaskClasses, UnknownValueError
from effvit.errors import DatasetError

REMEDY = "restore or remove the file, or train with `--data.faults skip`, which leaves it out"
_INDEXED, _DEEP = {"1", "L", "P"}, ("I", "I;16")
#: Pillow stretches grey values of few bits to 0 … 255 as it decodes; divided by this, they are what the file holds.
_STRETCHED = {"L;2": 85, "L;4": 17}


class MaskPair(NamedTuple):
    """An image and its mask, as paths relative to the root of the data set, with forward slashes."""

    image: str
    mask: str


class MaskSource(ABC):
    """Images of one split with their masks."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What an image is called in results and messages."""

    @abstractmethod
    def read_image(self, index: int) -> Pixels:
        """An image as uint8 RGB ``(H, W, 3)``.

        Raises:
            DatasetError: The file is missing or damaged.
        """

    @abstractmethod
    def read(self, index: int) -> tuple[Pixels, Labels]:
        """An image and its labels, int16 ``(H, W)`` with -1 where there is none.

        Raises:
            DatasetError: A file is missing or damaged, or the mask is of another size.
            UnknownValueError: The mask has a pixel value that is no class.
        """


class MaskFiles(MaskSource):
    """Pairs of files below one folder.

    Args:
        root: The folder.
        pairs: The files.
        classes: What pixel values mean.
        unknown: "error", or "ignore" to take pixels of a value that is no class for unlabelled.
    """

    def __init__(self, root: Path, pairs: Sequence[MaskPair], classes: MaskClasses, unknown: str) -> None:
        self.root = root
        self.classes = classes
        self.unknown = unknown
        # Two arrays instead of thousands of objects, whose reference counts each worker would copy page by page.
        self._images = np.array([os.fsencode(pair.image) for pair in pairs])
        self._masks = np.array([os.fsencode(pair.mask) for pair in pairs])

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self._images)

    def name(self, index: int) -> str:
        """Path of the image relative to the root."""
        return os.fsdecode(bytes(self._images[index]))

    def mask_name(self, index: int) -> str:
        """Path of the mask relative to the root."""
        return os.fsdecode(bytes(self._masks[index]))

    def read_image(self, index: int) -> Pixels:
        """The decoded image, turned as its mask is."""
        mask = self.root / self.mask_name(index)
        with _open_mask(mask) as opened:
            return read_paired_image(self.root / self.name(index), mask, opened.size)

    def read(self, index: int) -> tuple[Pixels, Labels]:
        """The decoded files."""
        image, labels, unknown = decode_pair(self.root, MaskPair(self.name(index), self.mask_name(index)), self.classes)
        if unknown and self.unknown == "error":
            raise UnknownValueError(
                f"mask {self.root / self.mask_name(index)} has {self.classes.explain_unknown(unknown)}. Declare them, "
                "or pass `--data.ignore` or `--data.merge` where the data module has it, or `--data.unknown ignore`"
            )
        return image, labels


def decode_pair(root: Path, pair: MaskPair, classes: MaskClasses) -> tuple[Pixels, Labels, dict[str, int]]:
    """Decodes an image and its mask.

    Args:
        root: What their names are relative to.
        pair: The files.
        classes: What pixel values mean.

    Returns:
        The image, uint8 RGB ``(H, W, 3)``; its labels, int16 ``(H, W)``; and the number of pixels of each value that is
        no class, which have no label.

    Raises:
        DatasetError: A file is missing or damaged, or the mask is of another size.
    """
    path = root / pair.mask
    values = read_values(path)
    image = read_paired_image(root / pair.image, path, (values.shape[1], values.shape[0]))
    if values.ndim == 3 and not classes.colours:
        values = single_channel(values, path)
    return image, *classes.labels(values)


def read_values(path: Path) -> Array:
    """Pixel values of a mask file.

    Indices of a palette are values, whatever their colours.

    Returns:
        Integers ``(H, W)`` in 0 … 65535, or RGB ``(H, W, 3)``, uint8, where the file has colours.

    Raises:
        DatasetError: It is missing, damaged, or no mask.
    """
    with _open_mask(path) as image:
        stretched = _STRETCHED.get(image.tile[0][3], 1) if image.format == "PNG" else 1  # decoding forgets the tiles
        try:
            if image.mode in _INDEXED:
                return np.asarray(image).astype(np.uint8, copy=False) // np.uint8(stretched)
            if image.mode in {"RGB", "RGBA"}:
                return np.asarray(image)[..., :3]
            if image.mode in {"LA", "PA"}:
                return np.asarray(image.getchannel(0))
            values = np.asarray(image)
        except Exception as error:  # Pillow raises whatever its decoders raise
            raise DatasetError(f"mask {path} is truncated or damaged: {error}; {REMEDY}") from error
        if not image.mode.startswith(_DEEP) or values.min() < 0 or values.max() >= 1 << 16:
            raise DatasetError(
                f"mask {path} has pixels of the sort {image.mode!r}; a mask holds indices of 8 or 16 bits, a palette, "
                "or RGB colours"
            )
        return values


def single_channel(values: Array, path: Path) -> Array:
    """The one channel of a grey picture saved as RGB, ``(H, W, 3)`` to ``(H, W)``.

    Raises:
        DatasetError: It is not grey.
    """
    if (values == values[..., :1]).all():
        return values[..., 0]
    raise DatasetError(
        f"mask {path} holds RGB colours, and the classes declare none: give each class its 'color' in classes.json, "
        'as [{"id": 1, "name": "road", "color": [128, 64, 128]}, …], or save the masks with indices'
    )


def read_paired_image(path: Path, mask: Path, size: tuple[int, int]) -> Pixels:
    """An image, turned as its EXIF orientation says where the mask is so too.

    Args:
        path: Its file.
        mask: File of the mask, for the message.
        size: Width and height of the mask.

    Raises:
        DatasetError: It is missing, damaged, or of another size.
    """
    try:
        pixels: Pixels = read_image(path, size=(size[1], size[0]), remedy=REMEDY).permute(1, 2, 0).numpy()
    except SizeMismatchError as error:
        with Image.open(path) as image:
            raise DatasetError(f"{path}: {size_message(image.size, size)} ({mask})") from error
    return pixels


def size_message(image: tuple[int, int], mask: tuple[int, int]) -> str:
    """Says that a mask is of another size than its image, both as width and height."""
    return f"the image has {image[0]}x{image[1]} pixels (width x height), its mask {mask[0]}x{mask[1]}"


def header_faults(root: Path, pairs: Iterable[MaskPair]) -> list[Fault]:
    """What is wrong with pairs of files, as far as their first bytes tell; each fault names the image.

    Args:
        root: What their names are relative to.
        pairs: The files.
    """
    return [fault for pair in pairs if (fault := _header_fault(root, pair)) is not None]


def _header_fault(root: Path, pair: MaskPair) -> Fault | None:
    try:
        with _open_mask(root / pair.mask) as mask, _open_image(root / pair.image) as image:
            fits = image.size == mask.size
            if not fits and image.size == mask.size[::-1]:
                fits = read_orientation(image) >= 5
            if fits:
                return None
            return Fault("wrong-size", f"{size_message(image.size, mask.size)} ({pair.mask})", file=pair.image)
    except DatasetError as error:
        return Fault("unreadable-file", str(error), file=pair.image)


def _open_mask(path: Path) -> Any:
    return _open_image(path, "mask")


def _open_image(path: Path, what: str = "image") -> Any:
    """Opens a file without decoding it."""
    try:
        return Image.open(path)
    except FileNotFoundError as error:
        raise DatasetError(f"cannot read {what} {path}: there is no such file") from error
    except Exception as error:
        raise DatasetError(f"{what} {path} cannot be opened: {error}; {REMEDY}") from error
