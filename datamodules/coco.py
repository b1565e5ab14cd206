"""Object detection on any data set in COCO format."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import cv2
from torch.utils.data import DataLoader

from effvit.categories import Categories
from effvit.datamodules._annotations import AnnotationTable
from effvit.datamodules._checks import (
    NO_SEGMENTATION,
    Fault,
    apply_policy,
    count_kinds,
    fault_table,
    find_faults,
    only_boxes,
    read_coco,
)
from effvit.datamodules._layout import SplitFiles, find_split, has_split
from effvit.datamodules._loaders import DataModule, check_at_least, check_choice
from effvit.datamodules._samplers import ShapeBatches
from effvit.datamodules._samples import AnnotatedImages
from effvit.datamodules.transforms import AUGMENTATIONS, RESIZES, Collate, eval_transform, train_transform
from effvit.errors import ConfigError, DatasetError

_log = logging.getLogger(__name__)
_POLICIES = ("error", "skip", "clip")
_STAGE_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class CocoDetection(DataModule):
    """Detection data in COCO format, read as the published recipes do.

    Where no files are named, a split is looked for as ``annotations/instances_<split>2017.json`` with ``<split>2017/``,
    as ``annotations/instances_<split>.json`` with ``<split>/``, and as ``<split>/_annotations.coco.json`` with the
    images beside it. A data set without a test split is tested on its validation split.

    A batch is ``(images, targets)``: uint8 images ``(B, 3, H, W)`` in channels_last memory, padded with 0, and for each
    a dictionary with ``image_id``, ``boxes`` (float32 ``(N, 4)``, XYXY in the resized image), ``labels`` (int64
    ``(N,)``), ``size`` and ``original_size`` (height, width), ``file_name`` and, where asked for, ``masks`` (uint8
    ``(N, H, W)`` at the original size, flipped as the image).

    The order of training images and their augmentation depend on ``seed``, the epoch and the image alone, not on
    workers or on what ran before; a run resumed within an epoch goes on with the next batch.

    Args:
        root: Folder of the data set.
        train_annotations: JSON of the training split, relative to ``root``.
        train_images: Image folder of the training split, relative to ``root``.
        val_annotations: JSON of the validation split.
        val_images: Image folder of the validation split.
        test_annotations: JSON of the test split.
        test_images: Image folder of the test split.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation. With 1, padding and hence AP do not depend on which images
            happen to share a batch.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Limits of the long and the short side in pixels, or width and height where ``resize`` is "squash".
        resize: "keep_ratio", or "squash" to give images exactly ``image_size`` whatever their ratio, as SSD does.
        augmentation: Of training images. "flip" is a horizontal flip alone; "ssd" crops around objects and distorts
            colours before, as the published SSDLite recipe of MobileViT does, and knows no masks.
        scale_jitter: Range of a random factor on ``image_size`` in training.
        flip: Probability of a horizontal flip in training.
        pad_divisor: Height and width of a batch are multiples of this.
        masks: Load instance masks.
        keep_empty: Train on images without any annotation too; the published recipes leave them out.
        faults: What to do about faulty annotations and missing files. "error" stops before training and lists them all,
            "skip" leaves them out, "clip" cuts boxes that reach beyond the image and leaves out the rest.
        seed: Seed of order and augmentation.

    Raises:
        ConfigError: An option is out of its range.
        DatasetError: The folder is not there.
    """

    def __init__(
        self,
        root: str,
        *,
        train_annotations: str | None = None,
        train_images: str | None = None,
        val_annotations: str | None = None,
        val_images: str | None = None,
        test_annotations: str | None = None,
        test_images: str | None = None,
        batch_size: int = 2,
        val_batch_size: int = 1,
        num_workers: int = 2,
        image_size: tuple[int, int] = (1333, 800),
        resize: Literal["keep_ratio", "squash"] = "keep_ratio",
        augmentation: Literal["flip", "ssd"] = "flip",
        scale_jitter: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.5,
        pad_divisor: int = 32,
        masks: bool = False,
        keep_empty: bool = False,
        faults: Literal["error", "skip", "clip"] = "error",
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            collate=Collate(pad_divisor),
        )
        self.root = Path(root)
        self._files = {
            "train": (train_annotations, train_images),
            "val": (val_annotations, val_images),
            "test": (test_annotations, test_images),
        }
        check_at_least(1, pad_divisor=pad_divisor)
        check_at_least(1, **{"image_size[0]": image_size[0], "image_size[1]": image_size[1]})
        if not 0.0 <= flip <= 1.0:
            raise ConfigError(f"flip is a probability and must lie in 0 … 1, found {flip}")
        if not 0.0 < scale_jitter[0] <= scale_jitter[1]:
            raise ConfigError(f"scale_jitter must be a range 0 < low <= high, found {scale_jitter}")
        check_choice("faults", faults, _POLICIES)
        check_choice("resize", resize, RESIZES)
        check_choice("augmentation", augmentation, AUGMENTATIONS)
        if masks and augmentation == "ssd":
            raise ConfigError(
                "augmentation 'ssd' crops images, which masks of the original size cannot follow, and masks are on "
                "because the detector learns them. Pass `--data.augmentation flip`, or choose a detector of boxes, "
                "such as `--model.detector ssdlite`"
            )
        self.image_size = image_size
        self.resize = resize
        self.augmentation = augmentation
        self.scale_jitter = scale_jitter
        self.flip = flip
        self.pad_divisor = pad_divisor
        self.masks = masks
        self.keep_empty = keep_empty
        self.faults = faults
        self.seed = seed
        self._categories: Categories | None = None
        self._left_out: dict[str, dict[str, int]] = {}
        self._truths: dict[str, dict[str, Any]] = {}
        self._datasets: dict[str, AnnotatedImages] = {}

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each category id; reads only a JSON, and works before ``setup``."""
        if self._categories is None:
            split = next((name for name in ("val", "test", "train") if self._has(name)), "train")
            self._categories = Categories.from_coco(read_coco(self._locate(split).annotations)["categories"])
        return self._categories.to_dict()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.categories)

    def ground_truth(self, stage: Literal["validate", "test"]) -> dict[str, Any]:
        """The COCO dictionary that predictions of a stage are compared with.

        It is the file as it is, crowd regions included, with ``area`` and ``iscrowd`` added where a file lacks them,
        and without what the policy ``faults`` left out.

        Args:
            stage: "validate" or "test".

        Raises:
            DatasetError: The annotations have faults, and the policy is "error".
        """
        split = self._resolve(_STAGE_SPLITS[stage][0])
        if split not in self._truths:
            self._truths[split] = _complete(self._read([split])[split])
        return self._truths[split]

    def setup(self, stage: str) -> None:
        """Reads and checks the annotations of a stage; images are opened later, one by one.

        Raises:
            DatasetError: Files are missing or faulty, or the splits declare different categories.
        """
        # As MMDetection does: OpenCV's threads would compete with torch's, and are no faster for one picture.
        cv2.setNumThreads(0)
        wanted = [self._resolve(split) for split in _STAGE_SPLITS[stage]]
        missing = [split for split in wanted if split not in self._datasets]
        for split, data in self._read(missing).items():
            self._datasets[split] = self._make_dataset(split, data)
            if split != "train":
                self._truths[split] = _complete(data)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches in the order of this epoch."""
        dataset = self._datasets["train"]
        batches = ShapeBatches(dataset.table.is_wide, self.batch_size, self.seed, self._ranks())
        return self._make_train_loader(dataset, batches)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in the order of the JSON."""
        return self._make_eval_loader(self._datasets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches in the order of the JSON."""
        return self._make_eval_loader(self._datasets[self._resolve("test")])

    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of the test split, to predict on."""
        return self._make_predict_loader(self._datasets[self._resolve("test")])

    def _make_dataset(self, split: str, data: dict[str, Any]) -> AnnotatedImages:
        categories = Categories.from_coco(data["categories"])
        if self._categories is None:
            self._categories = categories
        if categories != self._categories:
            raise DatasetError(
                f"{self._locate(split).annotations} declares the categories {categories.to_dict()}, "
                f"another split declares {self._categories.to_dict()}; all splits need the same ones"
            )
        training = split == "train"
        table = AnnotationTable(data, categories, masks=self.masks, keep_empty=self.keep_empty or not training)
        if not len(table):
            raise DatasetError(self._explain_empty(split))
        # `effvit tables coco` reads this line from the log of a run, to tell COCO from other data.
        total = len(data["images"])
        _log.info("%s split: %d of %d images, %d categories", split, len(table), total, len(categories))
        if training:
            transform = train_transform(self.image_size, self.flip, self.scale_jitter, self.resize, self.augmentation)
        else:
            transform = eval_transform(self.image_size, self.resize)
        return AnnotatedImages(table, self._locate(split).images, transform, self.seed)

    def _read(self, splits: list[str]) -> dict[str, dict[str, Any]]:
        """Reads splits and applies the policy, to the faults of all of them together."""
        read = {split: read_coco(self._locate(split).annotations) for split in splits}
        found: dict[str, list[Fault]] = {}
        for split, data in read.items():
            found[split] = find_faults(data, self._locate(split).images, masks=self.masks)
        self._check_masks(read, found)
        faulty = {self._locate(split).annotations: faults for split, faults in found.items() if faults}
        if faulty and self.faults == "error":
            raise DatasetError(_fault_report(faulty))
        return {split: self._repair(split, data, found[split]) for split, data in read.items()}

    def _repair(self, split: str, data: dict[str, Any], faults: list[Fault]) -> dict[str, Any]:
        """What the policy makes of a split."""
        if not faults:
            return data
        data, self._left_out[split] = apply_policy(data, faults, self.faults)
        path = self._locate(split).annotations
        _log.warning("%s: faults handled by policy %r: %s", path, self.faults, self._left_out[split])
        return data

    def _check_masks(self, read: dict[str, dict[str, Any]], found: dict[str, list[Fault]]) -> None:
        """Says it once where there is nothing to learn masks from, instead of a fault for each object."""
        parts = []
        for split, data in read.items():
            every, missing = len(data["annotations"]), count_kinds(found[split]).get(NO_SEGMENTATION, 0)
            # Who asked to leave out those without may train on few that are left, but not on none.
            if only_boxes(every, missing) and (self.faults == "error" or missing == every):
                parts.append(f"{missing} of {every} objects of {self._locate(split).annotations}")
        if parts:
            raise DatasetError(
                f"{' and '.join(parts)} have no segmentation: masks cannot be learnt from these annotations. Use a "
                "detector of boxes, `--model.detector faster_rcnn` (or retinanet), or annotations with masks"
            )

    def _explain_empty(self, split: str) -> str:
        text = f"{self._locate(split).annotations} has no image to {'train on' if split == 'train' else 'use'}"
        if split not in self._left_out:
            return text
        kinds = ", ".join(f"{kind} {number}" for kind, number in self._left_out[split].items())
        return f"{text} after `--data.faults {self.faults}`, which found: {kinds}"

    def _locate(self, split: str) -> SplitFiles:
        return find_split(self.root, split, *self._files[split])

    def _has(self, split: str) -> bool:
        return self._files[split][0] is not None or has_split(self.root, split)

    def _resolve(self, split: str) -> str:
        """The split itself, or "val" where there is no test split."""
        return "val" if split == "test" and not self._has("test") else split


def _fault_report(found: dict[Path, list[Fault]]) -> str:
    parts = [
        f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} in {path}:\n{fault_table(faults)}"
        for path, faults in found.items()
    ]
    return (
        "\n".join(parts)
        + "\nCorrect the data, or pass `--data.faults skip` to leave these out"
        + " (`--data.faults clip` cuts boxes that reach beyond the image instead)."
    )


def _complete(data: dict[str, Any]) -> dict[str, Any]:
    """Adds what pycocotools needs and some tools leave out."""
    annotations = [
        {"iscrowd": 0, "area": annotation["bbox"][2] * annotation["bbox"][3], **annotation}
        for annotation in data["annotations"]
    ]
    return {**data, "annotations": annotations}
