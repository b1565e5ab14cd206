"""ImageNet-1k as it is handed out: class folders, the flat validation folder with the devkit, or Kaggle's tree."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from effvit.datamodules._class_folders import check_same_classes, class_folders, list_classes, name_some
from effvit.datamodules._image_data import PLAIN, ImageData
from effvit.datamodules._image_sources import FileImages, ImageSource, image_endings
from effvit.datamodules.augmentation import Augmentation
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)
_DEVKIT = Path("ILSVRC2012_devkit_t12", "data")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")
_KAGGLE_NAMES = "LOC_synset_mapping.txt"
_KAGGLE_TRUTH = "LOC_val_solution.csv"


class ImageNet(ImageData):
    """ImageNet-1k (ILSVRC2012), or any part of it in the same layout.

    Training images lie in ``train/<wnid>/``. Validation images lie in ``val/<wnid>/``, or all in ``val/`` as they come;
    their labels are then read from ``ILSVRC2012_devkit_t12/data/`` or, in Kaggle's tree (``ILSVRC/Data/CLS-LOC/``),
    from ``LOC_val_solution.csv``. Labels follow the sorted WordNet ids, as in all published weights. Class names are
    the words of the devkit or of ``LOC_synset_mapping.txt`` where there is one, followed by the id where two classes
    have the same words, otherwise the ids. Without ``train/`` the set can still be evaluated on.

    Batches, order and augmentation are as in ``ImageData``; there is no test split, the validation split is tested on.

    Args:
        root: Folder with ``train/`` and ``val/``, or with ``ILSVRC/``.
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
        ConfigError: An option is out of its range.
        DatasetError: A folder is not there.
    """

    def __init__(
        self,
        root: str,
        *,
        batch_size: int = 128,
        val_batch_size: int = 128,
        num_workers: int = 8,
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
        self._images = images_folder(self.root)
        if not any((self._images / split).is_dir() for split in ("train", "val")):
            raise DatasetError(
                f"there is neither {self._images / 'train'} nor {self._images / 'val'}; `--data.root` must be the "
                f"folder with train/<wnid>/ and val/, or with Kaggle's {_KAGGLE}"
            )
        self._wnids: list[str] | None = None
        self._words: dict[str, str] | None = None

    @property
    def categories(self) -> dict[int, str]:
        """Class name of each label."""
        words = self._class_words()
        names = [words.get(wnid, wnid) for wnid in self.wnids]
        times = Counter(names)
        return {
            label: f"{name} ({wnid})" if times[name] > 1 else name
            for label, (name, wnid) in enumerate(zip(names, self.wnids, strict=True))
        }

    @property
    def wnids(self) -> list[str]:
        """WordNet id of each label: the training folders, or without them what devkit or validation folder list."""
        if self._wnids is None:
            if (self._images / "train").is_dir():
                self._wnids = class_folders(self._images / "train")
            else:
                self._wnids = sorted(self._class_words()) or class_folders(self._images / "val")
        return self._wnids

    def _class_words(self) -> dict[str, str]:
        """Name of each WordNet id, as far as a file tells."""
        if self._words is None:
            kaggle = self.root / _KAGGLE_NAMES
            if (self.root / _DEVKIT / "meta.mat").is_file():
                self._words = dict(read_synsets(self.root / _DEVKIT / "meta.mat").values())
            elif kaggle.is_file():
                lines = kaggle.read_text(encoding="utf-8").splitlines()
                self._words = {
                    wnid: words for wnid, _, words in (line.strip().partition(" ") for line in lines) if wnid
                }
            else:
                self._words = {}
        return self._words

    def _has(self, split: str) -> bool:
        return split != "test"

    def _open(self, split: str) -> ImageSource:
        folder = self._images / split
        if not folder.is_dir():
            raise DatasetError(f"there is no folder {folder}")
        if split == "val" and not any(path.is_dir() for path in folder.iterdir()):
            return self._open_flat()
        classes = list_classes(self.root, folder)
        known = set(classes) if not (self._images / "train").is_dir() and set(classes) < set(self.wnids) else self.wnids
        check_same_classes(folder, classes, self._images / "train", known)
        pairs = [(name, label) for label, wnid in enumerate(self.wnids) for name in classes.get(wnid, [])]
        return FileImages(self.root, [name for name, _ in pairs], [label for _, label in pairs])

    def _open_flat(self) -> ImageSource:
        """The validation images as they come, with their labels from a file beside."""
        files = flat_validation(self.root, self.wnids)
        labels = {wnid: label for label, wnid in enumerate(self.wnids)}
        return FileImages(self.root, list(files), [labels[wnid] for wnid in files.values()])


def images_folder(root: Path) -> Path:
    """Folder of ``train/`` and ``val/``: the root itself, or one deep in Kaggle's tree."""
    return root / _KAGGLE if (root / _KAGGLE).is_dir() else root


