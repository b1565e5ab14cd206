"""The embedded default: detection of handwritten digits, made on the spot from real ones."""

from __future__ import annotations

import logging
from pathlib import Path

from effvit._cache import cache_folder
from effvit.datamodules._digit_scenes import SceneOptions, make_scenes
from effvit.datamodules.coco import CocoDetection
from effvit.errors import ConfigError

_log = logging.getLogger(__name__)


class HandwrittenDigits(CocoDetection):
    """Scenes of one to five handwritten digits on textured paper, with clutter, boxes and masks.

    The digits are scikit-learn's 1,797 real ones; training and validation use different ones. Scenes are made once
    (a few seconds, no download), are the same on every run, and lie in COCO layout below ``EFFVIT_CACHE`` or
    ``~/.cache/effvit``, from where they are read as any COCO-format data set. Category id and label are the digit.

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
        scale_jitter: Range of a random factor on ``image_size`` in training.
        pad_divisor: Height and width of a batch are multiples of this.
        masks: Load instance masks.
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
        scene_size: int = 160,
        scene_seed: int = 0,
        batch_size: int = 16,
        val_batch_size: int = 20,
        num_workers: int = 2,
        image_size: tuple[int, int] | None = None,
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        pad_divisor: int = 32,
        masks: bool = False,
        seed: int = 0,
    ) -> None:
        if num_train < 1 or num_val < 1 or scene_size < 64:
            raise ConfigError(
                f"num_train and num_val must be 1 or more and scene_size 64 or more, "
                f"found {num_train}, {num_val} and {scene_size}"
            )
        self.scenes = SceneOptions(num_train, num_val, scene_size, scene_seed)
        super().__init__(
            str((Path(root) if root is not None else cache_folder()) / self.scenes.folder_name),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size if image_size is not None else (scene_size, scene_size),
            scale_jitter=scale_jitter,
            flip=0.0,  # a mirrored digit is another sign
            pad_divisor=pad_divisor,
            masks=masks,
            keep_empty=True,
            seed=seed,
        )

    @property
    def categories(self) -> dict[int, str]:
        """The ten digits, each with itself as id."""
        return {digit: str(digit) for digit in range(10)}

    def prepare_data(self) -> None:
        """Makes the scenes, unless they are there."""
        if not self.root.is_dir():
            _log.info("making %d + %d scenes in %s", self.scenes.num_train, self.scenes.num_val, self.root)
        make_scenes(self.root, self.scenes)

    def setup(self, stage: str) -> None:
        """Reads the annotations; makes the scenes first where nobody called ``prepare_data``."""
        make_scenes(self.root, self.scenes)
        super().setup(stage)
