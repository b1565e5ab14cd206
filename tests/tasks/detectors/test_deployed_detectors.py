"""Detectors with fixed shapes: traced, recorded, and suppressed candidate by candidate."""

import warnings

import pytest
import torch
from torch import nn

from effvit.deploy._onnx_trace import trace_to_onnx
from effvit.tasks import Detection
from effvit.tasks.detectors._deployed import Candidates, sigmoid, suppress
from effvit.tasks.detectors._deployed_rcnn import FixedRCNN
from effvit.tasks.detectors._deployed_retinanet import FixedRetinaNet
from effvit.tasks.detectors.rcnn import FasterRCNN, MaskRCNN
from effvit.tasks.detectors.retinanet import RetinaNet
from effvit.tasks.detectors.roi_pooling import RoIPooling

SIZES = torch.tensor([[64, 96], [50, 61]])
ORIGINALS = torch.tensor([[128, 192], [100, 122]])


class SmallPyramid(nn.Module):
    """Stand-in for a feature pyramid: one strided convolution a level."""

    def __init__(self, strides, channels=8):
        super().__init__()
        self.strides, self.out_channels = strides, channels
        self.stems = nn.ModuleList(
            nn.Conv2d(3, channels, 2 * stride - 1, stride=stride, padding=stride - 1) for stride in strides
        )

    def forward(self, images):
        return {f"p{number}": stem(images).relu() for number, stem in enumerate(self.stems, 2)}


def make(kind):
    torch.manual_seed(0)
    limits = {"score_threshold": 0.3, "detections_per_image": 30}
    if kind is RetinaNet:
        detector = RetinaNet(SmallPyramid((8, 16, 32, 64, 128)), 3, head_convs=1, candidates_per_level=50, **limits)
        nn.init.zeros_(detector.head.classification_head.cls_logits.bias)
        return detector.eval(), FixedRetinaNet(detector)
    detector = kind(SmallPyramid((4, 8, 16, 32, 64)), 3, head_channels=16, **limits)
    nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.5)
    return detector.eval(), FixedRCNN(detector)


def images(seed=0):
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(seed))


def check(found, expected):
    """Arrays against what `predict` returned."""
    assert sum(len(own["boxes"]) for own in expected) > 0
    for number, own in enumerate(expected):
        count = len(own["boxes"])
        torch.testing.assert_close(found[0][number, :count], own["boxes"], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(found[1][number, :count], own["scores"], atol=1e-6, rtol=1e-5)
        assert torch.equal(found[2][number, :count], own["labels"])
        for values, filler in zip(found, (0, 0, -1, 0), strict=False):
            assert (values[number, count:] == filler).all()


KINDS = pytest.mark.parametrize("kind", [RetinaNet, FasterRCNN, MaskRCNN])


@pytest.mark.parametrize("kind", [RetinaNet, MaskRCNN])
def test_a_trace_holds_for_other_images_and_sizes(kind):
    detector, fixed = make(kind)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="torch")  # tracing itself, and torchvision's own layers
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(fixed, (images(), SIZES, ORIGINALS), check_trace=False)
    for seed, sizes in ((1, SIZES), (2, SIZES.flip(0))):
        expected = detector.predict(images(seed), sizes.tolist(), ORIGINALS.tolist())
        check(traced(images(seed), sizes, ORIGINALS), expected)


@pytest.mark.slow
@KINDS
def test_a_recorded_graph_holds_and_leaves_nothing_behind(kind):
    detector, fixed = make(kind)
    with torch.no_grad():  # before anything was kept of these shapes
        graph = torch.export.export(fixed, (images(), SIZES, ORIGINALS), strict=False).module()
    expected = detector.predict(images(1), SIZES.tolist(), ORIGINALS.tolist())
    check(graph(images(1), SIZES, ORIGINALS), expected)


