"""Operations of the augmentation policies on uint8 RGB arrays ``(H, W, 3)``, with Pillow's results and OpenCV's speed.

Operations on single pixels give Pillow's values exactly; what blends two images, filters or moves pixels stays within
the bounds that ``tests/datamodules/test_augment_ops.py`` states and checks. Nothing here draws a random number, and
nothing writes into its input.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from torch.nn import functional as F

# uint8 throughout; OpenCV's annotations know whole and floating numbers only.
Pixels: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Colour: TypeAlias = tuple[int, int, int]
Matrix: TypeAlias = tuple[float, float, float, float, float, float]
Interpolation: TypeAlias = Literal["nearest", "bilinear", "bicubic"]

_FLAGS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
_LEVELS = np.arange(256, dtype=np.uint8)
# Pillow's ImageFilter.SMOOTH.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13
# Pillow truncates where OpenCV rounds. A little less than a half, as a whole number must stay what it is.
_TRUNCATE = -0.4999


def resize(image: Pixels, size: int, interpolation: Interpolation) -> Pixels:
    """Resizes to a square as Pillow does, with a filter that widens where the image shrinks.

    torch's filter for channels_last uint8 is Pillow's in vector instructions: one value in 20 is 1 or 2 off. For an
    image that is higher than wide, Pillow filters columns first and torch rows; the rounding in between sets one value
    in 4 apart by 1, overshooting bicubic edges by up to 8. Neither is nearer to exact arithmetic.

    Args:
        image: ``(H, W, 3)``; a window of a larger image will do.
        size: New height and width.
        interpolation: The filter, "bilinear" or "bicubic".

    Returns:
        ``(size, size, 3)``.
    """
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    # A batch first, channels second: in the other order torch does not see channels_last and takes twice the time.
    window = np.require(image, requirements=["C_CONTIGUOUS", "WRITEABLE"])  # torch has no read-only tensors
    batch = torch.from_numpy(window).unsqueeze(0).permute(0, 3, 1, 2)
    resized = F.interpolate(batch, size=(size, size), mode=interpolation, antialias=True, align_corners=False)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1)[0].numpy())


def flip(image: Pixels) -> Pixels:
    """Mirrors left and right."""
    return cv2.flip(image, 1)


def autocontrast(image: Pixels) -> Pixels:
    """Stretches each channel to 0…255 (``ImageOps.autocontrast``)."""
    rows = image.reshape(image.shape[0], -1)  # reducing whole rows first is 20 times as fast as reducing channels
    low, high = rows.min(axis=0).reshape(-1, 3).min(axis=0), rows.max(axis=0).reshape(-1, 3).max(axis=0)
    return _look_up(image, np.stack([_stretch(int(a), int(b)) for a, b in zip(low, high, strict=True)], axis=-1))


def _stretch(low: int, high: int) -> Pixels:
    if high <= low:
        return _LEVELS
    factor = 255.0 / (high - low)
    return (_LEVELS * factor + -low * factor).clip(0, 255).astype(np.uint8)


def equalize(image: Pixels) -> Pixels:
    """Spreads the values of each channel evenly (``ImageOps.equalize``)."""
    return _look_up(image, np.stack([_spread(_histogram(image, channel)) for channel in range(3)], axis=-1))


def _histogram(image: Pixels, channel: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)


def _spread(histogram: np.ndarray[Any, np.dtype[np.int64]]) -> Pixels:
    used = histogram.nonzero()[0]
    step = int(histogram.sum() - histogram[used[-1]]) // 255
    if len(used) <= 1 or step == 0:
        return _LEVELS
    below = np.cumsum(histogram) - histogram
    table: Pixels = ((step // 2 + below) // step).clip(0, 255).astype(np.uint8)
    return table


def invert(image: Pixels) -> Pixels:
    """``255 - value`` (``ImageOps.invert``)."""
    return cv2.bitwise_not(image)


def posterize(image: Pixels, bits: int) -> Pixels:
    """Keeps the highest ``bits`` of each value (``ImageOps.posterize``); 0 gives a black image."""
    return cv2.bitwise_and(image, _scalar(0xFF00 >> bits & 0xFF))


def solarize(image: Pixels, threshold: int) -> Pixels:
    """Inverts the values from ``threshold`` up, 0…256 (``ImageOps.solarize``)."""
    return cv2.bitwise_xor(image, cv2.compare(image, _scalar(threshold), cv2.CMP_GE))


def solarize_add(image: Pixels, amount: int, threshold: int = 128) -> Pixels:
    """Adds ``amount`` to the values below ``threshold``, up to 255 (timm's ``solarize_add``)."""
    dark = cv2.compare(image, _scalar(threshold), cv2.CMP_LT)
    return cv2.add(image, cv2.bitwise_and(dark, _scalar(amount)))


def brightness(image: Pixels, factor: float) -> Pixels:
    """Blends with black (``ImageEnhance.Brightness``)."""
    return _look_up(image, _blend_levels(0, factor))


def contrast(image: Pixels, factor: float) -> Pixels:
    """Blends with the mean grey value (``ImageEnhance.Contrast``)."""
    return _look_up(image, _blend_levels(int(cv2.mean(to_grey(image))[0] + 0.5), factor))


def _blend_levels(grey: int, factor: float) -> Pixels:
    # Single precision, truncated: Pillow's arithmetic.
    levels = np.float32(factor) * (_LEVELS.astype(np.float32) - np.float32(grey)) + np.float32(grey)
    return levels.clip(0, 255).astype(np.uint8)


def color(image: Pixels, factor: float) -> Pixels:
    """Blends with the grey image (``ImageEnhance.Color``); a factor of 0 is the grey image."""
    return _blend(cv2.cvtColor(to_grey(image), cv2.COLOR_GRAY2RGB), image, factor)


def hue(image: Pixels, shift: float) -> Pixels:
    """Turns the hue by a share of the whole circle (torchvision's ``adjust_hue`` on Pillow images).

    OpenCV's steps of hue are 1/256 of the circle and Pillow's 1/255, so values are a few levels apart.
    """
    turned = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    turned[..., 0] += np.uint8(round(shift * 256) % 256)  # wraps around
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL)


