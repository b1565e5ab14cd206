"""What the pixel values of a mask mean: which class, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import cv2
import numpy as np

from effvit.categories import IGNORED, Categories
from effvit.datamodules._class_folders import name_some
from effvit.errors import DatasetError

Array = np.ndarray[Any, np.dtype[Any]]
Labels = np.ndarray[Any, np.dtype[np.int16]]
Colour = tuple[int, int, int]

#: Pixel values that a mask of up to 16 bits can have.
_VALUES = 1 << 16
#: In a table of labels: this value is no class, and not declared to be ignored either.
_UNKNOWN = -2


class UnknownValueError(DatasetError):
    """A mask has pixels of a value that is no class."""


class MaskClasses:
    """The classes of a data set, and what each pixel value of a mask stands for.

    A category is no class where its pixels are ignored or counted as another one.

    Args:
        names: Class name of each category id, which is its pixel value.
        ignored: Pixel values without a label.
        merge: Category id by the pixel value that counts as it.
        colours: Colour of each category id in RGB masks, red, green and blue in 0 … 255.

    Raises:
        DatasetError: These do not fit each other.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        *,
        ignored: Collection[int] = (),
        merge: Mapping[int, int] | None = None,
        colours: Mapping[int, Colour] | None = None,
    ) -> None:
        merge = {value: target for value, target in (merge or {}).items() if value != target}
        _check(names, ignored, merge)
        gone = set(ignored) | set(merge)
        self.categories = Categories({key: name for key, name in names.items() if key not in gone})
        self.ignored = frozenset(ignored)
        self.merge = merge
        self.colours = dict(colours or {})
        self._table = np.full(_VALUES, _UNKNOWN, dtype=np.int16)
        self._table[self.categories.ids,] = np.arange(len(self.categories), dtype=np.int16)
        self._table[list(ignored)] = IGNORED
        for value, target in merge.items():
            self._table[value] = self.categories.label_of(target)
        self._codes, self._labels_of_codes = self._colour_table()

    def __len__(self) -> int:
        """Number of classes."""
        return len(self.categories)

    def labels(self, values: Array) -> tuple[Labels, dict[str, int]]:
        """Labels of the pixels of a mask.

        Args:
            values: Pixel values ``(H, W)``, or RGB colours ``(H, W, 3)``.

        Returns:
            int16 ``(H, W)``, -1 where there is no label; and the number of pixels of each value that is no class,
            which are -1 as well.
        """
        labels = self._look_up(values)
        if labels.min() > _UNKNOWN:
            return labels, {}
        unknown = labels == _UNKNOWN
        labels[unknown] = IGNORED
        found, counts = np.unique(values[unknown], axis=0, return_counts=True)
        names = [str(value) if values.ndim == 2 else hex_colour(value) for value in found]
        return labels, dict(zip(names, counts.tolist(), strict=True))

    def explain_unknown(self, unknown: Mapping[str, int]) -> str:
        """Says which values of a mask are no class, and which are.

        Args:
            unknown: Number of pixels of each such value.
        """
        found = name_some([f"{value} ({number} px)" for value, number in unknown.items()])
        if next(iter(unknown)).startswith("#"):
            known = name_some([f"{hex_colour(colour)}" for colour in self.colours.values()])
            return f"pixels of colours that are no class: {found}; declared colours: {known}"
        known = _ranges(np.flatnonzero(self._table != _UNKNOWN).tolist())
        text = f"pixel values that are no class: {found}; known values: {known}"
        return text + " (255 has no label only where no other ignored value is named)" * ("255" in unknown)

    def _colour_table(self) -> tuple[Array, Labels]:
        """Codes of the declared colours, ascending, and their labels."""
        values = list(self.colours)
        codes = _codes(np.array([self.colours[value] for value in values], dtype=np.uint8).reshape(-1, 3))
        order = np.argsort(codes)
        twice = order[1:][codes[order][1:] == codes[order][:-1]]
        if len(twice):
            value = values[twice[0]]
            raise DatasetError(f"two classes have the colour {hex_colour(self.colours[value])}, one of them is {value}")
        return codes[order], self._table[np.array(values, dtype=np.int64)[order]]

    def _look_up(self, values: Array) -> Labels:
        if values.ndim == 3:
            return self._labels_of_colours(values)
        if values.dtype != np.uint8:
            return self._table[values]
        # A fifth of numpy's time.
        return cv2.LUT(np.ascontiguousarray(values), self._table[:256]).astype(np.int16, copy=False)

    def _labels_of_colours(self, values: Array) -> Labels:
        codes = _codes(values)
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        return np.where(self._codes[places] == codes, self._labels_of_codes[places], np.int16(_UNKNOWN))


def _check(names: Mapping[int, str], ignored: Collection[int], merge: Mapping[int, int]) -> None:
    for what, values in (("category id", names), ("ignored pixel value", ignored), ("merged pixel value", merge)):
        bad = [value for value in values if not (isinstance(value, int) and 0 <= value < _VALUES)]
        if bad:
            raise DatasetError(f"the {what} {bad[0]!r} is no pixel value: it must be an integer in 0 … {_VALUES - 1}")
    both = sorted(set(ignored) & set(merge))
    if both:
        raise DatasetError(f"the pixel value {both[0]} is both ignored and merged into {merge[both[0]]}; choose one")
    for value, target in merge.items():
        if target not in names or target in ignored or target in merge:
            usable = sorted(set(names) - set(ignored) - set(merge))
            raise DatasetError(
                f"the pixel value {value} is merged into {target}, which is no class; classes: {_ranges(usable)}"
            )


def _codes(colours: Array) -> Array:
    """One number for each colour of ``(..., 3)``."""
    wide = colours.astype(np.int32)
    codes: Array = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    return codes


def hex_colour(colour: Any) -> str:
    """A colour as ``#rrggbb``."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def _ranges(values: list[int]) -> str:
    """Ascending numbers, consecutive ones as a range."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][-1] == value - 1:
            parts[-1] = [parts[-1][0], value]
        else:
            parts.append([value])
    return ", ".join(" … ".join(map(str, part)) for part in parts)
