"""Intervals are as sure as they say, on samples whose truth is known."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from effvit.deploy.statistics import _student, ratio, summarise

TAIL_MEDIAN = 0.05 * stats.t(2).ppf(0.75)  # median of the absolute value


def noisy_rounds(random, *, rounds=9, samples=12, drift=0.08, correlation=0.0):
    """Samples around 1: each round in its own mood, with a heavy tail upwards."""
    mood, moods = random.normal(), []
    for _ in range(rounds):
        moods.append(mood)
        mood = correlation * mood + np.sqrt(1 - correlation**2) * random.normal()
    return [np.exp(drift * mood) * (1 + np.abs(0.05 * random.standard_t(2, samples))) for mood in moods]


def coverage(correlation, simulations=200, **settings):
    random = np.random.default_rng(7)
    found = [summarise(noisy_rounds(random, correlation=correlation, **settings)).ci95 for _ in range(simulations)]
    return np.mean([low <= 1 + TAIL_MEDIAN <= high for low, high in found])


@pytest.mark.parametrize("rounds", [2, 3, 4, 5, 6, 7, 9])
def test_the_interval_covers_the_true_median(rounds):
    assert coverage(0.0, rounds=rounds) >= 0.9


def test_the_interval_of_few_rounds_is_no_narrower_than_they_are():
    low, high = summarise([[1.0], [1.0], [1.0], [1.0], [2.0]]).ci95
    assert low <= 1.0
    assert high >= 2.0


def test_a_round_counts_once_however_many_samples_it_has():
    """Quick rounds hold more samples; what is reported is what the interval is of."""
    quick, slow = [1.0] * 40, [1.5] * 10
    found = summarise([slow, quick] * 4 + [slow])
    assert found.median == 1.5
    assert found.ci95[0] <= 1.0
    assert found.ci95[1] == pytest.approx(1.5)  # no round was slower
    assert found.mean == pytest.approx((160 + 75) / 210)


def test_the_interval_knows_of_a_machine_that_drifts():
    assert coverage(0.7) >= 0.88  # without its widening it is 0.78


def test_one_sure_round_is_not_many():
    """Thousands of samples of few rounds know no more than the rounds."""
    assert coverage(0.0, samples=300) >= 0.9


def test_the_interval_of_a_ratio_covers_the_true_one():
    random = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        base, own = noisy_rounds(random), noisy_rounds(random)
        found = ratio(base, [samples / 2 for samples in own])
        covered += found.ci95[0] <= 2 <= found.ci95[1]
    assert covered >= 180


def test_what_both_sides_suffer_leaves_the_ratio_alone():
    random = np.random.default_rng(3)
    base = noisy_rounds(random, drift=1.0)
    found = ratio(base, [samples / 3 for samples in base])
    assert found.value == pytest.approx(3)
    assert found.ci95 == pytest.approx((3, 3))


def test_more_rounds_are_surer():
    random = np.random.default_rng(0)
    few, many = (
        np.median([np.diff(summarise(noisy_rounds(random, rounds=rounds)).ci95) for _ in range(40)])
        for rounds in (5, 40)
    )
    assert many < few / 2


def test_statistics_by_hand():
    rounds = [[3.0, 1.0], [2.0, 5.0, 4.0]]
    found = summarise(rounds)
    assert (found.median, found.mean) == (3.0, 3.0)  # of 2 and 4; of all
    assert found.p95 == pytest.approx(4.8)
    assert found.p99 == pytest.approx(4.96)
    assert found.rounds == ((3.0, 1.0), (2.0, 5.0, 4.0))
    assert found.ci95[0] <= 3.0 <= found.ci95[1]
    assert summarise(rounds) == found  # from a fixed seed
    assert json.loads(json.dumps(asdict(found)))["median"] == 3.0


def test_one_round_says_nothing_about_others():
    assert summarise([[2.0, 4.0]]).ci95 == (3.0, 3.0)
    assert ratio([[2.0]], [[1.0]]).ci95 == (2.0, 2.0)


def test_rounds_belong_together():
    with pytest.raises(ValueError, match="shorter"):
        ratio([[1.0], [1.0]], [[1.0]])


@pytest.mark.parametrize("freedom", [1, 2, 3, 6, 8, 30])
def test_students_t(freedom):
    assert _student(0.975, freedom) == pytest.approx(stats.t(freedom).ppf(0.975), rel=0.01)


def test_no_interval_reaches_below_zero():
    """Two quiet rounds and many disturbed ones, one after the other."""
    rounds = [[1.0], [1.0], [1.5], [6.0], [9.0], [12.0], [14.0], [14.0], [15.0]]
    found = summarise(rounds)
    assert 0 < found.ci95[0] < 1 < found.median < 15 < found.ci95[1]
