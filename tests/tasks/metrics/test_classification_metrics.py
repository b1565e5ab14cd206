"""Metrics of classification against torchmetrics and values by hand, in any batches and on two processes.

The file is its own worker: run as a script it joins the process group, plays every scenario and writes what it got.
"""

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from effvit.errors import DatasetError
from effvit.tasks.metrics.classification import ClassificationEvaluator, Mistake

NUM_CLASSES, NUM_IMAGES = 8, 61
SCENARIOS = ("shared", "padded", "empty rank 1", "empty rank 0", "no images", "bad label", "diverged")


def make_data():
    """Logits and labels of images, right about half of the time."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(NUM_CLASSES - 1, (NUM_IMAGES,), generator=random)  # the last class has no image
    logits = 1.5 * torch.randn(NUM_IMAGES, NUM_CLASSES, generator=random)
    logits[torch.arange(NUM_IMAGES), labels] += 2
    return logits, labels


def evaluate(*batches, num_classes=NUM_CLASSES):
    evaluator = ClassificationEvaluator(num_classes)
    for image_ids, logits, labels in batches:
        evaluator.update(torch.as_tensor(image_ids), torch.as_tensor(logits), torch.as_tensor(labels))
    return evaluator.compute()


def digits_of(result):
    """All of a result as plain data that compares equal; NaN as text."""
    numbers = [result.metrics, result.per_class, [vars(mistake) for mistake in result.mistakes]]
    tensors = [result.confusion.tolist(), result.calibration.tolist(), result.not_finite]
    return json.loads(json.dumps(numbers + tensors).replace("NaN", '"NaN"'))


def test_values_by_hand():
    p = 0.7
    rest = (1 - p) / 6
    logits = torch.full((4, 7), rest).log()
    logits[:, 2] = math.log(p)
    logits[3, 6] = math.log(rest / 2)  # the label of the last image is its least probable class
    result = evaluate((range(4), logits, [2, 2, 0, 6]), num_classes=7)
    total = p + 5 * rest + rest / 2
    assert result.metrics["top1"] == 0.5
    by_hand = -(2 * math.log(p) + math.log(rest) + math.log(rest / 2 / total)) / 4
    assert result.metrics["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert result.metrics["ece"] == pytest.approx(abs((3 * p + p / total) / 4 - 0.5), rel=1e-5)
    assert result.per_class[2] == 1.0
    assert result.per_class[0] == result.per_class[6] == 0.0
    assert math.isnan(result.per_class[1])
    assert [vars(m) for m in result.mistakes] == [
        {"image_id": 3, "label": 6, "predicted": 2, "confidence": pytest.approx(p / total)},
        {"image_id": 2, "label": 0, "predicted": 2, "confidence": pytest.approx(p)},
    ]


def test_fifth_counts_for_top5_and_sixth_does_not():
    ranked = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    assert evaluate(([0], ranked, [4]), num_classes=6).metrics["top5"] == 1.0
    assert evaluate(([0], ranked, [5]), num_classes=6).metrics["top5"] == 0.0
    assert "top5" not in evaluate(([0], ranked[:, :5], [4]), num_classes=5).metrics


def test_agrees_with_torchmetrics():
    logits, labels = make_data()
    result = evaluate((range(NUM_IMAGES), logits, labels))
    assert 0.3 < result.metrics["top1"] < 0.9
    assert result.metrics["top1"] == pytest.approx(
        float(multiclass_accuracy(logits, labels, NUM_CLASSES, average="micro")), rel=1e-6
    )
    assert result.metrics["top5"] == pytest.approx(
        float(multiclass_accuracy(logits, labels, NUM_CLASSES, average="micro", top_k=5)), rel=1e-6
    )
    assert result.metrics["ece"] == pytest.approx(
        float(multiclass_calibration_error(logits, labels, NUM_CLASSES, n_bins=15, norm="l1")), rel=1e-5
    )
    assert result.metrics["loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert torch.equal(result.confusion, multiclass_confusion_matrix(logits, labels, NUM_CLASSES))
    by_class = multiclass_accuracy(logits, labels, NUM_CLASSES, average="none")
    assert list(result.per_class.values())[:-1] == pytest.approx(by_class[:-1].tolist(), rel=1e-6)
    assert math.isnan(result.per_class[NUM_CLASSES - 1])
    assert len(result.mistakes) == int(result.confusion.sum() - result.confusion.diag().sum())
    confidences = [mistake.confidence for mistake in result.mistakes]
    assert confidences == sorted(confidences, reverse=True)


def test_batches_order_and_repeats_do_not_matter():
    logits, labels = make_data()
    ids = torch.arange(NUM_IMAGES)
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))
    batches = [(ids[rows], logits[rows], labels[rows]) for rows in [*order.split(7), order[:3]]]
    assert digits_of(evaluate(*batches)) == digits_of(evaluate((ids, logits, labels)))


def test_the_first_record_of_an_image_counts():
    result = evaluate(([4], [[0.0, 9]], [1]), ([4], [[9.0, 0]], [1]), num_classes=2)
    assert result.metrics["top1"] == 1.0
    assert int(result.confusion.sum()) == 1


def test_unknown_labels_are_left_out():
    logits, labels = make_data()
    known = torch.arange(0, NUM_IMAGES, 2)
    hidden = torch.full_like(labels, -1).scatter(0, known, labels[known])
    whole = evaluate((range(NUM_IMAGES), logits, hidden))
    assert digits_of(whole) == digits_of(evaluate((known, logits[known], labels[known])))


def test_reset_forgets():
    evaluator = ClassificationEvaluator(2)
    evaluator.update(torch.tensor([0]), torch.tensor([[1.0, 0]]), torch.tensor([1]))
    evaluator.reset()
    result = evaluator.compute()
    assert all(math.isnan(value) for value in result.metrics.values())
    assert result.mistakes == ()
    assert int(result.confusion.sum()) == 0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(kind):
    logits, labels = make_data()
    half = logits.to(kind)
    assert digits_of(evaluate((range(NUM_IMAGES), half, labels))) == digits_of(
        evaluate((range(NUM_IMAGES), half.float(), labels))
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_network_is_said(bad, caplog):
    logits = torch.eye(3).repeat(2, 1) * 9
    logits[4, 2] = bad
    with caplog.at_level(logging.WARNING, "effvit"):
        result = evaluate((range(6), logits, [0, 1, 2, 0, 1, 2]), num_classes=3)
    assert "diverged" in caplog.text
    assert "1 of 6 images" in caplog.text
    assert result.not_finite == 1
    assert result.metrics["top1"] == pytest.approx(5 / 6)
    assert math.isnan(result.metrics["loss"])
    assert math.isnan(result.metrics["ece"])
    assert result.per_class == {0: 1.0, 1: 0.5, 2: 1.0}
    assert result.mistakes == ()


def test_a_class_ruled_out_by_minus_infinity_is_sound(caplog):
    result = evaluate(([0], [[2.0, -math.inf, 1.0]], [0]), num_classes=3)
    assert result.not_finite == 0
    assert math.isfinite(result.metrics["loss"])
    assert not caplog.records


def test_wrong_input_is_named():
    with pytest.raises(DatasetError, match=r"image id 7 has the label 2, .* \[0, 1\]"):
        evaluate(([3, 7], [[0.0, 1], [1, 0]], [1, 2]), num_classes=2)
    with pytest.raises(ValueError, match=r"\(B, 2\)"):
        evaluate(([0], [[0.0, 1, 2]], [0]), num_classes=2)
    with pytest.raises(ValueError, match="image ids"):
        evaluate(([0], [[0.0, 1], [0, 1]], [0, 1]), num_classes=2)


def test_many_mistakes_are_cut_to_the_worst():
    logits = torch.zeros(300, 2)
    logits[:, 0] = torch.linspace(0.1, 5, 300)
    mistakes = evaluate((range(300), logits, [1] * 300), num_classes=2).mistakes
    assert len(mistakes) == 100
    assert mistakes[0] == Mistake(299, 1, 0, pytest.approx(1 / (1 + math.exp(-5)), rel=1e-5))


def test_calibration_bins():
    logits = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.0, 0.0]])
    calibration = evaluate((range(3), logits, [0, 0, 1]), num_classes=2).calibration
    assert calibration.shape == (15, 3)
    assert calibration[:, 0].tolist() == [0.0] * 7 + [1] + [0] * 6 + [2]
    assert calibration[14].tolist() == pytest.approx([2, 1 / (1 + math.exp(-4)), 0.5])
    assert calibration[0, 1:].isnan().all()


def images_of(scenario, rank):
    """Which images a rank sees; a distributed sampler deals them out in turns and repeats the first to fill up."""
    if scenario == "padded":
        return [*range(rank, NUM_IMAGES, 2), *([0] if rank == 1 else [])]
    if scenario.startswith("empty rank"):
        return [] if scenario.endswith(str(rank)) else list(range(NUM_IMAGES))
    if scenario == "no images":
        return []
    return list(range(rank, NUM_IMAGES, 2))


def play(rank):
    """What one rank gets in every scenario, or the error's message."""
    logits, labels = make_data()
    evaluator = ClassificationEvaluator(NUM_CLASSES)
    outcomes = {}
    for scenario in SCENARIOS:
        evaluator.reset()
        ids = torch.tensor(images_of(scenario, rank), dtype=torch.int64)
        own_logits, own_labels = logits[ids], labels[ids]
        if rank == 1 and scenario == "padded":
            own_logits[-1] += 1e-3 * torch.arange(NUM_CLASSES)  # the copy differs a little, as in another batch
        if rank == 1 and scenario == "bad label":
            own_labels[2] = NUM_CLASSES
        if rank == 1 and scenario == "diverged":
            own_logits[2] = math.nan
        for rows in torch.arange(len(ids)).split(4):
            evaluator.update(ids[rows], own_logits[rows], own_labels[rows])
        try:
            outcomes[scenario] = digits_of(evaluator.compute())
        except DatasetError as error:
            outcomes[scenario] = str(error)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(play_on_two_ranks):
    """Outcomes of both ranks."""
    return play_on_two_ranks(__file__)


@pytest.mark.parametrize("scenario", ["shared", "padded", "empty rank 1", "empty rank 0"])
def test_two_processes_get_the_digits_of_one(outcomes, scenario):
    logits, labels = make_data()
    alone = digits_of(evaluate((range(NUM_IMAGES), logits, labels)))
    assert outcomes[0][scenario] == alone
    assert outcomes[1][scenario] == alone


def test_what_one_process_sees_is_said_by_both(outcomes):
    assert outcomes[0] == outcomes[1]
    assert "image id 5 has the label 8" in outcomes[0]["bad label"]
    assert outcomes[0]["diverged"][-1] == 1
    assert set(outcomes[0]["no images"][0].values()) == {"NaN"}


def main(rank, folder):
    """Joins the group through a file, so that no port is needed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=int(rank), world_size=2)
    outcomes = play(int(rank))
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
