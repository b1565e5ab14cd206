"""The check of a data set: everything that is in it, and every fault, in one report."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effvit.categories import Categories
from effvit.datamodules._checks import NO_SEGMENTATION, Fault, count_kinds, find_faults, only_boxes, read_coco
from effvit.datamodules._decode import SizeMismatchError, read_image
from effvit.errors import DatasetError

__all__ = ["DatasetReport", "Fault", "inspect_coco"]

# COCO's area ranges, in square pixels (pycocotools, `Params.areaRng`).
_SMALL, _MEDIUM = 32**2, 96**2


@dataclass(frozen=True)
class DatasetReport:
    """What a data set holds, and what is wrong with it.

    Attributes:
        annotations: The JSON.
        images_folder: The image folder.
        num_images: Images in the JSON.
        num_objects: Annotations that are no crowd regions.
        num_crowd: Crowd regions.
        num_empty: Images without any annotation.
        class_counts: Objects of each class by name, in the order of the category ids.
        box_sizes: Objects that COCO counts as "small" (area below 32²), "medium" and "large" (from 96²), by box area.
        image_sizes: Smallest and largest (width, height) by area; None without a sound image entry.
        faults: Every fault, in the order images, annotations, files.
        num_masks: Annotations with a segmentation, crowd regions included.
        decoded: Whether the image files were opened.
    """

    annotations: Path
    images_folder: Path
    num_images: int
    num_objects: int
    num_crowd: int
    num_empty: int
    class_counts: dict[str, int]
    box_sizes: dict[str, int]
    image_sizes: tuple[tuple[int, int], tuple[int, int]] | None
    faults: list[Fault] = field(default_factory=list)
    decoded: bool = True
    num_masks: int = 0

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def faults_by_image(self) -> dict[int | None, list[Fault]]:
        """Faults of each image id; those without a known image under None, last."""
        grouped: dict[int | None, list[Fault]] = defaultdict(list)
        for fault in self.faults:
            grouped[fault.image_id].append(fault)
        return dict(sorted(grouped.items(), key=lambda item: (item[0] is None, item[0] or 0)))

    def __str__(self) -> str:
        """The report as text."""
        return "\n".join([*self._summary(), *self._classes(), *self._fault_lines()])

    def _summary(self) -> list[str]:
        lines = [
            f"annotations  {self.annotations}",
            f"images       {self.images_folder}",
            (
                f"{self.num_images} images ({self.num_empty} without objects), {self.num_objects} objects, "
                f"{self.num_crowd} crowd regions, {len(self.class_counts)} classes"
            ),
            "box sizes    " + ", ".join(f"{name} {number}" for name, number in self.box_sizes.items()),
            f"masks        {self._masks()}",
        ]
        if self.image_sizes is not None:
            (w0, h0), (w1, h1) = self.image_sizes
            lines.append(f"image sizes  {w0}x{h0} to {w1}x{h1}")
        return lines

    def _masks(self) -> str:
        annotations = self.num_objects + self.num_crowd
        if self.num_masks == annotations:
            return "every annotation has a segmentation"
        missing = annotations - self.num_masks
        text = f"{missing} of {annotations} annotations have no segmentation: enough for a detector of boxes; "
        if only_boxes(annotations, missing):
            return text + "masks cannot be learnt from them"
        return text + "mask_rcnn stops at them (--data.faults skip leaves them out)"

    def _classes(self) -> list[str]:
        width = max((len(name) for name in self.class_counts), default=0)
        return ["objects by class", *(f"  {name:<{width}}  {n}" for name, n in self.class_counts.items())]

    def _fault_lines(self) -> list[str]:
        lines = [summarise_faults(self.faults, decoded=self.decoded)]
        for image_id, faults in self.faults_by_image().items():
            lines.append(f"  image {image_id}" if image_id is not None else "  no image")
            lines += [f"    {fault}" for fault in faults]
        return lines


def summarise_faults(faults: list[Fault], *, decoded: bool) -> str:
    """The line above the faults of a report: how many there are of each kind.

    Args:
        faults: The faults.
        decoded: Whether the image files were opened.
    """
    scope = "" if decoded else " (image files were not opened)"
    if not faults:
        return f"no faults{scope}"
    kinds = count_kinds(faults).items()
    number = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return f"{number}{scope}: " + ", ".join(f"{kind} {number}" for kind, number in kinds)


def inspect_coco(json_path: str | Path, image_dir: str | Path, decode_images: bool = True) -> DatasetReport:
    """Checks a data set in COCO format, and counts what is in it.

    Args:
        json_path: The annotations.
        image_dir: The folder that file names are relative to.
        decode_images: Open every image file too, and compare its size with the JSON.

    Returns:
        The report, with every fault.

    Raises:
        DatasetError: The JSON cannot be read at all, or is not COCO format.
    """
    path, folder = Path(json_path), Path(image_dir)
    data = read_coco(path)
    if not folder.is_dir():
        raise DatasetError(f"there is no image folder {folder}")
    categories = Categories.from_coco(data["categories"])
    faults = [fault for fault in find_faults(data, folder) if fault.kind != NO_SEGMENTATION]
    if decode_images:
        faults += _file_faults(data["images"], folder, {fault.image_id for fault in faults if fault.kind in _NO_FILE})
    annotated = {
        annotation.get("image_id") for annotation in data["annotations"] if _hashable(annotation.get("image_id"))
    }
    objects = [annotation for annotation in data["annotations"] if not annotation.get("iscrowd")]
    return DatasetReport(
        annotations=path,
        images_folder=folder,
        num_images=len(data["images"]),
        num_objects=len(objects),
        num_crowd=len(data["annotations"]) - len(objects),
        num_empty=sum(entry.get("id") not in annotated for entry in data["images"] if _hashable(entry.get("id"))),
        class_counts=_count_classes(objects, categories),
        box_sizes=_count_sizes(data["annotations"], faults),
        image_sizes=_image_sizes(data["images"]),
        faults=faults,
        decoded=decode_images,
        num_masks=sum(bool(annotation.get("segmentation")) for annotation in data["annotations"]),
    )


# An image with one of these has no file to open, or no size to compare.
_NO_FILE = {"missing-file", "bad-image"}


def _file_faults(entries: list[dict[str, Any]], folder: Path, known: set[int | None]) -> list[Fault]:
    faults = []
    for entry in entries:
        image_id, name = entry.get("id"), entry.get("file_name")
        if not isinstance(image_id, int) or not isinstance(name, str) or image_id in known:
            continue
        try:
            read_image(folder / name, size=(entry["height"], entry["width"]))
        except DatasetError as error:
            kind = "wrong-size" if isinstance(error, SizeMismatchError) else "unreadable-file"
            faults.append(Fault(kind, str(error), image_id=image_id, file=name))
        except KeyError:  # a second entry of an id that lacks width or height
            continue
    return faults


def _count_classes(objects: list[dict[str, Any]], categories: Categories) -> dict[str, int]:
    counts = Counter(a["category_id"] for a in objects if _hashable(a.get("category_id")))
    return {name: counts[category_id] for category_id, name in zip(categories.ids, categories.names, strict=True)}


def _count_sizes(annotations: list[dict[str, Any]], faults: list[Fault]) -> dict[str, int]:
    # By position, as a faulty annotation may have no usable id.
    unusable = {fault.position for fault in faults if fault.kind in {"bad-box", "not-finite", "no-area"}}
    counts = {"small": 0, "medium": 0, "large": 0}
    for position, annotation in enumerate(annotations):
        if annotation.get("iscrowd") or position in unusable:
            continue
        area = annotation["bbox"][2] * annotation["bbox"][3]
        counts["small" if area < _SMALL else "medium" if area < _MEDIUM else "large"] += 1
    return counts


def _image_sizes(entries: list[dict[str, Any]]) -> tuple[tuple[int, int], tuple[int, int]] | None:
    sizes = [(entry["width"], entry["height"]) for entry in entries if _has_size(entry)]
    if not sizes:
        return None
    return min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])


def _has_size(entry: dict[str, Any]) -> bool:
    return all(isinstance(entry.get(key), int) and entry[key] > 0 for key in ("width", "height"))


def _hashable(value: object) -> bool:
    return isinstance(value, int | str)
