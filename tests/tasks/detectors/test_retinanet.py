"""RetinaNet's loss and predictions against the recipe in plain Python and float64."""

import math

import pytest
import torch
from torch import nn

from effvit.backbones import FeaturePyramid, create_backbone
from effvit.errors import ConfigError
from effvit.tasks.detectors.assigner import IGNORED, assign
from effvit.tasks.detectors.retinanet import RetinaNet


class SmallPyramid(nn.Module):
    """Stand-in for a feature pyramid: one strided convolution a level."""

    def __init__(self, strides=(16, 32), channels=8):
        super().__init__()
        self.strides = strides
        self.levels = tuple(f"p{int(math.log2(stride))}" for stride in strides)
        self.out_channels = channels
        self.stems = nn.ModuleList(
            nn.Conv2d(3, channels, 2 * stride - 1, stride=stride, padding=stride - 1) for stride in strides
        )

    def forward(self, images):
        return {level: stem(images).relu() for level, stem in zip(self.levels, self.stems, strict=True)}


def make_detector(num_classes=3, strides=(16, 32), spread=1.0, **options):
    """A detector whose random logits are spread enough for every branch of the post-processing."""
    torch.manual_seed(0)
    detector = RetinaNet(SmallPyramid(strides), num_classes, **{"head_convs": 1, **options})
    with torch.no_grad():
        for name, parameter in detector.head.named_parameters():
            if name.endswith("weight"):
                parameter.normal_(0, spread / math.sqrt(parameter[0].numel()))
        detector.head.classification_head.cls_logits.bias.fill_(-2.0)
    return detector


def target(boxes, labels):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}


CROWDED = target([[4, 4, 60, 50], [6, 5, 60, 52], [30, 30, 36, 40], [0, 0, 90, 60], [50, 2, 58, 61]], [0, 1, 2, 2, 0])
SPARSE = target([[8, 8, 40, 30]], [1])
EMPTY = target([], [])


def inside_own_padding(anchors, size, strides, map_sizes):
    """Whether each anchor's location lies in the image's own area rounded up to 32, by loops."""
    height, width = (32 * math.ceil(side / 32) for side in size)
    flags = [
        y * stride < height and x * stride < width
        for stride, (rows, columns) in zip(strides, map_sizes, strict=True)
        for y in range(rows)
        for x in range(columns)
        for _ in range(9)
    ]
    assert len(flags) == len(anchors)
    return flags


def expected_losses(detector, images, sizes, targets):
    """Focal and L1 loss, anchor by anchor and class by class."""
    outputs = detector(images)
    strides = detector.pyramid.strides
    map_sizes = [(math.ceil(images.shape[2] / s), math.ceil(images.shape[3] / s)) for s in strides]
    anchors = detector.anchors(map_sizes, images.device)
    focal = l1 = 0.0
    positives = 0
    for logits, deltas, size, wanted in zip(
        outputs["cls_logits"].tolist(), outputs["bbox_regression"].tolist(), sizes, targets, strict=True
    ):
        inside = inside_own_padding(anchors, size, strides, map_sizes)
        places = [i for i, flag in enumerate(inside) if flag]
        matched = assign(anchors[places], wanted["boxes"]).tolist()
        positives += max(1, sum(match >= 0 for match in matched))
        for place, match in zip(places, matched, strict=True):
            if match == IGNORED:
                continue
            for category, logit in enumerate(logits[place]):
                p = 1 / (1 + math.exp(-logit))
                if match >= 0 and category == wanted["labels"][match]:
                    focal -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    focal -= 0.75 * p**2 * math.log(1 - p)
            if match >= 0:
                ax1, ay1, ax2, ay2 = anchors[place].tolist()
                bx1, by1, bx2, by2 = wanted["boxes"][match].tolist()
                code = [
                    ((bx1 + bx2) - (ax1 + ax2)) / 2 / (ax2 - ax1),
                    ((by1 + by2) - (ay1 + ay2)) / 2 / (ay2 - ay1),
                    math.log((bx2 - bx1) / (ax2 - ax1)),
                    math.log((by2 - by1) / (ay2 - ay1)),
                ]
                l1 += sum(abs(a - b) for a, b in zip(code, deltas[place], strict=True))
    return {"loss_cls": focal / positives, "loss_bbox": l1 / positives}


