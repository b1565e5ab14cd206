"""Where a COCO-format data set keeps its annotations and images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from effvit.errors import DatasetError

if TYPE_CHECKING:
    from pathlib import Path

# Folder and file names in use for one and the same split.
_ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class SplitFiles:
    """One split of a data set.

    Attributes:
        split: "train", "val" or "test".
        annotations: The COCO JSON.
        images: The folder that file names in the JSON are relative to.
    """

    split: str
    annotations: Path
    images: Path


def find_split(root: Path, split: str, annotations: str | None = None, images: str | None = None) -> SplitFiles:
    """Finds a split of a COCO-format data set.

    Without explicit names, the layouts of COCO (``annotations/instances_train2017.json`` and ``train2017/``), of COCO
    without the year, and of Roboflow (``train/_annotations.coco.json`` beside the images) are tried, in this order.

    Args:
        root: Folder of the data set.
        split: "train", "val" or "test".
        annotations: JSON file, relative to ``root``.
        images: Image folder, relative to ``root``.

    Raises:
        DatasetError: A folder or file is missing; the message lists what was looked for and what is there.
    """
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root} (data root); it is {_nearest(root)}")
    if annotations is not None:
        json_path = root / annotations
        if not json_path.is_file():
            raise DatasetError(
                f"there is no annotation file {json_path} ({split}_annotations); it is {_nearest(json_path)}"
            )
        return SplitFiles(split, json_path, _image_folder(root, split, json_path, images))
    looked = _candidates(root, split)
    for json_path, folder in looked:
        if json_path.is_file():
            chosen = root / images if images is not None else folder
            if chosen.is_dir():
                return SplitFiles(split, json_path, chosen)
            raise DatasetError(f"{json_path} exists, but not its image folder {chosen}; name it with {split}_images")
    raise DatasetError(
        f"no annotations of the {split} split in {root}. Looked for:\n"
        + "\n".join(f"  {path.relative_to(root)}" for path, _ in looked)
        + f"\nThere is: {_listing(root)}\nName them with {split}_annotations and {split}_images (relative to root)."
    )


def has_split(root: Path, split: str) -> bool:
    """Whether a split is found by its usual names."""
    return any(path.is_file() for path, _ in _candidates(root, split))


def _candidates(root: Path, split: str) -> list[tuple[Path, Path]]:
    names = _ALIASES[split]
    return [
        *((root / "annotations" / f"instances_{name}2017.json", root / f"{name}2017") for name in names[:1]),
        *((root / "annotations" / f"instances_{name}.json", root / name) for name in names),
        *((root / name / "_annotations.coco.json", root / name) for name in names),
    ]


def _image_folder(root: Path, split: str, json_path: Path, images: str | None) -> Path:
    if images is not None:
        folder = root / images
        if not folder.is_dir():
            raise DatasetError(f"there is no image folder {folder} ({split}_images); it is {_nearest(folder)}")
        return folder
    usual = [folder for path, folder in _candidates(root, split) if path == json_path and folder.is_dir()]
    by_name = [root / name for name in (json_path.stem.removeprefix("instances_"), *_ALIASES[split])]
    for folder in [*usual, *by_name]:
        if folder.is_dir():
            return folder
    return json_path.parent


def _nearest(path: Path) -> str:
    """Says which part of a path exists, and what is there."""
    parent = path
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return f"looked for in {parent.resolve()}, where there is: {_listing(parent)}"


def _listing(folder: Path, most: int = 12) -> str:
    names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in folder.iterdir())
    annotations = folder / "annotations"
    if annotations.is_dir():
        names += sorted(f"annotations/{entry.name}" for entry in annotations.iterdir())
    return (", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")) or "nothing"
