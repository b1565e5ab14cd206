"""Map-style data sets of segmentation: a key in, an image tensor and its target out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._image_samples import Key
from effvit.datamodules._mask_classes import Labels, UnknownValueError
from effvit.datamodules._mask_files import REMEDY, MaskSource
from effvit.datamodules.segmentation_transforms import SegmentationAugmentation, pad_both
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)
Sample = tuple[torch.Tensor, dict[str, Any]]


class _Masked(Dataset[Sample]):
    """Base: reads a pair, or the next readable one in its place.

    Args:
        source: The images and masks.
        skip: Take the next readable image for one that cannot be read, instead of raising.
    """

    def __init__(self, source: MaskSource, *, skip: bool) -> None:
        self.source = source
        self._skip = skip
        self._warned: set[int] = set()

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def _read(self, index: int) -> tuple[int, Pixels, Labels]:
        """The number, the image and the mask of an index."""
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return (number, *self.source.read(number))
            except DatasetError as error:
                # What a pixel value means is a question about the whole set, and has a policy of its own.
                if not self._skip or isinstance(error, UnknownValueError):
                    raise
                if number not in self._warned:
                    _log.warning("skipped: %s", str(error).removesuffix(f"; {REMEDY}"))
                self._warned.add(number)
        raise DatasetError(f"none of the {len(self)} images can be read together with its mask")

    def _target(self, number: int, size: tuple[int, ...], original_size: tuple[int, ...], mask: Labels) -> Any:
        return {
            "image_id": number + 1,
            "file_name": self.source.name(number),
            "size": size[:2],
            "original_size": original_size[:2],
            "mask": torch.from_numpy(mask),
        }


class TrainMasks(_Masked):
    """Augmented images and masks, padded to one size; they depend on the seed and their key alone.

    Args:
        source: The images and masks.
        augment: The augmentation.
        padded_size: Height and width of all samples.
        seed: Seed of the augmentation.
        skip: Take the next readable image for one that cannot be read.
    """

    def __init__(
        self,
        source: MaskSource,
        augment: SegmentationAugmentation | Callable[[Pixels, Labels, np.random.Generator], tuple[Pixels, Labels]],
        padded_size: tuple[int, int],
        seed: int,
        *,
        skip: bool,
    ) -> None:
        super().__init__(source, skip=skip)
        self._augment = augment
        self._padded_size = padded_size
        self._seed = seed

    def __getitem__(self, key: Key) -> Sample:
        """The sample of ``(epoch, index, repeat, size)``."""
        epoch, index, repeat, _ = key
        number, original, labels = self._read(index)
        image, mask = self._augment(original, labels, np.random.default_rng((self._seed, epoch, index, repeat)))
        size = image.shape
        image, mask = pad_both(image, mask, self._padded_size)
        return torch.from_numpy(image).permute(2, 0, 1), self._target(number, size, original.shape, mask)


class EvalMasks(_Masked):
    """Resized images with the masks of their files.

    An image that stands in for another keeps its own id, so that it counts once.

    Args:
        source: The images and masks.
        transform: Takes and returns a dictionary of tv_tensors.
        skip: Take the next readable image for one that cannot be read.
    """

    def __init__(self, source: MaskSource, transform: v2.Transform, *, skip: bool) -> None:
        super().__init__(source, skip=skip)
        self._transform = transform

    def __getitem__(self, index: int) -> Sample:
        """The sample of an index."""
        number, original, mask = self._read(index)
        image = tv_tensors.Image(torch.from_numpy(original).permute(2, 0, 1))
        resized = self._transform({"image": image})["image"].as_subclass(torch.Tensor)
        return resized, self._target(number, tuple(resized.shape[1:]), original.shape, mask)
