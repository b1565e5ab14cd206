"""The check of images with masks: everything that is in them, and every fault, in one report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effvit.datamodules._checks import Fault
from effvit.datamodules._class_folders import name_some
from effvit.datamodules._mask_classes import MaskClasses
from effvit.datamodules._mask_files import MaskPair, decode_pair, header_faults
from effvit.datamodules._mask_layout import ALIASES, IMAGES, MASKS
from effvit.datamodules.ade20k import ADE20K, is_ade20k
from effvit.datamodules.cityscapes import Cityscapes, is_cityscapes
from effvit.datamodules.inspection import summarise_faults
from effvit.datamodules.segmentation import MaskFilesData
from effvit.datamodules.segmentation_folder import SegmentationFolder
from effvit.datamodules.voc import PascalVOC, voc_folder
from effvit.errors import ConfigError, DatasetError

__all__ = ["MaskSetReport", "has_masks", "inspect_masks"]

Counts = np.ndarray[Any, np.dtype[np.int64]]

#: Pairs between two reports of progress: a second or so.
_AT_ONCE = 128


@dataclass(frozen=True)
class SplitContents:
    """What the masks of a split hold.

    Attributes:
        num_images: Images with a mask.
        pixels: Pixels of each label, ``(K,)``.
        images: Images that show each label, ``(K,)``.
        ignored: Pixels without a label, by declaration.
        unknown: Pixels of a value that is no class.
    """

    num_images: int
    pixels: Counts
    images: Counts
    ignored: int = 0
    unknown: int = 0

    @property
    def total(self) -> int:
        """All pixels."""
        return int(self.pixels.sum()) + self.ignored + self.unknown


@dataclass(frozen=True)
class MaskSetReport:
    """What a segmentation set holds, and what is wrong with it.

    Attributes:
        root: Its folder.
        layout: The data module that reads it.
        names: Class name of each label.
        contents: What is in each split.
        image_sizes: Smallest, median and largest (width, height) by area; None where nothing was opened.
        unlabelled: Masks without any label, which are nothing to learn from.
        unknown: For each pixel value that is no class, the number of its pixels and of the masks that have it.
        faults: Every fault, in the order of the splits: pairs, then files.
        decoded: Whether the files were opened.
    """

    root: Path
    layout: str
    names: tuple[str, ...]
    contents: dict[str, SplitContents]
    image_sizes: tuple[tuple[int, int], ...] | None
    unlabelled: list[str] = field(default_factory=list)
    unknown: dict[str, tuple[int, int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    decoded: bool = True

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    @property
    def absent(self) -> dict[str, list[str]]:
        """Classes without a pixel, by split."""
        return {
            split: [name for name, number in zip(self.names, held.pixels, strict=True) if not number]
            for split, held in self.contents.items()
        }

    def __str__(self) -> str:
        """The report as text."""
        faults = [summarise_faults(self.faults, decoded=self.decoded), *(f"  {fault}" for fault in self.faults)]
        return "\n".join([*self._summary(), *(self._classes() if self.decoded else []), *faults])

    def _summary(self) -> list[str]:
        splits = ", ".join(f"{split} {held.num_images}" for split, held in self.contents.items())
        number = sum(held.num_images for held in self.contents.values())
        lines = [
            f"images with masks  {self.root} ({self.layout})",
            f"{number} images ({splits}), {len(self.names)} class{'es' * (len(self.names) > 1)}",
        ]
        if self.image_sizes is not None:
            smallest, median, largest = (f"{width}x{height}" for width, height in self.image_sizes)
            lines.append(f"image sizes        {smallest} to {largest}, median {median}")
        if not self.decoded:
            return lines
        shares = ", ".join(f"{split} {_percent(held.ignored, held.total)}" for split, held in self.contents.items())
        lines.append(f"without a label    {shares} of the pixels")
        if self.unlabelled:
            plural = "s" * (len(self.unlabelled) > 1)
            lines.append(f"wholly without     {len(self.unlabelled)} mask{plural}: {name_some(self.unlabelled)}")
        lines += [
            f"no class           pixel value {value}: {pixels:,} pixels in {masks} mask{'s' * (masks > 1)}"
            for value, (pixels, masks) in self.unknown.items()
        ]
        return [*lines, *self._remedies()]

    def _remedies(self) -> list[str]:
        """What to do about values that are no class."""
        values = [value for value in self.unknown if not value.startswith("#")]
        if not values:
            return []
        zero = ', often {"0": "background"}' if "0" in values else ""
        ignored, merged = f"--ignore [{','.join(values)}]", f"--merge {{{values[0]}:ID}}"
        return [
            f"{'':19}declare them in classes.json{zero}; leave them out, {ignored}; or count them as a class, {merged}"
        ]

    def _classes(self) -> list[str]:
        width = max(map(len, self.names))
        held = self.contents.values()
        lines = [f"share of the labelled pixels and number of images by class (columns: {', '.join(self.contents)})"]
        for label, name in enumerate(self.names):
            columns = (
                f"{_percent(int(split.pixels[label]), int(split.pixels.sum())):>9}{split.images[label]:>7}"
                for split in held
            )
            lines.append(f"  {name:<{width}}{''.join(columns)}")
        for split, names in self.absent.items():
            if names:
                lines.append(f"no pixel in {split}: {len(names)} of {len(self.names)} classes, {name_some(names)}")
        return lines


def has_masks(root: Path) -> bool:
    """Whether a folder has one of the layouts of images with masks."""
    folders = [root, *(root / name for names in ALIASES.values() for name in names)]
    return (
        is_ade20k(ADE20K(str(root)).home)
        or voc_folder(root) is not None
        or is_cityscapes(root)
        or any((folder / IMAGES).is_dir() and (folder / MASKS).is_dir() for folder in folders)
    )


def inspect_masks(
    root: str | Path,
    splits: Collection[str] | None = None,
    decode_images: bool = True,
    progress: Callable[[int, int], None] | None = None,
    *,
    ignore: list[int] | None = None,
    merge: dict[int, int] | None = None,
) -> MaskSetReport:
    """Checks a segmentation set, and counts what is in it.

    The layouts are those of ``SegmentationFolder``, ``ADE20K``, ``PascalVOC`` and ``Cityscapes``, read with their
    default options but for those named here.

    Args:
        root: Its folder.
        splits: Which to check, of "train", "val" and "test"; None for all there are.
        decode_images: Open every file too, on all cores; without that, only missing partners are found.
        progress: Called now and then with the number of pairs that were opened, and of all.
        ignore: Of a ``SegmentationFolder``, its option.
        merge: Of a ``SegmentationFolder``, its option.

    Returns:
        The report, with every fault.

    Raises:
        DatasetError: There is no such layout, or the classes are not declared as they should be.
        ConfigError: There is no such split, or the layout declares what is ignored and merged itself.
    """
    data = _find_data(Path(root), ignore, merge)
    chosen = _choose(data, splits)
    listings = {split: data.list_pairs(split) for split in chosen}
    contents = _Contents(data, [(split, pair) for split, listing in listings.items() for pair in listing.pairs])
    if decode_images:
        contents.read_all(progress)
    return MaskSetReport(
        root=data.home,
        layout=type(data).__name__,
        names=data.classes.categories.names,
        contents={split: contents.of(split, len(listing.pairs)) for split, listing in listings.items()},
        image_sizes=contents.sizes(),
        unlabelled=contents.unlabelled,
        unknown={value: (pixels, contents.masks[value]) for value, pixels in contents.unknown.most_common()},
        faults=[
            fault
            for split in chosen
            for fault in (*listings[split].faults, *contents.faults[split], *contents.lacks(split))
        ]
        + _too_few(data.classes),
        decoded=decode_images,
    )


def _find_data(root: Path, ignore: list[int] | None, merge: dict[int, int] | None) -> MaskFilesData:
    """The data module that reads a folder."""
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}")
    published = _find_published(root)
    if published is None:
        return SegmentationFolder(str(root), ignore=ignore, merge=merge)
    if ignore is not None or merge is not None:
        raise ConfigError(
            f"{root} is a {type(published).__name__}, whose values are declared: leave out --ignore and --merge"
        )
    return published


def _find_published(root: Path) -> MaskFilesData | None:
    ade20k = ADE20K(str(root))
    if is_ade20k(ade20k.home):
        return ade20k
    if voc_folder(root) is not None:
        return PascalVOC(str(root))
    return Cityscapes(str(root)) if is_cityscapes(root) else None


def _too_few(classes: MaskClasses) -> list[Fault]:
    if len(classes) > 1:
        return []
    return [Fault("one-class", "the only class is what every pixel would be: declare what it is to be told from")]


def _choose(data: MaskFilesData, splits: Collection[str] | None) -> list[str]:
    missing = [split for split in splits or () if split not in data.splits]
    if missing:
        raise ConfigError(f"{data.home} has no {missing[0]} split; there is: {', '.join(data.splits)}")
    if not data.splits:
        raise DatasetError(f"{data.home} has neither a train nor a val split; looked for {IMAGES} and {MASKS}")
    return [split for split in data.splits if splits is None or split in splits]


class _Read(NamedTuple):
    """What one pair tells: (width, height), pixels of each label, pixels without one, and of values of no class."""

    size: tuple[int, int]
    pixels: Counts
    ignored: int
    unknown: dict[str, int]


def _read(home: Path, pair: MaskPair, classes: MaskClasses) -> _Read | Fault:
    try:
        image, labels, unknown = decode_pair(home, pair, classes)
    except DatasetError as error:
        return (*header_faults(home, [pair]), Fault("unreadable-file", str(error), file=pair.image))[0]
    counts = np.bincount(labels.ravel() + 1, minlength=len(classes) + 1)
    return _Read((image.shape[1], image.shape[0]), counts[1:], int(counts[0]) - sum(unknown.values()), unknown)


class _Contents:
    """What opening the files tells."""

    def __init__(self, data: MaskFilesData, places: Sequence[tuple[str, MaskPair]]) -> None:
        self._home, self._classes, self._places = data.home, data.classes, places
        self.faults: dict[str, list[Fault]] = {split: [] for split in data.splits}
        self.unlabelled: list[str] = []
        self.unknown: Counter[str] = Counter()
        self.masks: Counter[str] = Counter()
        self._sizes: list[tuple[int, int]] = []
        self._pixels = {split: np.zeros((2, len(data.classes)), dtype=np.int64) for split in data.splits}
        self._others: Counter[tuple[str, str]] = Counter()

    def read_all(self, progress: Callable[[int, int], None] | None) -> None:
        """Reads all pairs: decoding lets go of Python's lock, so threads help."""
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self._places), _AT_ONCE):
                part = self._places[start : start + _AT_ONCE]
                reads = pool.map(lambda place: _read(self._home, place[1], self._classes), part)
                for (split, pair), read in zip(part, reads, strict=True):
                    self._add(split, pair, read)
                if progress is not None:
                    progress(start + len(part), len(self._places))

    def _add(self, split: str, pair: MaskPair, read: _Read | Fault) -> None:
        if isinstance(read, Fault):
            self.faults[split].append(read)
            return
        self._sizes.append(read.size)
        self._pixels[split] += read.pixels, read.pixels > 0
        self._others[split, "ignored"] += read.ignored
        self._others[split, "unknown"] += sum(read.unknown.values())
        if read.unknown:
            message = f"{pair.mask}: {self._classes.explain_unknown(read.unknown)}"
            self.faults[split].append(Fault("unknown-value", message, file=pair.image))
            self.unknown.update(read.unknown)
            self.masks.update(read.unknown.keys())
        elif not read.pixels.any():
            self.unlabelled.append(pair.mask)

    def of(self, split: str, num_images: int) -> SplitContents:
        """What a split holds."""
        pixels, images = self._pixels[split]
        return SplitContents(num_images, pixels, images, self._others[split, "ignored"], self._others[split, "unknown"])

    def lacks(self, split: str) -> list[Fault]:
        """A fault of a split whose masks were read, and say nothing; those of a test set may be withheld."""
        if (
            split == "test"
            or self._pixels[split].any()
            or self._others[split, "unknown"]
            or not self._others[split, "ignored"]
        ):
            return []
        return [Fault("no-label", f"no pixel of the {split} split has a class: nothing can be learned or measured")]

    def sizes(self) -> tuple[tuple[int, int], ...] | None:
        """Smallest, median and largest (width, height)."""
        ordered = sorted(self._sizes, key=lambda size: size[0] * size[1])
        return (ordered[0], ordered[len(ordered) // 2], ordered[-1]) if ordered else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f}%" if whole else "-"
