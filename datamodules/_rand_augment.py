"""RandAugment (arXiv 1909.13719) in the two forms that published recipes use, and 3-Augment (arXiv 2204.07118)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules._augment_ops import Colour, Interpolation, Matrix, Pixels

# The mean of ImageNet, which timm paints where an operation moves the image away; torchvision paints black.
_IMAGENET_GREY: Colour = (124, 116, 104)
_BLACK: Colour = (0, 0, 0)

Operation: TypeAlias = Callable[[Pixels, float, Interpolation, Colour], Pixels]


@dataclass(frozen=True)
class Entry:
    """One operation of a policy.

    Attributes:
        apply: Function of image, level, interpolation and fill colour. The level is the magnitude as a share of its
            largest value, negated half of the time where ``signed``.
        signed: Whether the operation has two directions.
    """

    apply: Operation
    signed: bool = False


def _plain(operation: Callable[[Pixels], Pixels]) -> Entry:
    return Entry(lambda image, _level, _how, _fill: operation(image))


def _point(operation: Callable[[Pixels, int], Pixels], argument: Callable[[float], int]) -> Entry:
    return Entry(lambda image, level, _how, _fill: operation(image, argument(level)))


def _enhance(operation: Callable[[Pixels, float], Pixels], least: float = 0.0) -> Entry:
    return Entry(lambda image, level, _how, _fill: operation(image, max(least, 1 + 0.9 * level)), signed=True)


def _warp(matrix: Callable[[float, int, int], Matrix]) -> Entry:
    """The matrix is a function of level, width and height."""
    return Entry(
        lambda image, level, how, fill: ops.warp(image, matrix(level, image.shape[1], image.shape[0]), how, fill),
        signed=True,
    )


# timm's list for `rand-…-inc1`: the effect of every operation grows with the magnitude.
TIMM: dict[str, Entry] = {
    "AutoContrast": _plain(ops.autocontrast),
    "Equalize": _plain(ops.equalize),
    "Invert": _plain(ops.invert),
    "Rotate": _warp(lambda level, width, height: ops.rotation(30 * level, width, height)),
    "PosterizeIncreasing": _point(ops.posterize, lambda level: 4 - int(4 * level)),
    "SolarizeIncreasing": _point(ops.solarize, lambda level: 256 - int(256 * level)),
    "SolarizeAdd": _point(ops.solarize_add, lambda level: int(110 * level)),
    "ColorIncreasing": _enhance(ops.color, least=0.1),
    "ContrastIncreasing": _enhance(ops.contrast, least=0.1),
    "BrightnessIncreasing": _enhance(ops.brightness, least=0.1),
    "SharpnessIncreasing": _enhance(ops.sharpness, least=0.1),
    "ShearX": _warp(lambda level, _width, _height: (1, 0.3 * level, 0, 0, 1, 0)),
    "ShearY": _warp(lambda level, _width, _height: (1, 0, 0, 0.3 * level, 1, 0)),
    "TranslateXRel": _warp(lambda level, width, _height: (1, 0, 0.45 * level * width, 0, 1, 0)),
    "TranslateYRel": _warp(lambda level, _width, height: (1, 0, 0, 0, 1, 0.45 * level * height)),
}

# torchvision's `RandAugment`. Its shifts go the other way than timm's, by whole pixels.
TORCHVISION: dict[str, Entry] = {
    "Identity": _plain(np.ascontiguousarray),
    "ShearX": _warp(lambda level, _width, _height: (1, 0.3 * level, 0, 0, 1, 0)),
    "ShearY": _warp(lambda level, _width, _height: (1, 0, 0, 0.3 * level, 1, 0)),
    "TranslateX": _warp(lambda level, width, _height: (1, 0, -int(150 / 331 * level * width), 0, 1, 0)),
    "TranslateY": _warp(lambda level, _width, height: (1, 0, 0, 0, 1, -int(150 / 331 * level * height))),
    "Rotate": _warp(lambda level, width, height: ops.rotation(30 * level, width, height)),
    "Brightness": _enhance(ops.brightness),
    "Color": _enhance(ops.color),
    "Contrast": _enhance(ops.contrast),
    "Sharpness": _enhance(ops.sharpness),
    "Posterize": _point(ops.posterize, lambda level: 8 - round(4 * level)),
    # Its threshold is a fraction; a whole value lies from it up when it lies from the next whole number up.
    "Solarize": _point(ops.solarize, lambda level: math.ceil(255 * (1 - level))),
    "AutoContrast": _plain(ops.autocontrast),
    "Equalize": _plain(ops.equalize),
}

_TIMM_ENTRIES, _TORCHVISION_ENTRIES = tuple(TIMM.values()), tuple(TORCHVISION.values())


def rand_augment_timm(
    image: Pixels, random: np.random.Generator, interpolation: Interpolation, magnitude: float, std: float, num_ops: int
) -> Pixels:
    """RandAugment as in timm, ``rand-m<magnitude>-mstd<std>-inc1-n<num_ops>``.

    Each of ``num_ops`` operations, drawn with replacement, is applied half of the time, with a magnitude drawn from a
    normal distribution and clipped to 0…10.

    Args:
        image: ``(H, W, 3)``.
        random: Where random numbers come from.
        interpolation: That of rotation, shear and shift. In timm it is that of the recipe's resized crop.
        magnitude: 0…10.
        std: Its standard deviation.
        num_ops: How many operations are drawn.
    """
    for number in random.integers(len(_TIMM_ENTRIES), size=num_ops):
        if random.random() < 0.5:
            level = min(max(random.normal(magnitude, std), 0.0), 10.0) / 10
            image = _apply(_TIMM_ENTRIES[number], image, level, random, interpolation, _IMAGENET_GREY)
    return image


def rand_augment_torchvision(image: Pixels, random: np.random.Generator, magnitude: float, num_ops: int) -> Pixels:
    """RandAugment as in torchvision, ``RandAugment(num_ops, magnitude)``: 31 magnitudes, nearest-pixel sampling.

    Args:
        image: ``(H, W, 3)``.
        random: Where random numbers come from.
        magnitude: 0…30.
        num_ops: How many operations are drawn, with replacement; all are applied.
    """
    for number in random.integers(len(_TORCHVISION_ENTRIES), size=num_ops):
        image = _apply(_TORCHVISION_ENTRIES[number], image, magnitude / 30, random, "nearest", _BLACK)
    return image


def _apply(
    entry: Entry,
    image: Pixels,
    level: float,
    random: np.random.Generator,
    interpolation: Interpolation,
    fill: Colour,
) -> Pixels:
    signed = -level if entry.signed and random.random() < 0.5 else level
    return entry.apply(image, signed, interpolation, fill)


def three_augment(image: Pixels, random: np.random.Generator) -> Pixels:
    """One of greyscale, solarisation from 128 and Gaussian blur (DeiT III, section 3 and ``augment.py``).

    Args:
        image: ``(H, W, 3)``.
        random: Where random numbers come from.
    """
    choice = random.integers(3)
    if choice == 0:
        return ops.grayscale(image)
    if choice == 1:
        return ops.solarize(image, 128)
    return ops.gaussian_blur(image, random.uniform(0.1, 2.0))


def color_jitter(image: Pixels, random: np.random.Generator, strength: float) -> Pixels:
    """Brightness, contrast and saturation in random order (torchvision's ``ColorJitter(s, s, s)``).

    Args:
        image: ``(H, W, 3)``.
        random: Where random numbers come from.
        strength: Each factor is drawn between ``1 - strength`` (at least 0) and ``1 + strength``.
    """
    for number in random.permutation(3):
        factor = random.uniform(max(0.0, 1 - strength), 1 + strength)
        image = (ops.brightness, ops.contrast, ops.color)[number](image, factor)
    return image
