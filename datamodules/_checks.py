"""What can be wrong in a COCO-format JSON, found in one pass, and what the policies do about it."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effvit.categories import Categories
from effvit.datamodules._segmentations import segmentation_fault, shorten
from effvit.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Annotation tools round box corners to whole pixels; that much beyond the border is no fault.
BORDER_TOLERANCE = 1.0
_SHOWN = 20

# The faults that `clip` repairs; it leaves out what has one of the others.
CLIPPABLE = "outside"

# What only a detector of masks minds.
NO_SEGMENTATION = "no-segmentation"
# Annotations that have boxes only lack nearly all segmentations; fewer are a fault of single objects.
_BOXES_ONLY = 0.9


@dataclass(frozen=True)
class Fault:
    """One fault of a data set.

    Attributes:
        kind: Short name of the sort of fault, such as "no-area".
        message: What is wrong.
        image_id: Id of the image, if known.
        annotation_id: Id of the annotation, if it concerns one.
        file: Name of the image file, if known.
        position: Position of the entry in its list of the JSON; None for faults of a file.
    """

    kind: str
    message: str
    image_id: int | None = None
    annotation_id: int | None = None
    file: str | None = None
    position: int | None = None

    def __str__(self) -> str:
        """One line: kind, where, what."""
        where = [
            f"{name} {value}"
            for name, value in (
                ("image", self.image_id),
                ("annotation", self.annotation_id),
                ("file", self.file),
            )
            if value is not None
        ]
        return f"[{self.kind}] {', '.join(where)}{': ' if where else ''}{self.message}"


def read_coco(path: Path) -> dict[str, Any]:
    """Reads a JSON file and checks that it is COCO format at the top level.

    Raises:
        DatasetError: The file is missing, no JSON, or has not the lists ``images``, ``annotations``, ``categories``.
    """
    try:
        with path.open("rb") as file:
            data = json.load(file)
    except OSError as error:
        raise DatasetError(f"cannot read annotations {path}: {error.strerror}") from error
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{path} is not COCO format: the top level is a {type(data).__name__}, expected an object")
    for key in ("images", "annotations", "categories"):
        value = data.get(key)
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            found = (
                f"it has the keys {sorted(data)[:12]}" if key not in data else f"'{key}' is a {type(value).__name__}"
            )
            raise DatasetError(f"{path} is not COCO format: it needs a list of objects '{key}', {found}")
    return data


def find_faults(data: dict[str, Any], folder: Path | None = None, *, masks: bool = True) -> list[Fault]:
    """Every fault of images and annotations that shows without opening an image.

    Args:
        data: A COCO dictionary with the right top level.
        folder: Image folder, to look for missing files; None to leave that out.
        masks: Check segmentations too: that every object has one, and that it can be drawn.

    Raises:
        DatasetError: The list of categories itself is unusable.
    """
    categories = Categories.from_coco(data["categories"])
    faults, images = _image_faults(data["images"])
    if folder is not None:
        faults += _missing_files(images.values(), folder)
    seen: set[Any] = set()
    declared = set(categories.ids)
    for position, annotation in enumerate(data["annotations"]):
        faults += _annotation_faults(annotation, position, images, declared, seen, masks)
    return faults


def _image_faults(entries: list[dict[str, Any]]) -> tuple[list[Fault], dict[Any, dict[str, Any]]]:
    faults: list[Fault] = []
    images: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        image_id, name = entry.get("id"), entry.get("file_name")
        where: dict[str, Any] = {"image_id": image_id if _is_int(image_id) else None, "position": position}
        where["file"] = name if isinstance(name, str) else None
        if not _is_int(image_id) or not isinstance(name, str) or not name:
            message = f"images[{position}] needs an integer 'id' and a 'file_name', it has {shorten(entry)}"
            faults.append(Fault("bad-image", message, **where))
        elif image_id in images:
            first = images[image_id]["file_name"]
            faults.append(Fault("duplicate-image-id", f"the id belongs to {first} already", **where))
        elif not all(_is_int(entry.get(key)) and entry[key] > 0 for key in ("width", "height")):
            got = f"width {entry.get('width')!r}, height {entry.get('height')!r}"
            faults.append(Fault("bad-image", f"width and height must be positive integers, found {got}", **where))
            images[image_id] = entry
        else:
            images[image_id] = entry
    return faults, images


def _missing_files(entries: Iterable[dict[str, Any]], folder: Path) -> list[Fault]:
    listings: dict[str, set[str]] = {}  # one listing a folder, as asking for each file is slow on network drives
    faults = []
    for entry in entries:
        subfolder, name = os.path.split(entry["file_name"])
        if subfolder not in listings:
            place = folder / subfolder
            listings[subfolder] = {path.name for path in place.iterdir()} if place.is_dir() else set()
        if name not in listings[subfolder]:
            message = f"there is no such file in {folder}"
            faults.append(Fault("missing-file", message, image_id=entry["id"], file=entry["file_name"]))
    return faults


def _annotation_faults(
    annotation: dict[str, Any],
    position: int,
    images: dict[Any, dict[str, Any]],
    declared: set[int],
    seen: set[Any],
    masks: bool,
) -> list[Fault]:
    number, image_id, category = annotation.get("id"), annotation.get("image_id"), annotation.get("category_id")
    image = images.get(image_id) if _is_int(image_id) else None
    found: list[tuple[str, str]] = []
    if not _is_int(number):
        found.append(("bad-annotation", f"annotations[{position}] needs an integer 'id', it has {shorten(annotation)}"))
    elif number in seen:
        found.append(("duplicate-annotation-id", "an annotation before has the same id"))
    else:
        seen.add(number)
    if image is None:
        found.append(("unknown-image", f"image_id {image_id!r} is not among the images"))
    if not _is_int(category) or category not in declared:
        ids = sorted(declared)
        shown = f"{ids[:10]}{' …' if len(ids) > 10 else ''}"
        found.append(("unknown-category", f"category_id {category!r} is not declared; declared ids: {shown}"))
    found += _box_faults(annotation.get("bbox"), image)
    if masks:
        found += _segmentation_faults(annotation.get("segmentation"), image)
    if not found:
        return []
    where: dict[str, Any] = {
        "image_id": image_id if _is_int(image_id) else None,
        "annotation_id": number if _is_int(number) else None,
        "file": image["file_name"] if image else None,
        "position": position,
    }
    return [Fault(kind, message, **where) for kind, message in found]


def _segmentation_faults(segmentation: Any, image: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not segmentation:
        message = "there is no segmentation; mask_rcnn needs one for each object, retinanet and faster_rcnn do without"
        return [(NO_SEGMENTATION, message)]
    known = image is not None and all(_is_int(image.get(key)) for key in ("height", "width"))
    message = segmentation_fault(segmentation, (image["height"], image["width"]) if image and known else None)
    return [("bad-segmentation", message)] if message else []


def _box_faults(box: Any, image: dict[str, Any] | None) -> list[tuple[str, str]]:
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= {int, float}:
        return [("bad-box", f"bbox must be four numbers [x, y, width, height], found {shorten(box)}")]
    if not all(map(math.isfinite, box)):
        return [("not-finite", f"bbox {box} holds NaN or infinity")]
    if box[2] <= 0 or box[3] <= 0:
        return [("no-area", f"bbox {box} has no area: width and height must be above 0")]
    if image is None or not all(_is_int(image.get(key)) for key in ("width", "height")):
        return []
    return _border_faults(box, image["width"], image["height"])


def _border_faults(box: list[float], width: int, height: int) -> list[tuple[str, str]]:
    x, y, w, h = box
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return [("wholly-outside", f"bbox {box} lies outside the image of {width}x{height} pixels")]
    beyond = max(-x, -y, x + w - width, y + h - height)
    if beyond > BORDER_TOLERANCE:
        return [(CLIPPABLE, f"bbox {box} reaches {beyond:g} px beyond the image of {width}x{height} pixels")]
    return []


def apply_policy(data: dict[str, Any], faults: list[Fault], policy: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Leaves out or repairs what is faulty.

    Args:
        data: A COCO dictionary.
        faults: Its faults.
        policy: "skip" leaves out every faulty image and annotation; "clip" cuts boxes that reach beyond the image back
            to it, and leaves out the rest.

    Returns:
        The COCO dictionary without faults, and how many were repaired or left out, by kind.
    """
    clipped = {f.position for f in faults if f.kind == CLIPPABLE} if policy == "clip" else set()
    bad_images = {f.position for f in faults if f.kind in {"bad-image", "duplicate-image-id"}}
    missing = {f.image_id for f in faults if f.kind == "missing-file"}
    bad_annotations = {
        f.position
        for f in faults
        if f.kind not in {"bad-image", "duplicate-image-id", "missing-file"} and not (f.kind == CLIPPABLE and clipped)
    }
    images = [e for i, e in enumerate(data["images"]) if i not in bad_images and e["id"] not in missing]
    sizes = {e["id"]: (e["width"], e["height"]) for e in images}
    annotations = []
    for position, annotation in enumerate(data["annotations"]):
        if position in bad_annotations or annotation.get("image_id") not in sizes:
            continue
        inside = position in clipped
        annotations.append(_clip(annotation, sizes[annotation["image_id"]]) if inside else annotation)
    kept = {**data, "images": images, "annotations": annotations}
    return kept, count_kinds(faults)


def _clip(annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    x, y, w, h = annotation["bbox"]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + w, size[0]), min(y + h, size[1])
    return {**annotation, "bbox": [left, top, right - left, bottom - top]}


def count_kinds(faults: list[Fault]) -> dict[str, int]:
    """Number of faults of each kind, most frequent first."""
    return dict(Counter(fault.kind for fault in faults).most_common())


def only_boxes(annotations: int, without_segmentation: int) -> bool:
    """Whether annotations are made for boxes: all or nearly all of them have no segmentation."""
    return annotations > 0 and without_segmentation >= _BOXES_ONLY * annotations


def fault_table(faults: list[Fault]) -> str:
    """Faults by kind, with their number, and the first of them in full."""
    counts = count_kinds(faults)
    lines = [f"  {kind}: {number}" for kind, number in counts.items()]
    lines += [f"  {fault}" for fault in faults[:_SHOWN]]
    if len(faults) > _SHOWN:
        lines.append(f"  … and {len(faults) - _SHOWN} more (`effvit check-data` lists all of them)")
    return "\n".join(lines)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
