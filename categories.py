"""The one mapping between a data set's category ids and a network's contiguous labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from effvit.errors import DatasetError

#: Label of a pixel that has none, in masks of segmentation.
IGNORED = -1


class Categories:
    """Category ids of a data set against labels ``0 … num_classes - 1`` of a network.

    COCO's own ids are sparse (80 ids between 1 and 90), other data sets start at 1 or at 0. Labels follow ascending
    category id, the order in which pycocotools and MMDetection count COCO's classes. Data, task and checkpoint share
    this object, as the plain dictionary ``{category id: name}`` where it is stored.

    Args:
        names: Class name of each category id.

    Raises:
        DatasetError: There is no category, or an id is not an integer.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        if not names:
            raise DatasetError("a data set needs at least one category, and none is declared")
        bad = [key for key in names if isinstance(key, bool) or not isinstance(key, int)]
        if bad:
            raise DatasetError(f"category ids must be integers, found {bad[0]!r}")
        self._names = {key: str(names[key]) for key in sorted(names)}
        self._ids = tuple(self._names)
        self._labels = {category_id: label for label, category_id in enumerate(self._ids)}

    @classmethod
    def from_coco(cls, categories: Iterable[Mapping[str, Any]]) -> Categories:
        """Reads the ``categories`` list of a COCO-format JSON.

        Raises:
            DatasetError: An id is declared twice or is no integer, or an entry lacks ``id`` or ``name``.
        """
        names: dict[int, str] = {}
        for position, entry in enumerate(categories):
            if "id" not in entry or "name" not in entry:
                raise DatasetError(f"categories[{position}] needs the keys 'id' and 'name', it has {sorted(entry)}")
            category_id = entry["id"]
            if isinstance(category_id, bool) or not isinstance(category_id, int):
                raise DatasetError(f"categories[{position}] needs an integer 'id', found {category_id!r}")
            if category_id in names:
                raise DatasetError(
                    f"category id {category_id} is declared twice ({names[category_id]!r} and {entry['name']!r})"
                )
            names[category_id] = entry["name"]
        return cls(names)

    @property
    def ids(self) -> tuple[int, ...]:
        """Category id of each label, in label order."""
        return self._ids

    @property
    def names(self) -> tuple[str, ...]:
        """Class name of each label, in label order."""
        return tuple(self._names.values())

    def label_of(self, category_id: int) -> int:
        """Label of a category id.

        Raises:
            DatasetError: The id is not declared.
        """
        try:
            return self._labels[category_id]
        except KeyError:
            raise DatasetError(f"category id {category_id} is not declared; declared ids: {list(self._ids)}") from None

    def id_of(self, label: int) -> int:
        """Category id of a label in ``0 … num_classes - 1``."""
        return self._ids[label]

    def to_dict(self) -> dict[int, str]:
        """The mapping as plain data, ``{category id: name}``, ready for a checkpoint or a config."""
        return dict(self._names)

    def __len__(self) -> int:
        """Number of classes."""
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        """Same ids with the same names."""
        return isinstance(other, Categories) and self._names == other._names

    def __hash__(self) -> int:
        """Hash over ids and names."""
        return hash(tuple(self._names.items()))

    def __repr__(self) -> str:
        """Ids and names, as written in a config."""
        return f"Categories({self._names})"
