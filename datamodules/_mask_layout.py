"""Where a set of images and masks keeps them: the folders of each split, the pairs in them, and ``classes.json``."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effvit.datamodules._checks import Fault
from effvit.datamodules._class_folders import images_below, name_some
from effvit.datamodules._image_sources import image_endings
from effvit.datamodules._mask_classes import Colour
from effvit.datamodules._mask_files import MaskPair
from effvit.datamodules._segmentations import shorten
from effvit.errors import DatasetError

IMAGES, MASKS, CLASSES = "images", "masks", "classes.json"
#: Names in use for one and the same split.
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}

_MASK_ENDING = ".png"
_FORMAT = '{"1": "road", "2": "car"} or [{"id": 1, "name": "road", "color": [128, 64, 128]}, …]'


class Folders(NamedTuple):
    """Where the images and the masks of a split lie."""

    images: Path
    masks: Path


class Listing(NamedTuple):
    """A split as its folders have it.

    Attributes:
        pairs: Images with their masks, by name.
        faults: Images without a mask and masks without an image.
    """

    pairs: list[MaskPair]
    faults: list[Fault]


def find_folders(root: Path) -> dict[str, Folders]:
    """Folders of each split there is: ``images/<split>`` with ``masks/<split>``, or ``<split>/images`` with ``masks``.

    Without a folder of any split, ``images`` and ``masks`` themselves are the training split.

    Args:
        root: Folder of the data set.

    Raises:
        DatasetError: A folder is not there.
    """
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}; pass the folder of the data set as `--data.root`")
    found: dict[str, Folders] = {}
    for split, names in ALIASES.items():
        for name in names:
            for images, masks in ((Path(IMAGES, name), Path(MASKS, name)), (Path(name, IMAGES), Path(name, MASKS))):
                if (root / images).is_dir() and split not in found:
                    found[split] = _checked(root, images, masks)
    if not found and (root / IMAGES).is_dir():
        found["train"] = _checked(root, Path(IMAGES), Path(MASKS))
    if not found:
        inside = sorted(path.name for path in root.iterdir())
        raise DatasetError(
            f"{root} has no images with masks. Looked for images/train with masks/train, train/images with train/masks "
            f"(the same of val and test), and images with masks. There is: {name_some(inside) or 'nothing'}"
        )
    return found


def _checked(root: Path, images: Path, masks: Path) -> Folders:
    if not (root / masks).is_dir():
        raise DatasetError(f"{root / images} has images, but there is no folder {root / masks} with their masks")
    return Folders(root / images, root / masks)


def pair_up(root: Path, folders: Folders) -> Listing:
    """Pairs each image with the PNG of the same name below the folder of masks.

    Args:
        root: What names are relative to.
        folders: Where to look, at any depth.

    Raises:
        DatasetError: There is no image, or no mask at all.
    """
    images, twice = _by_stem(root, folders.images, image_endings())
    if not images:
        raise DatasetError(f"{folders.images} holds no image")
    found, _ = _by_stem(root, folders.masks, {_MASK_ENDING})
    if not set(images) & set(found):
        example = next(iter(images.values()))
        others, _ = images_below(root, folders.masks, image_endings())
        raise DatasetError(
            f"no image in {folders.images} has a mask in {folders.masks}: a mask has the name of its image and the "
            f"ending .png, such as {Path(example).stem}.png for {example}. There is: "
            f"{name_some(sorted(others), 3) or 'nothing'}"
            + (". Masks are never JPEG, which changes pixel values" if _has_jpeg(others) else "")
        )
    pairs = [MaskPair(name, found[stem]) for stem, name in images.items() if stem in found]
    faults = [Fault("same-name", f"{images[stem]} has the same mask by its name", file=name) for name, stem in twice]
    faults += [
        Fault("no-mask", f"there is no mask {(folders.masks / stem).as_posix()}.png", file=name)
        for stem, name in images.items()
        if stem not in found
    ]
    faults += [
        Fault("no-image", f"the mask has no image in {folders.images}", file=name)
        for stem, name in found.items()
        if stem not in images
    ]
    return Listing(pairs, faults)


def existing_pairs(root: Path, pairs: Sequence[MaskPair]) -> Listing:
    """Those of some pairs of which both files are there.

    Args:
        root: What names are relative to.
        pairs: What there should be.
    """
    listings: dict[str, set[str]] = {}  # one listing a folder, as asking for each file is slow on network drives

    def is_there(name: str) -> bool:
        place, file = os.path.split(name)
        if place not in listings:
            folder = root / place
            listings[place] = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return file in listings[place]

    found: list[MaskPair] = []
    faults: list[Fault] = []
    for pair in pairs:
        missing = [name for name in pair if not is_there(name)]
        if missing:
            kind = "no-image" if missing[0] == pair.image else "no-mask"
            faults.append(Fault(kind, f"there is no file {' and no '.join(missing)} in {root}", file=pair.image))
        else:
            found.append(pair)
    return Listing(found, faults)


def _by_stem(root: Path, folder: Path, endings: Collection[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Files below a folder with one of some endings, relative to the root, by their path in it without that, in order.

    Returns:
        The files; and those, with that path, of which another has the same.
    """
    names, _ = images_below(root, folder, endings)
    inside = folder.relative_to(root).as_posix() + "/"
    found: dict[str, str] = {}
    twice: list[tuple[str, str]] = []
    for name in names:
        stem = os.path.splitext(name.removeprefix(inside))[0]  # noqa: PTH122 - a Path for each takes seconds
        if found.setdefault(stem, name) != name:
            twice.append((name, stem))
    return found, twice


