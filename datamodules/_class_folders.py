"""Listing a tree with a folder per class, and what can be wrong with one."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from effvit.datamodules._image_sources import image_endings
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)
_VAL_NAMES = ("val", "valid", "validation")
_TEST_NAMES = ("test",)
_PURPOSES = {"train": "training", "val": "validation", "test": "test"}
#: Folders of these names, in any case, are taken for splits and never for classes.
_SPLIT_NAMES = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "validating"},
    "test": {"test", "testing"},
}


def find_splits(root: Path, train: str = "train", val: str | None = None, test: str | None = None) -> dict[str, Path]:
    """Folder of each split there is, that of training first.

    Without a folder of any split, ``root`` itself is the training split. Where only others are there, so is no
    training split: the set can be evaluated on.

    Args:
        root: Folder of the data set.
        train: Folder of the training split, relative to ``root``.
        val: Folder of the validation split; None looks for one.
        test: Folder of the test split; None looks for one.

    Raises:
        DatasetError: A folder is not there.
    """
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}; pass the folder of the data set as `--data.root`")
    found = {"val": _find_split(root, val, _VAL_NAMES), "test": _find_split(root, test, _TEST_NAMES)}
    folders = {split: folder for split, folder in found.items() if folder is not None}
    if (root / train).is_dir():
        return {"train": root / train, **folders}
    if folders:
        return folders
    if train != "train":
        raise DatasetError(f"there is no folder {root / train} (`--data.train`); {_what_is_in(root)}")
    _refuse_splits_as_classes(root)
    return {"train": root}


def no_split(root: Path, split: str, folders: Mapping[str, Path]) -> DatasetError:
    """The error where a split is asked for that is not there."""
    there = " and ".join(folder.name for folder in folders.values())
    return DatasetError(
        f"{root} has {there} but no folder {split}; name the {_PURPOSES[split]} folder with `--data.{split}`; "
        f"{_what_is_in(root)}"
    )


def _refuse_splits_as_classes(root: Path) -> None:
    """Raises where folders that would become classes are splits by their names, such as ``Train``."""
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    found = [(split, name) for split, names in _SPLIT_NAMES.items() for name in inside if name.casefold() in names]
    if found:
        options = " ".join(f"--data.{split} {name}" for split, name in found)
        raise DatasetError(
            f"{root} has {' and '.join(name for _, name in found)}, by their names splits and not classes; pass "
            f"`{options}`, or rename them to train, val and test. If they are classes, pass `--data.train .`"
        )


def _find_split(root: Path, asked: str | None, names: tuple[str, ...]) -> Path | None:
    if asked is None:
        return next((root / name for name in names if (root / name).is_dir()), None)
    if not (root / asked).is_dir():
        raise DatasetError(f"there is no folder {root / asked} (`--data.{names[0]}`); {_what_is_in(root)}")
    return root / asked


def _what_is_in(root: Path) -> str:
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    return f"folders in {root}: {name_some(inside) if inside else 'none'}"


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a split, sorted.

    Raises:
        DatasetError: There are fewer than two, or images lie beside them.
    """
    endings = image_endings()
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    classes = sorted(entry.name for entry in visible if entry.is_dir())
    stray = sorted(entry.name for entry in visible if entry.is_file() and Path(entry.name).suffix.lower() in endings)
    if stray:
        raise DatasetError(
            f"{len(stray)} images lie in {folder} itself, beside the class folders, so that their class is unknown: "
            f"{name_some(stray)}. Move each into the folder of its class, or away."
        )
    if not classes:
        found = sorted(entry.name for entry in visible)
        raise DatasetError(
            f"{folder} has no class folders; expected {folder}/<class>/<image>, "
            f"found {name_some(found) if found else 'nothing'}"
        )
    if len(classes) == 1:
        raise DatasetError(f"{folder} has one class only, {classes[0]!r}; a classifier needs two or more class folders")
    return classes


def list_classes(root: Path, folder: Path) -> dict[str, list[str]]:
    """Image files of each class, sorted, relative to a root.

    Class folders are searched in depth; hidden files and folders are passed over.

    Args:
        root: What the names are relative to.
        folder: A split: the folder of the class folders, below the root.

    Raises:
        DatasetError: A class has no image, there are fewer than two classes, or images lie beside them.
    """
    endings = image_endings()
    found = {kind: images_below(root, folder / kind, endings) for kind in class_folders(folder)}
    others = sum(number for _, number in found.values())
    if others:
        _log.info("%s: %d files that are no images were passed over", folder, others)
    classes = {kind: names for kind, (names, _) in found.items()}
    _check_none_empty(folder, classes)
    return classes


def check_same_classes(folder: Path, classes: Collection[str], train: Path, expected: Collection[str]) -> None:
    """Raises ``DatasetError`` where the classes of a split are not those of the training split."""
    missing, extra = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
    if missing or extra:
        parts = [f"missing: {name_some(missing)}"] if missing else []
        parts += [f"only there: {name_some(extra)}"] if extra else []
        raise DatasetError(f"the class folders in {folder} differ from those in {train}; {'; '.join(parts)}")


def name_some(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list for a message, and how many there are beside."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def images_below(root: Path, folder: Path, endings: Collection[str]) -> tuple[list[str], int]:
    """Image files below a class folder, sorted, relative to the root; and the number of other files."""
    images: list[str] = []
    others = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(place).relative_to(root).as_posix()
        found = [f"{inside}/{name}" for name in files if not name.startswith(".") and _ending(name) in endings]
        images += found
        others += len(files) - len(found)
    return sorted(images), others


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path for each of a million files takes seconds


def _check_none_empty(folder: Path, classes: Mapping[str, list[str]]) -> None:
    empty = [kind for kind, names in classes.items() if not names]
    if empty:
        raise DatasetError(
            f"{len(empty)} of {len(classes)} class folders in {folder} hold no image: {name_some(empty)}. "
            "Add images or remove the folders."
        )
