"""COCO evaluation by hotcoco or by pycocotools, on the same plain data and with the same digits."""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from effvit.errors import ConfigError, DatasetError, close_matches

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

#: Where each backend keeps the classes that pycocotools named ``COCO`` and ``COCOeval``.
_MODULES = {
    "hotcoco": ("hotcoco", "hotcoco"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval"),
}

_ALL, _SMALL, _MEDIUM, _LARGE = range(4)  # positions of the area ranges in a COCO evaluation
_MAX_DETECTIONS = (1, 10, 100)


def check_backend(name: str) -> None:
    """Makes sure that a backend exists.

    Raises:
        ConfigError: It does not.
    """
    if name not in _MODULES:
        raise ConfigError(f"there is no COCO evaluation backend {name!r}. {close_matches(name, _MODULES)}")


def select_ground_truth(ground_truth: Mapping[str, Any], image_ids: Sequence[int], iou_type: str) -> dict[str, Any]:
    """The part of a COCO data set that an evaluation looks at, as new dictionaries.

    Annotations are numbered from 1 again: pycocotools takes the id 0, with which many exporters start, for "unmatched"
    and would count that object as missed and its detection as false.

    Args:
        ground_truth: Data set with ``images``, ``annotations`` and ``categories``. ``area`` may be missing (the box's
            area stands in) and so may ``iscrowd`` (0).
        image_ids: Images to keep.
        iou_type: ``bbox``, or ``segm``, which keeps the masks.

    Raises:
        DatasetError: An image is not in the data set, or an annotation lacks what the evaluation needs.
    """
    images = {image["id"]: image for image in ground_truth["images"]}
    unknown = [image_id for image_id in image_ids if image_id not in images]
    if unknown:
        raise DatasetError(
            f"{len(unknown)} evaluated images are not in the ground truth, first image id {unknown[0]!r}; "
            "evaluate against the annotations of the split that was predicted"
        )
    if "annotations" not in ground_truth:
        raise DatasetError(
            "the ground truth has no 'annotations'; a split without them can be predicted, not evaluated"
        )
    kept = set(image_ids)
    annotations: list[dict[str, Any]] = []
    for annotation in ground_truth["annotations"]:
        if annotation["image_id"] in kept:
            annotations.append(_annotation(annotation, len(annotations) + 1, iou_type))
    return {
        "images": [_image(images[image_id], iou_type) for image_id in sorted(kept)],
        "annotations": annotations,
        "categories": [{"id": entry["id"], "name": entry["name"]} for entry in ground_truth["categories"]],
    }


def _image(image: Mapping[str, Any], iou_type: str) -> dict[str, Any]:
    missing = [key for key in ("height", "width") if image.get(key) is None]
    if missing and iou_type == "segm":
        raise DatasetError(f"image id {image['id']} has no {missing[0]!r}, without which its masks cannot be drawn")
    return {"id": image["id"], "height": image.get("height") or 0, "width": image.get("width") or 0}


def _annotation(annotation: Mapping[str, Any], number: int, iou_type: str) -> dict[str, Any]:
    box = [float(side) for side in annotation["bbox"]]
    area = annotation.get("area")
    kept = {
        "id": number,
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "area": box[2] * box[3] if area is None else area,
        "iscrowd": int(annotation.get("iscrowd") or 0),
    }
    if iou_type == "segm":
        if not annotation.get("segmentation"):
            raise DatasetError(
                f"annotation id {annotation.get('id')} of image id {annotation['image_id']} has no 'segmentation': "
                "mask AP needs one on every annotation; evaluate boxes only (iou type 'bbox')"
            )
        kept["segmentation"] = annotation["segmentation"]
    return kept


def evaluate(
    backend: str, ground_truth: dict[str, Any], results: NDArray[np.float64] | list[dict[str, Any]], iou_type: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Runs the COCO protocol.

    Args:
        backend: ``hotcoco`` or ``pycocotools``.
        ground_truth: As `select_ground_truth` gives it. The backend may write into it.
        results: Boxes as rows (image id, x, y, width, height, score, category id), or masks as COCO result entries.
        iou_type: ``bbox`` or ``segm``.

    Returns:
        Precision ``(10 IoU thresholds, 101 recalls, categories, 4 area ranges, 3 detection limits)`` and recall, the
        same without the second axis. -1 marks what is not defined for lack of ground truth.
    """
    load, judge = (importlib.import_module(module) for module in _MODULES[backend])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress there
        truth = _dataset(load.COCO, ground_truth)
        # pycocotools looks at the first result to see what kind it is, so there has to be one.
        found = truth.loadRes(results) if len(results) else _dataset(load.COCO, {**ground_truth, "annotations": []})
        run = judge.COCOeval(truth, found, iou_type)
        run.evaluate()
        run.accumulate()
    return np.asarray(run.eval["precision"]), np.asarray(run.eval["recall"])


def _dataset(coco: Any, content: dict[str, Any]) -> Any:
    """A backend's ``COCO`` object around data in memory, which pycocotools takes by attribute only."""
    loaded = coco()
    loaded.dataset = content
    loaded.createIndex()
    return loaded


def summarize(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> dict[str, float]:
    """The twelve numbers of a COCO table, computed as pycocotools' ``summarize`` does.

    Args:
        precision: As `evaluate` returns it.
        recall: The same.

    Returns:
        ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm``, ``APl``, ``AR1``, ``AR10``, ``AR100``, ``ARs``, ``ARm`` and
        ``ARl`` in [0, 1], or -1 where no object defines them.
    """
    thresholds = np.linspace(0.5, 0.95, 10)
    ap = precision[..., -1]
    ar = recall[..., -1]
    return {
        "AP": _mean(ap[..., _ALL]),
        "AP50": _mean(ap[thresholds == 0.5][..., _ALL]),
        "AP75": _mean(ap[thresholds == 0.75][..., _ALL]),
        "APs": _mean(ap[..., _SMALL]),
        "APm": _mean(ap[..., _MEDIUM]),
        "APl": _mean(ap[..., _LARGE]),
        **{f"AR{limit}": _mean(recall[..., _ALL, i]) for i, limit in enumerate(_MAX_DETECTIONS)},
        "ARs": _mean(ar[..., _SMALL]),
        "ARm": _mean(ar[..., _MEDIUM]),
        "ARl": _mean(ar[..., _LARGE]),
    }


def class_precision(precision: NDArray[np.float64]) -> list[float]:
    """AP of each category, in ascending order of category id; -1 for a category without objects.

    Args:
        precision: As `evaluate` returns it.
    """
    return [_mean(precision[:, :, category, _ALL, -1]) for category in range(precision.shape[2])]


def _mean(values: NDArray[np.float64]) -> float:
    defined = values[values > -1]
    return float(np.mean(defined)) if len(defined) else -1.0
