"""``effvit configs --plot-lr``: the corner points of every published recipe, as a table and as a picture."""

from __future__ import annotations

import math

import cv2
import pytest

from effvit._cli.plot_lr import learning_rate_of
from effvit._cli.shipped import shipped_configs
from effvit.errors import ConfigError

EFFICIENTVIT = [f"efficientvit_m{size}" for size in range(6)]
TRANSFER = {
    "cifar10": 195,
    "cifar100": 195,
    "flowers102": 7,
    "oxford_iiit_pets": 14,
    "stanford_cars": 31,
}


def cosine(peak, low, share):
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * share))


def corners(curve):
    return {corner.name: corner for corner in curve.corners}


@pytest.mark.parametrize(
    ("names", "batch", "peak", "start", "steps"),
    [
        (EFFICIENTVIT, 2048, 4e-3, 1e-6, 626),
        ([f"efficientformer_{size}" for size in ("l1", "l3", "l7")], 3072, 3e-3, 1e-5, 417),
        *(([f"efficientvit_m5_{name}"], 256, 1e-3, 1e-6, steps) for name, steps in TRANSFER.items()),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_the_corners_of_the_recipes_by_epochs(names, batch, peak, start, steps):
    """300 epochs, 5 of warm-up, all one epoch late: epochs 0 and 1 at the start, from 6 on the cosine of epoch 5 on."""
    for name in names:
        curve = learning_rate_of(f"classification/{name}")
        assert (curve.global_batch, curve.epochs, curve.steps_per_epoch) == (batch, 300, steps)
        found = corners(curve)
        assert found["first step"].rates == (start,)
        assert (found["warm-up over"].epoch, found["warm-up over"].step) == (6, 6 * steps)
        assert found["warm-up over"].rates[0] == pytest.approx(cosine(peak, 1e-5, 5 / 300), rel=1e-9)
        assert found["middle"].rates[0] == pytest.approx(cosine(peak, 1e-5, 149 / 300), rel=1e-9)
        assert found["last epoch"].rates[0] == pytest.approx(cosine(peak, 1e-5, 298 / 300), rel=1e-9)
        by_epoch = dict(curve.line)
        assert by_epoch[1.0] == (start,)
        assert by_epoch[5.0][0] == pytest.approx(start + (peak - start) * 4 / 5, rel=1e-9)


@pytest.mark.parametrize("size", ["xxs", "xs", "s"])
def test_the_corners_of_mobilevit(size):
    curve = learning_rate_of(f"classification/mobilevit_{size}")
    assert (curve.global_batch, curve.epochs, curve.steps_per_epoch) == (1024, 300, 928)
    found = corners(curve)
    assert found["first step"].rates == (2e-4,)
    assert (found["warm-up over"].epoch, found["warm-up over"].step) == (3, 3000)
    assert found["warm-up over"].rates[0] == pytest.approx(cosine(2e-3, 2e-4, 3 / 300), rel=1e-9)
    assert found["middle"].rates[0] == pytest.approx(1.1e-3, rel=1e-9)
    assert found["last step"].rates[0] == pytest.approx(cosine(2e-3, 2e-4, 299 / 300), rel=1e-9)


def test_the_corners_of_dynamicvit():
    curve = learning_rate_of("classification/dynamicvit_small")
    assert (curve.global_batch, curve.epochs, curve.steps_per_epoch) == (1024, 30, 1252)
    assert curve.kinds == ("new", "backbone")
    found = corners(curve)
    assert found["first step"].rates == (0.0, 0.0)
    assert (found["warm-up over"].epoch, found["warm-up over"].step) == (5, 5 * 1252)
    assert found["warm-up over"].rates == pytest.approx((1e-3, 1e-5), rel=1e-9)
    middle = cosine(1e-3, 1e-6, 10 / 25)
    assert found["middle"].rates == pytest.approx((middle, middle * 0.01), rel=1e-9)
    assert found["last step"].rates[0] == pytest.approx(cosine(1e-3, 1e-6, 1 - 1 / (25 * 1252)), rel=1e-9)
    assert all(rates[1] == 0 for epoch, rates in curve.line if epoch < 5)


def test_the_corners_of_retinanet():
    curve = learning_rate_of("detection/retinanet_1x", 16)
    assert curve.steps_per_epoch == 7330
    assert [(corner.name, corner.epoch, corner.step) for corner in curve.corners] == [
        ("first step", 0, 0),
        ("warm-up over", 0, 500),
        ("change", 8, 8 * 7330),
        ("change", 11, 11 * 7330),
        ("last epoch", 11, 11 * 7330),
    ]
    rates = [corner.rates[0] for corner in curve.corners]
    assert rates == pytest.approx([1e-7, 1e-4, 1e-5, 1e-6, 1e-6], rel=1e-6)


def test_another_batch_scales_the_peak_but_not_the_ends():
    curve = learning_rate_of("classification/efficientvit_m4", 512)
    assert curve.steps_per_epoch == 2502
    found = corners(curve)
    assert found["first step"].rates == (1e-6,)
    assert found["warm-up over"].rates[0] == pytest.approx(cosine(1e-3, 1e-5, 5 / 300), rel=1e-9)


def test_the_command_prints_a_table_and_draws(cli, tmp_path):
    done = cli.run("configs", "--plot-lr", "classification/dynamicvit_small", "--output", tmp_path / "new" / "lr.png")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert (
        lines[0]
        == "classification/dynamicvit_small: 30 epochs, global batch 1024, 1252 steps an epoch of 1,281,167 images"
    )
    assert lines[1].split() == ["epoch", "step", "new", "backbone"]
    assert ["warm-up", "over", "5", "6260", "0.001", "1e-05"] in [line.split() for line in lines]
    picture = cv2.imread(str(tmp_path / "new" / "lr.png"))
    assert picture.shape[0] > 200
    assert picture.std() > 5


def test_data_of_unknown_size_matters_only_where_the_curve_moves_by_steps(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("base: classification/efficientvit_m0\ndata: {class_path: ImageFolder}\n")
    curve = learning_rate_of(str(own))
    assert curve.steps_per_epoch is None
    assert corners(curve)["middle"].step is None
    own.write_text("base: classification/dynamicvit_small\ndata: {class_path: ImageFolder}\n")
    with pytest.raises(ConfigError, match="nobody knows here how many steps"):
        learning_rate_of(str(own))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classification/efficientvit_m9"], "Did you mean 'classification/efficientvit_m5'"),
        (["classification/efficientvit_m0", "--global_batch", "0"], "it must be 1 or more"),
    ],
)
def test_what_has_no_curve_is_refused(cli, words, message):
    done = cli.run("configs", "--plot-lr", *words)
    assert done.code == 2
    assert message in done.err


def test_a_configuration_without_an_end_or_a_schedule_that_is_not_there(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("model: {class_path: Classification, init_args: {backbone: efficientvit_m0}}\n")
    with pytest.raises(ConfigError, match="there is no curve"):
        learning_rate_of(str(own))
    own.write_text("base: classification/efficientvit_m0\nmodel: {init_args: {lr_scheduler: {class_path: NoSuchLR}}}\n")
    with pytest.raises(ConfigError, match="no schedule 'NoSuchLR'"):
        learning_rate_of(str(own))
    own.write_text("base: classification/efficientvit_m0\nmodel: {init_args: {lr_scheduler: null}}\n")
    assert {corner.rates for corner in learning_rate_of(str(own)).corners} == {(4e-3,)}


def test_every_shipped_recipe_has_a_curve():
    recipes = [name for name in shipped_configs() if name.startswith("classification/efficient")]
    assert len(recipes) >= 14
    for name in recipes:
        assert learning_rate_of(name).line


def test_poly_is_drawn_over_the_steps_that_end_the_training():
    """EfficientFormer on ADE20K: 40,000 steps of 32 images are 64 epochs begun, the last one cut off."""
    curve = learning_rate_of("segmentation/semantic_fpn_ade20k", 32)
    assert (curve.epochs, curve.images, curve.steps_per_epoch) == (64, 20_210, 632)
    found = corners(curve)
    assert found["first step"].rates == (2e-4,)
    assert found["middle"].rates[0] == pytest.approx(2e-4 * (1 - 32 * 632 / 40_000) ** 0.9, rel=1e-9)
    assert found["last step"].step == 39_999
    assert found["last step"].rates[0] == pytest.approx(2e-4 * (1 / 40_000) ** 0.9, rel=1e-9)
    assert curve.line[-1][0] < 40_000 / 632
    assert curve.line[0][1] == (2e-4,)


def test_the_head_of_mobilevit_has_a_curve_of_its_own():
    curve = learning_rate_of("segmentation/deeplabv3_voc", 128)
    assert curve.kinds == ("backbone", "head")
    assert curve.images == 10_582
    for corner in curve.corners:
        backbone, head = corner.rates
        assert head == pytest.approx(10 * backbone, rel=1e-12)
    assert corners(curve)["first step"].rates[0] == pytest.approx(9e-5)
    assert corners(curve)["warm-up over"].step == 500
