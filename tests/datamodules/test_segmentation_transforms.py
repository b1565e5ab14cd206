"""Augmentation of images and masks: mmsegmentation's arithmetic, written out plainly."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from effvit.datamodules.segmentation_transforms import (
    SegmentationAugmentation,
    crop_both,
    pad_both,
    photometric_distortion,
    resize_both,
)
from effvit.datamodules.transforms import eval_transform

PLAIN = {
    "image_size": (80, 40),
    "squash": False,
    "scale_range": (1.0, 1.0),
    "short_side": None,
    "crop_size": (32, 32),
    "class_limit": 1.0,
    "flip": 0.0,
    "photometric": False,
}


def pair(height, width, seed=0):
    """An image whose red channel is its mask, so that any transform of one that the other lacks shows."""
    random = np.random.default_rng(seed)
    mask = np.repeat(np.repeat(random.integers(-1, 5, (-(-height // 8), -(-width // 8))), 8, 0), 8, 1)
    mask = mask[:height, :width].astype(np.int16)
    image = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    image[..., 0] = mask + 1
    return image, mask


def convert(image, alpha=1.0, beta=0.0):
    return np.clip(image.astype(np.float32) * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)


def plain_distortion(image, random):
    """mmsegmentation's steps on whole float images, with the numbers drawn in the same order."""

    def random_contrast(image):
        return convert(image, alpha=random.uniform(0.5, 1.5)) if random.random() < 0.5 else image

    if random.random() < 0.5:
        image = convert(image, beta=random.uniform(-32, 32))
    contrast_first = random.random() < 0.5
    if contrast_first:
        image = random_contrast(image)
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], alpha=random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + random.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else random_contrast(image)


def test_photometric_distortion_is_mmsegmentations_value_by_value():
    image = np.random.default_rng(0).integers(0, 256, (31, 47, 3), dtype=np.uint8)
    changed = 0
    for seed in range(40):
        mine = photometric_distortion(image.copy(), np.random.default_rng(seed))
        assert (mine == plain_distortion(image, np.random.default_rng(seed))).all()
        changed += bool((mine != image).any())
    assert 30 <= changed < 40  # each of the four steps happens in one of two images


def test_resizing_is_opencvs_bilinear_for_images_and_nearest_for_masks():
    image, mask = pair(48, 64)
    resized, labels = resize_both(image, mask, (30, 50))
    assert (resized == cv2.resize(image, (50, 30), interpolation=cv2.INTER_LINEAR)).all()
    assert labels.dtype == np.int16
    assert (labels == cv2.resize(mask, (50, 30), interpolation=cv2.INTER_NEAREST)).all()
    assert set(np.unique(labels)) <= set(np.unique(mask))  # no label in between two others
    assert resize_both(image, mask, (48, 64))[1] is mask


@pytest.mark.parametrize("photometric", [False, True])
def test_masks_follow_their_images(photometric):
    image, mask = pair(60, 90)
    augment = SegmentationAugmentation(**PLAIN | {"flip": 0.5, "image_size": (90, 60), "photometric": photometric})
    flips = 0
    for seed in range(20):
        cropped, labels = augment(image, mask, np.random.default_rng(seed))
        assert cropped.shape == (32, 32, 3)
        assert labels.shape == (32, 32)
        if not photometric:
            assert (cropped[..., 0] == labels + 1).all()
            flips += not any((mask[y : y + 32, x : x + 32] == labels).all() for y in range(29) for x in range(59))
    assert photometric or 4 <= flips <= 16


def test_scale_and_short_side_are_drawn_from_their_ranges():
    image, mask = pair(50, 100)

    def sides(number=60, **changes):
        augment = SegmentationAugmentation(**PLAIN | {"crop_size": (999, 999)} | changes)
        return [augment(image, mask, np.random.default_rng(seed))[1].shape for seed in range(number)]

    heights = [height for height, _ in sides(scale_range=(0.5, 2.0))]
    assert min(heights) >= 20
    assert max(heights) <= 80
    assert max(heights) - min(heights) > 40
    assert all(abs(width - 2 * height) <= 1 for height, width in sides(scale_range=(0.5, 2.0)))
    drawn = sides(short_side=(30, 90))
    # ml-cvnets' limit of the long side: the upper end of the range.
    assert max(max(shape) for shape in drawn) == 90
    assert {min(shape) for shape in drawn} <= set(range(30, 46))
    assert len({min(shape) for shape in drawn}) > 8
    assert set(sides(5, squash=True)) == {(40, 80)}


def test_crops_are_drawn_again_while_one_class_fills_them():
    """All windows but the rightmost columns hold one class only."""
    mask = np.zeros((64, 200), dtype=np.int16)
    mask[:, 150:] = 1
    image = np.zeros((64, 200, 3), dtype=np.uint8)

    def mixed(limit, number=150):
        shares = []
        for seed in range(number):
            crop = crop_both(image, mask, (64, 64), limit, np.random.default_rng(seed))[1]
            shares.append(max((crop == 0).mean(), (crop == 1).mean()))
        return np.mean(np.array(shares) < 0.75)

    assert mixed(1.0) < 0.4
    assert mixed(0.75) > 0.85


def test_unlabelled_pixels_do_not_count_for_the_limit():
    """Seven of eight pixels have no label, and the others are shared by two classes: the first window is good."""
    mask = np.full((16, 160), -1, dtype=np.int16)
    mask[:, ::16], mask[:, 1::16] = 0, 1
    image = np.repeat(np.arange(160, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)
    for seed in range(10):
        first, limited = (crop_both(image, mask, (16, 32), x, np.random.default_rng(seed))[0] for x in (1.0, 0.75))
        assert (first == limited).all()


def test_an_unlabelled_mask_is_cropped_too():
    image, mask = np.zeros((64, 64, 3), np.uint8), np.full((64, 64), -1, np.int16)
    assert crop_both(image, mask, (32, 16), 0.75, np.random.default_rng(0))[1].shape == (32, 16)


def test_padding_is_black_and_without_a_label():
    image, mask = pair(20, 30)
    padded, labels = pad_both(image, mask, (32, 32))
    assert (padded[:20, :30] == image).all()
    assert padded[20:].sum() + padded[:, 30:].sum() == 0
    assert (labels[:20, :30] == mask).all()
    assert (labels[20:] == -1).all()
    assert (labels[:, 30:] == -1).all()
    assert labels.dtype == np.int16


@pytest.mark.parametrize(
    ("size", "kept", "aligned"), [((48, 64), (96, 128), (96, 128)), ((50, 61), (96, 117), (96, 128))]
)
def test_aligning_resizes_twice_as_published(size, kept, aligned):
    """``AlignResize`` of snap-research/EfficientFormer: to the limits, and then up to multiples of 32."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
    first = cv2.resize(pixels, kept[::-1], interpolation=cv2.INTER_LINEAR)
    expected = cv2.resize(first, aligned[::-1], interpolation=cv2.INTER_LINEAR)
    out = eval_transform((400, 96), "align")({"image": image})["image"]
    assert (out.permute(1, 2, 0).numpy() == expected).all()
    assert eval_transform((400, 96), "align", 50)({"image": image})["image"].shape[1:] == (100, 150)


def test_aligned_boxes_follow():
    boxes = tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0.0, 61.0, 50.0]]), format="XYXY", canvas_size=(50, 61))
    image = tv_tensors.Image(torch.zeros(3, 50, 61, dtype=torch.uint8))
    out = eval_transform((400, 96), "align")({"image": image, "boxes": boxes})["boxes"]
    assert out.tolist() == [pytest.approx([0.0, 0.0, 128.0, 96.0])]
