"""How an exported file is compared with its source."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from effvit.deploy._detections import Matched, match_detections
from effvit.deploy.parity import parity
from effvit.errors import ExportError


def exported(run, tolerance=1e-4):
    return SimpleNamespace(run=run, tolerance=tolerance, path="model.onnx")


def running(module, change):
    """What runs `module` and hands its outputs through `change`."""

    def run(*inputs):
        with torch.no_grad():
            outputs = module(*inputs)
        return change([outputs] if isinstance(outputs, torch.Tensor) else list(outputs))

    return exported(run)


def test_a_file_that_says_the_same(stand_ins):
    module = stand_ins.classifier()
    (three,) = module.example_inputs(3, (32, 32))
    found = parity(module, running(module, lambda outputs: outputs), [(three[:1],), (three,)])
    assert (found.images, found.error, found.worst, found.top1) == (3, 0.0, "probabilities", 1.0)
    assert found.detections is None


def test_an_image_in_two_batches_counts_once_and_as_the_worse_one(stand_ins):
    module = stand_ins.detector()
    once = module.example_inputs(1, (64, 64))
    twice = tuple(torch.cat([tensor, tensor]) for tensor in once)
    turned = iter([[0, 0, 0], [0, 5, 0]])  # boxes of the first batch are right, one of the second is elsewhere

    def elsewhere(outputs):
        outputs[0][0, :3] += torch.tensor(next(turned))[:, None]
        return outputs

    found = parity(module, running(module, elsewhere), [once, twice])
    assert (found.images, found.detections, found.unmatched) == (1, 3, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_source_whose_outputs_are_not_finite_is_refused(stand_ins, value):
    module = stand_ins.classifier()
    with torch.no_grad():
        module.head.bias += value
    with pytest.raises(ExportError, match=r"network itself gives probabilities that are not finite"):
        parity(module, running(module, lambda outputs: outputs), [module.example_inputs(2, (32, 32))])


@pytest.mark.parametrize(
    ("matched", "share", "allowed"),
    [
        (Matched(50, 49, 2), 0.0, 2),  # one turn
        (Matched(50, 48, 4), 0.02, 2),
        (Matched(500, 490, 20), 0.02, 20),
        (Matched(1, 0, 2), 0.01, 1),  # nothing says the same
        (Matched(0, 0, 1), 0.01, 1),  # one at the threshold
    ],
)
def test_how_many_detections_may_be_alone(matched, share, allowed):
    assert matched.allowed(share) == allowed


def test_differences_are_the_largest_over_all_batches(stand_ins):
    module = stand_ins.classifier()
    gaps = iter([1e-6, 3e-5, 0.0])
    batches = [module.example_inputs(1, (32, 32))] * 3
    found = parity(module, running(module, lambda outputs: [outputs[0] + next(gaps)]), batches)
    assert found.differences["probabilities"] == pytest.approx(3e-5, rel=0.01)
    largest = module(*batches[0]).max().item()
    assert found.error == pytest.approx(3e-5 / largest, rel=0.01)
    assert found.as_dict()["errors"] == {"probabilities": found.error}


@pytest.mark.parametrize("wrong", [lambda p: p.flip(-1), lambda p: p * float("nan"), lambda p: p + float("inf")])
def test_a_file_that_disagrees_is_refused_by_the_name_of_the_output(stand_ins, wrong):
    module = stand_ins.classifier()
    with pytest.raises(ExportError, match=r"model.onnx disagrees with its source: probabilities differs by"):
        parity(module, running(module, lambda outputs: [wrong(outputs[0])]), [module.example_inputs(2, (32, 32))])


def test_outputs_of_other_shapes_are_refused(stand_ins):
    module = stand_ins.classifier()
    with pytest.raises(ExportError, match=r"the shapes \[\(2, 1\)\], its source \[\(2, 2\)\]"):
        parity(module, running(module, lambda outputs: [outputs[0][:, :1]]), [module.example_inputs(2, (32, 32))])


def test_nothing_to_compare_is_no_agreement(stand_ins):
    module = stand_ins.classifier()
    with pytest.raises(ExportError, match="no image was given"):
        parity(module, running(module, lambda outputs: outputs), [])


def test_detections_in_another_order_are_the_same(stand_ins):
    module = stand_ins.detector()
    order = [3, 1, 0, 2]
    changed = running(module, lambda outputs: [tensor[:, order] for tensor in outputs])
    found = parity(module, changed, [module.example_inputs(2, (64, 64))])
    assert (found.images, found.detections, found.unmatched, found.error) == (2, 6, 0, 0.0)
    assert set(found.errors) == {"boxes", "scores"}
    assert found.top1 is None


@pytest.mark.parametrize(
    ("output", "change", "words"),
    [
        (0, lambda boxes: boxes * 1.001, "boxes differs by 0.048"),
        (0, lambda boxes: boxes + 0.5, "12 of either side have no partner"),
        (1, lambda scores: scores + 0.01, "scores differs by 0.01"),
        (0, lambda boxes: boxes + 30, "12 of either side have no partner"),
        (2, lambda labels: torch.where(labels < 0, labels, labels + 2), "12 of either side have no partner"),
        (2, lambda labels: torch.full_like(labels, -1), "6 of either side have no partner"),
    ],
)
def test_detections_that_differ_are_refused(stand_ins, output, change, words):
    module = stand_ins.detector()

    def wrong(outputs):
        outputs[output] = change(outputs[output])
        return outputs

    with pytest.raises(ExportError, match=words):
        parity(module, running(module, wrong), [module.example_inputs(2, (64, 64))])


def relabelled(number):
    """Gives so many pixels of the first image another label, from the bottom right on."""

    def change(outputs):
        labels = outputs[0][0].reshape(-1)  # a view
        labels[len(labels) - number :] = 1 - labels[len(labels) - number :]
        return outputs

    return change


@pytest.mark.parametrize(("number", "share"), [(0, 1.0), (8, 1 - 8 / 8192)])
def test_labels_are_counted_that_are_others(stand_ins, number, share):
    """At most 1 in 1000 pixels; an image that comes twice counts once."""
    module = stand_ins.segmenter()
    both = module.example_inputs(2, (64, 64))
    found = parity(module, running(module, relabelled(number)), [both, both])
    assert (found.images, found.labels) == (2, pytest.approx(share))
    assert (found.errors, found.top1, found.detections) == ({"logits": 0.0}, None, None)
    assert found.as_dict()["labels"] == found.labels


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (relabelled(9), r"0.11 % of the pixels of 2 images have another label \(allowed: 0.1 %\)"),
        (lambda outputs: [outputs[0], outputs[1] + 0.01], "logits differs by 0.01"),
        (lambda outputs: [outputs[0][:, 1:], outputs[1]], "of the shapes"),
    ],
)
def test_label_maps_that_differ_are_refused(stand_ins, change, words):
    module = stand_ins.segmenter()
    with pytest.raises(ExportError, match=words):
        parity(module, running(module, change), [module.example_inputs(2, (64, 64))])


def test_labels_of_the_padding_do_not_count(stand_ins):
    module = stand_ins.segmenter()
    images, _ = module.example_inputs(1, (64, 64))
    inputs = images, torch.tensor([[62, 40]])
    found = parity(module, running(module, relabelled(2 * 64)), [inputs])
    assert found.labels == 1.0
    with pytest.raises(ExportError, match=r"1.61 % of the pixels of 1 images"):
        parity(module, running(module, relabelled(3 * 64)), [inputs])


def test_each_detection_has_one_partner():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]])
    labels = torch.tensor([1, 1, 1])
    found = {"boxes": boxes[[1, 0]], "labels": labels[:2]}
    rows, columns = match_detections(found, {"boxes": boxes, "labels": labels})
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 1), (1, 0)]
    none = match_detections({"boxes": boxes[:0], "labels": labels[:0]}, {"boxes": boxes, "labels": labels})
    assert [len(side) for side in none] == [0, 0]


def test_boxes_that_the_border_cut_down_to_lines_have_partners_too():
    lines = torch.tensor([[20.0, 5, 20, 40], [0, 30, 12, 30], [20, 30, 20, 30]])
    labels = torch.tensor([1, 1, 1])
    rows, columns = match_detections(
        {"boxes": lines + 1e-4, "labels": labels}, {"boxes": lines.flip(0), "labels": labels}
    )
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [(0, 2), (1, 1), (2, 0)]
    shorter = {"boxes": lines[:1] - torch.tensor([0, 0, 0, 1.0]), "labels": labels[:1]}
    assert len(match_detections(shorter, {"boxes": lines, "labels": labels})[0]) == 0
