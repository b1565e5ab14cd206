"""Faster and Mask R-CNN on what data can hold; their numbers are compared with MMDetection's in tests/mmdet."""

import math

import pytest
import torch
from pycocotools import mask as coco_masks
from torch import nn

from effvit.errors import ConfigError
from effvit.tasks.detectors.rcnn import FasterRCNN, MaskRCNN

SIZE = (64, 96)


class SmallPyramid(nn.Module):
    """Stand-in for a feature pyramid: one strided convolution a level."""

    def __init__(self, strides=(4, 8, 16, 32, 64), channels=8):
        super().__init__()
        self.strides, self.out_channels = strides, channels
        self.stems = nn.ModuleList(
            nn.Conv2d(3, channels, 2 * stride - 1, stride=stride, padding=stride - 1) for stride in strides
        )

    def forward(self, images):
        return {f"p{number}": stem(images).relu() for number, stem in enumerate(self.stems, 2)}


def make(kind=MaskRCNN, **options):
    torch.manual_seed(0)
    return kind(SmallPyramid(), 3, **{"head_channels": 16, "roi_samples": 64, **options})


def target(count, original=(32, 48), side=None):
    generator = torch.Generator().manual_seed(count)
    corners = torch.rand(count, 2, generator=generator) * 40
    sides = torch.rand(count, 2, generator=generator) * 22 + 1 if side is None else torch.full((count, 2), side)
    masks = (torch.rand(count, *original, generator=generator) > 0.5).to(torch.uint8)
    boxes = torch.cat([corners, corners + sides], dim=1)
    return {"boxes": boxes, "labels": torch.randint(0, 3, (count,), generator=generator), "masks": masks}


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN])
@pytest.mark.parametrize(
    "targets",
    [
        [target(0), target(3)],
        [target(3), target(0), target(2)],
        [target(0), target(0)],  # also images with nothing but crowds: the data leaves those out
        [target(300)],
        [target(1, side=1.0)],
        [target(2, side=0.01)],
        [target(2, original=(700, 900), side=1.0)],  # the mask's pixels may all fall between those of the image
    ],
    ids=["first_empty", "middle_empty", "all_empty", "300", "one_pixel", "a_point", "vanishing"],
)
def test_losses_are_finite_and_reach_every_parameter(kind, targets):
    detector = make(kind)
    losses = detector.loss(torch.randn(len(targets), 3, *SIZE), [SIZE] * len(targets), targets)
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_bbox", "loss_cls", "loss_bbox"} | (
        {"loss_mask"} if kind is MaskRCNN else set()
    )
    sum(losses.values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, f"{name} would stop a distributed run"
        assert parameter.grad.isfinite().all(), name
    assert (losses["loss_bbox"].item() > 0) == any(len(own["boxes"]) for own in targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_detections_are_float32_under_autocast(dtype):
    detector = make(score_threshold=0.01)
    arguments = (torch.randn(2, 3, *SIZE), [SIZE, (50, 60)])
    exact = detector.loss(*arguments, [target(4), target(2)])
    with torch.autocast("cpu", dtype=dtype):
        losses = detector.loss(*arguments, [target(4), target(2)])
        found = detector.predict(*arguments)[0]
    for name, value in losses.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32


def test_detections_are_sorted_inside_the_original_image_and_have_masks_there():
    detector = make(score_threshold=0.1)
    sizes, originals = [SIZE, (33, 47)], [(128, 192), (99, 141)]
    for found, (height, width) in zip(
        detector.predict(torch.randn(2, 3, *SIZE), sizes, originals), originals, strict=True
    ):
        assert 0 < len(found["boxes"]) == len(found["rles"]) <= 100
        assert (found["scores"].diff() <= 0).all()
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height]).repeat(2) + 1e-3).all()
        assert found["boxes"][:, 2].max() > 0.6 * width
        assert not found["boxes"].requires_grad
        for rle, box in zip(found["rles"], found["boxes"].tolist(), strict=True):
            assert rle["size"] == [height, width]
            x, y, w, h = coco_masks.toBbox(rle)
            assert not w or (x >= box[0] - 1 and y >= box[1] - 1 and x + w <= box[2] + 1 and y + h <= box[3] + 1)


