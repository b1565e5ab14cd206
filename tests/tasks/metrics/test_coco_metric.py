"""COCO AP against pycocotools itself, on data made to be awkward."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effvit.errors import ConfigError, DatasetError
from effvit.tasks.metrics import _backends
from effvit.tasks.metrics.coco import CocoEvaluator

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
SIZE = 300
CATEGORY_IDS = (1, 3, 7, 90)  # 90 has no ground truth
BACKENDS = ("hotcoco", "pycocotools")


def make_ground_truth(seed=0, num_images=14):
    """Sparse ids, crowds as RLE, polygons, objects from 2 to 250 pixels, images without objects."""
    random = np.random.default_rng(seed)
    images = [{"id": 10 * i + 5, "height": SIZE, "width": SIZE, "file_name": f"{i}.jpg"} for i in range(num_images)]
    annotations = []
    for image in images[2:]:
        for _ in range(random.integers(1, 9)):
            width, height = random.choice([2.0, 12.0, 40.0, 120.0, 250.0], 2) * random.uniform(0.8, 1.1, 2)
            x, y = random.uniform(0, SIZE - width), random.uniform(0, SIZE - height)
            crowd = random.random() < 0.15
            polygon = [[x, y, x + width, y, x + width, y + height, x + 0.3 * width, y + height]]
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": image["id"],
                    "category_id": int(random.choice(CATEGORY_IDS[:3])),
                    "bbox": [float(x), float(y), float(width), float(height)],
                    "area": float(0.8 * width * height),
                    "iscrowd": int(crowd),
                    "segmentation": crowd_rle((x, y, width, height)) if crowd else polygon,
                }
            )
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in reversed(CATEGORY_IDS)],
    }


def crowd_rle(box):
    """An uncompressed run-length mask of a box, as COCO stores crowds."""
    x, y, width, height = (int(side) for side in box)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[y : y + height + 1, x : x + width + 1] = 1
    pixels = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(pixels)) + 1
    runs = np.diff(np.concatenate([[0], changes, [len(pixels)]])).tolist()
    return {"size": [SIZE, SIZE], "counts": runs if pixels[0] == 0 else [0, *runs]}


def make_detections(ground_truth, seed=1, masks=True):
    """Jittered objects and noise; scores in steps of a tenth so that many tie; one image has more than 100."""
    random = np.random.default_rng(seed)
    image_ids, detections = [], []
    for position, image in enumerate(ground_truth["images"]):
        boxes, category_ids = [], []
        for annotation in ground_truth["annotations"]:
            if annotation["image_id"] != image["id"] or position == 3:  # image 3 has objects and no detections
                continue
            for _ in range(random.integers(0, 4)):
                x, y, width, height = annotation["bbox"]
                shift = random.normal(0, 0.06, 4) * [width, height, width, height]
                boxes.append(np.array([x, y, x + width, y + height]) + shift)
                category_ids.append(annotation["category_id"])
        for _ in range(150 if position == 5 else 3 * (position != 3)):
            x, y, width, height = random.uniform(0, SIZE / 2, 4)
            boxes.append(np.array([x, y, x + width, y + height]))
            category_ids.append(random.choice(CATEGORY_IDS))
        order = random.permutation(len(boxes))
        found = {
            "boxes": torch.tensor(np.array(boxes).reshape(-1, 4)[order], dtype=torch.float32).clamp(0, SIZE),
            "scores": torch.tensor(random.integers(1, 10, len(boxes)) / 10, dtype=torch.float32),
            "category_ids": torch.tensor(np.array(category_ids, dtype=np.int64)[order]),
        }
        if masks:
            found["rles"] = [box_rle(box) for box in found["boxes"].tolist()]
        image_ids.append(image["id"])
        detections.append(found)
    return image_ids, detections


def box_rle(box):
    """Compressed mask of a box with its lower left corner cut off."""
    x1, y1, x2, y2 = box
    polygon = [[x1, y1, x2, y1, x2, y2 + 0.1, x1 + 0.2 * (x2 - x1), y2 + 0.1]]
    return mask_utils.merge(mask_utils.frPyObjects(polygon, SIZE, SIZE))


def reference(ground_truth, entries, iou_type, image_ids):
    """The published protocol, straight from pycocotools: twelve numbers, and AP by class."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        entries = copy.deepcopy(entries)
        for entry in entries:
            entry.pop("segmentation" if iou_type == "bbox" else "bbox", None)
        run = COCOeval(truth, truth.loadRes(entries), iou_type)
        run.params.imgIds = list(image_ids)
        run.evaluate()
        run.accumulate()
        run.summarize()
    by_class = {}
    for position, category_id in enumerate(run.params.catIds):
        values = run.eval["precision"][:, :, position, 0, 2]
        by_class[category_id] = values[values > -1].mean() if (values > -1).any() else -1
    return dict(zip(NAMES, run.stats.tolist(), strict=True)), by_class


@pytest.fixture(scope="module")
def truth():
    return make_ground_truth()


