"""The training augmentation of one image, and the published evaluation transform."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules import _rand_augment as policies
from effvit.datamodules._decode import read_image
from effvit.datamodules.augmentation import Augmentation, draw_crop, eval_transform, train_transform
from effvit.errors import ConfigError

POLICIES = ("none", "rand_augment", "rand_augment_torchvision", "three_augment")
MODES = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


@pytest.fixture(scope="module")
def photograph():
    return np.array(load_sample_images().images[0][:375, :500])


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_a_sample_depends_on_the_generator_alone(photograph, policy, how):
    transform = train_transform(Augmentation(policy=policy, color_jitter=0.3), how)
    before = photograph.copy()
    results = [transform(photograph, generator(7), 96) for _ in range(2)]
    assert (results[0] == results[1]).all()
    assert (transform(photograph, generator(8), 96) != results[0]).any()
    assert (photograph == before).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (500, 3), (32, 32), (64, 48)])
def test_any_image_becomes_a_square_of_the_size(policy, shape):
    image = generator().integers(0, 256, (*shape, 3), dtype=np.uint8)
    transform = train_transform(Augmentation(policy=policy, color_jitter=0.4), "bicubic")
    for seed in range(20):
        result = transform(image, generator(seed), 32)
        assert result.shape == (32, 32, 3)
        assert result.dtype == np.uint8
        assert result.flags.c_contiguous


def test_nothing_is_changed_where_nothing_is_asked_for(photograph):
    still = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)
    square = np.ascontiguousarray(photograph[:128, :128])
    assert (train_transform(still, "bicubic")(square, generator(), 128) == square).all()
    always = dataclasses.replace(still, flip=1.0)
    assert (train_transform(always, "bicubic")(square, generator(), 128) == square[:, ::-1]).all()


def test_crops_are_distributed_as_torchvisions():
    height, width = 375, 500
    random, number = generator(), 2000
    mine = np.array([draw_crop(height, width, Augmentation(), random) for _ in range(number)])
    torch.manual_seed(0)
    theirs = v2.RandomResizedCrop(224)
    image = torch.empty(3, height, width, dtype=torch.uint8)
    drawn = (theirs.make_params([image]) for _ in range(number))
    theirs = np.array([[crop[key] for key in ("top", "left", "height", "width")] for crop in drawn])
    for column in range(4):
        assert stats.ks_2samp(mine[:, column], theirs[:, column]).pvalue > 1e-3
    top, left, h, w = mine.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    assert (h * w / (height * width) >= 0.08 * 0.97).all()
    assert ((w / h > 0.73) & (w / h < 1.37)).all()


@pytest.mark.parametrize(("shape", "window"), [((10, 400), (0, 193, 10, 13)), ((400, 10), (193, 0, 13, 10))])
def test_an_image_that_no_window_fits_gives_its_centre(shape, window):
    assert draw_crop(*shape, Augmentation(scale=(0.9, 1.0)), generator()) == window


def test_a_flip_comes_half_of_the_time(photograph):
    square = np.ascontiguousarray(photograph[:16, :16])
    transform = train_transform(Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)), "bicubic")
    flipped = sum((transform(square, generator(seed), 16) != square).any() for seed in range(400))
    assert stats.binomtest(int(flipped), 400).pvalue > 1e-3


def calls(monkeypatch, table, number, draw):
    """How often each operation of a policy is applied, and its levels, over many draws."""
    seen = {name: [] for name in table}
    entries = tuple(
        dataclasses.replace(entry, apply=lambda image, level, how, fill, name=name: seen[name].append(level) or image)
        for name, entry in table.items()
    )
    monkeypatch.setattr(policies, "_TIMM_ENTRIES" if table is policies.TIMM else "_TORCHVISION_ENTRIES", entries)
    random, image = generator(), np.zeros((4, 4, 3), np.uint8)
    for _ in range(number):
        draw(image, random)
    return seen


def test_rand_augment_draws_as_timm(monkeypatch):
    def draw(image, random):
        policies.rand_augment_timm(image, random, "bicubic", 9.0, 0.5, 2)

    seen = calls(monkeypatch, policies.TIMM, 6000, draw)
    counts = [len(levels) for levels in seen.values()]
    assert stats.binomtest(sum(counts), 12000).pvalue > 1e-3
    assert stats.chisquare(counts).pvalue > 1e-3
    signed = np.concatenate([seen[name] for name, entry in policies.TIMM.items() if entry.signed])
    plain = np.concatenate([seen[name] for name, entry in policies.TIMM.items() if not entry.signed])
    assert stats.binomtest(int((signed < 0).sum()), len(signed)).pvalue > 1e-3
    levels = np.abs(np.concatenate([signed, plain]))
    assert levels.max() == 1.0  # magnitudes above 10 are cut to it
    assert abs((levels == 1).mean() - stats.norm.sf(2)) < 0.01
    inside = levels[levels < 1]
    cut = stats.truncnorm(-18, 2, loc=0.9, scale=0.05)
    assert stats.kstest(inside, cut.cdf).pvalue > 1e-3
    assert (plain > 0).all()


def test_rand_augment_draws_as_torchvision(monkeypatch):
    def draw(image, random):
        policies.rand_augment_torchvision(image, random, 9.0, 2)

    seen = calls(monkeypatch, policies.TORCHVISION, 3000, draw)
    counts = [len(levels) for levels in seen.values()]
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 1e-3
    assert {abs(level) for levels in seen.values() for level in levels} == {0.3}


def test_three_augment_takes_one_of_three(photograph):
    picture = np.ascontiguousarray(photograph[:32, :32])
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    for seed in range(600):
        result = policies.three_augment(picture, generator(seed))
        grey = (result == ops.grayscale(picture)).all()
        solarised = (result == np.where(picture >= 128, 255 - picture, picture)).all()
        counts["grey" if grey else "solarised" if solarised else "blurred"] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_colour_jitter_is_torchvisions(photograph, monkeypatch):
    picture = np.ascontiguousarray(photograph[:64, :64])
    factors = []
    for name in ("brightness", "contrast", "color"):
        function = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda image, factor, name=name, function=function: factors.append((name, factor))
            or function(image, factor),
        )  # fmt: skip
    orders = set()
    for seed in range(60):
        factors.clear()
        result = policies.color_jitter(picture, generator(seed), 0.3)
        assert all(0.7 <= factor <= 1.3 for _, factor in factors)
        orders.add(tuple(name for name, _ in factors))
        theirs = Image.fromarray(picture)
        for name, factor in factors:
            adjust = "saturation" if name == "color" else name
            theirs = getattr(v2.functional, f"adjust_{adjust}")(theirs, factor)
        assert np.abs(result.astype(int) - np.asarray(theirs).astype(int)).max() <= 3  # off by one, then enhanced
    assert len(orders) == 6


def test_colour_jitter_beside_a_policy_is_applied(photograph):
    plain, jittered = (
        train_transform(Augmentation(policy="rand_augment", num_ops=0, color_jitter=strength), "bicubic")
        for strength in (0.0, 0.4)
    )
    assert (plain(photograph, generator(), 64) != jittered(photograph, generator(), 64)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "randaugment"}, "no augmentation policy 'randaugment'. Did you mean 'rand_augment'"),
        ({"scale": (0.0, 1.0)}, r"augmentation.scale is \(0.0, 1.0\); allowed: two numbers with 0 < least"),
        ({"scale": (0.5, 0.2)}, "augmentation.scale"),
        ({"scale": (0.5, 1.2)}, "augmentation.scale"),
        ({"ratio": (0.0, 1.0)}, "augmentation.ratio"),
        ({"flip": 1.5}, "augmentation.flip is 1.5; allowed: 0 to 1"),
        ({"policy": "rand_augment", "magnitude": 11}, "augmentation.magnitude is 11; allowed: 0 to 10"),
        ({"magnitude_std": -1.0}, "augmentation.magnitude_std"),
        ({"num_ops": -1}, "augmentation.num_ops"),
        ({"color_jitter": float("nan")}, "augmentation.color_jitter"),
    ],
)
def test_values_out_of_their_range(options, message):
    with pytest.raises(ConfigError, match=message):
        Augmentation(**options)


def test_torchvisions_magnitudes_go_to_30():
    assert Augmentation(policy="rand_augment_torchvision", magnitude=30).magnitude == 30


def test_bad_evaluation_settings():
    with pytest.raises(ConfigError, match=r"no interpolation 'cubic'\. Did you mean 'bicubic'"):
        eval_transform(224, 0.875, "cubic")
    with pytest.raises(ConfigError, match="no interpolation 'nearest'"):
        train_transform(Augmentation(), "nearest")
    with pytest.raises(ConfigError, match=r"crop 1\.5: size must be 1 or more, crop above 0, at most 1"):
        eval_transform(224, 1.5, "bicubic")


def torchvision_eval(size, crop, how):
    return v2.Compose([v2.Resize(int(size // crop), MODES[how], antialias=True), v2.CenterCrop(size)])


SHAPES = [(375, 500), (500, 375), (427, 640), (224, 224), (256, 256), (100, 80), (31, 900), (900, 31), (225, 257)]


@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "crop"), list(product((224, 256), (0.875, 0.9, 0.95, 1.0))))
def test_evaluation_has_torchvisions_pixels(how, size, crop):
    transform, theirs = eval_transform(size, crop, how), torchvision_eval(size, crop, how)
    source = load_sample_images().images[1]
    for height, width in SHAPES:
        image = np.resize(source[:height, :width], (height, width, 3))
        result = transform(image)
        assert result.shape == (size, size, 3)
        assert (result == np.asarray(theirs(Image.fromarray(image)))).all()


@pytest.mark.realdata
@pytest.mark.parametrize("how", ["bilinear", "bicubic"])
def test_evaluation_has_torchvisions_pixels_on_photographs(real_data, how):
    files = sorted((real_data / "ants_bees" / "val").rglob("*.jpg"))[::8]
    assert len(files) >= 10
    transform, theirs = eval_transform(224, 0.9, how), torchvision_eval(224, 0.9, how)
    for path in files:
        with Image.open(path) as image:
            expected = np.asarray(theirs(image.convert("RGB")))
        assert (transform(read_image(path).permute(1, 2, 0).numpy()) == expected).all()
