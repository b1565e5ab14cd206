"""SSDLite against the published sizes, and its loss and predictions against the recipe in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effvit.backbones import Backbone, FeatureMap, backbone_info, create_backbone, without_memory
from effvit.errors import CheckpointError, ConfigError
from effvit.tasks.detectors._cvnets_checkpoint import is_cvnets, load_cvnets
from effvit.tasks.detectors.default_boxes import DefaultBoxes
from effvit.tasks.detectors.ssd_head import SSDHead, make_coarser
from effvit.tasks.detectors.ssdlite import SSDLite

LEVELS = (16, 32, 64, 128, 256)


class Stub(Backbone):
    """The quickest network with maps of some strides, the finest 16 or less, and a parameter that no map reads."""

    info = backbone_info("mobilevit_xxs")

    def __init__(self, strides=(16, 32)):
        super().__init__()
        self.feature_maps = tuple(FeatureMap(f"c{int(math.log2(stride))}", 48 + stride, stride) for stride in strides)
        self.stems = nn.ModuleList(
            nn.Conv2d(3, spec.channels, spec.stride - 1, spec.stride, spec.stride // 2 - 1)
            for spec in self.feature_maps
        )
        self.unread = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return {spec.level: stem(images).relu() for spec, stem in zip(self.feature_maps, self.stems, strict=True)}

    def _unused(self, *_):
        raise NotImplementedError

    embed = make_classifier = no_weight_decay = layer_of = fuse = convert_key = _unused


def small(num_classes=3, backbone=None, spread=1.0, **options):
    """A detector whose random logits are spread enough for every branch of the post-processing."""
    torch.manual_seed(0)
    detector = SSDLite(backbone or Stub(), num_classes, **options)
    with torch.no_grad():
        for head in detector.heads:
            for predictor in (head.boxes, head.classes):
                predictor.weight.mul_(spread)
                predictor.bias.normal_(0, spread)
    return detector


def target(boxes, labels):
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels).long()}


CROWDED = target([[4, 4, 60, 50], [6, 5, 60, 52], [30, 30, 36, 40], [0, 0, 90, 60], [50, 2, 58, 61]], [0, 1, 2, 2, 0])
SPARSE = target([[8, 8, 40, 30]], [1])
EMPTY = target([], [])
SIZE = (64, 96)


def images_for(number, size=SIZE):
    return torch.randn(number, 3, *size, generator=torch.Generator().manual_seed(1))


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mobilevit_xxs", 1_755_050),
        pytest.param("mobilevit_xs", 2_742_042, marks=pytest.mark.slow),
        pytest.param("mobilevit_s", 5_738_826, marks=pytest.mark.slow),
        ("mobilevitv2_100", 5.6e6),
        *(
            pytest.param(f"mobilevitv2_{width:03}", parameters, marks=pytest.mark.slow)
            for width, parameters in (
                (50, 2.0e6),
                (75, 3.6e6),
                (125, 8.2e6),
                (150, 11.3e6),
                (175, 14.9e6),
                (200, 19.1e6),
            )
        ),
    ],
)
def test_parameters_are_those_published_for_coco(name, parameters):
    """Of v1 to the digit (counted in ml-cvnets' code), of v2 as its table rounds; frozen leftovers not counted."""
    with without_memory():
        detector = SSDLite(create_backbone(name), 80)
        outputs = detector(torch.empty(2, 3, 320, 320))
    found = sum(parameter.numel() for parameter in detector.parameters() if parameter.requires_grad)
    assert found == parameters if isinstance(parameters, int) else abs(found - parameters) < 5e4
    assert outputs["cls_logits"].shape == (2, 3232, 81)
    assert outputs["bbox_regression"].shape == (2, 3232, 4)


@pytest.mark.parametrize("strides", [(16,), (4, 8, 16, 32), (16, 32, 64), (8, 16, 64)])
def test_every_backbone_gets_the_same_levels(strides):
    """The strides of DynamicViT, EfficientFormer and EfficientViT, and some with a gap."""
    detector = SSDLite(Stub(strides), 80)
    own = [stride for stride in strides if stride >= 16]
    assert [stride for stride, level in zip(LEVELS, detector.levels, strict=True) if level] == own
    assert list(detector.coarser) == [str(stride) for stride in LEVELS if stride not in own] + ["global"]
    assert [head.classes.out_channels for head in detector.heads] == [6 * 81] * 5 + [4 * 81]
    unread = {f"backbone.stems.{i}.{name}" for i, s in enumerate(strides) for name in ("weight", "bias") if s < 16}
    frozen = {name for name, parameter in detector.named_parameters() if not parameter.requires_grad}
    assert frozen == unread | {"backbone.unread"}
    outputs = detector.eval()(images_for(1, (320, 320)))
    assert outputs["cls_logits"].shape == (1, 3232, 81)


def test_a_backbone_without_stride_16_is_refused():
    with pytest.raises(ConfigError, match=r"starts at stride 16, and mobilevit_xxs has maps of the strides 4, 8"):
        SSDLite(Stub((4, 8)), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 0},
        {"candidates": 0},
        {"detections_per_image": 0},
        {"score_threshold": -0.1},
        {"nms_threshold": 0},
        {"nms_threshold": 2},
    ],
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SSDLite(Stub(), **{"num_classes": 3, **options})


