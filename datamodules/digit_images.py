"""The embedded default of classification: real handwritten digits, in memory."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from effvit.datamodules._image_data import ImageData
from effvit.datamodules._image_sources import ArrayImages, ImageSource, stratified_split
from effvit.datamodules.augmentation import Augmentation

_VAL_SHARE = 0.2
_SIDE = 64  # pixels of the enlarged digits, which a crop can then shift finely
#: A mirrored digit is another sign, and a small part of one is none.
MILD = Augmentation(scale=(0.7, 1.0), flip=0.0)


class DigitImages(ImageData):
    """scikit-learn's 1,797 real handwritten digits (8x8 pixels, UCI ML), enlarged, black on white, as RGB.

    One fifth of each class is the validation split; which one depends on nothing. Nothing is downloaded or written.

    Batches, order and augmentation are as in ``ImageData``.

    Args:
        image_size: Height and width of the images in pixels.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        augmentation: What is done to training images.
        repeats: How often an image comes in an epoch, each time augmented anew; an epoch keeps its length.
        multi_scale: Sizes in pixels, one of which is drawn for each training batch (MobileViT).
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line; only its interpolation is
            used, as the digits are not cropped in evaluation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        batch_size: int = 64,
        val_batch_size: int = 120,
        num_workers: int = 0,
        augmentation: Augmentation = MILD,
        repeats: int = 1,
        multi_scale: list[int] | None = None,
        seed: int = 0,
        published: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            "",
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            augmentation=augmentation,
            repeats=repeats,
            multi_scale=multi_scale,
            unreadable="error",
            seed=seed,
            published={**(published or {}), "crop": 1.0},  # a digit fills its image
        )

    @property
    def categories(self) -> dict[int, str]:
        """The ten digits."""
        return {digit: str(digit) for digit in range(10)}

    def _has(self, split: str) -> bool:
        return split != "test"

    def _open(self, split: str) -> ImageSource:
        from sklearn.datasets import load_digits

        digits, labels = load_digits(return_X_y=True)
        train, val = stratified_split(labels, _VAL_SHARE, seed=0)
        part = train if split == "train" else val
        grey = np.rint(255 - digits[part].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        large = np.stack([cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_CUBIC) for image in grey])
        return ArrayImages(np.repeat(large[..., None], 3, axis=3), labels[part], f"digits/{split}")