@pytest.fixture(scope="module")
def predicted(truth):
    return make_detections(truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_numbers_are_bitwise_those_of_pycocotools(truth, predicted, backend):
    evaluator = CocoEvaluator(("bbox", "segm"), backend)
    evaluator.update(*predicted)
    result = evaluator.compute(truth, per_class=True)
    for iou_type in ("bbox", "segm"):
        expected, by_class = reference(truth, evaluator.results(), iou_type, predicted[0])
        assert result.metrics[iou_type] == expected
        assert result.per_class[iou_type] == by_class
        assert 0.05 < expected["AP"] < 0.9, "the data should be neither trivial nor hopeless"
    assert result.metrics["bbox"] != result.metrics["segm"]
    assert result.per_class["bbox"][90] == -1


@pytest.mark.parametrize("seed", range(6))
def test_backends_agree_on_other_data(seed):
    truth = make_ground_truth(seed + 10, num_images=8)
    image_ids, detections = make_detections(truth, seed + 50)
    results = []
    for backend in BACKENDS:
        evaluator = CocoEvaluator(("bbox", "segm"), backend)
        evaluator.update(image_ids, detections)
        results.append(evaluator.compute(truth, per_class=True))
    assert results[0] == results[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_images_seen_are_judged(truth, predicted, backend):
    image_ids, detections = predicted
    evaluator = CocoEvaluator(backend=backend)
    evaluator.update(image_ids[:6], detections[:6])
    result = evaluator.compute(truth).metrics["bbox"]
    assert result == reference(truth, evaluator.results(), "bbox", image_ids[:6])[0]
    evaluator.update(image_ids[6:], detections[6:])
    assert evaluator.compute(truth).metrics["bbox"] != result


def test_updates_accumulate_and_reset_forgets(truth, predicted):
    whole, pieces = CocoEvaluator(), CocoEvaluator()
    whole.update(*predicted)
    pieces.update(["5"], [{"boxes": torch.ones(1, 4), "scores": torch.ones(1), "category_ids": torch.ones(1)}])
    pieces.reset()
    for image_id, found in zip(*predicted, strict=True):
        pieces.update([image_id], [found])
    assert pieces.compute(truth) == whole.compute(truth)


def test_image_seen_twice_counts_once(truth, predicted):
    image_ids, detections = predicted
    evaluator = CocoEvaluator()
    evaluator.update(image_ids, detections)
    expected = evaluator.compute(truth)
    evaluator.update(image_ids[4:6], detections[6:8])
    assert evaluator.compute(truth) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_at_all_is_zero(truth, backend, capfd):
    evaluator = CocoEvaluator(("bbox", "segm"), backend)
    nothing = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "category_ids": torch.zeros(0).long(), "rles": []}
    ids = [image["id"] for image in truth["images"]]
    evaluator.update(ids, [nothing] * len(ids))
    result = evaluator.compute(truth, per_class=True)
    assert result.metrics["bbox"] == result.metrics["segm"] == dict.fromkeys(NAMES, 0.0)
    assert result.per_class["bbox"] == {1: 0.0, 3: 0.0, 7: 0.0, 90: -1.0}
    assert evaluator.results() == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_no_object_defines_stays_minus_one(truth, backend):
    evaluator = CocoEvaluator(backend=backend)
    assert evaluator.compute(truth).metrics["bbox"] == dict.fromkeys(NAMES, -1.0), "no image was seen"
    large = {**truth, "annotations": [a for a in truth["annotations"] if a["area"] > 96**2]}
    image_ids, detections = make_detections(truth)
    evaluator.update(image_ids, detections)
    metrics = evaluator.compute(large).metrics["bbox"]
    assert metrics["APs"] == metrics["APm"] == metrics["ARs"] == -1
    assert metrics == reference(large, evaluator.results(), "bbox", image_ids)[0]


def test_backends_are_silent(truth, predicted, capfd):
    for backend in BACKENDS:
        evaluator = CocoEvaluator(("bbox", "segm"), backend)
        evaluator.update(*predicted)
        evaluator.compute(truth)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_ground_truth_and_detections_are_left_alone(truth, predicted):
    truth_before, predicted_before = copy.deepcopy(truth), copy.deepcopy(predicted)
    for backend in BACKENDS:
        evaluator = CocoEvaluator(("bbox", "segm"), backend)
        evaluator.update(*predicted)
        evaluator.compute(truth)
    assert truth == truth_before
    for found, before in zip(predicted[1], predicted_before[1], strict=True):
        assert torch.equal(found["boxes"], before["boxes"])
        assert found["rles"] == before["rles"]


def test_results_survive_json_with_the_same_digits(truth, predicted):
    evaluator = CocoEvaluator(("bbox", "segm"))
    evaluator.update(*predicted)
    entries = json.loads(json.dumps(evaluator.results()))
    assert set(entries[0]) == {"image_id", "category_id", "bbox", "score", "segmentation"}
    again = CocoEvaluator(("bbox", "segm"))
    for image_id in predicted[0]:
        own = [entry for entry in entries if entry["image_id"] == image_id]
        boxes = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        again.update(
            [image_id],
            [
                {
                    "boxes": boxes,
                    "scores": torch.tensor([entry["score"] for entry in own], dtype=torch.float64),
                    "category_ids": torch.tensor([entry["category_id"] for entry in own], dtype=torch.int64),
                    "rles": [entry["segmentation"] for entry in own],
                }
            ],
        )
    first, second = evaluator.compute(truth), again.compute(truth)
    assert second.metrics["segm"] == first.metrics["segm"]
    assert second.metrics["bbox"] == pytest.approx(first.metrics["bbox"], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_and_iscrowd_may_be_missing(truth, predicted, backend):
    boxes_only = copy.deepcopy(truth)
    complete = copy.deepcopy(truth)
    for bare, full in zip(boxes_only["annotations"], complete["annotations"], strict=True):
        for key in ("area", "iscrowd", "segmentation"):
            del bare[key]
        full["area"], full["iscrowd"] = full["bbox"][2] * full["bbox"][3], 0
    evaluator = CocoEvaluator(backend=backend)
    evaluator.update(*predicted)
    assert evaluator.compute(boxes_only) == evaluator.compute(complete)
    assert evaluator.compute(boxes_only) != evaluator.compute(truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotation_with_id_zero_is_an_object_like_any_other(truth, predicted, backend):
    zero_based = copy.deepcopy(truth)
    for number, annotation in enumerate(zero_based["annotations"]):
        annotation["id"] = number
    evaluator = CocoEvaluator(backend=backend)
    evaluator.update(*predicted)
    assert evaluator.compute(zero_based) == evaluator.compute(truth)


def test_low_precision_and_lists_are_taken(truth):
    evaluator = CocoEvaluator()
    found = {"boxes": torch.tensor([[1, 2, 30, 50]], dtype=torch.bfloat16), "scores": [0.5], "category_ids": [3]}
    evaluator.update(torch.tensor([5]), [found])
    assert evaluator.results() == [{"image_id": 5, "category_id": 3, "bbox": [1.0, 2.0, 29.0, 48.0], "score": 0.5}]


def test_per_class_is_computed_only_on_demand(truth, predicted, monkeypatch):
    evaluator = CocoEvaluator()
    evaluator.update(*predicted)

    def fail(precision):
        raise AssertionError("nobody asked for AP by class")

    monkeypatch.setattr(_backends, "class_precision", fail)
    assert evaluator.compute(truth).per_class == {}
    with pytest.raises(AssertionError):
        evaluator.compute(truth, per_class=True)


def test_unknown_backend_and_iou_type_offer_close_matches():
    with pytest.raises(ConfigError, match=r"no COCO evaluation backend 'hotcoc'\. Did you mean 'hotcoco'\?"):
        CocoEvaluator(backend="hotcoc")
    with pytest.raises(ConfigError, match=r"no IoU type 'segmn'\. Did you mean 'segm'\?"):
        CocoEvaluator(("bbox", "segmn"))


def test_bad_ground_truth_is_named(truth, predicted):
    evaluator = CocoEvaluator(("segm",))
    evaluator.update(*predicted)
    bare = copy.deepcopy(truth)
    del bare["annotations"][1]["segmentation"]
    with pytest.raises(DatasetError, match=r"annotation id 101 of image id \d+ has no 'segmentation'.*'bbox'"):
        evaluator.compute(bare)
    with pytest.raises(DatasetError, match=r"evaluated images are not in the ground truth, first image id 5"):
        evaluator.compute({**truth, "images": truth["images"][1:]})
    with pytest.raises(DatasetError, match=r"category id 90, which the ground truth does not declare.*\[1, 3, 7\]"):
        evaluator.compute({**truth, "categories": truth["categories"][1:]})
    with pytest.raises(DatasetError, match=r"no 'annotations'; a split without them can be predicted, not evaluated"):
        evaluator.compute({key: truth[key] for key in ("images", "categories")})
    sizeless = copy.deepcopy(truth)
    del sizeless["images"][0]["height"]
    with pytest.raises(DatasetError, match="image id 5 has no 'height'"):
        evaluator.compute(sizeless)


def test_bad_detections_are_named():
    good = {"boxes": torch.ones(2, 4), "scores": torch.ones(2), "category_ids": torch.ones(2)}
    with pytest.raises(ValueError, match="image id 7 need 'rles'"):
        CocoEvaluator(("segm",)).update([7], [good])
    with pytest.raises(ValueError, match=r"image id 7 differ in length: \[1, 2\]"):
        CocoEvaluator().update([7], [{**good, "scores": torch.ones(1)}])
    with pytest.raises(ValueError, match=r"image id 7 differ in length: \[0, 2\]"):
        CocoEvaluator().update([7], [{**good, "rles": []}])
    with pytest.raises(ValueError, match="masks of image id 7 differ in size"):
        CocoEvaluator().update([7], [{**good, "rles": [{"size": [side, 9], "counts": b""} for side in (8, 9)]}])
    with pytest.raises(ValueError, match="zip"):
        CocoEvaluator().update([7, 8], [good])
