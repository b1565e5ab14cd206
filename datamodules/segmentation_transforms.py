"""Augmentation of an image and its mask together, as the published recipes of semantic segmentation do it.

Images are uint8 RGB arrays ``(H, W, 3)``, masks int16 labels ``(H, W)`` with -1 where there is none. The arithmetic is
that of mmsegmentation (``datasets/pipelines/transforms.py`` of 0.x), with which the ADE20K numbers were made; all that
is random is drawn from a generator that the caller seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from effvit.categories import IGNORED
from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules.transforms import keep_ratio_size

Labels = np.ndarray[Any, np.dtype[np.int16]]
Pair = tuple[Pixels, Labels]

#: Crops that are tried before one with too much of one class is taken.
_TRIES = 10
# mmsegmentation's ``PhotoMetricDistortion``.
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 32, (0.5, 1.5), (0.5, 1.5), 18
_HUES = 180  # OpenCV's circle, in steps of two degrees
_LEVELS = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentation:
    """Random scale, crop, flip and distortion of colours.

    Attributes:
        image_size: Limits of the long and the short side in pixels; width and height where ``squash``.
        squash: Resize to ``image_size`` whatever the ratio of the image.
        scale_range: Range of a random factor on ``image_size``.
        short_side: Range of a random short side in pixels, in place of ``scale_range``; the long side stays within its
            upper end, as in ml-cvnets.
        crop_size: Height and width of the crop; smaller images stay as they are.
        class_limit: Largest share that one class may have of the labelled pixels of a crop; 1 for any.
        flip: Probability of a horizontal flip.
        photometric: Distort colours.
    """

    image_size: tuple[int, int]
    squash: bool
    scale_range: tuple[float, float]
    short_side: tuple[int, int] | None
    crop_size: tuple[int, int]
    class_limit: float
    flip: float
    photometric: bool

    def __call__(self, image: Pixels, mask: Labels, random: np.random.Generator) -> Pair:
        """Augments an image ``(H, W, 3)`` and its mask ``(H, W)``; both may be smaller than the crop afterwards."""
        image, mask = resize_both(image, mask, self._draw_size(image.shape[0], image.shape[1], random))
        image, mask = crop_both(image, mask, self.crop_size, self.class_limit, random)
        if random.random() < self.flip:
            image, mask = cv2.flip(image, 1), cv2.flip(mask, 1).astype(np.int16, copy=False)
        return (photometric_distortion(image, random) if self.photometric else image), mask

    def _draw_size(self, height: int, width: int, random: np.random.Generator) -> tuple[int, int]:
        """Height and width that an image is resized to."""
        if self.short_side is not None:
            low, high = self.short_side
            return keep_ratio_size(height, width, (high, int(random.integers(low, high + 1))))
        factor = random.uniform(*self.scale_range)
        scale = max(int(self.image_size[0] * factor), 1), max(int(self.image_size[1] * factor), 1)
        return (scale[1], scale[0]) if self.squash else keep_ratio_size(height, width, scale)


def resize_both(image: Pixels, mask: Labels, size: tuple[int, int]) -> Pair:
    """Resizes an image bilinearly and its mask to the nearest label, with OpenCV as the recipes do.

    Args:
        image: ``(H, W, 3)``.
        mask: ``(H, W)``.
        size: New height and width.
    """
    if image.shape[:2] == size:
        return image, mask
    width_height = size[::-1]
    resized = cv2.resize(image, width_height, interpolation=cv2.INTER_LINEAR)
    return resized, cv2.resize(mask, width_height, interpolation=cv2.INTER_NEAREST).astype(np.int16, copy=False)


def crop_both(
    image: Pixels, mask: Labels, size: tuple[int, int], class_limit: float, random: np.random.Generator
) -> Pair:
    """A random window of an image and its mask in which no class has too large a share.

    Up to ten windows are tried; one with a single class is refused as well, and the eleventh is taken as it is
    (mmsegmentation's ``RandomCrop`` with ``cat_max_ratio``).

    Args:
        image: ``(H, W, 3)``.
        mask: ``(H, W)``.
        size: Height and width of the window; a shorter side is not cropped.
        class_limit: Largest share of one class among the labelled pixels; 1 takes the first window.
        random: Where the window is drawn from.
    """
    room = max(mask.shape[0] - size[0], 0), max(mask.shape[1] - size[1], 0)
    if room == (0, 0):
        return image, mask
    for _ in range(_TRIES if class_limit < 1 else 0):
        window = _draw_window(room, size, random)
        if _is_mixed(mask[window], class_limit):
            break
    else:
        window = _draw_window(room, size, random)
    return image[window], mask[window]


def _draw_window(room: tuple[int, int], size: tuple[int, int], random: np.random.Generator) -> tuple[slice, slice]:
    top, left = int(random.integers(room[0] + 1)), int(random.integers(room[1] + 1))
    return slice(top, top + size[0]), slice(left, left + size[1])


def _is_mixed(mask: Labels, class_limit: float) -> bool:
    """Whether there are several classes, none of them with a larger share than allowed."""
    # OpenCV counts unsigned numbers, in half of numpy's time; IGNORED is -1, so that the first place counts it.
    shifted = np.ascontiguousarray(mask - IGNORED).view(np.uint16)
    bins = int(shifted.max()) + 1
    counts = cv2.calcHist([shifted], [0], None, [bins], [0, bins]).ravel()[1:]
    return bool(np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < class_limit)


def pad_both(image: Pixels, mask: Labels, size: tuple[int, int]) -> Pair:
    """Puts image and mask to the top left of a larger size; the rest is black, and without a label.

    Args:
        image: ``(H, W, 3)``.
        mask: ``(H, W)``.
        size: Height and width, neither smaller than the image's.
    """
    bottom, right = size[0] - image.shape[0], size[1] - image.shape[1]
    if bottom == right == 0:
        return np.ascontiguousarray(image), np.ascontiguousarray(mask)
    edges = (0, bottom, 0, right, cv2.BORDER_CONSTANT)
    padded = cv2.copyMakeBorder(mask, *edges, value=IGNORED)
    return cv2.copyMakeBorder(image, *edges, value=(0, 0, 0)), padded.astype(np.int16, copy=False)


def photometric_distortion(image: Pixels, random: np.random.Generator) -> Pixels:
    """Distorts brightness, contrast, saturation and hue, each in one of two images.

    mmsegmentation's ``PhotoMetricDistortion``, value by value: brightness by up to 32, contrast before or after
    saturation and hue by 0.5 to 1.5, saturation by 0.5 to 1.5, hue by up to 18 of OpenCV's 180 steps.

    Args:
        image: uint8 ``(H, W, 3)``, RGB.
        random: What is drawn from.
    """
    if random.random() < 0.5:
        image = _look_up(image, _scaled(1.0, random.uniform(-_BRIGHTNESS, _BRIGHTNESS)))
    contrast_first = random.random() < 0.5
    if contrast_first:
        image = _random_contrast(image, random)
    if random.random() < 0.5:
        image = _change_hsv(image, 1, _scaled(random.uniform(*_SATURATION), 0.0))
    if random.random() < 0.5:
        shift = int(random.integers(-_HUE, _HUE))
        image = _change_hsv(image, 0, ((_LEVELS.astype(int) + shift) % _HUES).astype(np.uint8))
    return image if contrast_first else _random_contrast(image, random)


def _random_contrast(image: Pixels, random: np.random.Generator) -> Pixels:
    return _look_up(image, _scaled(random.uniform(*_CONTRAST), 0.0)) if random.random() < 0.5 else image


def _scaled(factor: float, offset: float) -> Pixels:
    """What becomes of each of 256 levels: float32 arithmetic, cut to 0 … 255, and truncated."""
    levels = _LEVELS.astype(np.float32) * np.float32(factor) + np.float32(offset)
    table: Pixels = levels.clip(0, 255).astype(np.uint8)
    return table


def _change_hsv(image: Pixels, channel: int, table: Pixels) -> Pixels:
    """Looks up one channel of hue, saturation and value."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., channel] = _look_up(np.ascontiguousarray(hsv[..., channel]), table)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _look_up(image: Pixels, table: Pixels) -> Pixels:
    return cv2.LUT(np.ascontiguousarray(image), table)
