"""The learning rate of the published recipes: timm is the oracle by epochs, the authors' formulas by steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler

from effvit.errors import ConfigError
from effvit.tasks.schedules import Poly, WarmupCosine

PEAK = 4e-3


def make(lr=PEAK, groups=None, schedule=WarmupCosine, **options):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in groups or [{}]]
    optimizer = torch.optim.SGD(
        [{"params": [parameter], **group} for parameter, group in zip(parameters, groups or [{}], strict=True)], lr=lr
    )
    return optimizer, schedule(optimizer, **options)


def make_poly(**options):
    return make(schedule=Poly, **options)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def run_steps(optimizer, schedule, epochs, steps_per_epoch, start=0):
    """The rate of group 0 in each step, driven as a task drives it."""
    seen = []
    for step in range(start, epochs * steps_per_epoch):
        if step % steps_per_epoch == 0:
            schedule.start_epoch(step // steps_per_epoch)
        seen.append(rates(optimizer)[0])
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("epochs", "warmup", "warmup_lr", "min_lr"), [(300, 5, 1e-6, 1e-5), (30, 0, 0.0, 0.0), (7, 3, 1e-5, 1e-6)]
)
def test_by_epochs_it_is_timms(epochs, warmup, warmup_lr, min_lr):
    oracle_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = CosineLRScheduler(
        oracle_optimizer, t_initial=epochs, lr_min=min_lr, warmup_t=warmup, warmup_lr_init=warmup_lr, t_in_epochs=True
    )
    optimizer, schedule = make(warmup_epochs=warmup, warmup_lr=warmup_lr, min_lr=min_lr)
    schedule.bind(epochs, None)
    for epoch in range(epochs + 3):
        oracle.step(epoch)
        schedule.start_epoch(epoch)
        assert rates(optimizer)[0] == pytest.approx(oracle_optimizer.param_groups[0]["lr"], rel=1e-12), epoch


def test_delayed_it_is_timms_driven_as_the_authors_drive_it():
    """Cream's and EfficientFormer's ``main.py`` pass the epoch just finished to ``step``."""
    oracle_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    oracle = CosineLRScheduler(oracle_optimizer, t_initial=300, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    optimizer, schedule = make(warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, delay_epochs=1)
    schedule.bind(300, 625)
    seen = []
    for epoch in range(300):
        schedule.start_epoch(epoch)
        assert rates(optimizer)[0] == pytest.approx(oracle_optimizer.param_groups[0]["lr"], rel=1e-12), epoch
        seen.append(rates(optimizer)[0])
        oracle.step(epoch)
    assert seen[:2] == [1e-6, 1e-6]
    assert seen[6] == max(seen[6:])


def test_scaled_groups_are_timms_scaled_groups():
    oracle_optimizer = torch.optim.SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (1.0, 0.25)], lr=PEAK
    )
    oracle = CosineLRScheduler(oracle_optimizer, t_initial=20, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6)
    optimizer, schedule = make(
        groups=[{}, {"lr": PEAK * 0.25, "lr_scale": 0.25}], warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5
    )
    schedule.bind(20, None)
    for epoch in range(20):
        oracle.step(epoch)
        schedule.start_epoch(epoch)
        assert rates(optimizer) == pytest.approx([group["lr"] for group in oracle_optimizer.param_groups], rel=1e-12)


def test_the_warm_up_of_mobilevit_counts_steps_and_its_cosine_epochs():
    """2e-4 to 2e-3 in 3000 iterations, then the cosine of the epoch over all 300 epochs."""
    optimizer, schedule = make(lr=2e-3, warmup_steps=3000, warmup_lr=2e-4, min_lr=2e-4)
    schedule.bind(300, None)
    assert schedule.lr_at(0, 0) == 2e-4
    assert schedule.lr_at(1, 1500) == pytest.approx(1.1e-3, rel=1e-12)
    assert schedule.lr_at(3, 2999) == pytest.approx(2e-4 + 1.8e-3 * 2999 / 3000, rel=1e-12)
    assert schedule.lr_at(3, 3000) == pytest.approx(2e-4 + 0.9e-3 * (1 + math.cos(math.pi * 3 / 300)), rel=1e-12)
    assert schedule.lr_at(150, 139_050) == pytest.approx(1.1e-3, rel=1e-12)
    assert schedule.lr_at(299, 277_000) == pytest.approx(2e-4 + 0.9e-3 * (1 + math.cos(math.pi * 299 / 300)), rel=1e-12)
    seen = run_steps(optimizer, schedule, epochs=1, steps_per_epoch=5)
    assert seen == pytest.approx([2e-4 + 1.8e-3 * step / 3000 for step in range(5)], rel=1e-12)


def test_by_steps_it_is_the_curve_of_dynamicvit():
    """Linear to the full rate in the last step of the warm-up, the cosine over the steps that remain."""
    epochs, per_epoch, warmup = 6, 7, 2 * 7
    optimizer, schedule = make(lr=1e-3, warmup_epochs=2, min_lr=1e-6, every="step")
    schedule.bind(epochs, per_epoch)
    remaining = epochs * per_epoch - warmup
    expected = np.concatenate(
        [
            np.linspace(0, 1e-3, warmup),
            1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + np.cos(np.pi * np.arange(remaining) / remaining)),
        ]
    )
    assert run_steps(optimizer, schedule, epochs, per_epoch) == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-18)
    assert schedule.lr_at(epochs, 10_000) == pytest.approx(1e-6)


def test_a_frozen_backbone_stands_still_and_then_takes_its_share():
    """DynamicViT: 0 for five epochs, then 0.01 of the predictors' rate, whatever that is."""
    groups = [{"lr": 1e-5, "lr_scale": 0.01, "frozen_epochs": 5}, {}]
    optimizer, schedule = make(lr=1e-3, groups=groups, warmup_epochs=5, min_lr=1e-6, every="step")
    schedule.bind(30, 4)
    for epoch in range(30):
        schedule.start_epoch(epoch)
        for _ in range(4):
            backbone, predictor = rates(optimizer)
            assert backbone == pytest.approx(0.0 if epoch < 5 else predictor * 0.01, rel=1e-12)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_epochs": 2, "min_lr": 1e-6, "every": "step"},
        {"warmup_steps": 9, "warmup_lr": 1e-4},
        {"warmup_epochs": 2, "warmup_lr": 1e-6, "delay_epochs": 1},
    ],
    ids=["step", "steps then epochs", "delayed"],
)
@pytest.mark.parametrize("stop", [5, 8, 12], ids=["within", "at the end of", "after some epochs"])
def test_a_resumed_training_sees_the_same_rates(options, stop):
    whole = run_steps(*bound(**options), epochs=5, steps_per_epoch=4)

    optimizer, schedule = bound(**options)
    run_steps(optimizer, schedule, 1, stop)  # the epoch is not moved: it is set below, as after a real interruption
    schedule.start_epoch((stop - 1) // 4)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}

    again, resumed = bound(**options)
    again.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["schedule"])
    assert run_steps(again, resumed, 5, 4, start=stop) == whole[stop:]
    assert resumed.get_last_lr() == rates(again)