def _has_jpeg(names: Sequence[str]) -> bool:
    return any(name.lower().endswith((".jpg", ".jpeg")) for name in names)


def split_pairs(pairs: list[MaskPair], share: float, seed: int, where: Path) -> tuple[list[MaskPair], list[MaskPair]]:
    """Splits pairs into those to train on and a share that is held out, by a seed.

    Args:
        pairs: All of them.
        share: Share of the second part.
        seed: Seed of the choice.
        where: Their folder, for the message.

    Raises:
        DatasetError: There are fewer than two.
    """
    if len(pairs) < 2:
        raise DatasetError(f"{where} has {len(pairs)} image with a mask; two or more can be split, for validation")
    number = min(max(round(len(pairs) * share), 1), len(pairs) - 1)
    held_out = set(np.random.default_rng(seed).permutation(len(pairs))[:number].tolist())
    parts: tuple[list[MaskPair], list[MaskPair]] = ([], [])
    for place, pair in enumerate(pairs):
        parts[place in held_out].append(pair)
    return parts


def read_classes(path: Path) -> tuple[dict[int, str], dict[int, Colour]]:
    """Class names and colours by category id, from ``classes.json``.

    Args:
        path: ``{id: name}``, or a list of ``{"id", "name"}`` of which all or none have a ``color`` [r, g, b].

    Raises:
        DatasetError: It is missing, or something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"cannot read {path}, which names the classes, as {_FORMAT}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from error
    if isinstance(data, dict):
        data = [{"id": _number(key), "name": name} for key, name in data.items()]
    if not isinstance(data, list) or not data:
        raise DatasetError(f"{path} must name the classes, as {_FORMAT}; found {shorten(data)}")
    names: dict[int, str] = {}
    colours: dict[int, Colour] = {}
    for entry in data:
        _check_entry(path, entry, names)
        names[entry["id"]] = entry["name"]
        if "color" in entry:
            colours[entry["id"]] = _colour(path, entry)
    if colours and len(colours) < len(names):
        lacking = name_some([repr(name) for key, name in names.items() if key not in colours])
        raise DatasetError(f"{path}: some classes have a color, and these have none: {lacking}")
    return names, colours


def _number(key: str) -> int | str:
    return int(key) if key.strip().isdecimal() else key


def _check_entry(path: Path, entry: Any, names: Mapping[int, str]) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise DatasetError(f"{path}: each class needs 'id' and 'name', as {_FORMAT}; found {shorten(entry)}")
    if len(f"{entry['name']}.".splitlines()) > 1:
        raise DatasetError(f"{path}: the name of a class is one line; found {entry['name']!r}")
    number = entry.get("id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise DatasetError(f"{path}: the id of a class is its pixel value, an integer; found {shorten(entry)}")
    if number in names:
        raise DatasetError(f"{path}: id {number} is declared twice ({names[number]!r} and {entry['name']!r})")


def _colour(path: Path, entry: dict[str, Any]) -> Colour:
    parts = entry["color"]
    if isinstance(parts, list) and len(parts) == 3 and all(type(part) is int and 0 <= part <= 255 for part in parts):
        return parts[0], parts[1], parts[2]
    raise DatasetError(f"{path}: a color is [red, green, blue], each in 0 … 255; found {shorten(entry)}")