@pytest.mark.parametrize(
    ("sizes", "targets"),
    [
        ([(64, 96)], [CROWDED]),
        ([(64, 96), (60, 90)], [CROWDED, SPARSE]),
        ([(64, 96), (31, 50)], [CROWDED, SPARSE]),  # the second image leaves anchors out on both levels
        ([(64, 96), (32, 50), (64, 40)], [SPARSE, EMPTY, CROWDED]),
        ([(64, 96), (64, 30)], [EMPTY, EMPTY]),
    ],
)
def test_loss_equals_the_recipe(sizes, targets):
    detector = make_detector()
    images = torch.randn(len(sizes), 3, 64, 96, generator=torch.Generator().manual_seed(1))
    losses = detector.loss(images, sizes, targets)
    expected = expected_losses(detector, images, sizes, targets)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=2e-6)


def test_anchors_beyond_an_images_own_padding_matter():
    """The same image in a wider batch: the loss changes only by what is inside."""
    detector = make_detector()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    assert detector.loss(images, [(64, 96)], [SPARSE]) != detector.loss(images, [(64, 64)], [SPARSE])
    assert detector.loss(images, [(64, 65)], [SPARSE]) == detector.loss(images, [(64, 96)], [SPARSE])


def test_loss_of_a_batch_without_objects_is_finite_and_reaches_every_parameter():
    detector = make_detector()
    losses = detector.loss(torch.randn(2, 3, 64, 96), [(64, 96), (64, 96)], [EMPTY, EMPTY])
    assert losses["loss_bbox"].item() == 0
    assert losses["loss_cls"].item() > 0
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, f"{name} would stop a distributed run"
        assert parameter.grad.isfinite().all()


def test_gradient_equals_finite_differences_in_float64():
    detector = make_detector().double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = detector.head.regression_head.bbox_reg.bias
    arguments = (images, [(64, 96), (40, 60)], [CROWDED, SPARSE])
    sum(detector.loss(*arguments).values()).backward()
    with torch.no_grad():
        for index in (0, 7, 20):
            change = 1e-2  # float32 inside the loss: the L1 loss is piecewise linear, so a large step is exact enough
            bias[index] += change
            above = sum(detector.loss(*arguments).values())
            bias[index] -= 2 * change
            below = sum(detector.loss(*arguments).values())
            bias[index] += change
            assert ((above - below) / (2 * change)).item() == pytest.approx(bias.grad[index].item(), rel=0.05, abs=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype):
    detector = make_detector()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    arguments = (images, [(64, 96), (60, 90)], [CROWDED, SPARSE])
    exact = detector.loss(*arguments)
    with torch.autocast("cpu", dtype=dtype):
        losses = detector.loss(*arguments)
        detections = detector.predict(images, arguments[1])
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.02)
    assert detections[0]["boxes"].dtype == detections[0]["scores"].dtype == torch.float32


def test_extreme_logits_give_a_finite_loss():
    detector = make_detector(spread=2000.0)
    losses = detector.loss(torch.randn(1, 3, 64, 96), [(64, 96)], [CROWDED])
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(parameter.grad.isfinite().all() for parameter in detector.head.parameters())


