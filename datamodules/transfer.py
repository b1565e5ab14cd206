"""The data sets that published networks are fine-tuned on, through torchvision."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effvit.datamodules._image_data import PLAIN, ImageData
from effvit.datamodules._image_sources import ArrayImages, FileImages, ImageSource
from effvit.datamodules.augmentation import Augmentation
from effvit.errors import ConfigError, DatasetError, close_matches

Name = Literal[
    "cifar10", "cifar100", "flowers102", "oxford_iiit_pets", "stanford_cars", "fgvc_aircraft", "food101", "dtd"
]


@dataclass(frozen=True)
class _Set:
    """How torchvision calls a data set.

    Attributes:
        loader: Class in ``torchvision.datasets``.
        train: Arguments of each part that the published protocol trains on.
        test: Arguments of the part that it evaluates on.
        layout: What must lie below the root.
        files: Attribute with the files of the images; None for images in memory.
    """

    loader: str
    train: tuple[dict[str, Any], ...]
    test: dict[str, Any]
    layout: str
    files: str | None = "_image_files"


# The parts follow AutoFormer's loaders, to which the authors of EfficientViT point (Cream#182), and DTD's and
# Aircraft's own protocols.
_SETS = {
    "cifar10": _Set(
        "CIFAR10", ({"train": True},), {"train": False}, "cifar-10-batches-py/ (from cifar-10-python.tar.gz)", None
    ),
    "cifar100": _Set(
        "CIFAR100", ({"train": True},), {"train": False}, "cifar-100-python/ (from cifar-100-python.tar.gz)", None
    ),
    "flowers102": _Set(
        "Flowers102",
        ({"split": "train"}, {"split": "val"}),
        {"split": "test"},
        "flowers-102/jpg/ (from 102flowers.tgz), flowers-102/imagelabels.mat and flowers-102/setid.mat",
    ),
    "oxford_iiit_pets": _Set(
        "OxfordIIITPet",
        ({"split": "trainval"},),
        {"split": "test"},
        "oxford-iiit-pet/images/ and oxford-iiit-pet/annotations/ (from images.tar.gz and annotations.tar.gz)",
        "_images",
    ),
    "stanford_cars": _Set(
        "StanfordCars",
        ({"split": "train"},),
        {"split": "test"},
        "stanford_cars/cars_train/ and stanford_cars/cars_test/ (the images), stanford_cars/devkit/cars_meta.mat, "
        "stanford_cars/devkit/cars_train_annos.mat and stanford_cars/cars_test_annos_withlabels.mat",
        "_samples",
    ),
    "fgvc_aircraft": _Set(
        "FGVCAircraft",
        ({"split": "trainval"},),
        {"split": "test"},
        "fgvc-aircraft-2013b/data/ (from fgvc-aircraft-2013b.tar.gz)",
    ),
    "food101": _Set(
        "Food101",
        ({"split": "train"},),
        {"split": "test"},
        "food-101/images/ and food-101/meta/ (from food-101.tar.gz)",
    ),
    "dtd": _Set(
        "DTD",
        ({"split": "train"}, {"split": "val"}),
        {"split": "test"},
        "dtd/dtd/images/ and dtd/dtd/labels/ (from dtd-r1.0.1.tar.gz)",
    ),
}


class Transfer(ImageData):
    """A data set of the published transfer tables, in the published split.

    The protocol trains on everything but the test split and evaluates on that: Flowers-102 and DTD on train and val
    together, Oxford-IIIT Pets and FGVC Aircraft (variants) on trainval. The validation split here is hence the test
    split.

    Batches, order and augmentation are as in ``ImageData``.

    Args:
        name: Which data set.
        root: Folder that torchvision keeps it in.
        download: Fetch it where it is missing; Stanford Cars cannot be fetched any more, its files must be put there.
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        image_size: Height and width of the network's input in pixels; None for the published one.
        augmentation: What is done to training images.
        repeats: How often an image comes in an epoch, each time augmented anew; an epoch keeps its length.
        multi_scale: Sizes in pixels, one of which is drawn for each training batch (MobileViT).
        unreadable: "error" stops at an image that cannot be read; "skip" trains on the next one in its place, and
            leaves it out of the evaluation.
        seed: Seed of order and augmentation.
        published: Input of the backbone's published weights, filled in by the command line.

    Raises:
        ConfigError: There is no such data set, or an option is out of its range.
    """

    def __init__(
        self,
        name: Name,
        root: str,
        *,
        download: bool = False,
        batch_size: int = 64,
        val_batch_size: int = 64,
        num_workers: int = 4,
        image_size: int | None = None,
        augmentation: Augmentation = PLAIN,
        repeats: int = 1,
        multi_scale: list[int] | None = None,
        unreadable: Literal["error", "skip"] = "error",
        seed: int = 0,
        published: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            image_size=image_size,
            augmentation=augmentation,
            repeats=repeats,
            multi_scale=multi_scale,
            unreadable=unreadable,
            seed=seed,
            published=published,
        )
        if name not in _SETS:
            raise ConfigError(f"there is no transfer set {name!r}. {close_matches(name, _SETS)}")
        self.name = name
        self._set = _SETS[name]
        self.download = download
        self._categories: dict[int, str] | None = None

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each label; downloads the set where that is asked for."""
        if self._categories is None:
            self._source("train")
        assert self._categories is not None
        return dict(self._categories)

    def prepare_data(self) -> None:
        """Downloads the set where that is asked for and it is missing."""
        self._source("train")

    def _has(self, split: str) -> bool:
        return split != "test"

    def _open(self, split: str) -> ImageSource:
        kind = self._set
        parts = [self._load(arguments) for arguments in (kind.train if split == "train" else (kind.test,))]
        if kind.files is None:
            (part,) = parts
            labels = part.targets
            source: ImageSource = ArrayImages(part.data, labels, f"{self.name}/{split}")
        else:
            files, labels = _files_and_labels(parts, kind.files)
            source = FileImages(self.root, [os.path.relpath(file, self.root) for file in files], labels)
        self._check(split, parts, labels)
        return source

    def _check(self, split: str, parts: list[Any], labels: list[int]) -> None:
        """Takes the class names from the training split, and compares everything else with them."""
        where = f"{self.name} in {self.root}: the {split} split"
        highest = max(labels, default=-1)
        names = [getattr(part, "classes", None) or [str(label) for label in range(highest + 1)] for part in parts]
        if split == "train" and self._categories is None:
            self._categories = {label: str(name) for label, name in enumerate(names[0])}
        expected = list(self.categories.values())
        # Pets and DTD number the classes that a part happens to show.
        if any(list(map(str, part)) != expected for part in names):
            raise DatasetError(f"{where} shows other classes than the training split; its label files are not complete")
        if not labels or min(labels) < 0 or highest >= len(expected):
            raise DatasetError(
                f"{where} has labels {min(labels, default=-1)} … {highest} for {len(expected)} classes; "
                "its label files do not belong together"
            )

    def _load(self, arguments: dict[str, Any]) -> Any:
        """The data set of torchvision, with its errors in words that help here."""
        from filelock import FileLock  # comes with torch
        from torchvision import datasets

        loader = getattr(datasets, self._set.loader)
        try:
            if not self.download or self.name == "stanford_cars":
                return loader(str(self.root), **arguments)
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.name}.lock"):  # one process of a machine downloads, the others wait
                return loader(str(self.root), **arguments, download=True)
        except Exception as error:  # torchvision raises whatever urllib, tarfile, scipy or pickle raise
            raise DatasetError(self._explain(error)) from error

    def _explain(self, error: Exception) -> str:
        layout = f"Expected below {self.root}: {self._set.layout}."
        if self.name == "stanford_cars":
            remedy = "Its download is dead: get the files elsewhere and put them there."
        elif self.download:
            remedy = "Put the files there yourself, or remove what is incomplete and try again."
        else:
            remedy = "Pass `--data.download true` to fetch it, or put the files there."
        return f"{self.name} cannot be read from {self.root}: {str(error) or repr(error)}. {layout} {remedy}"


def _files_and_labels(parts: list[Any], attribute: str) -> tuple[list[str | Path], list[int]]:
    """Files and labels of torchvision data sets, which have no public list of them."""
    if attribute == "_samples":
        pairs = [pair for part in parts for pair in part._samples]  # noqa: SLF001
        return [file for file, _ in pairs], [int(label) for _, label in pairs]
    files = [file for part in parts for file in getattr(part, attribute)]
    return files, [int(label) for part in parts for label in part._labels]  # noqa: SLF001