# Anchors


def plain_anchors(map_sizes, size):
    """Section 2.2 of the SSD paper by loops: corners in pixels, ratios 2 and 3 (2 on the last level)."""
    scales = [0.1 + 0.95 / 6 * level for level in range(7)]
    anchors = []
    for level, (rows, columns) in enumerate(map_sizes):
        scale = scales[level]
        sides = [(scale, scale), (math.sqrt(scale * scales[level + 1]),) * 2]
        for ratio in (2, 3) if level < 5 else (2,):
            wide, narrow = scale * math.sqrt(ratio), scale / math.sqrt(ratio)
            sides += [(wide, narrow), (narrow, wide)]
        for y in range(rows):
            for x in range(columns):
                for w, h in ((min(w, 1.0), min(h, 1.0)) for w, h in sides):
                    cx, cy = (x + 0.5) / columns, (y + 0.5) / rows
                    corners = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                    anchors.append([side * size[1 - i % 2] for i, side in enumerate(corners)])
    return torch.tensor(anchors, dtype=torch.float64)


@pytest.mark.parametrize("size", [(320, 320), (96, 200)])
def test_anchors_are_those_of_the_paper(size):
    map_sizes = [tuple(math.ceil(side / stride) for side in size) for stride in LEVELS] + [(1, 1)]
    generator = DefaultBoxes(((2, 3),) * 5 + ((2,),))
    found = generator(map_sizes, size, torch.device("cpu"))
    expected = plain_anchors(map_sizes, size)
    assert size != (320, 320) or len(found) == 3232
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert generator(map_sizes, size, torch.device("cpu")) is found


# Loss


def overlap(a, b):
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0.0) * max(h, 0.0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def plain_match(anchors, boxes):
    """The object of each anchor, or None: its best one from an IoU of 0.5 on, and the one whose best anchor it is."""
    matched = []
    for anchor in anchors:
        overlaps = [overlap(anchor, box) for box in boxes]
        best = max(range(len(boxes)), key=overlaps.__getitem__, default=None)
        matched.append(best if best is not None and overlaps[best] >= 0.5 else None)
    for number, box in enumerate(boxes):
        matched[max(range(len(anchors)), key=lambda i, box=box: overlap(anchors[i], box))] = number
    return matched


def encode(anchor, box):
    (ax, ay, aw, ah), (bx, by, bw, bh) = (
        ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (anchor, box)
    )
    return [(bx - ax) / aw / 0.1, (by - ay) / ah / 0.1, math.log(bw / aw) / 0.2, math.log(bh / ah) / 0.2]


def plain_losses(outputs, anchors, targets):
    """Smooth L1 and mined cross-entropy, anchor by anchor."""
    boxes_loss = class_loss = 0.0
    positives = 0
    for logits, codes, wanted in zip(
        outputs["cls_logits"].double().tolist(), outputs["bbox_regression"].double().tolist(), targets, strict=True
    ):
        boxes, labels = wanted["boxes"].tolist(), wanted["labels"].tolist()
        matched = plain_match(anchors, boxes)
        negatives = []
        found = 0
        for row, code, anchor, match in zip(logits, codes, anchors, matched, strict=True):
            total = math.log(sum(math.exp(value) for value in row))
            if match is None:
                negatives.append(total - row[-1])
                continue
            found += 1
            class_loss += total - row[labels[match]]
            for value, aim in zip(code, encode(anchor, boxes[match]), strict=True):
                gap = abs(value - aim)
                boxes_loss += 0.5 * gap**2 if gap < 1 else gap - 0.5
        class_loss += sum(sorted(negatives, reverse=True)[: 3 * found])
        positives += found
    return {"loss_cls": class_loss / max(positives, 1), "loss_bbox": boxes_loss / max(positives, 1)}


@pytest.mark.parametrize(
    "targets", [(CROWDED, SPARSE), (EMPTY, CROWDED, EMPTY), (EMPTY, EMPTY)], ids=["full", "some empty", "all empty"]
)
def test_loss_equals_the_recipe(targets):
    detector = small().train()
    images = images_for(len(targets))
    with torch.no_grad():
        losses = detector.loss(images, [SIZE] * len(targets), targets)
        outputs = detector(images)
    map_sizes = [tuple(math.ceil(side / stride) for side in SIZE) for stride in LEVELS] + [(1, 1)]
    expected = plain_losses(outputs, plain_anchors(map_sizes, SIZE).tolist(), targets)
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=2e-4)
    assert (expected["loss_cls"] == 0) == (all(not len(own["boxes"]) for own in targets))