def bound(**options):
    optimizer, schedule = make(**options)
    schedule.bind(5, 4)
    return optimizer, schedule


def test_before_it_is_bound_it_stands_at_its_start():
    assert rates(make(warmup_epochs=5, warmup_lr=1e-6)[0]) == [1e-6]
    assert rates(make()[0]) == [PEAK]
    optimizer, schedule = make()
    optimizer.step()
    with pytest.raises(RuntimeError, match="bind"):
        schedule.step()


def test_a_training_shorter_than_its_warm_up_only_warms_up():
    _, schedule = make(warmup_epochs=5)
    schedule.bind(2, None)
    assert schedule.lr_at(1, 0) == pytest.approx(PEAK / 5)
    _, schedule = make(warmup_steps=1, every="step")
    schedule.bind(1, 1)
    assert schedule.lr_at(0, 0) == 0.0
    assert schedule.lr_at(0, 1) == PEAK


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": -1}, "warmup_epochs is -1; it must be 0 or more"),
        ({"min_lr": float("nan")}, "min_lr is nan"),
        ({"every": "iteration"}, 'must be "epoch" or "step"'),
        ({"warmup_epochs": 5, "warmup_steps": 100}, "set only one of"),
        ({"delay_epochs": 1, "every": "step"}, "delay_epochs needs"),
        ({"groups": [{"lr_scale": 0.0}]}, "lr_scale is 0.0"),
    ],
)
def test_what_makes_no_curve_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)


