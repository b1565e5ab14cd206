"""The check of a classification set in folders: everything that is in it, and every fault, in one report."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from effvit.datamodules import _class_folders as layout
from effvit.datamodules import imagenet
from effvit.datamodules._checks import Fault
from effvit.datamodules._decode import decode_image, read_orientation
from effvit.datamodules._image_sources import image_endings
from effvit.datamodules.inspection import summarise_faults
from effvit.errors import ConfigError, DatasetError

__all__ = ["ImageFolderReport", "has_class_folders", "inspect_image_folder"]

_REMEDY = "restore or remove the file"
#: Files between two reports of progress: a second or so.
_AT_ONCE = 512
_GREY, _DEEP = {"1", "L", "LA", "La"}, ("I", "F")


@dataclass(frozen=True)
class ImageFolderReport:
    """What a classification set in folders holds, and what is wrong with it.

    Attributes:
        root: Its folder.
        class_counts: Image files by split, then by class name.
        image_sizes: Smallest, median and largest (width, height) by area, as displayed; None where nothing was opened.
        unusual: Number of images of each unusual sort, such as "greyscale" or "EXIF rotation". They can all be read.
        faults: Every fault, in the order folders, files, duplicates.
        decoded: Whether the image files were opened.
    """

    root: Path
    class_counts: dict[str, dict[str, int]]
    image_sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None
    unusual: dict[str, int]
    faults: list[Fault] = field(default_factory=list)
    decoded: bool = True

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def imbalance(self) -> float | None:
        """Images of the largest class over those of the smallest, in training; None where that cannot be said."""
        counts = self.class_counts.get("train", {}).values()
        return max(counts) / min(counts) if counts and min(counts) > 0 else None

    def __str__(self) -> str:
        """The report as text."""
        return "\n".join([*self._summary(), *self._classes(), *self._fault_lines()])

    def _summary(self) -> list[str]:
        splits = ", ".join(f"{split} {sum(counts.values())}" for split, counts in self.class_counts.items())
        number = sum(sum(counts.values()) for counts in self.class_counts.values())
        lines = [
            f"class folders  {self.root}",
            f"{number} images ({splits}), {len(self._class_names())} classes",
        ]
        if self.imbalance is not None:
            lines.append(f"largest class over smallest, in training: {self.imbalance:.2f}")
        if self.image_sizes is not None:
            smallest, median, largest = (f"{width}x{height}" for width, height in self.image_sizes)
            lines.append(f"image sizes    {smallest} to {largest}, median {median}")
        if self.unusual:
            lines.append("unusual        " + ", ".join(f"{name} {number}" for name, number in self.unusual.items()))
        return lines

    def _class_names(self) -> list[str]:
        return sorted({name for counts in self.class_counts.values() for name in counts})

    def _classes(self) -> list[str]:
        names = self._class_names()
        width = max((len(name) for name in names), default=0)
        lines = [f"images by class (columns: {', '.join(self.class_counts)})"]
        for name in names:
            counts = (f"{counts.get(name, 0):>7}" for counts in self.class_counts.values())
            lines.append(f"  {name:<{width}}{''.join(counts)}")
        return lines

    def _fault_lines(self) -> list[str]:
        return [summarise_faults(self.faults, decoded=self.decoded), *(f"  {fault}" for fault in self.faults)]


def inspect_image_folder(
    root: str | Path,
    splits: Collection[str] | None = None,
    decode_images: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ImageFolderReport:
    """Checks a classification set with a folder per class, and counts what is in it.

    The layouts are those of ``ImageFolder``, and of ``ImageNet`` where there is its devkit or Kaggle's tree. Duplicates
    are files of equal bytes.

    Args:
        root: Its folder: ``train/<class>/…`` with ``val`` and ``test``, or ``<class>/…``.
        splits: Which to check, of "train", "val" and "test"; None for all there are.
        decode_images: Open every image file too, on all cores; without that, neither damaged files nor duplicates are
            found.
        progress: Called now and then with the number of files that were opened, and of all.

    Returns:
        The report, with every fault.

    Raises:
        DatasetError: There is no folder, or its folders are splits under other names.
        ConfigError: There is no such split.
    """
    root = Path(root)
    folders = layout.find_splits(imagenet.images_folder(root))
    only_one = list(folders) == ["train"]
    if splits is not None:
        missing = [split for split in splits if split not in folders]
        if missing:
            raise ConfigError(f"{root} has no {missing[0]} split; there is: {', '.join(folders)}")
        folders = {split: folder for split, folder in folders.items() if split in splits}
    files = {split: _files_by_class(root, folder) for split, folder in folders.items()}
    unlabelled: list[Fault] = []
    if "val" in folders and imagenet.has_flat_validation(root):
        files["val"], unlabelled = _flat_validation(root, files.get("train"))
        del folders["val"]  # it has no class folders to be checked
    faults = _layout_faults(folders, files) + unlabelled
    if only_one:
        faults += _too_small_to_split(files["train"])
    contents = _Contents()
    if decode_images:
        contents.read_all(root, list(_walk(files)), progress)
    return ImageFolderReport(
        root=root,
        class_counts={split: {kind: len(names) for kind, names in kinds.items()} for split, kinds in files.items()},
        image_sizes=contents.sizes(),
        unusual=dict(contents.unusual.most_common()),
        faults=[*faults, *contents.unreadable, *contents.duplicates()],
        decoded=decode_images,
    )


def has_class_folders(root: Path) -> bool:
    """Whether a folder holds class folders with images, directly or in splits."""
    if imagenet.has_flat_validation(root):
        return True
    try:
        folders = layout.find_splits(imagenet.images_folder(root))
    except DatasetError:
        return True  # splits under other names: the check says so
    endings = image_endings()
    return any(
        Path(name).suffix.lower() in endings
        for folder in folders.values()
        for kind in _subfolders(folder)
        for _, _, names in os.walk(folder / kind, followlinks=True)
        for name in names
    )


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _files_by_class(root: Path, folder: Path) -> dict[str, list[str]]:
    endings = image_endings()
    return {kind: layout.images_below(root, folder / kind, endings)[0] for kind in _subfolders(folder)}


def _flat_validation(root: Path, train: Collection[str] | None) -> tuple[dict[str, list[str]], list[Fault]]:
    """ImageNet's validation images by class, from the devkit or Kaggle's file, and what is wrong with that."""
    try:
        wnids = imagenet.ImageNet(str(root)).wnids if train is None else train
        labelled = imagenet.flat_validation(root, wnids)
    except DatasetError as error:
        names, _ = layout.images_below(root, imagenet.images_folder(root) / "val", image_endings())
        return {"(no label)": names}, [Fault("labels", str(error))]
    classes: dict[str, list[str]] = {wnid: [] for wnid in wnids}
    for name, wnid in labelled.items():
        classes[wnid].append(name)
    return classes, []


def _walk(files: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str, str]]:
    return ((split, kind, name) for split, kinds in files.items() for kind, names in kinds.items() for name in names)


def _layout_faults(folders: dict[str, Path], files: dict[str, dict[str, list[str]]]) -> list[Fault]:
    """What training would stop at, of all splits at once."""
    faults = []
    for split, folder in folders.items():
        try:
            layout.class_folders(folder)
        except DatasetError as error:
            faults.append(Fault("class-folders", str(error)))
        faults += [
            Fault("empty-class", "the class folder holds no image", file=f"{split}: {kind}")
            for kind, names in files[split].items()
            if not names
        ]
        if split != "train" and "train" in folders:
            try:
                layout.check_same_classes(folder, files[split], folders["train"], files["train"])
            except DatasetError as error:
                faults.append(Fault("classes-differ", str(error)))
    return faults


def _too_small_to_split(classes: dict[str, list[str]]) -> list[Fault]:
    return [
        Fault("one-image", f"the class {kind} has one image, and there is no other split to validate on", file=names[0])
        for kind, names in classes.items()
        if len(names) == 1
    ]


class _Read(NamedTuple):
    """What reading one file tells: (width, height), what is unusual, and a hash of the content."""

    size: tuple[int, int]
    unusual: list[str]
    digest: bytes


def _read(root: Path, name: str) -> _Read | Fault:
    try:
        data = (root / name).read_bytes()
        height, width = decode_image(data, str(root / name), remedy=_REMEDY).shape[1:]
    except (DatasetError, OSError) as error:
        return Fault("unreadable-file", str(error), file=name)
    return _Read((width, height), _unusual(data), hashlib.blake2b(data, digest_size=16).digest())


class _Contents:
    """What opening the files tells."""

    def __init__(self) -> None:
        self.unreadable: list[Fault] = []
        self.unusual: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []
        self._places: dict[bytes, list[tuple[str, str, str]]] = defaultdict(list)

    def read_all(
        self, root: Path, places: Sequence[tuple[str, str, str]], progress: Callable[[int, int], None] | None
    ) -> None:
        """Reads image files, given as split, class and name: decoding lets go of Python's lock, so threads help."""
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.simplefilter("ignore")  # the decoder sets this for itself, which is not safe among threads
            for start in range(0, len(places), _AT_ONCE):
                part = places[start : start + _AT_ONCE]
                for place, read in zip(part, pool.map(lambda place: _read(root, place[2]), part), strict=True):
                    self._add(place, read)
                if progress is not None:
                    progress(start + len(part), len(places))

    def _add(self, place: tuple[str, str, str], read: _Read | Fault) -> None:
        if isinstance(read, Fault):
            self.unreadable.append(read)
            return
        self._sizes.append(read.size)
        self.unusual.update(read.unusual)
        self._places[read.digest].append(place)

    def sizes(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
        """Smallest, median and largest (width, height)."""
        ordered = sorted(self._sizes, key=lambda size: size[0] * size[1])
        return (ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None

    def duplicates(self) -> list[Fault]:
        """Files of equal content, contradictions first."""
        faults = []
        for places in self._places.values():
            if len(places) < 2:
                continue
            files = layout.name_some([name for _, _, name in places])
            splits = sorted({split for split, _, _ in places})
            kinds = sorted({kind for _, kind, _ in places})
            if len(kinds) > 1:
                faults.append(
                    Fault("contradicting-labels", f"one image is of the classes {', '.join(kinds)}: {files}; keep one")
                )
            elif len(splits) > 1:
                faults.append(Fault("leak", f"one image is in {' and '.join(splits)}: {files}; keep one"))
            else:
                faults.append(Fault("duplicate", f"one image is there {len(places)} times: {files}; keep one"))
        order = ("contradicting-labels", "leak", "duplicate")
        return sorted(faults, key=lambda fault: order.index(fault.kind))


def _unusual(data: bytes) -> list[str]:
    """In what an image is unlike an upright picture of three 8-bit channels."""
    with Image.open(io.BytesIO(data)) as image:
        mode, orientation = image.mode, read_orientation(image)
    found = []
    if mode in _GREY:
        found.append("greyscale")
    elif mode == "CMYK":
        found.append("CMYK")
    elif mode.startswith(_DEEP):
        found.append("more than 8 bits")
    elif mode != "RGB":
        found.append("palette" if mode == "P" else mode)
    if orientation != 1:
        found.append("EXIF rotation")
    return found
