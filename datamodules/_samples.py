"""Map-style data sets behind the datamodules: a key in, an image tensor and its target out."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from effvit.datamodules._decode import PREDICT_REMEDY, read_image

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torchvision.transforms import v2

    from effvit.datamodules._annotations import AnnotationTable

Key = int | tuple[int, int]


class AnnotatedImages(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Images of an ``AnnotationTable`` with their targets.

    Args:
        table: The annotations.
        folder: Image folder.
        transform: Takes and returns a dictionary of tv_tensors.
        seed: Random numbers of the transform depend on this, the epoch and the image, and on nothing else.
    """

    def __init__(self, table: AnnotationTable, folder: Path, transform: v2.Transform, seed: int) -> None:
        self.table = table
        self.folder = folder
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def __getitem__(self, key: Key) -> tuple[torch.Tensor, dict[str, Any]]:
        """The sample of an index, or of ``(epoch, index)``."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        record = self.table[index]
        image = read_image(self.folder / record.file_name, size=record.size, where=f"image id {record.image_id}")
        sample: dict[str, Any] = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=record.size),
            "labels": record.labels,
        }
        if record.masks is not None:
            sample["masks"] = tv_tensors.Mask(record.masks)
        with random_numbers_of(self.seed, epoch, index):
            sample = self.transform(sample)
        target = {
            "image_id": record.image_id,
            "boxes": sample["boxes"].as_subclass(torch.Tensor),
            "labels": sample["labels"],
            "size": tuple(sample["image"].shape[-2:]),
            "original_size": record.size,
            "file_name": record.file_name,
        }
        if record.masks is not None:
            target["masks"] = sample["masks"].as_subclass(torch.Tensor)
        return sample["image"].as_subclass(torch.Tensor), target


class PlainImages(Dataset[tuple[torch.Tensor, dict[str, Any]]]):
    """Image files without annotations, numbered from 1.

    Args:
        files: The files.
        names: What each is called in the results.
        transform: Takes and returns a dictionary of tv_tensors.
    """

    def __init__(self, files: list[Path], names: list[str], transform: v2.Transform) -> None:
        self.files = files
        self.names = names
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """The sample of an index."""
        image = read_image(self.files[index], remedy=PREDICT_REMEDY)
        resized = self.transform({"image": tv_tensors.Image(image)})["image"].as_subclass(torch.Tensor)
        return resized, {
            "image_id": index + 1,
            "size": tuple(resized.shape[-2:]),
            "original_size": tuple(image.shape[-2:]),
            "file_name": self.names[index],
        }


@contextmanager
def random_numbers_of(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seeds torch's CPU generator from three numbers, and puts it back as it was afterwards."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence((seed, epoch, index)).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        generator.set_state(before)


def single_threaded(worker: int) -> None:
    """Keeps OpenCV to one thread in a worker process, as torch does: the workers are the parallelism."""
    del worker
    cv2.setNumThreads(0)