def sharpness(image: Pixels, factor: float) -> Pixels:
    """Blends with a smoothed image (``ImageEnhance.Sharpness``), leaving the outermost pixels as they are."""
    smooth = cv2.filter2D(image, -1, _SMOOTH)
    smooth[0], smooth[-1], smooth[:, 0], smooth[:, -1] = image[0], image[-1], image[:, 0], image[:, -1]
    return _blend(smooth, image, factor)


def to_grey(image: Pixels) -> Pixels:
    """Luma of ITU-R 601-2, ``(H, W)`` (Pillow's mode "L", but for the rounding of one value in a thousand)."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)


def grayscale(image: Pixels) -> Pixels:
    """The grey image as three equal channels."""
    return cv2.cvtColor(to_grey(image), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: Pixels, sigma: float) -> Pixels:
    """Gaussian blur (``ImageFilter.GaussianBlur``, which approximates it by box filters)."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """The matrix of a counter-clockwise rotation about the centre (``Image.rotate``)."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos


def warp(image: Pixels, matrix: Matrix, interpolation: Interpolation, fill: Colour) -> Pixels:
    """Moves pixels by an affine map (``Image.transform`` with ``AFFINE``).

    Args:
        image: ``(H, W, 3)``.
        matrix: ``(a, b, c, d, e, f)``: the target's ``(x, y)`` comes from ``(a x + b y + c, d x + e y + f)``, where the
            middle of the first pixel is at 0.5.
        interpolation: How the source is sampled.
        fill: What lies outside of the source.
    """
    a, b, c, d, e, f = matrix
    # OpenCV's first pixel is at 0.
    at_zero = np.array([[a, b, c + (a + b - 1) / 2], [d, e, f + (d + e - 1) / 2]])
    return cv2.warpAffine(
        image,
        at_zero,
        (image.shape[1], image.shape[0]),
        flags=_FLAGS[interpolation] | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )


def _scalar(value: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One value for every channel, in the form that OpenCV takes for that."""
    return np.full((4, 1), value, dtype=np.float64)


def _look_up(image: Pixels, table: Pixels) -> Pixels:
    """Replaces each value by that of ``table``: ``(256,)`` for all channels, ``(256, 3)`` for each its own."""
    return cv2.LUT(image, table if table.ndim == 1 else np.ascontiguousarray(table[:, None]))


def _blend(start: Pixels, end: Pixels, factor: float) -> Pixels:
    """``start + factor * (end - start)``, clipped (``Image.blend``)."""
    return cv2.addWeighted(end, factor, start, 1 - factor, _TRUNCATE)
