"""The embedded default of segmentation: the scenes of handwritten digits, each pixel with its digit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effvit._cache import cache_folder
from effvit.categories import Categories
from effvit.datamodules._annotations import AnnotationTable
from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._checks import read_coco
from effvit.datamodules._decode import read_image
from effvit.datamodules._digit_scenes import SceneOptions, make_scenes
from effvit.datamodules._layout import find_split
from effvit.datamodules._mask_classes import Labels, MaskClasses
from effvit.datamodules._mask_files import MaskSource
from effvit.datamodules.segmentation import SegmentationData
from effvit.errors import ConfigError


class SegmentedDigits(SegmentationData):
    """The scenes of ``HandwrittenDigits`` with a label for each pixel: paper and clutter are background.

    Category id and label are 0 for the background and digit + 1 for a digit's strokes. Scenes are made once (a few
    seconds, no download), are the same on every run, and lie below ``EFFVIT_CACHE`` or ``~/.cache/effvit``, shared
    with ``HandwrittenDigits`` where the options are the same.

    Args:
        root: Folder to keep the scenes in, in place of the cache; scenes of other options may lie beside them.
        num_train: Number of training scenes.
        num_val: Number of validation scenes.
        scene_size: Width and height of a scene in pixels; digits are about a third to three quarters as tall.
        scene_seed: Seed of the scenes.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation; scenes are of one size, so that it does not change results.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Limits of the long and the short side in pixels; None for the size of the scenes.
        crop_size: Height and width of training images in pixels; None for the size of the scenes.
        scale_range: Range of a random factor on ``image_size`` in training.
        photometric: Distort brightness, contrast, saturation and hue in training.
        pad_divisor: Height and width of a batch are multiples of this.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        num_train: int = 1500,
        num_val: int = 200,
        scene_size: int = 128,
        scene_seed: int = 0,
        batch_size: int = 16,
        val_batch_size: int = 20,
        num_workers: int = 2,
        image_size: tuple[int, int] | None = None,
        crop_size: tuple[int, int] | None = None,
        scale_range: tuple[float, float] = (0.8, 1.25),
        photometric: bool = False,
        pad_divisor: int = 32,
        seed: int = 0,
    ) -> None:
        if num_train < 1 or num_val < 1 or scene_size < 64:
            raise ConfigError(
                f"num_train and num_val must be 1 or more and scene_size 64 or more, "
                f"found {num_train}, {num_val} and {scene_size}"
            )
        self.scenes = SceneOptions(num_train, num_val, scene_size, scene_seed)
        scene = (scene_size, scene_size)
        super().__init__(
            str((Path(root) if root is not None else cache_folder()) / self.scenes.folder_name),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size if image_size is not None else scene,
            resize="keep_ratio",
            crop_size=crop_size if crop_size is not None else scene,
            scale_range=scale_range,
            short_side=None,
            class_limit=1.0,  # nearly all of a scene is background
            flip=0.0,  # a mirrored digit is another sign
            photometric=photometric,
            pad_divisor=pad_divisor,
            faults="error",
            unknown="error",
            seed=seed,
        )

    def prepare_data(self) -> None:
        """Makes the scenes, unless they are there."""
        make_scenes(self.root, self.scenes)

    def _declare(self) -> MaskClasses:
        return MaskClasses({0: "background", **{digit + 1: str(digit) for digit in range(10)}})

    def _has(self, split: str) -> bool:
        return split != "test"

    def _open(self, splits: Sequence[str]) -> dict[str, MaskSource]:
        make_scenes(self.root, self.scenes)  # where nobody called ``prepare_data``
        return {split: _Scenes(self.root, split) for split in splits}


class _Scenes(MaskSource):
    """Scenes in COCO layout; the mask of an image is painted from its objects, which do not overlap."""

    def __init__(self, root: Path, split: str) -> None:
        files = find_split(root, split)
        data: dict[str, Any] = read_coco(files.annotations)
        self._folder = files.images
        self._table = AnnotationTable(data, Categories.from_coco(data["categories"]), masks=True, keep_empty=True)

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        return self._table.file_name(index)

    def read_image(self, index: int) -> Pixels:
        pixels: Pixels = read_image(self._folder / self.name(index)).permute(1, 2, 0).numpy()
        return pixels

    def read(self, index: int) -> tuple[Pixels, Labels]:
        record = self._table[index]
        mask = np.zeros(record.size, dtype=np.int16)
        assert record.masks is not None
        for digit, inside in zip(record.labels.tolist(), record.masks.numpy(), strict=True):
            mask[inside.astype(bool)] = digit + 1
        return self.read_image(index), mask
