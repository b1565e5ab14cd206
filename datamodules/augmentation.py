"""What is done to one image of a classification set: random in training, the published centre crop in evaluation.

Images are uint8 RGB arrays ``(H, W, 3)``. All random numbers come from the generator that the data set hands over, so
that a sample depends on nothing else. What mixes images (MixUp, CutMix) and random erasing work on batches, on the
device, in the task.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, TypeAlias, get_args

import numpy as np
from PIL import Image

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules import _rand_augment as policies
from effvit.datamodules._augment_ops import Pixels
from effvit.errors import ConfigError, close_matches

__all__ = ["Augmentation", "eval_transform", "train_transform"]

Policy: TypeAlias = Literal["none", "rand_augment", "rand_augment_torchvision", "three_augment"]
Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
TrainTransform: TypeAlias = Callable[[Pixels, np.random.Generator, int], Pixels]
EvalTransform: TypeAlias = Callable[[Pixels], Pixels]

_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_LARGEST_MAGNITUDE = {"rand_augment": 10.0, "rand_augment_torchvision": 30.0}
_ATTEMPTS = 10  # torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Augmentation:
    """The training augmentation of one image, in this order: resized crop, flip, policy, colour jitter.

    The EfficientViT, EfficientFormer, DeiT and DynamicViT recipes are ``policy="rand_augment"`` with everything else at
    its default. Their option ``color_jitter=0.4`` has no effect there: timm turns colour jitter off where RandAugment
    is on. MobileViT's is ``policy="none"``, DeiT III's ``policy="three_augment"`` with ``color_jitter=0.3``.

    Attributes:
        scale: Share of the image's area that the crop takes, least and most (torchvision's ``RandomResizedCrop``).
        ratio: Width over height of the crop, least and most.
        flip: Probability of a horizontal flip.
        policy: "rand_augment" is timm's ``rand-m9-mstd0.5-inc1`` (each operation applied half of the time),
            "rand_augment_torchvision" is ``torchvision.transforms.v2.RandAugment`` with its 31 magnitudes
            (MobileViTv2), "three_augment" is DeiT III's: one of greyscale, solarisation and blur.
        magnitude: Strength of RandAugment: 0 to 10, torchvision's 0 to 30.
        magnitude_std: Standard deviation of the magnitude, of timm's RandAugment only.
        num_ops: Operations that RandAugment draws for an image.
        color_jitter: Brightness, contrast and saturation each change by a factor of up to this from 1. It is applied
            beside any policy; 0 for none.

    Raises:
        ConfigError: A value is out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: Policy = "none"
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_ops: int = 2
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        """Checks every value."""
        if self.policy not in get_args(Policy):
            raise ConfigError(
                f"there is no augmentation policy {self.policy!r}. {close_matches(str(self.policy), get_args(Policy))}"
            )
        low, high = self.scale
        narrow, wide = self.ratio
        most = _LARGEST_MAGNITUDE.get(self.policy, math.inf)
        sound = {
            "scale": (0 < low <= high <= 1, "two numbers with 0 < least <= most <= 1"),
            "ratio": (0 < narrow <= wide < math.inf, "two numbers with 0 < least <= most"),
            "flip": (0 <= self.flip <= 1, "0 to 1"),
            "magnitude": (0 <= self.magnitude <= most, f"0 to {most:g}"),
            "magnitude_std": (0 <= self.magnitude_std < math.inf, "0 or more"),
            "num_ops": (self.num_ops >= 0, "0 or more"),
            "color_jitter": (0 <= self.color_jitter < math.inf, "0 or more"),
        }
        for field in fields(self):
            fits, allowed = sound.get(field.name, (True, ""))
            if not fits:
                raise ConfigError(f"augmentation.{field.name} is {getattr(self, field.name)}; allowed: {allowed}")


