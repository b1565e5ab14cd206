"""The operations of RandAugment and 3-Augment, held against Pillow through timm and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from timm.data import auto_augment
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules._rand_augment import TIMM, TORCHVISION

GREY = (124, 116, 104)
#: Largest mean difference in grey levels of what samples between pixels: OpenCV rounds positions to 1/32 pixel, its
#: cubic kernel is softer than that of Pillow's transform, and it blends the border with the fill colour.
MOVED = {"bilinear": 0.8, "bicubic": 1.3}
MOVING = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


@pytest.fixture(scope="module")
def pictures():
    """Two photographs, a pale one, one of a single colour, and one of few colours; 224 square and 90x130."""
    china, flower = (Image.fromarray(image) for image in load_sample_images().images)
    china = china.resize((224, 224), Image.Resampling.BICUBIC)
    flat = np.full((90, 130, 3), (0, 130, 255), np.uint8)
    few = flat.copy()
    few[:40, :50] = (7, 200, 254)
    return [
        np.asarray(china),
        np.asarray(flower.resize((130, 90), Image.Resampling.BICUBIC)),
        np.asarray(F.adjust_contrast(china, 0.4)),
        flat,
        few,
    ]


def differences(mine, theirs):
    """Largest and mean difference, and share of differing values."""
    assert mine.shape == np.asarray(theirs).shape
    assert mine.dtype == np.uint8
    apart = np.abs(mine.astype(int) - np.asarray(theirs).astype(int))
    return apart.max(), apart.mean(), (apart > 0).mean()


def check(name, mine, theirs, moved):
    """Exact, but for what moves pixels, and for the colour blend, where one value in 500 may be one off."""
    most, mean, share = differences(mine, theirs)
    if moved is not None:
        assert mean <= moved
    elif name.startswith("Color"):
        assert most <= 1
        assert share <= 0.002
    else:
        assert most == 0


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", TIMM)
def test_operations_of_timm(pictures, name, how, monkeypatch):
    entry = TIMM[name]
    for sign in (1, -1) if entry.signed else (1,):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        for magnitude in (0, 3.3, 9, 9.99):
            hparams = {"img_mean": GREY, "interpolation": PILLOW[how], "magnitude_std": 0}
            theirs = auto_augment.AugmentOp(name, prob=1, magnitude=magnitude, hparams=hparams)
            for picture in pictures:
                before = picture.copy()
                mine = entry.apply(picture, sign * magnitude / 10, how, GREY)
                check(name, mine, theirs(Image.fromarray(picture)), MOVED[how] if name in MOVING else None)
                assert (picture == before).all()


def test_the_operations_are_timms():
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": GREY})
    assert [operation.name for operation in transform.ops] == list(TIMM)
    assert {operation.prob for operation in transform.ops} == {0.5}
    assert transform.num_layers == 2


def test_posterising_to_no_bits_is_black(pictures):
    """What older Pillow gives at magnitude 10; Pillow 13 refuses."""
    assert TIMM["PosterizeIncreasing"].apply(pictures[0], 1.0, "bicubic", GREY).max() == 0


@pytest.mark.parametrize("name", TORCHVISION)
def test_operations_of_torchvision(pictures, name):
    theirs = v2.RandAugment()
    assert list(theirs._AUGMENTATION_SPACE) == list(TORCHVISION)
    entry = TORCHVISION[name]
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    assert entry.signed == signed
    for picture in pictures:
        values = magnitudes(31, *picture.shape[:2])
        for sign in (1, -1) if signed else (1,):
            for magnitude in (0, 5, 9, 17, 30):
                value = 0.0 if values is None else sign * float(values[magnitude])
                result = theirs._apply_image_or_video_transform(
                    Image.fromarray(picture), name, value, v2.InterpolationMode.NEAREST, {Image.Image: None}
                )
                mine = entry.apply(picture, sign * magnitude / 30, "nearest", (0, 0, 0))
                if name == "Rotate":  # where a position lies between two pixels, rounding takes one or the other
                    assert differences(mine, result)[2] <= 0.005
                else:
                    check(name, mine, result, None)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_gaussian_blur(pictures, sigma):
    for picture in pictures:
        theirs = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma))
        assert differences(ops.gaussian_blur(picture, sigma), theirs)[1] <= 1.0


def test_greyscale(pictures):
    for picture in pictures:
        most, _, share = differences(ops.grayscale(picture), F.rgb_to_grayscale(Image.fromarray(picture), 3))
        assert most <= 1
        assert share <= 0.002


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize("window", [(90, 130), (224, 224), (375, 500), (640, 427), (9, 31), (1, 1), (300, 200)])
def test_resize_is_pillows(how, window):
    photograph = load_sample_images().images[0][-window[0] :, : window[1]]  # a window, not contiguous
    for size in (224, 160):
        theirs = F.resize(Image.fromarray(photograph), [size, size], MODES[how], antialias=True)
        most, mean, _ = differences(ops.resize(photograph, size, how), theirs)
        high = window[0] > window[1]  # Pillow then filters in the other order, and rounds in between
        assert most <= (8 if high else 2)
        assert mean <= (0.25 if high else 0.05)


def test_resize_of_one_colour_is_that_colour():
    flat = np.full((300, 200, 3), (0, 130, 255), np.uint8)
    assert (ops.resize(flat, 224, "bicubic") == (0, 130, 255)).all()


def test_resize_to_the_same_size_is_a_copy(pictures):
    window = pictures[0][:100, :100]
    result = ops.resize(window, 100, "bicubic")
    assert (result == window).all()
    assert result.flags.c_contiguous


def test_flip(pictures):
    assert (ops.flip(pictures[1]) == pictures[1][:, ::-1]).all()