def test_nothing_over_the_threshold_gives_no_detections():
    found = make(score_threshold=1.0).predict(torch.randn(2, 3, *SIZE), [SIZE] * 2)
    assert [(own["boxes"].shape, own["rles"]) for own in found] == [((0, 4), [])] * 2


def test_the_same_seed_draws_the_same_samples():
    detector, images = make(), torch.randn(1, 3, *SIZE)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(detector.loss(images, [SIZE], [target(40)])["loss_rpn_cls"].item())
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize("kind", [FasterRCNN, MaskRCNN])
def test_raw_outputs_on_the_meta_device(kind):
    outputs = make(kind).to("meta")(torch.zeros(2, 3, *SIZE, device="meta"))
    cells = [math.ceil(SIZE[0] / stride) * math.ceil(SIZE[1] / stride) for stride in (4, 8, 16, 32, 64)]
    assert [level.shape for level in outputs["objectness"]] == [(2, 3 * count) for count in cells]
    assert outputs["cls_logits"].shape == (2000, 4)
    assert outputs["bbox_regression"].shape == (2000, 3, 4)
    assert kind is FasterRCNN or outputs["mask_logits"].shape == (200, 3, 28, 28)


def test_class_parameters_are_those_that_another_number_of_classes_changes():
    few, many = make().state_dict(), MaskRCNN(SmallPyramid(), 7, head_channels=16).state_dict()
    changed = {name for name in few if few[name].shape != many[name].shape}
    assert changed == {name for name in few if name.startswith(make().class_parameters)}


def test_start_of_training_follows_the_recipe():
    """MMDetection's: Gaussians of 0.01 and 0.001 before classes and boxes, Xavier, Kaiming; all biases zero."""
    detector = MaskRCNN(SmallPyramid(channels=32), 20)
    own = [(name, p) for name, p in detector.named_parameters() if not name.startswith("pyramid")]
    assert not any(p.any() for name, p in own if name.endswith("bias"))
    spread = {name: p.std().item() for name, p in own if name.endswith("weight")}
    assert spread["rpn.head.conv.0.0.weight"] == pytest.approx(0.01, rel=0.05)
    assert spread["roi_heads.box_predictor.cls_score.weight"] == pytest.approx(0.01, rel=0.05)
    assert spread["roi_heads.box_predictor.bbox_pred.weight"] == pytest.approx(0.001, rel=0.05)
    assert spread["roi_heads.box_head.fc7.weight"] == pytest.approx(math.sqrt(2 / 2048), rel=0.05)
    assert spread["roi_heads.mask_head.0.0.weight"] == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("head_channels", 0),
        ("roi_samples", 0),
        ("detections_per_image", 0),
        ("score_threshold", 1.5),
        ("head_convs", -1),
        ("nms_threshold", 0),
    ],
)
def test_values_out_of_range_are_named(option, value):
    with pytest.raises(ConfigError, match=rf"{option} must be .*not {value}"):
        MaskRCNN(SmallPyramid(), 2, **{option: value})


def test_boxes_without_masks_are_refused():
    without = {name: value for name, value in target(2).items() if name != "masks"}
    with pytest.raises(ConfigError, match="load it with masks"):
        make().loss(torch.randn(1, 3, *SIZE), [SIZE], [without])
    make(FasterRCNN).loss(torch.randn(1, 3, *SIZE), [SIZE], [without])


@pytest.mark.gpu
def test_cuda_equals_cpu():
    detector = make(score_threshold=0.1)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    arguments = ([SIZE, (31, 50)], [target(5), target(0)])
    torch.manual_seed(0)
    losses, found = detector.loss(images, *arguments), detector.predict(images, arguments[0])
    detector.cuda()
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        on_device = detector.loss(images.cuda(), *arguments)
        found_there = detector.predict(images.cuda(), arguments[0])
    for name, value in on_device.items():
        torch.testing.assert_close(value.cpu(), losses[name], rtol=1e-3, atol=1e-4)
    for own, expected in zip(found_there, found, strict=True):
        torch.testing.assert_close(own["scores"].cpu(), expected["scores"], rtol=1e-3, atol=1e-4)
        assert len(own["rles"]) == len(own["scores"])
