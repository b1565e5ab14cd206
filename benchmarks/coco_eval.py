"""COCO AP by our evaluator against pycocotools, digits compared first: ``python benchmarks/coco_eval.py --help``."""

from __future__ import annotations

import argparse
import contextlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _ruler import measure, to_markdown
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effvit.tasks.metrics.coco import CocoEvaluator

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

SIDE = 640
NUM_CLASSES = 80
CROWD_SHARE = 0.01
PEER, OURS, REFERENCE = "pycocotools", "effvit (hotcoco)", "effvit (pycocotools)"


def make_boxes(random: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Corners ``(count, 4)`` of boxes of 6 to 300 pixels, most of them small."""
    sides = np.exp(random.uniform(np.log(6), np.log(300), (count, 2)))
    corners = random.uniform(0, SIDE - sides)
    return np.concatenate([corners, corners + sides], axis=1)


def outline(box: NDArray[np.float64]) -> list[list[float]]:
    """A pentagon inside a box, as a COCO polygon."""
    x1, y1, x2, y2 = box.tolist()
    return [[x1, y1, x2, y1, x2, y2, x1 + 0.4 * (x2 - x1), y2, x1, y1 + 0.6 * (y2 - y1)]]


def make_ground_truth(random: np.random.Generator, num_images: int, per_image: int) -> dict[str, Any]:
    """A COCO data set; crowds, one in a hundred, are run-length masks."""
    annotations = []
    for image_id in range(1, num_images + 1):
        for box in make_boxes(random, per_image):
            crowd = random.random() < CROWD_SHARE
            mask: Any = outline(box)
            if crowd:
                mask = mask_utils.merge(mask_utils.frPyObjects(mask, SIDE, SIDE))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(random.integers(1, NUM_CLASSES + 1)),
                    "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
                    "area": float(0.8 * np.prod(box[2:] - box[:2])),
                    "iscrowd": int(crowd),
                    "segmentation": mask,
                }
            )
    return {
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)],
    }


def make_detections(random: np.random.Generator, ground_truth: dict[str, Any], per_image: int) -> list[dict[str, Any]]:
    """Detections of each image: every object found twice, displaced, and random boxes besides."""
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    detections = []
    for own in objects.values():
        boxes = np.array([annotation["bbox"] for annotation in own] * 2)
        boxes[:, 2:] += boxes[:, :2]
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + random.normal(0, 0.08, boxes.shape) * sides
        noise = make_boxes(random, per_image - len(boxes))
        boxes = np.clip(np.concatenate([boxes, noise]), 0, SIDE).astype(np.float32)
        labels = [annotation["category_id"] for annotation in own] * 2
        labels += random.integers(1, NUM_CLASSES + 1, len(noise)).tolist()
        outlines = [outline(box.astype(np.float64)) for box in boxes]
        detections.append(
            {
                "boxes": torch.from_numpy(boxes),
                "scores": torch.from_numpy(random.uniform(0.05, 1, len(boxes)).astype(np.float32)),
                "category_ids": torch.tensor(labels),
                "rles": [mask_utils.merge(mask_utils.frPyObjects(polygon, SIDE, SIDE)) for polygon in outlines],
            }
        )
    return detections


def peer(ground_truth: dict[str, Any], entries: list[dict[str, Any]], iou_type: str) -> Callable[[], list[float]]:
    """The protocol by pycocotools alone, from data in memory to the twelve numbers."""
    unused = "segmentation" if iou_type == "bbox" else "bbox"
    entries = [{key: value for key, value in entry.items() if key != unused} for entry in entries]

    def run() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            # pycocotools writes into what it is given.
            truth.dataset = {**ground_truth, "annotations": [dict(entry) for entry in ground_truth["annotations"]]}
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes([dict(entry) for entry in entries]), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        numbers: list[float] = evaluation.stats.tolist()
        return numbers

    return run


def ours(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], iou_type: str, backend: str
) -> Callable[[], list[float]]:
    """The same by our evaluator, with the conversion of the tensors that arrive image by image."""
    image_ids = [image["id"] for image in ground_truth["images"]]

    def run() -> list[float]:
        evaluator = CocoEvaluator((iou_type,), backend)
        evaluator.update(image_ids, detections)
        return list(evaluator.compute(ground_truth).metrics[iou_type].values())

    return run


def main() -> None:
    """Compares digits, then times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--objects", type=int, default=10, help="objects of one image")
    parser.add_argument("--detections", type=int, default=50, help="detections of one image")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    truth = make_ground_truth(random, options.images, options.objects)
    detections = make_detections(random, truth, options.detections)
    collector = CocoEvaluator(("segm",))
    collector.update([image["id"] for image in truth["images"]], detections)
    measurements = []
    for iou_type, title in (("bbox", "boxes"), ("segm", "masks")):
        variants = {
            PEER: peer(truth, collector.results(), iou_type),
            OURS: ours(truth, detections, iou_type, "hotcoco"),
            REFERENCE: ours(truth, detections, iou_type, "pycocotools"),
        }
        numbers = {name: run() for name, run in variants.items()}
        if not numbers[PEER] == numbers[OURS] == numbers[REFERENCE]:
            raise SystemExit(f"{title}: the digits differ: {numbers}")
        print(f"{title}: all twelve numbers bitwise equal, AP {numbers[PEER][0]:.6f}", flush=True)
        del variants[REFERENCE]  # as slow as the peer: only its digits are of interest
        measurements.append(
            measure(title, variants, items=sum(len(found["boxes"]) for found in detections), rounds=options.rounds)
        )
        print(measurements[-1].to_json(), flush=True)
    print(to_markdown(measurements, unit="detections"))


if __name__ == "__main__":
    main()