def test_what_does_not_count_neither_appears_nor_drops_a_neighbour():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [-5, -5, 1, 1]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5]])
    labels = torch.tensor([[1, 1, 1, 0, 1]])
    valid = torch.tensor([[False, True, True, True, True]])
    found = suppress(Candidates(boxes, scores, labels, valid), 0.5, 4)
    torch.testing.assert_close(found.scores, torch.tensor([[0.8, 0.6, 0.5, 0.0]]))
    assert found.labels.tolist() == [[1, 0, 1, -1]]
    assert found.boxes[0].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [-5, -5, 1, 1], [0, 0, 0, 0]]
    assert found.valid.tolist() == [[True, True, True, False]]


def test_only_the_best_are_kept_and_none_where_none_counts():
    corners = torch.arange(6.0) * 20
    boxes = torch.stack([corners, corners, corners + 10, corners + 10], dim=1).repeat(2, 1, 1)
    scores = torch.tensor([0.1, 0.6, 0.2, 0.5, 0.3, 0.4]).repeat(2, 1)
    valid = torch.tensor([[True] * 6, [False] * 6])
    found = suppress(Candidates(boxes, scores, torch.zeros(2, 6, dtype=torch.int64), valid), 0.5, 2)
    torch.testing.assert_close(found.scores, torch.tensor([[0.6, 0.5], [0.0, 0.0]]))
    assert found.labels.tolist() == [[0, 0], [-1, -1]]
    assert found.boxes[0, 0].tolist() == [20, 20, 30, 30]
    assert not found.boxes[1].any()


def test_boxes_left_of_the_image_stay_apart_from_other_classes():
    """SSDLite suppresses before it cuts: a shift by the largest coordinate alone would move one onto the other."""
    boxes = torch.tensor([[[-20.0, -20, 1, 1], [79, 79, 100, 100]]])
    found = suppress(
        Candidates(boxes, torch.tensor([[0.9, 0.8]]), torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool)),
        0.5,
        2,
    )
    assert found.labels.tolist() == [[1, 0]]


def test_regions_pooled_by_selection_are_those_pooled_by_sorting():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 4, 256 // stride, 256 // stride, generator=generator) for stride in (4, 8, 16, 32)]
    corners = torch.rand(2, 40, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 2 ** (1 + 6 * torch.rand(2, 40, 2, generator=generator))], dim=2)
    boxes[0, 3] = 0  # what stands for a proposal that is missing
    boxes[1, 0] = torch.tensor([0, 0, 255, 255])
    boxes[1, 1] = torch.tensor([10, 20, 150, 160])
    pooling = RoIPooling((4, 8, 16, 32))
    levels = pooling.levels(boxes.flatten(0, 1))
    assert set(levels.tolist()) == {0, 1, 2}  # the coarsest pools none, which must do no harm
    assert torch.equal(pooling.by_selection(maps, boxes, 7), pooling(maps, list(boxes), 7))


@pytest.mark.parametrize(
    ("detector", "backbone", "sides"),
    [
        ("retinanet", "mobilevitv2_050", range(64, 4097, 32)),
        ("retinanet", "efficientvit_m0", None),
        ("ssdlite", "mobilevit_xxs", range(64, 4097, 32)),
    ],
)
def test_which_detectors_take_images_of_any_size(detector, backbone, sides):
    view = Detection(backbone, {1: "ant"}, detector=detector).deployable()
    assert view.open_sides == sides


class Probabilities(nn.Module):
    """What ranks proposals."""

    def forward(self, logits):
        return sigmoid(logits)


def test_onnx_runtime_ranks_as_torch_does(tmp_path):
    """Its own sigmoid turns the order of values that are near 0, as most proposals of a coarse map are, and near 1."""
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    logits = torch.linspace(-80, 20, 100_001)
    path = tmp_path / "a.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        trace_to_onnx(Probabilities(), (logits,), path, ["logits"], ["probabilities"], 17)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"logits": logits.numpy()})[0])
    torch.testing.assert_close(found, logits.sigmoid(), rtol=1e-6, atol=0)
    assert (found.diff() >= 0).all()
