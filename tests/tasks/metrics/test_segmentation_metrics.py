"""mIoU against numpy and mmsegmentation's formula, on random and real masks, in any batches and on two processes.

The file is its own worker: run as a script it joins the process group, plays every scenario and writes what it got.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from effvit.errors import DatasetError
from effvit.tasks.metrics.segmentation import SegmentationEvaluator

CLASSES = 6


def sample(number=12, seed=0, classes=CLASSES):
    """Maps of odd sizes with ignored pixels; the last class is only predicted, the one before it is nowhere."""
    generator = np.random.default_rng(seed)
    predictions, masks = [], []
    for _ in range(number):
        size = generator.integers(3, 20, 2)
        mask = generator.integers(-1, classes - 2, size)
        wrong = generator.choice([0, 1, classes - 1], size)
        prediction = np.where(generator.random(size) < 0.6, mask.clip(0), wrong)
        masks.append(torch.from_numpy(mask.astype(np.int16)))
        predictions.append(torch.from_numpy(prediction.astype(np.int16)))
    return list(range(1, number + 1)), predictions, masks


def confusion_of(predictions, masks, classes):
    """Pixel by pixel, as its definition reads."""
    counts = np.zeros((classes, classes), dtype=np.int64)
    for prediction, mask in zip(predictions, masks, strict=True):
        inside = np.asarray(mask) >= 0
        np.add.at(counts, (np.asarray(mask)[inside], np.asarray(prediction)[inside]), 1)
    return counts


def mmseg(predictions, masks, classes):
    """``intersect_and_union`` of each image by histograms, summed, and ``total_area_to_metrics`` with nanmean."""
    areas = np.zeros((3, classes))
    edges = np.arange(classes + 1)
    for prediction, mask in zip(predictions, masks, strict=True):
        inside = np.asarray(mask) >= 0
        p, truth = np.asarray(prediction)[inside], np.asarray(mask)[inside]
        for row, values in enumerate((p[p == truth], p, truth)):
            areas[row] += np.histogram(values, edges)[0]
    hits, chosen, truth = areas
    with np.errstate(invalid="ignore"):
        iou, accuracy = hits / (chosen + truth - hits), hits / truth
    metrics = {"mIoU": np.nanmean(iou), "mAcc": np.nanmean(accuracy), "aAcc": hits.sum() / truth.sum()}
    return metrics, iou, accuracy


def evaluate(ids, predictions, masks, classes=CLASSES, batch=5):
    evaluator = SegmentationEvaluator(classes)
    for start in range(0, len(ids), batch):
        rows = slice(start, start + batch)
        evaluator.update(ids[rows], predictions[rows], masks[rows])
    return evaluator.compute()


@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_formula_of_mmsegmentation_and_the_confusion_of_numpy(seed):
    ids, predictions, masks = sample(seed=seed)
    found = evaluate(ids, predictions, masks)
    metrics, iou, accuracy = mmseg(predictions, masks, CLASSES)
    assert found.metrics == pytest.approx(metrics, rel=1e-12)
    np.testing.assert_allclose([found.per_class[label] for label in range(CLASSES)], iou, rtol=1e-12)
    np.testing.assert_allclose([found.accuracy_per_class[label] for label in range(CLASSES)], accuracy, rtol=1e-12)
    np.testing.assert_array_equal(found.confusion.numpy(), confusion_of(predictions, masks, CLASSES))
    # A class that is only predicted has no accuracy and pulls mIoU down; one that is nowhere does not count.
    assert found.per_class[CLASSES - 1] == 0.0
    assert np.isnan(found.accuracy_per_class[CLASSES - 1])
    assert np.isnan(found.per_class[CLASSES - 2])


@pytest.mark.realdata
def test_on_real_masks_it_is_numpys_confusion(real_data):
    from PIL import Image

    folder = real_data / "coco_semantic"
    values = sorted(int(key) for key in json.loads((folder / "classes.json").read_text()) if int(key))
    label_of = np.full(256, -1, dtype=np.int16)
    label_of[values] = np.arange(len(values))
    masks = [label_of[np.asarray(Image.open(path))] for path in sorted((folder / "masks" / "val").iterdir())[:12]]
    assert len(masks) >= 4
    # A plausible prediction: the mask some pixels aside, with something everywhere.
    predictions = [np.roll(mask, (3, -5), (0, 1)).clip(0) for mask in masks]
    ids = list(range(1, len(masks) + 1))
    found = evaluate(
        ids, *([torch.from_numpy(one) for one in several] for several in (predictions, masks)), len(values)
    )
    metrics, iou, _ = mmseg(predictions, masks, len(values))
    np.testing.assert_array_equal(found.confusion.numpy(), confusion_of(predictions, masks, len(values)))
    assert found.metrics == pytest.approx(metrics, rel=1e-12)
    np.testing.assert_allclose(list(found.per_class.values()), iou, rtol=1e-12)
    assert 0.05 < found.metrics["mIoU"] < 0.95


def test_batches_and_order_do_not_matter():
    ids, predictions, masks = sample()
    whole = evaluate(ids, predictions, masks, batch=100)
    order = np.random.default_rng(4).permutation(len(ids))
    mixed = evaluate(*([several[row] for row in order] for several in (ids, predictions, masks)), batch=1)
    assert torch.equal(whole.confusion, mixed.confusion)
    assert whole.metrics == mixed.metrics


def test_an_image_counts_once():
    ids, predictions, masks = sample()
    again = evaluate(
        ids + ids[:3] + ids[-1:], predictions + predictions[:3] + predictions[-1:], masks + masks[:3] + masks[-1:]
    )
    assert torch.equal(again.confusion, evaluate(ids, predictions, masks).confusion)


def test_nothing_but_counts_and_ids_is_kept():
    evaluator = SegmentationEvaluator(CLASSES)
    for number in range(50):
        evaluator.update([number], [torch.zeros(64, 64, dtype=torch.int16)], [torch.zeros(64, 64, dtype=torch.int16)])
    kept = [value for value in vars(evaluator).values() if isinstance(value, torch.Tensor)]
    assert sum(value.numel() for value in kept) == 2 * CLASSES * (CLASSES + 1)
    assert int(evaluator.compute().confusion.sum()) == 50 * 64 * 64


def test_pixels_without_a_finite_number_are_wrong_and_reported(caplog):
    ids, predictions, masks = [1], [torch.tensor([[0, -1, 1, -1]])], [torch.tensor([[0, 0, 1, -1]])]
    with caplog.at_level(logging.WARNING):
        found = evaluate(ids, predictions, masks)
    assert found.not_finite == 1
    assert found.metrics["aAcc"] == pytest.approx(2 / 3)
    assert found.per_class[0] == 0.5
    assert found.per_class[1] == 1.0
    assert int(found.confusion.sum()) == 2
    assert found.pixels.tolist()[:2] == [2, 1]
    assert "NaN or infinite for 1 of 3 labelled pixels" in caplog.text


def test_without_a_labelled_pixel_every_number_is_nan_and_a_warning_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        found = evaluate([1], [torch.zeros(4, 4)], [torch.full((4, 4), -1)])
    assert all(np.isnan(value) for value in found.metrics.values())
    assert "no pixel of the images has a label" in caplog.text
    caplog.clear()
    assert all(np.isnan(value) for value in SegmentationEvaluator(2).compute().metrics.values())
    assert not caplog.text


def test_after_a_reset_nothing_is_left():
    ids, predictions, masks = sample()
    evaluator = SegmentationEvaluator(CLASSES)
    evaluator.update(ids, predictions, masks)
    evaluator.reset()
    evaluator.update(ids[:4], predictions[:4], masks[:4])
    assert torch.equal(evaluator.compute().confusion, evaluate(ids[:4], predictions[:4], masks[:4]).confusion)


def test_labels_that_are_no_class_are_refused():
    with pytest.raises(
        DatasetError, match=r"image id 7 has pixels with the labels 0 to 6, but the network has 6 classes"
    ):
        evaluate([7], [torch.zeros(1, 2)], [torch.tensor([[0, 6]])])
    with pytest.raises(DatasetError, match=r"labels must be in \[0, 5\], or -1 for none"):
        evaluate([7], [torch.zeros(1, 2)], [torch.tensor([[0, -2]])])
    with pytest.raises(ValueError, match=r"the prediction is \(2, 2\), the mask \(2, 3\)"):
        evaluate([7], [torch.zeros(2, 2)], [torch.zeros(2, 3)])


SCENARIOS = {
    # Which images each of two processes sees; a distributed sampler repeats the first ones at the end.
    "even": ([1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12]),
    "repeated": ([1, 3, 5, 7, 9, 11], [2, 4, 6, 8, 10, 12, 1]),
    "repeated by the lowest": ([1, 3, 5, 7, 2], [2, 4, 6, 8, 9, 10, 11, 12]),
    "the same image alone": ([1], [1]),
    "nothing": ([1, 2, 3], []),
}


@pytest.fixture(scope="module")
def outcomes(play_on_two_ranks):
    return play_on_two_ranks(__file__)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_processes_get_the_counts_of_one(outcomes, scenario):
    shared = sorted({number for rank in SCENARIOS[scenario] for number in rank})
    _, predictions, masks = sample()
    rows = [number - 1 for number in shared]
    alone = evaluate(shared, [predictions[row] for row in rows], [masks[row] for row in rows])
    for outcome in outcomes:
        assert outcome[scenario]["confusion"] == alone.confusion.tolist()
        assert outcome[scenario]["metrics"] == pytest.approx(alone.metrics)
        assert outcome[scenario]["warned"] is False


def test_an_image_that_cannot_be_told_apart_is_reported(outcomes):
    assert outcomes[0]["beyond a sampler"].startswith("2 images were seen by several processes and count as often")
    assert outcomes[1]["beyond a sampler"] is None


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said = []

    def emit(self, record):
        self.said.append(record.getMessage())


def play(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=int(rank), world_size=2)
    messages = _Messages()
    logging.getLogger("effvit.tasks.metrics.segmentation").addHandler(messages)
    _, predictions, masks = sample()
    found = {}
    for name, seen in {**SCENARIOS, "beyond a sampler": ([1, 2, 3, 4], [1, 2, 5, 6])}.items():
        own = seen[int(rank)]
        result = evaluate(own, [predictions[number - 1] for number in own], [masks[number - 1] for number in own])
        found[name] = {"confusion": result.confusion.tolist(), "metrics": result.metrics, "warned": bool(messages.said)}
    found["beyond a sampler"] = messages.said[0] if messages.said else None
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    play(*sys.argv[1:])
