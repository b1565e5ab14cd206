"""Image files to uint8 RGB: greyscale, CMYK, 16-bit, palette, EXIF rotation, and a clear error for everything else."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from effvit.errors import DatasetError

if TYPE_CHECKING:
    from pathlib import Path


class SizeMismatchError(DatasetError):
    """An image file of another size than its annotation says."""


# What to do about a damaged file that an annotation file lists.
REMEDY = "restore the file or remove its entry"
#: The same among the images to predict on.
PREDICT_REMEDY = "restore or remove the file, or pass `--unreadable skip` to leave out such files"

_JPEG_MAGIC, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_START_OF_SCAN = 0xDA
_ORIENTATION = 0x0112  # EXIF tag


def read_image(
    path: Path, *, size: tuple[int, int] | None = None, where: str = "", remedy: str = REMEDY
) -> torch.Tensor:
    """Reads an image file as RGB.

    A file with an EXIF orientation may have been annotated as displayed or as stored. The annotated size decides:
    where it equals the displayed size the image is transposed, where it equals only the stored size it is not.

    Args:
        path: The file.
        size: Annotated height and width in pixels; without it, EXIF orientation is always applied.
        where: What the error message adds about the image, such as its id.
        remedy: What the error message says to do about a damaged file.

    Returns:
        uint8 ``(3, H, W)``, laid out in memory as ``(H, W, 3)``.

    Raises:
        DatasetError: The file is missing, truncated or not an image.
        SizeMismatchError: It is of another size than annotated.
    """
    name = f"{path} ({where})" if where else str(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DatasetError(f"cannot read image {name}: {reason}") from error
    return decode_image(data, name, size=size, remedy=remedy)


def decode_image(data: bytes, name: str, *, size: tuple[int, int] | None = None, remedy: str = REMEDY) -> torch.Tensor:
    """Decodes the content of an image file as RGB; see `read_image`.

    Args:
        data: The content.
        name: What error messages call the image.
        size: Annotated height and width in pixels, if any.
        remedy: What the error message says to do about a damaged file.

    Returns:
        uint8 ``(3, H, W)``, laid out in memory as ``(H, W, 3)``.

    Raises:
        DatasetError: The content is truncated or not an image.
        SizeMismatchError: It is of another size than annotated.
    """
    try:
        image, orientation = _decode(data)
    except UnidentifiedImageError as error:
        raise DatasetError(f"{name} is not an image in a known format ({len(data)} bytes); {remedy}") from error
    except Exception as error:
        raise DatasetError(f"image {name} is truncated or damaged ({len(data)} bytes): {error}; {remedy}") from error
    return _orient(image, orientation, size, name)


def _decode(data: bytes) -> tuple[torch.Tensor, int]:
    """RGB as stored, and the EXIF orientation (1: as stored)."""
    if not data.startswith(_JPEG_MAGIC):
        with Image.open(io.BytesIO(data)) as image:
            return _from_pil(image), read_orientation(image)
    components, scan = _jpeg_frame(data)
    orientation = 1
    if b"Exif" in data[:scan] or components not in {1, 3}:
        with Image.open(io.BytesIO(data)) as image:
            orientation = read_orientation(image)
            if components not in {1, 3}:
                return _from_pil(image), orientation
    # OpenCV before version 5 fills a truncated picture with grey and says nothing.
    if data.rfind(_JPEG_END, scan) < 0:
        raise ValueError("the JPEG data end before the end-of-image marker")
    pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if pixels is None:
        raise ValueError("the JPEG data cannot be decoded")
    return torch.from_numpy(pixels).permute(2, 0, 1), orientation


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1, as stored, where there is none."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  a damaged EXIF block must not make a sound image unreadable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _jpeg_frame(data: bytes) -> tuple[int, int]:
    """Number of colour components of a JPEG, and where its compressed data start; 0 for what is not found."""
    position, components = 2, 0
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return components, position
        if 0xC0 <= marker <= 0xCF and marker not in {0xC4, 0xC8, 0xCC}:
            components = data[position + 9]
        # Markers may be preceded by any number of 0xFF bytes.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return components, 0


def _from_pil(image: Image.Image) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palette images with transparency: the alpha channel is dropped on purpose
        if image.mode.startswith("I"):  # 16 bits: keep the high byte
            deep = np.asarray(image).astype(np.int64)
            rgb = Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
        elif image.mode == "P" and "transparency" in image.info:
            rgb = image.convert("RGBA").convert("RGB")
        else:
            rgb = image.convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)


def _orient(image: torch.Tensor, orientation: int, size: tuple[int, int] | None, where: str) -> torch.Tensor:
    stored = (image.shape[1], image.shape[2])
    displayed = stored[::-1] if orientation >= 5 else stored
    if size is not None and size != displayed:
        if size == stored:
            return image
        raise SizeMismatchError(
            f"image {where} has {stored[1]}x{stored[0]} pixels (width x height)"
            + (f", {displayed[1]}x{displayed[0]} after its EXIF rotation" if displayed != stored else "")
            + f", but its annotation says {size[1]}x{size[0]}; correct width and height in the JSON or restore the file"
        )
    if orientation == 1:
        return image
    turned = Image.fromarray(image.permute(1, 2, 0).numpy())
    turned.getexif()[_ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(turned)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)