def has_flat_validation(root: Path) -> bool:
    """Whether validation images lie in ``val/`` as they come, and devkit or Kaggle's tree are there."""
    folder = images_folder(root) / "val"
    if not folder.is_dir() or not (folder.parent != root or (root / _DEVKIT).is_dir() or _kaggle_truth(root).is_file()):
        return False
    return not any(path.is_dir() for path in folder.iterdir())


def flat_validation(root: Path, wnids: Collection[str]) -> dict[str, str]:
    """WordNet id of each validation image of a folder without class folders.

    Args:
        root: Folder of the data set.
        wnids: The classes that there are.

    Returns:
        Ids by file names relative to ``root``, in the order of the files.

    Raises:
        DatasetError: There are no images, there is no file with their labels, or it does not fit.
    """
    folder = images_folder(root) / "val"
    endings = image_endings()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if not files:
        raise DatasetError(f"{folder} holds neither class folders nor images")
    truth = root / _DEVKIT / _GROUND_TRUTH
    if truth.is_file():
        found = _from_devkit(truth, files)
    elif _kaggle_truth(root).is_file():
        truth = _kaggle_truth(root)
        found = _from_kaggle(truth, files)
    else:
        raise DatasetError(
            f"the images in {folder} have no class folders, and there is no file with their labels: put the devkit "
            f"at {truth.parent} (ILSVRC2012_devkit_t12.tar.gz), or Kaggle's {_KAGGLE_TRUTH} into {root}"
        )
    unknown = sorted(set(found) - set(wnids))
    if unknown:
        raise DatasetError(
            f"{truth} names {len(unknown)} classes without a folder in {folder.with_name('train')}: "
            f"{name_some(unknown)}"
        )
    return {path.relative_to(root).as_posix(): wnid for path, wnid in zip(files, found, strict=True)}


def _kaggle_truth(root: Path) -> Path:
    return root / _KAGGLE_TRUTH


def read_synsets(path: Path) -> dict[int, tuple[str, str]]:
    """Reads the devkit's ``meta.mat``.

    Returns:
        WordNet id and words of each of the 1000 classes, by ``ILSVRC2012_ID``; inner nodes of the tree are left out.

    Raises:
        DatasetError: It is something else.
    """
    from scipy.io import loadmat  # comes with scikit-learn

    try:
        rows = loadmat(str(path), squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): (str(row["WNID"]), str(row["words"]))
            for row in rows
            if int(row["num_children"]) == 0
        }
    except Exception as error:  # scipy raises whatever its reader stumbles over
        raise DatasetError(f"{path} is not the meta.mat of ILSVRC2012_devkit_t12: {error!r}") from error


def _from_devkit(truth: Path, files: list[Path]) -> list[str]:
    """WordNet id of each file: the line of the same number holds its ``ILSVRC2012_ID``."""
    synsets = read_synsets(truth.with_name("meta.mat"))
    lines = truth.read_text(encoding="utf-8").split()
    if len(lines) != len(files):
        raise DatasetError(
            f"{truth} has {len(lines)} labels for the {len(files)} images in {files[0].parent}; it needs one for each"
        )
    for number, line in enumerate(lines, start=1):
        if not line.isdecimal() or int(line) not in synsets:
            raise DatasetError(
                f"{truth}, line {number}: {line!r} is not the id of a class; meta.mat has {len(synsets)} classes, "
                f"{min(synsets)} … {max(synsets)}"
            )
    return [synsets[int(line)][0] for line in lines]


def _from_kaggle(truth: Path, files: list[Path]) -> list[str]:
    """WordNet id of each file, from the columns ``ImageId`` and ``PredictionString`` (id and boxes)."""
    with truth.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        found = {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
    except (KeyError, IndexError) as error:
        raise DatasetError(f"{truth} needs the columns ImageId and PredictionString, filled in each row") from error
    missing = [path.name for path in files if path.stem not in found]
    if missing:
        raise DatasetError(f"{truth} has no label for {len(missing)} images: {name_some(missing)}")
    return [found[path.stem] for path in files]
