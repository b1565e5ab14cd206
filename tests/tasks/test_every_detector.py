"""Every family trains and predicts under every built-in detector, whatever a batch holds."""

from __future__ import annotations

import math

import pytest
import torch
from pycocotools import mask as mask_api

from effvit.errors import CheckpointError, ConfigError
from effvit.tasks import Detection
from effvit.tasks.detectors.factory import DETECTORS

CLASSES = {1: "disc", 3: "bar", 90: "ring"}
FAMILIES = (
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "dynamicvit_tiny",
)
OBJECTS = torch.tensor([[4.0, 4.0, 40.0, 44.0], [30.0, 10.0, 90.0, 60.0]])
SMALL = {"pyramid_channels": 16, "head_convs": 1, "head_channels": 32, "roi_samples": 32}


def small(detector, backbone="efficientvit_m0", **options):
    torch.manual_seed(0)
    return Detection(backbone, CLASSES, detector=detector, norm_eval=False, **SMALL, **options)


def target(number, boxes, size, original_size=(100, 150)):
    """The target of an image ``size`` = (height, width) whose objects are ellipses in their boxes."""
    rows, columns = torch.meshgrid(*(torch.arange(side) + 0.5 for side in original_size), indexing="ij")
    scale = torch.tensor([original_size[1] / size[1], original_size[0] / size[0]] * 2)
    masks = []
    for x1, y1, x2, y2 in (boxes * scale).tolist():
        inside = ((columns - (x1 + x2) / 2) / (x2 - x1)) ** 2 + ((rows - (y1 + y2) / 2) / (y2 - y1)) ** 2 <= 0.25
        masks.append(inside.to(torch.uint8))
    return {
        "image_id": number,
        "boxes": boxes,
        "labels": torch.arange(len(boxes)) % len(CLASSES),
        "masks": torch.stack(masks) if masks else torch.zeros(0, *original_size, dtype=torch.uint8),
        "size": size,
        "original_size": original_size,
        "file_name": f"{number}.jpg",
    }


def batch(*boxes, size=(64, 96)):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (len(boxes), 3, *size), dtype=torch.uint8, generator=generator)
    return images, [target(number, own, size) for number, own in enumerate(boxes)]


def train(task, data):
    """One backward pass: finite losses, and a finite gradient in every parameter, as distributed training asks."""
    task.train()
    task.zero_grad()
    images, sizes = task.prepare(data)
    losses = task.detector.loss(images, sizes, data[1])
    assert all(math.isfinite(value.item()) for value in losses.values()), losses
    sum(losses.values()).backward()
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    return {name: value.item() for name, value in losses.items()}


@pytest.mark.parametrize("detector", sorted(DETECTORS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_predicts(family, detector):
    task = small(detector, family, score_threshold=0.0, detections_per_image=20)
    data = batch(OBJECTS)
    losses = train(task, data)
    assert sum(losses.values()) > 0
    with torch.no_grad():
        found = task.eval().detect(data)
    assert len(found) == 1
    for one in found:
        assert len(one["boxes"]) == len(one["scores"]) == len(one["labels"]) > 0
        assert (one["boxes"][:, 2:] > one["boxes"][:, :2]).all()
        assert one["boxes"].min() >= 0
        assert (one["boxes"].amax(0) <= torch.tensor([150.0, 100.0, 150.0, 100.0]) + 1e-3).all()
        assert set(one["labels"].tolist()) <= {0, 1, 2}
        assert (one["scores"].diff() <= 0).all()
        assert ("rles" in one) == (detector == "mask_rcnn")
        for rle in one.get("rles", []):
            assert mask_api.decode(rle).shape == (100, 150)


NONE = torch.zeros(0, 4)


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_images_without_objects_stand_anywhere_in_a_batch(detector):
    task = small(detector)
    names = set(train(task, batch(OBJECTS)))
    for boxes in ((NONE, OBJECTS), (OBJECTS, NONE, OBJECTS[:1]), (OBJECTS, NONE), (NONE, NONE)):
        losses = train(task, batch(*boxes))
        assert set(losses) == names
        assert (losses["loss_bbox"] > 0) == any(len(own) for own in boxes)


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_a_crowd_of_three_hundred_and_an_object_of_one_pixel(detector):
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(300, 2, generator=generator) * torch.tensor([80.0, 50.0])
    sides = 1 + torch.rand(300, 2, generator=generator) * torch.tensor([15.0, 13.0])
    crowd = torch.cat([corners, corners + sides], dim=1)
    pixel = torch.tensor([[50.0, 20.0, 51.0, 21.0]])
    task = small(detector)
    torch.manual_seed(0)
    empty = train(task, batch(NONE))
    assert empty["loss_bbox"] == 0
    for objects in (crowd, pixel):  # the image is the same
        torch.manual_seed(0)
        losses = train(task, batch(objects))
        assert losses["loss_bbox"] > 0
        assert losses["loss_cls"] != empty["loss_cls"]


@pytest.mark.parametrize("detector", sorted(DETECTORS))
def test_weights_for_other_classes_say_for_how_many(detector):
    other = Detection("efficientvit_m0", {0: "one", 1: "two"}, detector=detector, **SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r"a\.ckpt was trained on 2 classes, the data has 3: disc, bar, ring"):
        small(detector).load_weights(other, "a.ckpt")


def test_masks_that_are_not_in_the_data_are_asked_for():
    data = batch(OBJECTS)
    for one in data[1]:
        del one["masks"]
    task = small("mask_rcnn")
    images, sizes = task.prepare(data)
    with pytest.raises(ConfigError, match="learns from masks"):
        task.detector.loss(images, sizes, data[1])


def test_settings_that_a_detector_does_not_read_are_named(caplog):
    small("ssdlite")
    assert "the detector ssdlite does not read pyramid_channels" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "mask_rcn"}, "there is no detector 'mask_rcn'. Did you mean 'mask_rcnn'"),
        ({"detector": "mmdet"}, "needs a configuration of MMDetection: pass --model.mmdet_config"),
        ({"mmdet_config": "a.py"}, "mmdet_config is for the detector mmdet"),
        ({"backbone": None}, "retinanet needs a backbone: pass --model.backbone"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Detection(**({"backbone": "efficientvit_m0", "categories": CLASSES} | options))