def train_transform(augmentation: Augmentation, interpolation: Interpolation) -> TrainTransform:
    """The random transform of a training image.

    Args:
        augmentation: What to do.
        interpolation: That of the resized crop, antialiased as Pillow's, and of what timm's RandAugment rotates, shears
            and shifts (timm hands it on in the same way).

    Returns:
        Function of an image ``(H, W, 3)``, a random generator and a size, to the image ``(size, size, 3)``.
    """
    _check_interpolation(interpolation)

    def transform(image: Pixels, random: np.random.Generator, size: int) -> Pixels:
        top, left, height, width = draw_crop(image.shape[0], image.shape[1], augmentation, random)
        image = image[top : top + height, left : left + width]
        if random.random() < augmentation.flip:  # before the resize, as flipping a window copies it anyway
            image = ops.flip(image)
        image = ops.resize(image, size, interpolation)
        image = _apply_policy(augmentation, image, random, interpolation)
        if augmentation.color_jitter > 0:
            image = policies.color_jitter(image, random, augmentation.color_jitter)
        return image

    return transform


def draw_crop(
    height: int, width: int, augmentation: Augmentation, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draws the window of a resized crop by torchvision's rule (``RandomResizedCrop``).

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        augmentation: Its ``scale`` and ``ratio``.
        random: Where random numbers come from.

    Returns:
        Top, left, height and width of the window. Where ten attempts find none that fits, the largest centre crop of
        an allowed ratio.
    """
    log_ratio = math.log(augmentation.ratio[0]), math.log(augmentation.ratio[1])
    for _ in range(_ATTEMPTS):
        area = height * width * random.uniform(*augmentation.scale)
        ratio = math.exp(random.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    narrow, wide = augmentation.ratio
    w, h = width, height
    if width / height < narrow:
        h = min(round(width / narrow), height)
    elif width / height > wide:
        w = min(round(height * wide), width)
    return (height - h) // 2, (width - w) // 2, h, w


def _apply_policy(
    augmentation: Augmentation, image: Pixels, random: np.random.Generator, interpolation: Interpolation
) -> Pixels:
    if augmentation.policy == "rand_augment":
        return policies.rand_augment_timm(
            image, random, interpolation, augmentation.magnitude, augmentation.magnitude_std, augmentation.num_ops
        )
    if augmentation.policy == "rand_augment_torchvision":
        return policies.rand_augment_torchvision(image, random, augmentation.magnitude, augmentation.num_ops)
    return policies.three_augment(image, random) if augmentation.policy == "three_augment" else image


def eval_transform(size: int, crop: float, interpolation: Interpolation) -> EvalTransform:
    """The transform of an evaluation image: shorter side to ``size / crop``, then the centre.

    The pixels are those of torchvision's ``Resize`` and ``CenterCrop`` on a Pillow image, which published accuracies
    were measured with, to the last one; Pillow does the resizing.

    Args:
        size: Height and width of the result, in pixels.
        crop: ``size`` over the shorter side before cropping, 0 to 1.
        interpolation: The filter, antialiased.

    Returns:
        Function of an image ``(H, W, 3)`` to the image ``(size, size, 3)``.

    Raises:
        ConfigError: A value is out of its range.
    """
    _check_interpolation(interpolation)
    if size < 1 or not 0 < crop <= 1:
        raise ConfigError(
            f"evaluation at size {size} with crop {crop}: size must be 1 or more, crop above 0, at most 1"
        )
    shorter = math.floor(size / crop)

    def transform(image: Pixels) -> Pixels:
        height, width = image.shape[:2]
        if width <= height:
            target = shorter, int(shorter * height / width)
        else:
            target = int(shorter * width / height), shorter
        resized = Image.fromarray(image)
        if target != (width, height):
            resized = resized.resize(target, _PILLOW[interpolation])
        # Python rounds halves to even, as torchvision's centre crop does.
        left, top = round((target[0] - size) / 2), round((target[1] - size) / 2)
        return np.array(resized.crop((left, top, left + size, top + size)))

    return transform


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in get_args(Interpolation):
        raise ConfigError(
            f"there is no interpolation {interpolation!r}. {close_matches(str(interpolation), get_args(Interpolation))}"
        )
