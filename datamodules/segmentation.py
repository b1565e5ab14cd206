"""What all data modules of semantic segmentation share: options, loaders, policies, and what a batch is."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import torch
from torch.utils.data import DataLoader

from effvit.datamodules._checks import Fault, count_kinds, fault_table
from effvit.datamodules._loaders import DataModule, check_at_least, check_choice
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_files import MaskFiles, MaskPair, MaskSource, header_faults
from effvit.datamodules._mask_layout import Listing
from effvit.datamodules._mask_samples import EvalMasks, TrainMasks
from effvit.datamodules._samplers import SquareBatches
from effvit.datamodules.segmentation_transforms import SegmentationAugmentation
from effvit.datamodules.transforms import RESIZES, Collate, eval_transform
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}

Resize = Literal["keep_ratio", "align", "squash"]
Faults = Literal["error", "skip"]
Unknown = Literal["error", "ignore"]


class SegmentationData(DataModule, ABC):
    """Base of all data modules of segmentation.

    A batch is ``(images, targets)``: uint8 images ``(B, 3, H, W)`` in channels_last memory, padded with 0 at the bottom
    and right, and for each a dictionary with ``image_id`` (position in the split, from 1), ``file_name``, ``size``
    (height and width in the batch, before padding), ``original_size`` (of the file) and ``mask``: int16 labels
    ``0 … num_classes - 1``, -1 for pixels without one. In training the mask is ``(H, W)`` as the images; in evaluation
    it is ``(h, w)`` of the file, as results are measured at the original resolution.

    Training images are resized by a random factor, cropped, flipped and distorted in their colours as in
    mmsegmentation; the batch has always the size of the crop. Their order and augmentation depend on ``seed``, the
    epoch and the image alone, not on workers or on what ran before; a run resumed within an epoch goes on with the next
    batch. The last training batch is left out where it would hold a single image.

    Args:
        root: Folder of the data set.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation. With 1, padding and hence results do not depend on which
            images happen to share a batch.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Limits of the long and the short side in pixels, or width and height where ``resize`` is "squash".
        resize: "keep_ratio"; "align" to bring both sides up to a multiple of ``pad_divisor`` in evaluation, instead of
            padding; or "squash" to give images exactly ``image_size`` whatever their ratio.
        crop_size: Height and width of training images in pixels.
        scale_range: Range of a random factor on ``image_size`` in training.
        short_side: Range of a random short side in training, in place of ``image_size`` and ``scale_range``.
        class_limit: Largest share of one class in a crop, which is drawn again up to ten times; 1 for any.
        flip: Probability of a horizontal flip in training.
        photometric: Distort brightness, contrast, saturation and hue in training.
        pad_divisor: Height and width of a batch are multiples of this.
        faults: What to do about images without a mask or of another size, and unreadable files: "error" stops and
            lists them all, "skip" leaves them out.
        unknown: What to do about pixel values that are no class: "error", or "ignore" to leave them without a label.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        image_size: tuple[int, int],
        resize: Resize,
        crop_size: tuple[int, int],
        scale_range: tuple[float, float],
        short_side: tuple[int, int] | None,
        class_limit: float,
        flip: float,
        photometric: bool,
        pad_divisor: int,
        faults: Faults,
        unknown: Unknown,
        seed: int,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            collate=Collate(pad_divisor),
        )
        self.root = Path(root)
        check_at_least(0, seed=seed)
        check_at_least(1, pad_divisor=pad_divisor, **_sides("image_size", image_size), **_sides("crop_size", crop_size))
        _check_ranges(scale_range, short_side, class_limit, flip)
        check_choice("resize", resize, RESIZES)
        check_choice("faults", faults, ("error", "skip"))
        check_choice("unknown", unknown, ("error", "ignore"))
        self.image_size = image_size
        self.resize = resize
        self.crop_size = crop_size
        self.scale_range = scale_range
        self.short_side = short_side
        self.class_limit = class_limit
        self.flip = flip
        self.photometric = photometric
        self.pad_divisor = pad_divisor
        self.faults = faults
        self.unknown = unknown
        self.seed = seed
        self._classes: MaskClasses | None = None
        self._sources: dict[str, MaskSource] = {}

    @abstractmethod
    def _declare(self) -> MaskClasses:
        """What pixel values mean."""

    @abstractmethod
    def _has(self, split: str) -> bool:
        """Whether there is a split of this name."""

    @abstractmethod
    def _open(self, splits: Sequence[str]) -> dict[str, MaskSource]:
        """Lists the images of splits, and applies the policy to the faults of all of them together.

        Raises:
            DatasetError: They are missing or not as they should be.
        """

    @property
    def classes(self) -> MaskClasses:
        """The classes, and what each pixel value of a mask stands for."""
        if self._classes is None:
            self._classes = self._declare()
        return self._classes

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each category id, which is its pixel value in a mask; works before ``setup``."""
        return self.classes.categories.to_dict()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def num_train_images(self) -> int:
        """Number of training images."""
        return len(self._source("train"))

    def setup(self, stage: str) -> None:
        """Lists the images and masks of a stage and compares their sizes; they are decoded later, one by one.

        Raises:
            DatasetError: Files are missing or faulty.
        """
        cv2.setNumThreads(0)  # OpenCV's threads would compete with torch's, and are no faster for one picture
        self._open_missing([self._resolve(split) for split in _STAGE_SPLITS[stage]])

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in the order of this epoch."""
        source = self._source("train")
        augment = SegmentationAugmentation(
            image_size=self.image_size,
            squash=self.resize == "squash",
            scale_range=self.scale_range,
            short_side=self.short_side,
            crop_size=self.crop_size,
            class_limit=self.class_limit,
            flip=self.flip,
            photometric=self.photometric,
        )
        height, width = (-(-side // self.pad_divisor) * self.pad_divisor for side in self.crop_size)
        dataset = TrainMasks(source, augment, (height, width), self.seed, skip=self.faults == "skip")
        batches = SquareBatches(len(source), self.batch_size, height, repeats=1, seed=self.seed, ranks=self._ranks())
        if batches.leaves_one_out:
            _log.info("the last batch of an epoch would hold a single image and is left out, another one each epoch")
        return self._make_train_loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in the order of the split."""
        return self._make_eval_loader(self._eval_dataset("val"))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in the order of the split; of the validation split where there is no other."""
        return self._make_eval_loader(self._eval_dataset("test"))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, to predict on."""
        return self._make_predict_loader(self._eval_dataset("test"))

    def read_original(self, split: str, image_id: int) -> torch.Tensor:
        """An image of a split as it was before any transform.

        Args:
            split: "train", "val" or "test".
            image_id: Its position in the split, from 1.

        Returns:
            uint8 ``(3, H, W)``, RGB.

        Raises:
            DatasetError: It cannot be read.
        """
        return torch.from_numpy(self._source(split).read_image(image_id - 1)).permute(2, 0, 1)

    def _eval_dataset(self, split: str) -> EvalMasks:
        transform = eval_transform(self.image_size, self.resize, self.pad_divisor)
        return EvalMasks(self._source(split), transform, skip=self.faults == "skip")

    def _resolve(self, split: str) -> str:
        """The split itself, or "val" where there is no test split."""
        return "val" if split == "test" and not self._has("test") else split

    def _source(self, split: str) -> MaskSource:
        split = self._resolve(split)
        self._open_missing([split])
        return self._sources[split]

    def _open_missing(self, splits: Sequence[str]) -> None:
        missing = [split for split in splits if split not in self._sources]
        self._sources |= self._open(missing)


class MaskFilesData(SegmentationData):
    """Base of those whose masks are files: a subclass lists the pairs of a split."""

    @property
    def home(self) -> Path:
        """The folder that names of files are relative to."""
        return self.root

    @property
    @abstractmethod
    def splits(self) -> list[str]:
        """The splits that are there, of "train", "val" and "test"."""

    @abstractmethod
    def list_pairs(self, split: str) -> Listing:
        """The pairs of a split, and what lacks a partner.

        Raises:
            DatasetError: A folder or list is missing.
        """

    def _open(self, splits: Sequence[str]) -> dict[str, MaskSource]:
        classes = self.classes
        listings = {split: self.list_pairs(split) for split in splits}
        faults = {
            split: [*listing.faults, *header_faults(self.home, listing.pairs)] for split, listing in listings.items()
        }
        if self.faults == "error" and any(faults.values()):
            raise DatasetError(_fault_report(self.home, faults))
        opened: dict[str, MaskSource] = {}
        for split, listing in listings.items():
            opened[split] = MaskFiles(self.home, self._sound(split, listing, faults[split]), classes, self.unknown)
        return opened

    def _sound(self, split: str, listing: Listing, faults: list[Fault]) -> list[MaskPair]:
        """The pairs without a fault."""
        bad = {fault.file for fault in faults}
        pairs = [pair for pair in listing.pairs if pair.image not in bad]
        total = len(listing.pairs) + len(listing.faults)
        if faults:
            _log.warning("%s split of %s: left out by policy 'skip': %s", split, self.home, count_kinds(faults))
        if not pairs:
            raise DatasetError(f"the {split} split of {self.home} has no image that can be used, of {total}")
        # `effvit tables segmentation` reads this line from the log of a run, to tell the published data from other.
        _log.info("%s split: %d of %d images, %d categories", split, len(pairs), total, len(self.classes))
        return pairs


def _fault_report(root: Path, faults: dict[str, list[Fault]]) -> str:
    parts = [
        f"{len(found)} {'fault' if len(found) == 1 else 'faults'} in the {split} split of {root}:\n{fault_table(found)}"
        for split, found in faults.items()
        if found
    ]
    return "\n".join(parts) + "\nCorrect the data, or pass `--data.faults skip` to leave these out."


def _sides(name: str, size: tuple[int, int]) -> dict[str, int]:
    return {f"{name}[{place}]": side for place, side in enumerate(size)}


def _check_ranges(
    scale_range: tuple[float, float], short_side: tuple[int, int] | None, class_limit: float, flip: float
) -> None:
    if not 0.0 < scale_range[0] <= scale_range[1]:
        raise ConfigError(f"scale_range must be a range 0 < low <= high, found {scale_range}")
    if short_side is not None and not 1 <= short_side[0] <= short_side[1]:
        raise ConfigError(f"short_side must be a range of pixels 1 <= low <= high, found {short_side}")
    if not 0.0 < class_limit <= 1.0:
        raise ConfigError(f"class_limit is a share and must lie in 0 … 1, above 0, found {class_limit}")
    if not 0.0 <= flip <= 1.0:
        raise ConfigError(f"flip is a probability and must lie in 0 … 1, found {flip}")
