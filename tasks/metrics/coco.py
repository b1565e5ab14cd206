"""COCO average precision over a whole data set, on one process or on many."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from effvit.errors import ConfigError, DatasetError, close_matches
from effvit.tasks.metrics import _backends

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_IOU_TYPES = ("bbox", "segm")


@dataclass(frozen=True)
class CocoResult:
    """What an evaluation found.

    Attributes:
        metrics: For each IoU type (``bbox`` for boxes, ``segm`` for masks) the twelve numbers of a COCO table:
            ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl`` (small, medium, large), ``AR1``, ``AR10``, ``AR100``,
            ``ARs``, ``ARm``, ``ARl``, each in [0, 1]. As in pycocotools, -1 stands where the ground truth has no
            object that could define the number.
        per_class: For each IoU type the AP by category id, -1 for a category without objects. Empty unless asked for.
    """

    metrics: dict[str, dict[str, float]]
    per_class: dict[str, dict[int, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _ImageDetections:
    """Detections of one image in the form in which they are kept and exchanged.

    Attributes:
        boxes: ``(N, 4)`` float64 (x, y, width, height) in pixels of the original image.
        scores: ``(N,)`` float64.
        category_ids: ``(N,)`` int64.
        size: Height and width of the image, where there are masks.
        counts: Run lengths of the masks, or nothing. A dictionary for each would be twice as large as what it holds.
    """

    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]
    category_ids: NDArray[np.int64]
    size: list[int] | None
    counts: list[bytes | str] | None

    def rles(self) -> list[dict[str, Any]]:
        """The masks as COCO writes them."""
        return [{"size": self.size, "counts": counts} for counts in self.counts or ()]


class CocoEvaluator:
    """Collects detections image by image, then computes COCO AP over all images that were seen.

    The numbers are pycocotools' to the last digit with either backend: crowd regions, area ranges and the 100
    detections that count for an image included. Only images that were seen are evaluated, so that a limited
    validation is judged on its own images. An image seen twice (a distributed sampler repeats some to fill the last
    batch) counts once.

    In a distributed run every process calls `compute`, with or without images of its own; detections are gathered in
    the order of the ranks, the first process evaluates, and all return its result or raise its error.

    Args:
        iou_types: ``bbox`` for boxes, ``segm`` for masks, or both.
        backend: ``hotcoco``, or ``pycocotools``, the slower reference.

    Raises:
        ConfigError: An unknown backend or IoU type.
    """

    def __init__(self, iou_types: Sequence[str] = ("bbox",), backend: str = "hotcoco") -> None:
        _backends.check_backend(backend)
        unknown = [name for name in iou_types if name not in _IOU_TYPES]
        if unknown:
            raise ConfigError(f"there is no IoU type {unknown[0]!r}. {close_matches(unknown[0], _IOU_TYPES)}")
        self.iou_types = tuple(iou_types)
        self.backend = backend
        self._seen: dict[int, _ImageDetections] = {}

    def reset(self) -> None:
        """Forgets all images."""
        self._seen = {}

    def update(self, image_ids: Sequence[int], detections: Sequence[Mapping[str, Any]]) -> None:
        """Adds the detections of some images.

        Args:
            image_ids: COCO image ids.
            detections: One for each image, N may be 0: ``boxes`` ``(N, 4)`` as (x1, y1, x2, y2) in pixels of the
                original image, ``scores`` ``(N,)``, ``category_ids`` ``(N,)`` (the data set's ids, not labels), and
                for ``segm`` also ``rles``, a list of N compressed COCO masks.

        Raises:
            ValueError: The lengths do not agree, or masks are needed and missing.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            if int(image_id) not in self._seen:
                self._seen[int(image_id)] = self._convert(int(image_id), found)

    def _convert(self, image_id: int, found: Mapping[str, Any]) -> _ImageDetections:
        boxes = _to_numpy(found["boxes"], np.float64).reshape(-1, 4)
        boxes[:, 2:] -= boxes[:, :2]
        rles = found.get("rles")
        if rles is None and "segm" in self.iou_types:
            raise ValueError(f"detections of image id {image_id} need 'rles' for the IoU type 'segm'")
        image = _ImageDetections(
            boxes,
            _to_numpy(found["scores"], np.float64),
            _to_numpy(found["category_ids"], np.int64),
            next((list(rle["size"]) for rle in rles or ()), None),
            None if rles is None else [rle["counts"] for rle in rles],
        )
        masks = boxes if image.counts is None else image.counts
        lengths = {len(part) for part in (boxes, image.scores, image.category_ids, masks)}
        if len(lengths) != 1:
            raise ValueError(f"detections of image id {image_id} differ in length: {sorted(lengths)}")
        if any(list(rle["size"]) != image.size for rle in rles or ()):
            raise ValueError(f"masks of image id {image_id} differ in size: all need that of the original image")
        return image

    def results(self) -> list[dict[str, Any]]:
        """Detections of this process as the entries of a COCO results JSON.

        Returns:
            Entries with ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``, and ``segmentation``
            where masks were given, in the order in which the images were seen.
        """
        entries = []
        for image_id, image in self._seen.items():
            rows = zip(image.boxes.tolist(), image.scores.tolist(), image.category_ids.tolist(), strict=True)
            rles = image.rles()
            for number, (box, score, category_id) in enumerate(rows):
                entry: dict[str, Any] = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
                if rles:
                    entry["segmentation"] = _json_rle(rles[number])
                entries.append(entry)
        return entries

    def compute(self, ground_truth: Mapping[str, Any], *, per_class: bool = False) -> CocoResult:
        """Evaluates everything seen since the last `reset`, by all processes together.

        Args:
            ground_truth: COCO data set of the split (``images``, ``annotations``, ``categories``); it is not changed.
            per_class: Also return the AP of each category.

        Returns:
            The same result on every process.

        Raises:
            DatasetError: The ground truth lacks an image or a category that was predicted, or masks.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self._evaluate(self._seen, ground_truth, per_class)
        gathered: list[dict[int, _ImageDetections]] = [{}] * dist.get_world_size()
        dist.all_gather_object(gathered, self._seen)
        outcome: list[Any] = [None]
        if dist.get_rank() == 0:
            outcome = [self._evaluate_or_explain(gathered, ground_truth, per_class)]
        # The error travels too: processes that were left waiting for a result would hang.
        dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        result: CocoResult = outcome[0]
        return result

    def _evaluate_or_explain(
        self, gathered: list[dict[int, _ImageDetections]], ground_truth: Mapping[str, Any], per_class: bool
    ) -> CocoResult | Exception:
        merged: dict[int, _ImageDetections] = {}
        for seen in gathered:
            merged = seen | merged  # the lowest rank that saw an image speaks for it
        try:
            return self._evaluate(merged, ground_truth, per_class)
        except Exception as error:  # noqa: BLE001 - raised again on every process
            return error

    def _evaluate(
        self, seen: Mapping[int, _ImageDetections], ground_truth: Mapping[str, Any], per_class: bool
    ) -> CocoResult:
        image_ids = sorted(seen)
        images = [seen[image_id] for image_id in image_ids]
        category_ids = sorted(entry["id"] for entry in ground_truth["categories"])
        _check_categories(image_ids, images, category_ids)
        result = CocoResult({})
        for iou_type in self.iou_types:
            truth = _backends.select_ground_truth(ground_truth, image_ids, iou_type)
            found = _box_rows(image_ids, images) if iou_type == "bbox" else _mask_entries(image_ids, images)
            precision, recall = _backends.evaluate(self.backend, truth, found, iou_type)
            result.metrics[iou_type] = _backends.summarize(precision, recall)
            if per_class:
                by_class = _backends.class_precision(precision)
                result.per_class[iou_type] = dict(zip(category_ids, by_class, strict=True))
        return result


def _check_categories(image_ids: list[int], images: list[_ImageDetections], category_ids: list[int]) -> None:
    for image_id, image in zip(image_ids, images, strict=True):
        unknown = set(image.category_ids.tolist()).difference(category_ids)
        if unknown:
            raise DatasetError(
                f"image id {image_id} has a detection of category id {min(unknown)}, which the ground truth does not "
                f"declare; declared ids: {category_ids}. Detections must carry category ids, not labels"
            )


def _box_rows(image_ids: list[int], images: list[_ImageDetections]) -> NDArray[np.float64]:
    """Rows (image id, x, y, width, height, score, category id) of all detections."""
    rows = [np.zeros((0, 7))]
    for image_id, image in zip(image_ids, images, strict=True):
        ids = np.full(len(image.boxes), image_id, dtype=np.float64)
        rows.append(np.column_stack([ids, image.boxes, image.scores, image.category_ids]))
    return np.concatenate(rows)


def _mask_entries(image_ids: list[int], images: list[_ImageDetections]) -> list[dict[str, Any]]:
    """Result entries without boxes, so that area ranges judge the masks' own areas."""
    return [
        {"image_id": image_id, "category_id": category_id, "segmentation": rle, "score": score}
        for image_id, image in zip(image_ids, images, strict=True)
        for category_id, rle, score in zip(
            image.category_ids.tolist(), image.rles(), image.scores.tolist(), strict=True
        )
    ]


def _json_rle(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _to_numpy(values: Tensor | Sequence[float], dtype: Any) -> NDArray[Any]:
    """A new array; through float32 for the types that numpy does not know."""
    tensor = torch.as_tensor(values).detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return np.array(tensor.numpy(), dtype=dtype)
