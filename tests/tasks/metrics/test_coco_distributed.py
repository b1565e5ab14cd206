"""COCO AP of two gloo processes against one, on the CPU.

The file is its own worker: run as a script it joins the process group, plays every scenario and writes what it got.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools import mask as mask_api

from effvit.errors import DatasetError
from effvit.tasks.metrics.coco import CocoEvaluator

NUM_IMAGES = 7
SCENARIOS = ("shared", "padded", "empty rank 1", "empty rank 0", "no images", "bad ground truth", "recovered")


def make_data():
    """Ground truth of seven images, masks as polygons and run lengths, and jittered detections of every object."""
    random = np.random.default_rng(3)
    truth = {
        "images": [{"id": i, "height": 200, "width": 200} for i in range(NUM_IMAGES)],
        "annotations": [],
        "categories": [{"id": 2, "name": "a"}, {"id": 5, "name": "b"}],
    }
    detections = []
    for image_id in range(NUM_IMAGES):
        corners, sides = random.uniform(0, 100, (6, 2)), random.uniform(5, 100, (6, 2))
        category_ids = random.choice([2, 5], 6)
        for corner, side, category_id in zip(corners, sides, category_ids, strict=True):
            box = [*corner.tolist(), *side.tolist()]
            entry = {"image_id": image_id, "category_id": int(category_id), "bbox": box, "area": box[2] * box[3]}
            number = len(truth["annotations"])
            crowd = number % 9 == 4
            mask = disc(box, text=number % 3 == 1) if crowd or number % 3 else [octagon(box)]
            truth["annotations"].append({"id": number + 1, "iscrowd": int(crowd), "segmentation": mask, **entry})
        boxes = np.concatenate([corners, corners + sides], axis=1) + random.normal(0, 4, (6, 4))
        scores = random.integers(1, 6, 6) / 6  # equal scores across images: the order of the images shows
        detections.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "scores": torch.tensor(scores, dtype=torch.float32),
                "category_ids": torch.tensor(category_ids),
                "rles": [disc([*box[:2], *(box[2:] - box[:2])]) for box in boxes],
            }
        )
    return truth, detections


def octagon(box):
    """A polygon inside a box."""
    x, y, width, height = box
    angles = np.arange(8) * np.pi / 4
    points = np.stack([x + width * (1 + np.cos(angles)) / 2, y + height * (1 + np.sin(angles)) / 2], 1)
    return points.ravel().tolist()


def disc(box, text=False):
    """The same as compressed run lengths, as a detector gives them or, with ``text``, as a JSON holds them."""
    rle = mask_api.frPyObjects([octagon(box)], 200, 200)[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()} if text else rle


def images_of(scenario, rank):
    """Which images a rank predicts; a distributed sampler deals them out in turns and repeats the first to fill up."""
    if scenario == "padded":
        return [*range(rank, NUM_IMAGES, 2), *([0] if rank == 1 else [])]
    if scenario == "empty rank 1":
        return list(range(NUM_IMAGES)) if rank == 0 else []
    if scenario == "empty rank 0":
        return list(range(NUM_IMAGES)) if rank == 1 else []
    if scenario == "no images":
        return []
    return list(range(rank, NUM_IMAGES, 2))


def as_json(result):
    """Metrics and AP by class of boxes and masks, with the keys that JSON has."""
    per_class = {kind: {str(key): ap for key, ap in values.items()} for kind, values in result.per_class.items()}
    return [result.metrics, per_class]


def play(rank):
    """What one rank gets in every scenario: ``[metrics, AP by class]``, or the error's message."""
    truth, detections = make_data()
    evaluator = CocoEvaluator(("bbox", "segm"))
    outcomes = {}
    for scenario in SCENARIOS:
        evaluator.reset()
        for position, image_id in enumerate(images_of(scenario, rank)):
            found = dict(detections[image_id])
            if position > 0 and image_id == 0:  # the copy differs in its last bits, as it does in another batch
                found["boxes"] = found["boxes"] + 1.0
            evaluator.update([image_id], [found])
        seen_by_all = truth if scenario != "bad ground truth" else {**truth, "images": truth["images"][1:]}
        # Only the first rank's ground truth is read.
        own_truth = seen_by_all if rank == 0 else {"images": [], "annotations": [], "categories": []}
        try:
            result = evaluator.compute(own_truth, per_class=True)
            outcomes[scenario] = as_json(result)
        except DatasetError as error:
            outcomes[scenario] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(play_on_two_ranks):
    """Outcomes of both ranks."""
    return play_on_two_ranks(__file__)


@pytest.fixture(scope="module")
def alone():
    """What one process gets from all images."""
    truth, detections = make_data()
    evaluator = CocoEvaluator(("bbox", "segm"))
    evaluator.update(range(NUM_IMAGES), detections)
    result = evaluator.compute(truth, per_class=True)
    assert 0.1 < result.metrics["segm"]["AP"] < result.metrics["bbox"]["AP"] < 0.9
    return as_json(result)


@pytest.mark.parametrize("scenario", ["shared", "padded", "empty rank 1", "empty rank 0", "recovered"])
def test_two_processes_get_the_digits_of_one(outcomes, alone, scenario):
    assert outcomes[0][scenario] == alone
    assert outcomes[1][scenario] == alone


def test_no_images_anywhere_is_undefined_on_both(outcomes):
    assert {value for metrics in outcomes[0]["no images"][0].values() for value in metrics.values()} == {-1.0}
    assert outcomes[0]["no images"] == outcomes[1]["no images"]


def test_an_error_is_raised_on_both(outcomes):
    assert "evaluated images are not in the ground truth, first image id 0" in outcomes[0]["bad ground truth"]
    assert outcomes[0]["bad ground truth"] == outcomes[1]["bad ground truth"]


def main(rank, folder):
    """Joins the group through a file, so that no port is needed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=int(rank), world_size=2)
    outcomes = play(int(rank))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
