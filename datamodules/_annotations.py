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

Mask = np.ndarray[Any, np.dtype[np.uint8]]

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
            self._segments = _blob([json.dumps(a["segmentation"], separators=(",", ":")).encode() for a in flat])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        """One image and its objects."""
        height, width = self.sizes[index].tolist()
        begin, end = _span(self._ends, index)
        return Record(
            image_id=int(self.image_ids[index]),
            file_name=self.file_name(index),
            size=(height, width),
            boxes=self._boxes[begin:end].clone(),
            labels=self._labels[begin:end].long(),
            masks=self._masks(begin, end, height, width),
        )

    def file_name(self, index: int) -> str:
        """Name of one image's file; unlike a record it costs no decoding of masks."""
        return _slice(self._names, self._name_ends, index).decode()

    @property
    def is_wide(self) -> torch.Tensor:
        """Which images are wider than tall, bool ``(N,)``, by the annotated size."""
        return self.sizes[:, 1] >= self.sizes[:, 0]

    def _masks(self, begin: int, end: int, height: int, width: int) -> torch.Tensor | None:
        if self._segments is None:
            return None
        masks = np.zeros((end - begin, height, width), dtype=np.uint8)
        for mask, position in zip(masks, range(begin, end), strict=True):
            paint_segmentation(mask, json.loads(_slice(*self._segments, position)))
        return torch.from_numpy(masks)


def paint_segmentation(mask: Mask, segmentation: Any) -> None:
    """Fills a COCO segmentation into an empty mask, with the pixels that pycocotools gives.

    Args:
        mask: uint8 ``(H, W)`` of 0; receives 1 inside.
        segmentation: Polygons, or run lengths as list or as string.
    """
    height, width = mask.shape
    if isinstance(segmentation, list):
        # Decoding costs as much as there are pixels, so it ends below and to the right of the polygons. Moving them to
        # the corner as well would save more, but shift how pycocotools rounds their edges.
        corners = np.concatenate([np.asarray(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
        right, bottom = np.clip(np.ceil(corners.max(0)) + 2, 1, (width, height)).astype(int).tolist()
        left, top = np.clip(np.floor(corners.min(0)) - 1, 0, (right - 1, bottom - 1)).astype(int).tolist()
        part = mask_api.decode(mask_api.merge(mask_api.frPyObjects(segmentation, bottom, right)))
        mask[top:bottom, left:right] = part[top:, left:]
    elif isinstance(segmentation["counts"], list):
        mask[:] = mask_api.decode(mask_api.frPyObjects(segmentation, height, width))
    else:
        mask[:] = mask_api.decode({"size": segmentation["size"], "counts": segmentation["counts"].encode()})


def _is_target(annotation: dict[str, Any]) -> bool:
    w, h = annotation["bbox"][2:]
    return not annotation.get("iscrowd") and w >= _MIN_SIDE and h >= _MIN_SIDE


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
