"""Map-style data sets of classification: a key in, an image of fixed size and its label out; and their batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._image_sources import ImageSource
from effvit.datamodules.augmentation import Interpolation, TrainTransform, eval_transform
from effvit.errors import ConfigError, DatasetError, close_matches

_log = logging.getLogger(__name__)

#: Epoch, index of the image, number of its repeat, and size in pixels.
Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class NetworkInput:
    """What a network is evaluated on.

    Attributes:
        size: Height and width in pixels.
        crop: ``size`` over the shorter side before the centre crop.
        interpolation: Filter of the resizing.
    """

    size: int = 224
    crop: float = 0.875
    interpolation: Interpolation = "bicubic"

    @classmethod
    def of(cls, image_size: int | None, published: dict[str, Any] | None) -> NetworkInput:
        """The published input at the size that is asked for; what neither says is at its usual value.

        Raises:
            ConfigError: ``published`` has other keys than size, crop and interpolation.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(published or {}) - known)
        if unknown:
            raise ConfigError(f"published has no key {unknown[0]!r}. {close_matches(unknown[0], known)}")
        spec = cls(**(published or {}))
        return replace(spec, size=image_size) if image_size is not None else spec


@dataclass(frozen=True)
class Sample:
    """One transformed image.

    Attributes:
        pixels: uint8 ``(S, S, 3)``, RGB.
        label: -1 for unknown or unreadable.
        image_id: Position in the split.
        file_name: What it is called.
    """

    pixels: Pixels
    label: int
    image_id: int
    file_name: str


class TrainImages(Dataset[Sample]):
    """Augmented images.

    An image depends on the seed and its key alone. Where unreadable images are skipped, the next readable one of the
    split stands in for each, augmented with the random numbers of the key.

    Args:
        source: The images.
        transform: The augmentation.
        seed: Seed of its random numbers.
        skip: Skip unreadable images instead of raising.
    """

    def __init__(self, source: ImageSource, transform: TrainTransform, seed: int, *, skip: bool) -> None:
        self.source = source
        self.unreadable = Unreadable(len(source)) if skip else None
        self._transform = transform
        self._seed = seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def __getitem__(self, key: Key) -> Sample:
        """The sample of ``(epoch, index, repeat, size)``."""
        epoch, index, repeat, size = key
        number, pixels = self._read(index)
        random = np.random.default_rng((self._seed, epoch, index, repeat))
        pixels = self._transform(pixels, random, size)
        return Sample(pixels, int(self.source.labels[number]), number, self.source.name(number))

    def _read(self, index: int) -> tuple[int, Pixels]:
        if self.unreadable is None:
            return index, self.source.read(index)
        for step in range(len(self.source)):
            number = (index + step) % len(self.source)
            pixels = self.unreadable.try_to_read(self.source, number)
            if pixels is not None:
                return number, pixels
        raise DatasetError(f"none of the {len(self.source)} training images can be read")


class EvalImages(Dataset[Sample]):
    """Images as the published accuracies are measured on them.

    Args:
        source: The images.
        spec: Size, crop and interpolation.
        skip: Give an unreadable image as black with the label -1 instead of raising.
    """

    def __init__(self, source: ImageSource, spec: NetworkInput, *, skip: bool) -> None:
        self.source = source
        self.unreadable = Unreadable(len(source)) if skip else None
        self._transform = eval_transform(spec.size, spec.crop, spec.interpolation)
        self._size = spec.size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of an index."""
        name = self.source.name(index)
        if self.unreadable is None:
            pixels: Pixels | None = self.source.read(index)
        else:
            pixels = self.unreadable.try_to_read(self.source, index)
        if pixels is None:
            return Sample(np.zeros((self._size, self._size, 3), np.uint8), -1, index, name)
        return Sample(self._transform(pixels), int(self.source.labels[index]), index, name)


class Unreadable:
    """Which images of a split could not be read, in memory that all worker processes share: one warning an image.

    Args:
        number: Number of images.
    """

    def __init__(self, number: int) -> None:
        self._known = torch.zeros(number, dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        """Number of images found unreadable so far."""
        return int(self._known.sum())

    def try_to_read(self, source: ImageSource, index: int) -> Pixels | None:
        """The image, or None; one found unreadable is not opened again."""
        if self._known[index]:
            return None
        try:
            return source.read(index)
        except DatasetError as error:
            self._known[index] = True
            _log.warning("skipped: %s", error)
            return None


def collate(samples: Sequence[Sample]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Puts samples of one size into a batch.

    Returns:
        Images, uint8 ``(B, 3, S, S)`` in channels_last memory, and the targets: ``labels`` and ``image_ids``, int64
        ``(B,)``, and ``file_names``, a list.
    """
    images = torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)
    return images, {
        "labels": torch.tensor([sample.label for sample in samples]),
        "image_ids": torch.tensor([sample.image_id for sample in samples]),
        "file_names": [sample.file_name for sample in samples],
    }
