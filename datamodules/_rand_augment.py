"""RandAugment (arXiv 1909.13719) in the two forms that published recipes use, and 3-Augment (arXiv 2204.07118)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules._augment_ops import Interpolation, Pixels

Operation: TypeAlias = Callable[[Pixels, float, Interpolation, tuple[int, int, int]], Pixels]

# The mean of ImageNet, which timm paints where an operation moves the image away.
_IMAGENET_GREY = (124, 116, 104)
_BLACK = (0, 0, 0)


@dataclass(frozen=True)
class Entry:
    """One operation of a policy.

    Attributes:
        apply: Called with image, magnitude, interpolation and fill colour. The magnitude is what timm or torchvision
            would draw, between 0 and 1; its sign matters only where ``signed``.
        signed: Whether half of the time the magnitude is negative.
    """

    apply: Operation
    signed: bool = False


def _plain(operation: Callable[[Pixels], Pixels]) -> Entry:
    return Entry(lambda image, level, how, fill: operation(image))


def _enhance(operation: Callable[[Pixels, float], Pixels], most: float = 0.9, least: float = 0.0) -> Entry:
    return Entry(lambda image, level, how, fill: operation(image, max(least, 1 + level * most)), signed=True)


# timm's `rand-…-inc1` list: the strength of every operation grows with the magnitude.
TIMM: dict[str, Entry] = {
    "AutoContrast": _plain(ops.autocontrast),
    "Equalize": _plain(ops.equalize),
    "Invert": _plain(ops.invert),
    "Rotate": Entry(lambda image, level, how, fill: ops.rotate(image, level * 30, how, fill), signed=True),
    "PosterizeIncreasing": Entry(lambda image, level, how, fill: ops.posterize(image, 4 - int(level * 4))),
    "SolarizeIncreasing": Entry(lambda image, level, how, fill: ops.solarize(image, 256 - min(256, int(level * 256)))),
    "SolarizeAdd": Entry(lambda image, level, how, fill: ops.solarize_add(image, min(128, int(level * 110)))),
    "ColorIncreasing": _enhance(ops.color, least=0.1),
    "ContrastIncreasing": _enhance(ops.contrast, least=0.1),
    "BrightnessIncreasing": _enhance(ops.brightness, least=0.1),
    "SharpnessIncreasing": _enhance(ops.sharpness, least=0.1),
    "ShearX": Entry(lambda image, level, how, fill: ops.shear_x(image, level * 0.3, how, fill), signed=True),
    "ShearY": Entry(lambda image, level, how, fill: ops.shear_y(image, level * 0.3, how, fill), signed=True),
    "TranslateXRel": Entry(
        lambda image, level, how, fill: ops.translate_x(image, level * 0.45 * image.shape[1], how, fill), signed=True
    ),
    "TranslateYRel": Entry(
        lambda image, level, how, fill: ops.translate_y(image, level * 0.45 * image.shape[0], how, fill), signed=True
    ),
}

_TORCHVISION_SHIFT = 150.0 / 331.0

# torchvision's `RandAugment`. Its shears and shifts go the other way than timm's, and shifts are whole pixels.
TORCHVISION: dict[str, Entry] = {
    "Identity": _plain(np.ascontiguousarray),
    "ShearX": Entry(lambda image, level, how, fill: ops.shear_x(image, level * -0.3, how, fill), signed=True),
    "ShearY": Entry(lambda image, level, how, fill: ops.shear_y(image, level * -0.3, how, fill), signed=True),
    "TranslateX": Entry(
        lambda image, level, how, fill: ops.translate_x(
            image, -int(level * _TORCHVISION_SHIFT * image.shape[1]), how, fill
        ),
        signed=True,
    ),
    "TranslateY": Entry(
        lambda image, level, how, fill: ops.translate_y(
            image, -int(level * _TORCHVISION_SHIFT * image.shape[0]), how, fill
        ),
        signed=True,
    ),
    "Rotate": Entry(lambda image, level, how, fill: ops.rotate(image, level * 30, how, fill), signed=True),
    "Brightness": _enhance(ops.brightness),
    "Color": _enhance(ops.color),
    "Contrast": _enhance(ops.contrast),
    "Sharpness": _enhance(ops.sharpness),
    "Posterize": Entry(lambda image, level, how, fill: ops.posterize(image, 8 - round(level * 4))),
    "Solarize": Entry(lambda image, level, how, fill: ops.solarize(image, 255 * (1 - level))),
    "AutoContrast": _plain(ops.autocontrast),
    "Equalize": _plain(ops.equalize),
}

_TIMM_ENTRIES, _TORCHVISION_ENTRIES = tuple(TIMM.values()), tuple(TORCHVISION.values())


def rand_augment_timm(
    image: Pixels, random: np.random.Generator, interpolation: Interpolation, magnitude: float, std: float, num_ops: int
) -> Pixels:
    """timm's RandAugment, ``rand-m<magnitude>-mstd<std>-inc1-n<num_ops>``.

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
        if random.random() > 0.5:
            continue
        level = min(max(random.normal(magnitude, std) if std > 0 else magnitude, 0.0), 10.0) / 10
        image = _apply(_TIMM_ENTRIES[number], image, level, random, interpolation, _IMAGENET_GREY)
    return image


def rand_augment_torchvision(
    image: Pixels, random: np.random.Generator, interpolation: Interpolation, magnitude: float, num_ops: int
) -> Pixels:
    """torchvision's ``RandAugment(num_ops, magnitude, num_magnitude_bins=31)``.

    Args:
        image: ``(H, W, 3)``.
        random: Where random numbers come from.
        interpolation: That of rotation, shear and shift.
        magnitude: 0…30.
        num_ops: How many operations are drawn, with replacement; all are applied.
    """
    for number in random.integers(len(_TORCHVISION_ENTRIES), size=num_ops):
        image = _apply(_TORCHVISION_ENTRIES[number], image, magnitude / 30, random, interpolation, _BLACK)
    return image


def _apply(
    entry: Entry,
    image: Pixels,
    level: float,
    random: np.random.Generator,
    interpolation: Interpolation,
    fill: tuple[int, int, int],
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
