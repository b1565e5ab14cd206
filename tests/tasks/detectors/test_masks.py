"""Targets of the mask head and pasted masks against the plain way, at full size."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_masks
from torchvision.ops import roi_align

from effvit.tasks.detectors import masks as module
from effvit.tasks.detectors.masks import mask_targets, paste


def blobs(count, height, width, seed=0):
    """Smooth random shapes ``(N, height, width)``, some over the border."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 5, 6, generator=generator)
    return (F.interpolate(coarse, (height, width), mode="bicubic")[:, 0] > 0.5).to(torch.uint8)


def regions(count, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height]) * 1.1 - 3
    return torch.cat([ends.amin(dim=1), ends.amax(dim=1) + 0.3], dim=1)


def targets_at_full_size(masks, objects, boxes, size, padded):
    """Every mask resized by OpenCV and padded, one copy a region, RoIAlign, one half."""
    resized = np.stack([cv2.resize(mask.numpy(), size[::-1], interpolation=cv2.INTER_NEAREST) for mask in masks])
    full = F.pad(torch.from_numpy(resized).float(), (0, padded[1] - size[1], 0, padded[0] - size[0]))[objects]
    boxes = boxes.clamp(min=0).minimum(torch.tensor([padded[1], padded[0]] * 2).float())
    index = torch.arange(len(boxes)).float()[:, None]
    return (roi_align(full[:, None], torch.cat([index, boxes], dim=1), (28, 28), 1.0, -1, True)[:, 0] >= 0.5).float()


@pytest.mark.parametrize("original", [(60, 90), (120, 180), (97, 251), (301, 403), (40, 2)])
@pytest.mark.parametrize("bound", [1, 200_000, 2**26])
def test_targets_equal_masks_at_full_size(monkeypatch, original, bound):
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", bound)
    masks, boxes = blobs(6, *original), regions(40, 120, 180)
    objects = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(2))  # the last one has no region
    arguments = (masks, objects, boxes, (120, 180), (128, 192))
    expected = targets_at_full_size(*arguments)
    assert torch.equal(mask_targets(*arguments, 28), expected)
    assert 0.1 < expected.mean() < 0.9


@pytest.mark.parametrize(("new", "old"), [(800, 427), (1333, 640), (333, 500), (7, 7), (1, 9), (9, 1), (1199, 1200)])
def test_nearest_pixels_are_opencvs(new, old):
    source = np.arange(old, dtype=np.float32)[None]
    expected = cv2.resize(source, (new, 1), interpolation=cv2.INTER_NEAREST)[0]
    assert module._nearest(new, old, torch.device("cpu")).tolist() == expected.astype(int).tolist()


def test_targets_of_no_regions_and_of_a_mask_that_vanishes():
    one_pixel = torch.zeros(1, 400, 400, dtype=torch.uint8)
    one_pixel[0, 1, 1] = 1
    box = torch.tensor([[0.0, 0, 1, 1]])
    assert mask_targets(one_pixel, torch.zeros(0).long(), box[:0], (100, 100), (128, 128), 28).shape == (0, 28, 28)
    assert not mask_targets(one_pixel, torch.zeros(1).long(), box, (100, 100), (128, 128), 28).any()


def paste_at_full_size(probabilities, boxes, size):
    """The whole image sampled at once."""
    height, width = size
    x = (torch.arange(width) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
    shape = (len(boxes), height, width)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5


def encoded(full):
    return [coco_masks.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in full]


@pytest.mark.parametrize("spread", [0.5, 3.0, 50.0])
def test_pasted_masks_are_those_of_pycocotools(spread):
    size = (70, 90)
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(40, 28, 28, generator=generator) * spread).sigmoid()
    boxes = regions(40, *size).clamp(min=0).minimum(torch.tensor([90.0, 70, 90, 70]))
    boxes[0] = torch.tensor([0.0, 0, 90, 70])
    found = paste(probabilities, boxes, size)
    assert found == encoded(paste_at_full_size(probabilities, boxes, size))
    assert len({rle["counts"] for rle in found}) > 30


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize(
    "box", [(0, 0, 20, 10), (5, 0, 9, 10), (0, 4, 20, 10), (19, 9, 20, 10), (3, 3, 3, 8), (3.5, 2, 3.5, 2)]
)
def test_full_and_empty_masks_of_boxes_at_the_border(box, value):
    """Runs that go on from one column to the next, an image that is all mask, boxes without an extent."""
    boxes, probabilities = torch.tensor([box]).float(), torch.full((1, 28, 28), value)
    (found,) = paste(probabilities, boxes, (10, 20))
    width, height = box[2] - box[0], box[3] - box[1]
    area = math.floor(width) * math.floor(height) * value if width and height else None
    assert found["size"] == [10, 20]
    if area is not None:
        assert coco_masks.area(found) == area
        assert found == encoded(paste_at_full_size(probabilities, boxes, (10, 20)))[0]


def test_several_masks_at_a_time_give_the_same():
    """What devices other than the CPU do."""
    size = (40, 50)
    probabilities = torch.rand(7, 28, 28, generator=torch.Generator().manual_seed(0))
    boxes = regions(7, *size).clamp(min=0).minimum(torch.tensor([50.0, 40, 50, 40]))
    assert module._encode(*module._paste_around(probabilities, boxes, size), size) == paste(probabilities, boxes, size)


def test_no_masks():
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (10, 10)) == []
