"""Annotations as a few shared tensors: worker processes read them, and copy nothing.

A list of dictionaries is copied into every worker, one reference count at a time; for COCO that is gigabytes
(mmdetection#11318). Columns in shared memory are mapped, whether workers are forked or spawned.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pycocotools import mask as mask_api

if TYPE_CHECKING:
    from effvit.categories import Categories

# MMDetection's `CocoDataset` leaves out boxes thinner than one pixel.
_MIN_SIDE = 1.0


@dataclass(frozen=True)
class Record:
    """One image with its objects; crowd regions are left out.

    Attributes:
        image_id: COCO image id.
        file_name: Relative to the image folder.
        size: Height and width of the image in pixels.
        boxes: float32 ``(N, 4)``, XYXY in pixels of the file.
        labels: int64 ``(N,)``, contiguous.
        masks: uint8 ``(N, H, W)`` of 0 and 1 at the file's size, or None where segmentations are not stored.
    """

    image_id: int
    file_name: str
    size: tuple[int, int]
    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None


class AnnotationTable:
    """The images of one split and their objects, column by column, in shared memory.

    Args:
        data: A COCO dictionary without faults.
        categories: Mapping to labels.
        masks: Store the segmentations.
        keep_empty: Keep images that have no annotation at all.
    """

    def __init__(self, data: dict[str, Any], categories: Categories, *, masks: bool, keep_empty: bool) -> None:
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in data["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        images = [image for image in data["images"] if keep_empty or image["id"] in by_image]
        objects = [[a for a in by_image.get(image["id"], ()) if _is_target(a)] for image in images]
        flat = [annotation for group in objects for annotation in group]

        self.image_ids = _shared([image["id"] for image in images], torch.int64)
        self.sizes = _shared([[image["height"], image["width"]] for image in images], torch.int32).reshape(-1, 2)
        self._names, self._name_ends = _blob([image["file_name"].encode() for image in images])
        self._ends = _shared(np.cumsum([len(group) for group in objects]).tolist(), torch.int64)
        boxes = np.array([annotation["bbox"] for annotation in flat], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        self._boxes = _share(torch.from_numpy(boxes.astype(np.float32)))
        self._labels = _shared([categories.label_of(annotation["category_id"]) for annotation in flat], torch.int32)
        self._segments: tuple[torch.Tensor, torch.Tensor] | None = None
        if masks:
            self._segments = _blob([json.dumps(_segmentation(a), separators=(",", ":")).encode() for a in flat])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        """One image and its objects."""
        height, width = self.sizes[index].tolist()
        begin, end = _span(self._ends, index)
        return Record(
            image_id=int(self.image_ids[index]),
            file_name=_slice(self._names, self._name_ends, index).decode(),
            size=(height, width),
            boxes=self._boxes[begin:end].clone(),
            labels=self._labels[begin:end].long(),
            masks=self._masks(begin, end, height, width),
        )

    @property
    def is_wide(self) -> torch.Tensor:
        """Which images are wider than tall, bool ``(N,)``, by the annotated size."""
        return self.sizes[:, 1] >= self.sizes[:, 0]

    def _masks(self, begin: int, end: int, height: int, width: int) -> torch.Tensor | None:
        if self._segments is None:
            return None
        out = torch.zeros((end - begin, height, width), dtype=torch.uint8)
        for row, position in enumerate(range(begin, end)):
            segmentation = json.loads(_slice(*self._segments, position))
            out[row] = torch.from_numpy(decode_segmentation(segmentation, height, width))
        return out


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A COCO segmentation as a mask, by pycocotools.

    Args:
        segmentation: Polygons, or run lengths as list or as string; empty for no mask.
        height: Height of the image in pixels.
        width: Width of the image in pixels.

    Returns:
        uint8 ``(H, W)`` of 0 and 1.
    """
    if not segmentation:
        return np.zeros((height, width), dtype=np.uint8)
    if isinstance(segmentation, list):
        rle = mask_api.merge(mask_api.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = mask_api.frPyObjects(segmentation, height, width)
    else:
        rle = {"size": segmentation["size"], "counts": segmentation["counts"].encode()}
    decoded: np.ndarray[Any, np.dtype[np.uint8]] = mask_api.decode(rle)
    return decoded


def _is_target(annotation: dict[str, Any]) -> bool:
    w, h = annotation["bbox"][2:]
    return not annotation.get("iscrowd") and w >= _MIN_SIDE and h >= _MIN_SIDE


def _segmentation(annotation: dict[str, Any]) -> Any:
    """The segmentation, or the box as a polygon where a data set has boxes only."""
    if annotation.get("segmentation"):
        return annotation["segmentation"]
    x, y, w, h = annotation["bbox"]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _shared(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
    return _share(torch.tensor(values, dtype=dtype))


def _share(tensor: torch.Tensor) -> torch.Tensor:
    tensor.share_memory_()  # type: ignore[no-untyped-call]
    return tensor


def _blob(pieces: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """Byte strings in one tensor, and where each ends."""
    data = _share(torch.from_numpy(np.frombuffer(b"".join(pieces), dtype=np.uint8).copy()))
    return data, _shared(np.cumsum([len(piece) for piece in pieces]).tolist(), torch.int64)


def _span(ends: torch.Tensor, index: int) -> tuple[int, int]:
    return (int(ends[index - 1]) if index else 0), int(ends[index])


def _slice(data: torch.Tensor, ends: torch.Tensor, index: int) -> bytes:
    begin, end = _span(ends, index)
    return data[begin:end].numpy().tobytes()