def random_objects(number):
    generator = torch.Generator().manual_seed(number)
    corner = torch.rand(number, 2, generator=generator) * torch.tensor([80.0, 50.0])
    boxes = torch.cat([corner, corner + 1 + 13 * torch.rand(number, 2, generator=generator)], dim=1)
    return {"boxes": boxes, "labels": torch.arange(number) % 3}


@pytest.mark.parametrize(
    "targets",
    [
        (EMPTY, SPARSE),
        (SPARSE, EMPTY),
        (EMPTY, EMPTY),
        (random_objects(300), EMPTY),
        (target([[10, 10, 11, 11], [5, 5, 5.01, 5.01]], [0, 1]), SPARSE),  # a pixel, and less
        (target([[10, 10, 10, 20], [0, 0, 0, 0]], [0, 1]), EMPTY),  # no area at all
        (target([[0, 0, 96, 64]], [2]), target([[-5, -5, 200, 100]], [0])),  # the whole image, and beyond
    ],
    ids=["first empty", "last empty", "all empty", "crowd", "tiny", "no area", "whole"],
)
def test_any_batch_gives_finite_losses_and_every_parameter_a_gradient(targets):
    detector = small().train()
    losses = detector.loss(images_for(2), [SIZE] * 2, targets)
    assert set(losses) == {"loss_cls", "loss_bbox"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


def test_one_small_image_can_be_trained_on():
    """Its coarse maps have one cell, of which BatchNorm can take no statistics."""
    detector = small().train()
    before = detector.heads[4].mix[1].running_mean.clone()
    losses = detector.loss(images_for(1), [SIZE], [SPARSE])
    assert all(torch.isfinite(value) for value in losses.values())
    assert torch.equal(detector.heads[4].mix[1].running_mean, before)
    assert not torch.equal(detector.heads[0].mix[1].running_mean, torch.zeros_like(before[:1]).expand(512))


# Predictions


def plain_predictions(detector, outputs, anchors, size, original):
    """Per class the best 400 above the threshold, suppressed; the best 200 of all, in pixels of the original."""
    found = []
    scores = outputs["cls_logits"][0].double().softmax(dim=-1).tolist()
    codes = outputs["bbox_regression"][0].double().tolist()
    for label in range(detector.num_classes):
        candidates = sorted(
            ((row[label], place) for place, row in enumerate(scores) if row[label] > detector.score_threshold),
            reverse=True,
        )[: detector.candidates]
        kept = []
        for score, place in candidates:
            x1, y1, x2, y2 = anchors[place]
            dx, dy, dw, dh = codes[place]
            w, h = (x2 - x1) * math.exp(0.2 * dw), (y2 - y1) * math.exp(0.2 * dh)
            cx, cy = (x1 + x2) / 2 + 0.1 * dx * (x2 - x1), (y1 + y2) / 2 + 0.1 * dy * (y2 - y1)
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            if all(overlap(box, other) <= detector.nms_threshold for _, _, other in kept):
                kept.append((score, label, box))
        found += kept
    found = sorted(found, reverse=True)[: detector.detections_per_image]
    factors = [original[1] / size[1], original[0] / size[0]]
    boxes = [[min(max(side * factors[i % 2], 0), original[1 - i % 2]) for i, side in enumerate(b)] for *_, b in found]
    return boxes, [score for score, _, _ in found], [label for _, label, _ in found]


@pytest.mark.parametrize("options", [{}, {"candidates": 5, "detections_per_image": 12, "score_threshold": 0.3}])
def test_predictions_equal_the_recipe(options):
    detector = small(spread=2.0, **options).eval()
    images, original = images_for(1), (200, 100)
    (found,) = detector.predict(images, [SIZE], [original])
    with torch.no_grad():
        outputs = detector(images)
    map_sizes = [tuple(math.ceil(side / stride) for side in SIZE) for stride in LEVELS] + [(1, 1)]
    anchors = plain_anchors(map_sizes, SIZE).tolist()
    boxes, scores, labels = plain_predictions(detector, outputs, anchors, SIZE, original)
    assert len(scores) > 10
    torch.testing.assert_close(found["boxes"].double(), torch.tensor(boxes).double(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found["scores"].double(), torch.tensor(scores).double(), rtol=1e-5, atol=1e-6)
    assert found["labels"].tolist() == labels


def test_boxes_are_in_pixels_of_the_input_where_no_original_is_named():
    detector = small(spread=2.0).eval()
    (here,) = detector.predict(images_for(1), [SIZE])
    (there,) = detector.predict(images_for(1), [SIZE], [(128, 96)])
    torch.testing.assert_close(here["boxes"] * torch.tensor([1.0, 2.0, 1.0, 2.0]), there["boxes"])


def test_nothing_may_be_found():
    detector = small(score_threshold=1.0).eval()
    (found,) = detector.predict(images_for(1), [SIZE])
    assert [tuple(found[name].shape) for name in ("boxes", "scores", "labels")] == [(0, 4), (0,), (0,)]


def test_it_learns_two_images():
    """Both objects found at their places after a few steps: labels, codes and anchors agree with each other."""
    detector = small(spread=0.1).train()
    images = images_for(2)
    targets = [target([[8, 8, 40, 40]], [1]), target([[40, 10, 90, 50]], [2])]
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        sum(detector.loss(images, [SIZE] * 2, targets).values()).backward()
        optimizer.step()
    with torch.no_grad():  # with the statistics of this batch: 25 steps are too few for running ones
        found = detector.predict(images, [SIZE] * 2)
    for own, wanted in zip(found, targets, strict=True):
        assert own["labels"][0] == wanted["labels"][0]
        assert overlap(own["boxes"][0].tolist(), wanted["boxes"][0].tolist()) > 0.7


# Apple's files


class PlainSeparable(nn.Module):
    """Depthwise 3x3 with BatchNorm, pointwise with a bias or with BatchNorm and ReLU."""

    def __init__(self, channels, out_channels, stride, *, predicts):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=predicts)
        self.last = None if predicts else nn.BatchNorm2d(out_channels)

    def forward(self, x):
        x = self.pointwise(self.norm(self.depthwise(x)))
        return x if self.last is None else self.last(x).relu()

    def entries(self, prefix):
        """Under Apple's names."""
        parts = {"dw_conv.block.conv": self.depthwise, "dw_conv.block.norm": self.norm}
        parts |= {"pw_conv.block.conv": self.pointwise} | ({"pw_conv.block.norm": self.last} if self.last else {})
        return {
            f"{prefix}.{part}.{name}": v for part, module in parts.items() for name, v in module.state_dict().items()
        }


def randomise_norms(module):
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    return module.eval()


class PlainSSD:
    """The layers after the backbone as Apple's file holds them: the background first, boxes and classes together."""

    def __init__(self, channels, num_classes):
        torch.manual_seed(3)
        self.outputs = 4 + num_classes + 1
        given = {16: channels[0], 32: channels[1], 64: 256, 128: 128, 256: 128}
        before = channels[1]
        self.extras = {}
        for stride in LEVELS[2:]:
            self.extras[stride] = randomise_norms(PlainSeparable(before, given[stride], 2, predicts=False))
            before = given[stride]
        self.last = nn.Conv2d(128, 64, 1, bias=False)
        self.projections, self.heads = {}, {}
        for level, (stride, width) in enumerate(zip(LEVELS, (512, 256, 256, 128, 128), strict=True)):
            if given[stride] != width:
                self.projections[level] = randomise_norms(
                    nn.Sequential(nn.Conv2d(given[stride], width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
                )
            self.heads[level] = randomise_norms(PlainSeparable(width, 6 * self.outputs, 1, predicts=True))
        self.heads[5] = nn.Conv2d(64, 4 * self.outputs, 1)

    def entries(self):
        state = {"extra_layers.os_-1.1.block.conv.weight": self.last.weight.detach()}
        for stride, extra in self.extras.items():
            state |= extra.entries(f"extra_layers.os_{stride}")
        for level, (convolution, norm, _) in self.projections.items():
            state[f"ssd_heads.{level}.proj_layer.block.conv.weight"] = convolution.weight.detach()
            state |= {f"ssd_heads.{level}.proj_layer.block.norm.{k}": v for k, v in norm.state_dict().items()}
        for level in range(5):
            state |= self.heads[level].entries(f"ssd_heads.{level}.loc_cls_layer")
        last = self.heads[5].state_dict()
        return state | {f"ssd_heads.5.loc_cls_layer.block.conv.{name}": value for name, value in last.items()}

    @torch.no_grad()
    def __call__(self, maps):
        maps = list(maps)
        for extra in self.extras.values():
            maps.append(extra(maps[-1]))
        maps.append(self.last(F.adaptive_avg_pool2d(maps[-1], 1)).relu())
        raw = []
        for level, given in enumerate(maps):
            x = self.heads[level](self.projections[level](given) if level in self.projections else given)
            raw.append(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.outputs))
        return torch.cat(raw, dim=1)


def apple_file(backbone, plain):
    encoder = {f"encoder.{name}": v for name, v in backbone.state_dict().items() if "final_conv" not in name}
    # Apple's name of the first convolution, which says that it reads BGR.
    encoder["encoder.conv_1.block.conv.weight"] = encoder.pop("encoder.stem.conv.weight").flip(1)
    return encoder | plain.entries()


@pytest.fixture(scope="module")
def xxs():
    torch.manual_seed(5)
    return create_backbone("mobilevit_xxs").eval()


def test_apples_file_gives_apples_outputs(xxs):
    plain = PlainSSD((64, 80), num_classes=3)
    state = apple_file(xxs, plain)
    detector = small(backbone=create_backbone("mobilevit_xxs")).eval()
    assert is_cvnets(state)
    assert not is_cvnets(detector.state_dict())
    report = load_cvnets(detector, state, "ssd.pt")
    assert all("final_conv" in name for name in report.missing)
    assert not report.unexpected
    images = images_for(2, (128, 160))
    with torch.no_grad():
        maps = xxs(images)
        outputs = detector(images)
    raw = plain([maps["c4"], maps["c5"]])
    torch.testing.assert_close(outputs["bbox_regression"], raw[..., :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs["cls_logits"], raw[..., 4:].roll(-1, dims=-1), rtol=1e-4, atol=1e-5)


def test_apples_file_of_something_else_is_refused(xxs):
    state = apple_file(xxs, PlainSSD((64, 80), num_classes=3))
    with pytest.raises(CheckpointError, match="trained on 3 classes and this detector is for 7"):
        load_cvnets(small(num_classes=7), state, "ssd.pt")
    lacking = {name: value for name, value in state.items() if not name.startswith("extra_layers.os_64")}
    with pytest.raises(CheckpointError, match=r"does not fit an SSDLite on mobilevit_xxs: .* first coarser\.64"):
        load_cvnets(small(), lacking, "ssd.pt")
    with pytest.raises(CheckpointError, match=r"first heads\.0\.project"):
        load_cvnets(small(), apple_file(xxs, PlainSSD((48, 80), num_classes=3)), "ssd.pt")
    with pytest.raises(CheckpointError, match=r"--model\.detector ssdlite"):
        load_cvnets(nn.Identity(), state, "ssd.pt")


# Layers


def test_layers_keep_and_halve_sizes():
    x = torch.randn(2, 8, 5, 7)
    boxes, classes = SSDHead(8, 16, 6, 4)(x)
    assert boxes.shape == (2, 5 * 7 * 6, 4)
    assert classes.shape == (2, 5 * 7 * 6, 4)
    assert make_coarser(8, 12)(x).shape == (2, 12, 3, 4)
    assert isinstance(SSDHead(16, 16, 6, 4).project, nn.Identity)