def overlap(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def expected_detections(logits, deltas, anchors, per_level, size, options):
    """Threshold, best of each level, decode, clip, greedy suppression class by class, best of all."""
    candidates = []
    start = 0
    for count in per_level:
        level = [
            (1 / (1 + math.exp(-logits[place][category])), place, category)
            for place in range(start, start + count)
            for category in range(len(logits[0]))
        ]
        level = sorted((entry for entry in level if entry[0] > options["score_threshold"]), reverse=True)
        candidates += level[: options["candidates_per_level"]]
        start += count
    kept = []
    for score, place, category in sorted(candidates, reverse=True):
        x1, y1, x2, y2 = anchors[place]
        dx, dy, dw, dh = deltas[place]
        bound = math.log(1000 / 16)
        width = (x2 - x1) * math.exp(min(bound, max(-bound, dw)))
        height = (y2 - y1) * math.exp(min(bound, max(-bound, dh)))
        x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
        box = [
            min(max(x - width / 2, 0), size[1]),
            min(max(y - height / 2, 0), size[0]),
            min(max(x + width / 2, 0), size[1]),
            min(max(y + height / 2, 0), size[0]),
        ]
        if box[2] <= box[0] or box[3] <= box[1]:
            continue
        if all(other[2] != category or overlap(box, other[1]) <= options["nms_threshold"] for other in kept):
            kept.append((score, box, category))
    return kept[: options["detections_per_image"]]


@pytest.mark.parametrize(
    "options",
    [
        {"score_threshold": 0.05, "nms_threshold": 0.5, "candidates_per_level": 1000, "detections_per_image": 100},
        {"score_threshold": 0.2, "nms_threshold": 0.5, "candidates_per_level": 1000, "detections_per_image": 100},
        {"score_threshold": 0.05, "nms_threshold": 0.3, "candidates_per_level": 40, "detections_per_image": 100},
        {"score_threshold": 0.0, "nms_threshold": 0.7, "candidates_per_level": 200, "detections_per_image": 7},
        {"score_threshold": 1.0, "nms_threshold": 0.5, "candidates_per_level": 1000, "detections_per_image": 100},
    ],
)
def test_predictions_equal_the_recipe(options):
    detector = make_detector(**options)
    images = 2 * torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    sizes = [(64, 96), (50, 61)]
    with torch.no_grad():
        outputs = {name: value.tolist() for name, value in detector(images).items()}
    map_sizes = [(4, 6), (2, 3)]
    anchors = detector.anchors(map_sizes, images.device).tolist()
    for index, found in enumerate(detector.predict(images, sizes)):
        expected = expected_detections(
            outputs["cls_logits"][index],
            outputs["bbox_regression"][index],
            anchors,
            [4 * 6 * 9, 2 * 3 * 9],
            sizes[index],
            options,
        )
        assert found["labels"].tolist() == [entry[2] for entry in expected]
        assert found["scores"].tolist() == pytest.approx([entry[0] for entry in expected], abs=1e-6)
        boxes = torch.tensor([entry[1] for entry in expected]).reshape(-1, 4)
        torch.testing.assert_close(found["boxes"], boxes, atol=1e-4, rtol=0)
        assert (len(expected) == 0) == (options["score_threshold"] == 1.0)


def test_predictions_are_sorted_inside_the_image_and_carry_no_graph():
    detector = make_detector(spread=3.0)
    sizes = [(64, 96), (33, 47)]
    for found, (height, width) in zip(detector.predict(torch.randn(2, 3, 64, 96), sizes), sizes, strict=True):
        assert 0 < len(found["boxes"]) <= 100
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"][:, 2] <= width).all()
        assert (found["boxes"][:, 3] <= height).all()
        assert not any(value.requires_grad for value in found.values())


def test_validation_first_then_training():
    """Lightning validates under inference mode before the first step; what was cached there must not break training."""
    detector = make_detector()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        detector.predict(images, [(64, 96)])
        detector.loss(images, [(64, 96)], [SPARSE])
    sum(detector.loss(images, [(64, 96)], [SPARSE]).values()).backward()


def test_start_of_training_follows_the_recipe():
    """Normal(0.01) weights, zero biases, and a prior probability of 0.01 for every class."""
    torch.manual_seed(0)
    detector = RetinaNet(SmallPyramid(channels=32), 4)
    for name, parameter in detector.head.named_parameters():
        if name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1)
            assert abs(parameter.mean().item()) < 0.001
        elif "cls_logits" in name:
            assert parameter.sigmoid().tolist() == pytest.approx([0.01] * 36)
        else:
            assert not parameter.any()


