"""Resize, flip and padding, against OpenCV and hand-made numbers."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from effvit.datamodules.transforms import Collate, KeepRatioResize, eval_transform, keep_ratio_size, train_transform


def sample(height, width, boxes, masks=None):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = {
        "image": tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=(height, width)),
    }
    if masks is not None:
        out["masks"] = tv_tensors.Mask(masks)
    return pixels, out


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((480, 640), (1333, 800), (800, 1067)),  # the usual COCO image, as MMDetection gives it
        ((640, 480), (1333, 800), (1067, 800)),
        ((427, 640), (1333, 800), (800, 1199)),
        ((300, 640), (1333, 800), (625, 1333)),  # the long side limits
        ((800, 1333), (1333, 800), (800, 1333)),
        ((160, 160), (160, 160), (160, 160)),
        ((1, 2000), (1333, 800), (1, 1333)),
    ],
)
def test_keep_ratio_size(size, scale, expected):
    assert keep_ratio_size(*size, scale) == expected
    assert keep_ratio_size(*size, scale[::-1]) == expected


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=50, deadline=None)
def test_keep_ratio_size_stays_within_the_limits(height, width):
    h, w = keep_ratio_size(height, width, (1333, 800))
    assert 1 <= min(h, w) <= 800
    assert max(h, w) <= 1333


def test_pixels_equal_opencv():
    pixels, given_sample = sample(48, 64, [[0.0, 0.0, 8.0, 8.0]])
    image = eval_transform((133, 80))(given_sample)["image"]
    assert (image.permute(1, 2, 0).numpy() == cv2.resize(pixels, (107, 80), interpolation=cv2.INTER_LINEAR)).all()
    assert image.dtype == torch.uint8


def test_boxes_are_scaled_and_clipped():
    _, given_sample = sample(48, 64, [[8.0, 12.0, 32.0, 24.0], [-4.0, 40.0, 70.0, 50.0]])
    boxes = KeepRatioResize((128, 96))(given_sample)["boxes"]
    torch.testing.assert_close(
        boxes.as_subclass(torch.Tensor), torch.tensor([[16.0, 24.0, 64.0, 48.0], [0.0, 80.0, 128.0, 96.0]])
    )


def test_flip_turns_image_boxes_and_masks_alike():
    masks = torch.zeros(1, 48, 64, dtype=torch.uint8)
    masks[0, 12:24, 8:32] = 1
    pixels, given_sample = sample(48, 64, [[8.0, 12.0, 32.0, 24.0]], masks)
    out = train_transform((128, 96), 1.0, (1.0, 1.0))(given_sample)
    resized = cv2.resize(pixels, (128, 96), interpolation=cv2.INTER_LINEAR)
    assert (out["image"].permute(1, 2, 0).numpy() == resized[:, ::-1]).all()
    assert out["boxes"].tolist() == [[128 - 64.0, 24.0, 128 - 16.0, 48.0]]
    assert out["masks"].shape == (1, 48, 64)  # masks stay at the size of the file
    assert torch.equal(out["masks"].as_subclass(torch.Tensor), masks.flip(-1))


def test_jitter_stays_in_its_range():
    torch.manual_seed(0)
    transform = KeepRatioResize((128, 96), jitter=(0.5, 1.0))
    heights = {transform(sample(48, 64, [[0.0, 0.0, 8.0, 8.0]])[1])["image"].shape[-2] for _ in range(40)}
    assert min(heights) >= 48
    assert max(heights) <= 96
    assert len(heights) > 10


def test_collate_pads_with_zero_to_a_multiple():
    images = [torch.full((3, 20, 50), 7, dtype=torch.uint8), torch.full((3, 33, 10), 9, dtype=torch.uint8)]
    batch, targets = Collate(32)([(images[0], {"image_id": 1}), (images[1], {"image_id": 2})])
    assert batch.shape == (2, 3, 64, 64)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[0, :, :20, :50], images[0])
    assert torch.equal(batch[1, :, :33, :10], images[1])
    assert batch.sum(dtype=torch.int64) == images[0].sum() + images[1].sum()
    assert [target["image_id"] for target in targets] == [1, 2]
