"""Suppression over a batch as one operator: eager, recorded for any number of images, and in ONNX."""

import io

import pytest
import torch
from torch import nn
from torchvision.ops import nms

from effvit.deploy._formats_source import quiet
from effvit.tasks.detectors._deployed import Candidates, suppress
from effvit.tasks.detectors._suppression_operator import kept_of_batch, onnx_translations, recorded

MOST = 12


class Suppressed(nn.Module):
    """The best of each image, as detectors choose them."""

    def forward(self, boxes, scores, labels, valid):
        return tuple(suppress(Candidates(boxes, scores, labels, valid), 0.5, MOST))


def candidates(batch, number=60, seed=0):
    """Boxes of which many overlap and some score alike; the second image has few that count, the fourth none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, number, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(batch, number, 2, generator=generator) * 20], dim=2)
    scores = (torch.rand(batch, number, generator=generator) * 20).ceil() / 20
    labels = torch.randint(0, 3, (batch, number), generator=generator)
    valid = torch.rand(batch, number, generator=generator) < 0.8
    valid[1:2, 4:] = False
    valid[3:4] = False
    return boxes, scores, labels, valid


@pytest.fixture(scope="module")
def graph():
    shapes = tuple({0: torch.export.Dim("batch")} for _ in range(4))
    return torch.export.export(Suppressed(), candidates(2), dynamic_shapes=shapes, strict=False)


def test_each_image_is_suppressed_by_itself():
    boxes, scores, _, _ = candidates(3)
    found = kept_of_batch(boxes, scores, 0.5, MOST)
    assert found.shape == (3, MOST)
    for own, rank, kept in zip(boxes, scores, found, strict=True):
        assert kept.tolist() == nms(own, rank, 0.5)[:MOST].tolist()
    assert torch.equal(recorded(boxes, scores, 0.5, MOST), found)


def test_what_is_missing_is_the_last_place():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [50, 50, 51, 51]]])
    scores = torch.tensor([[0.5, 0.5, 0.9, -1.0]])  # of two alike the first is kept
    assert recorded(boxes, scores, 0.5, 6).tolist() == [[2, 0, 3, 3, 3, 3]]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_recorded_graph_holds_for_any_number_of_images(graph, batch):
    given = candidates(batch, seed=batch)
    for found, expected in zip(graph.module(check_guards=False)(*given), Suppressed()(*given), strict=True):
        assert torch.equal(found, expected)


def test_a_fixed_batch_needs_no_operator_of_ours():
    with quiet():
        recorded_for_two = torch.export.export(Suppressed(), candidates(2), strict=False)
    names = {str(node.target) for node in recorded_for_two.graph.nodes}
    assert "torchvision.nms.default" in names
    assert not any("effvit" in name for name in names)


def test_onnx_keeps_the_same(graph):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    with quiet():
        program = torch.onnx.export(
            graph, (), input_names=list("bslv"), opset_version=18, dynamo=True, optimize=False, verbose=False,
            custom_translation_table=onnx_translations(),
        )  # fmt: skip
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        given = candidates(batch, seed=batch)
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip("bslv", given, strict=True)})
        for own, expected in zip(found, Suppressed()(*given), strict=True):
            torch.testing.assert_close(torch.from_numpy(own), expected)