@pytest.mark.parametrize("head_convs", [0, 1, 4, 5])
def test_number_of_stacked_convolutions(head_convs):
    detector = RetinaNet(SmallPyramid(), 2, head_convs=head_convs)
    names = set(detector.head.state_dict())
    for branch, last in (("classification_head", "cls_logits"), ("regression_head", "bbox_reg")):
        stacked = {f"{branch}.conv.{i}.0.{kind}" for i in range(head_convs) for kind in ("weight", "bias")}
        own = {name for name in names if name.startswith(branch)}
        assert own == stacked | {f"{branch}.{last}.weight", f"{branch}.{last}.bias"}
    detector.loss(torch.randn(1, 3, 64, 96), [(64, 96)], [target([[1, 2, 30, 40]], [1])])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_convs", -1),
        ("candidates_per_level", 0),
        ("detections_per_image", 0),
        ("score_threshold", 1.5),
        ("nms_threshold", -0.1),
    ],
)
def test_values_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=rf"{option} must be .*not {value}"):
        RetinaNet(SmallPyramid(), 2, **{option: value})


def test_no_classes_is_refused():
    with pytest.raises(ConfigError, match="num_classes must be at least 1, not 0"):
        RetinaNet(SmallPyramid(), 0)


def test_on_efficientvit_with_five_levels():
    torch.manual_seed(0)
    levels = ("p3", "p4", "p5", "p6", "p7")
    detector = RetinaNet(FeaturePyramid(create_backbone("efficientvit_m0"), levels=levels, out_channels=32), 5)
    images = torch.randn(2, 3, 96, 160)
    outputs = detector(images)
    cells = sum(math.ceil(96 / stride) * math.ceil(160 / stride) for stride in (8, 16, 32, 64, 128))
    assert outputs["cls_logits"].shape == (2, 9 * cells, 5)
    assert outputs["bbox_regression"].shape == (2, 9 * cells, 4)
    sum(detector.loss(images, [(96, 160), (90, 100)], [CROWDED, SPARSE]).values()).backward()
    unused = [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    assert unused == []


def test_learns_one_image():
    """A few steps on one image find both of its objects with the right classes."""
    torch.manual_seed(0)
    detector = RetinaNet(SmallPyramid(channels=32), 2, head_convs=1)
    images = torch.randn(1, 3, 128, 128)
    wanted = target([[10, 14, 70, 80], [64, 60, 120, 126]], [0, 1])
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(detector.loss(images, [(128, 128)], [wanted]).values()).backward()
        optimizer.step()
    found = detector.predict(images, [(128, 128)])[0]
    assert sorted(found["labels"][:2].tolist()) == [0, 1]
    for box, label in zip(found["boxes"][:2], found["labels"][:2], strict=True):
        assert overlap(box.tolist(), wanted["boxes"][label].tolist()) > 0.8


@pytest.mark.gpu
def test_cuda_equals_cpu():
    detector = make_detector(num_classes=20, strides=(8, 16, 32))
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    sizes, targets = [(64, 96), (31, 50), (64, 40)], [CROWDED, EMPTY, SPARSE]
    losses, detections = detector.loss(images, sizes, targets), detector.predict(images, sizes)
    detector.cuda()
    targets = [{name: value.cuda() for name, value in entry.items()} for entry in targets]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_device = detector.loss(images.cuda(), sizes, targets)
        found = detector.predict(images.cuda(), sizes)
    for name, value in on_device.items():
        torch.testing.assert_close(value.cpu(), losses[name], rtol=1e-4, atol=1e-5)
    for own, expected in zip(found, detections, strict=True):  # scores only: near ties may change places
        torch.testing.assert_close(own["scores"].cpu(), expected["scores"], rtol=1e-3, atol=1e-4)
