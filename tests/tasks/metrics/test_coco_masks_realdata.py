"""Mask AP on real annotations, made more awkward still, against pycocotools alone."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effvit.tasks.metrics.coco import CocoEvaluator

pytestmark = pytest.mark.realdata
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
EMPTY, CROWD_ONLY, CROWDED, TINY = 1, 2, 3, 4  # image ids that COCO does not use
SIDE = 200


def _rle(rows: slice, columns: slice) -> dict:
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[rows, columns] = 1
    return mask_api.encode(mask)


def _text(rle: dict) -> dict:
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _add(truth: dict, image_id: int, rle: dict, category_id: int, crowd: bool = False) -> None:
    annotation = {
        "id": max(entry["id"] for entry in truth["annotations"]) + 1,
        "image_id": image_id,
        "category_id": category_id,
        "bbox": mask_api.toBbox(rle).tolist(),
        "area": float(mask_api.area(rle)),
        "iscrowd": int(crowd),
        "segmentation": _text(rle),
    }
    truth["annotations"].append(annotation)


@pytest.fixture(scope="module")
def truth(real_data):
    """COCO's own images, one without objects, one with a crowd alone, one with 300 objects, one with single pixels."""
    path = real_data / "coco_tiny" / "annotations" / "instances_val2017.json"
    data = json.loads(path.read_text())
    data["images"] += [{"id": i, "height": SIDE, "width": SIDE} for i in (EMPTY, CROWD_ONLY, CROWDED, TINY)]
    person = data["categories"][0]["id"]
    _add(data, CROWD_ONLY, _rle(slice(20, 150), slice(10, 190)), person, crowd=True)
    for number in range(300):
        row, column = 10 * (number // 20), 10 * (number % 20)
        _add(data, CROWDED, _rle(slice(row, row + 8), slice(column, column + 6)), person)
    for number in range(5):
        _add(data, TINY, _rle(slice(40 * number, 40 * number + 1), slice(7, 8)), person)
    return data


@pytest.fixture(scope="module")
def predicted(truth):
    """Every object's mask moved, shrunk or grown a little, some twice, some of another class; false ones everywhere."""
    random = np.random.default_rng(0)
    loaded = COCO()
    loaded.dataset = copy.deepcopy(truth)
    with contextlib.redirect_stdout(io.StringIO()):
        loaded.createIndex()
    classes = [entry["id"] for entry in truth["categories"]]
    image_ids, found = [], []
    for image in truth["images"]:
        rles, ids = [], []
        for annotation in loaded.imgToAnns[image["id"]]:
            mask = loaded.annToMask(annotation)
            for _ in range(random.choice([0, 1, 1, 2])):
                shift = random.integers(-3, 4, 2) if image["id"] > TINY else random.integers(0, 2, 2)
                rles.append(mask_api.encode(np.asfortranarray(np.roll(mask, tuple(shift), (0, 1)))))
                ids.append(annotation["category_id"] if random.random() < 0.9 else int(random.choice(classes)))
        corner = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")
        corner[: image["height"] // 3, : image["width"] // 4] = 1
        rles.append(mask_api.encode(corner))
        ids.append(int(random.choice(classes)))
        boxes = torch.tensor(mask_api.toBbox(rles))
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor(random.integers(1, 40, len(rles)) / 40)  # many are equal
        image_ids.append(image["id"])
        found.append({"boxes": boxes, "scores": scores, "category_ids": torch.tensor(ids), "rles": rles})
    return image_ids, found


@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_masks_have_the_digits_of_pycocotools(truth, predicted, backend):
    image_ids, found = predicted
    evaluator = CocoEvaluator(("segm",), backend)
    evaluator.update(image_ids, found)
    result = evaluator.compute(truth).metrics["segm"]
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = copy.deepcopy(truth)
        reference.createIndex()
        entries = [{k: v for k, v in entry.items() if k != "bbox"} for entry in evaluator.results()]
        run = COCOeval(reference, reference.loadRes(entries), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert result == dict(zip(NAMES, run.stats.tolist(), strict=True))
    assert 0.2 < result["AP"] < 0.8


def test_a_crowd_alone_defines_no_number_and_costs_nothing(truth, predicted):
    at = predicted[0].index(CROWD_ONLY)
    evaluator = CocoEvaluator(("bbox", "segm"))
    evaluator.update([CROWD_ONLY], [predicted[1][at]])
    result = evaluator.compute(truth)
    assert set(result.metrics["segm"].values()) == set(result.metrics["bbox"].values()) == {-1.0}


def test_single_pixels_are_found(truth):
    own = [entry for entry in truth["annotations"] if entry["image_id"] == TINY]
    boxes = torch.tensor([entry["bbox"] for entry in own])
    boxes[:, 2:] += boxes[:, :2]
    evaluator = CocoEvaluator(("bbox", "segm"))
    exact = {
        "boxes": boxes,
        "scores": torch.ones(len(own)),
        "category_ids": torch.tensor([entry["category_id"] for entry in own]),
        "rles": [entry["segmentation"] for entry in own],
    }
    evaluator.update([TINY], [exact])
    result = evaluator.compute(truth).metrics
    assert result["segm"]["AP"] == result["bbox"]["AP"] == result["segm"]["APs"] == pytest.approx(1.0)