def test_a_training_without_an_end_or_a_length_is_refused():
    _, schedule = make(every="step")
    with pytest.raises(ConfigError, match="number of steps of an epoch"):
        schedule.bind(10, None)
    with pytest.raises(ConfigError, match="max_epochs is -1"):
        schedule.bind(-1, 10)


def test_poly_is_mmsegmentations_per_step():
    """``PolyLrUpdaterHook`` with ``by_epoch=False``: 40,000 iterations, power 0.9."""
    optimizer, schedule = make_poly(lr=2e-4, min_lr=1e-6)
    schedule.bind(-1, 632, 40_000)
    for step in (0, 1, 20_000, 39_999):
        expected = (2e-4 - 1e-6) * (1 - step / 40_000) ** 0.9 + 1e-6
        assert schedule.lr_at(step // 632, step) == pytest.approx(expected, rel=1e-12)
    assert rates(optimizer) == [2e-4]
    assert schedule.lr_at(64, 40_500) == pytest.approx(1e-6)
    assert schedule.warmup_end() == (0, None)


def test_polys_warm_up_multiplies_the_curve_as_in_mmsegmentation():
    _, schedule = make_poly(lr=6e-5, power=1.0, warmup_steps=1500, warmup_factor=1e-6)
    schedule.bind(-1, None, 160_000)
    for step in (0, 700, 1499):
        regular = 6e-5 * (1 - step / 160_000)
        k = (1 - step / 1500) * (1 - 1e-6)
        assert schedule.lr_at(0, step) == pytest.approx(regular * (1 - k), rel=1e-12)
    assert schedule.lr_at(0, 1500) == pytest.approx(6e-5 * (1 - 1500 / 160_000), rel=1e-12)
    assert schedule.warmup_end() == (0, 1500)


@pytest.mark.parametrize(
    ("length", "steps"),
    [((4, 5, None), 20), ((4, 5, 12), 12), ((4, 5, 100), 20), ((-1, None, 7), 7), ((4, None, 9), 9)],
)
def test_poly_ends_with_whatever_ends_the_training_first(length, steps):
    optimizer, schedule = make_poly(power=1.0)
    schedule.bind(*length)
    assert schedule.lr_at(0, steps) == 0.0
    seen = run_steps(optimizer, schedule, 1, steps)
    assert seen == pytest.approx([PEAK * (1 - step / steps) for step in range(steps)], rel=1e-12)


def test_polys_scaled_groups_keep_their_distance():
    """MobileViT's head learns ten times as fast as its backbone, in every step."""
    optimizer, schedule = make_poly(lr=1e-3, groups=[{}, {"lr": 1e-2, "lr_scale": 10.0}], min_lr=1e-5, warmup_steps=3)
    schedule.bind(2, 6)
    for _ in range(12):
        backbone, head = rates(optimizer)
        assert head == pytest.approx(10 * backbone, rel=1e-12)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("stop", [1, 8, 19])
def test_a_resumed_poly_sees_the_same_rates(stop):
    def bound():
        optimizer, schedule = make_poly(min_lr=1e-5, warmup_steps=4)
        schedule.bind(-1, 7, 20)
        return optimizer, schedule

    whole = run_steps(*bound(), epochs=1, steps_per_epoch=20)
    optimizer, schedule = bound()
    run_steps(optimizer, schedule, 1, stop)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    again, resumed = bound()
    again.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["schedule"])
    assert run_steps(again, resumed, 1, 20, start=stop) == whole[stop:]


def test_poly_needs_an_end_and_a_range():
    _, schedule = make_poly()
    for length in ((-1, 10, None), (5, None, None)):
        with pytest.raises(ConfigError, match=r"set trainer\.max_steps to 1 or more"):
            schedule.bind(*length)
    for name in ("power", "min_lr", "warmup_steps", "warmup_factor"):
        with pytest.raises(ConfigError, match=f"{name} is -1; it must be 0 or more"):
            make_poly(**{name: -1})
    optimizer, schedule = make_poly()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"Poly\.bind\(\) must be called"):
        schedule.step()
