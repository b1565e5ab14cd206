"""The clock: stable before it counts, everything in the same rounds; and runs that agree with each other."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch
from torch import nn

from effvit.deploy import timing
from effvit.deploy.statistics import ratio, summarise
from effvit.deploy.timing import time_in_rounds, warm_up


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls under test move."""

    class Clock:
        now = 0.0

        def call(self, seconds):
            """A call that takes what the iterator `seconds` says."""

            def run():
                self.now += next(seconds)

            return run

    own = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: own.now)
    return own


def test_warm_up_goes_on_until_the_time_has_settled(clock):
    falling = [10.0, 5.0, 2.5, 1.2, 1.0]
    found = warm_up(clock.call(itertools.chain(falling, itertools.repeat(1.0))), "cpu", window=0.5, most=100)
    assert found.stable
    assert found.calls == len(falling) + 2  # the last of them, and two that agree with it
    assert found.seconds == pytest.approx(sum(falling) + 2)


def test_warm_up_of_what_is_steady_takes_three_windows(clock):
    found = warm_up(clock.call(itertools.repeat(0.01)), "cpu", window=0.05)
    assert found.stable
    assert 15 <= found.calls <= 18


def test_warm_up_ends_without_ever_settling(clock):
    found = warm_up(clock.call(itertools.cycle([1.0, 2.0])), "cpu", window=0.5, most=20)
    assert not found.stable
    assert 20 <= found.seconds <= 22


def test_rounds_visit_forwards_and_backwards(clock):
    visits = []

    def call(name, seconds):
        def run():
            visits.append(name)
            clock.now += seconds

        return run

    found = time_in_rounds({"a": call("a", 3.0), 7: call("b", 5.0)}, "cpu", rounds=3, seconds=1.0)
    assert found == {"a": [[3.0]] * 3, 7: [[5.0]] * 3}
    first, *rest = (
        "".join(group) for group in ("aabb", "ba", "ab")
    )  # the first visits have a call that is not counted
    assert "".join(visits) == "".join([first, *rest])


def test_short_calls_fill_a_visit_behind_an_uncounted_one(clock):
    calls = itertools.count()
    step = clock.call(itertools.repeat(0.125))

    def run():
        next(calls)
        step()

    found = time_in_rounds({"a": run}, "cpu", rounds=2, seconds=1.0)
    assert found == {"a": [[0.125] * 8] * 2}
    assert next(calls) == 2 * (1 + 8)


def test_no_garbage_is_collected_while_timing():
    seen = []
    time_in_rounds({"a": lambda: seen.append(gc.isenabled())}, "cpu", rounds=1, seconds=0)
    assert seen == [False, False]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        time_in_rounds({"a": lambda: 1 / 0}, "cpu", rounds=1, seconds=0)
    assert gc.isenabled()


def make_network(channels, depth):
    layers = [nn.Conv2d(3, channels, 3, stride=2, padding=1)]
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def overlap(one, other):
    return one[0] <= other[1] and other[0] <= one[1]


@pytest.mark.slow
def test_repeated_runs_agree_within_their_interval():
    """Ten times the same measurement, and once more: each agrees with the one before, nine times of ten at least."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    small, large = make_network(16, 4), make_network(32, 6)
    calls = {"small": lambda: small(images), "large": lambda: large(images)}
    latencies, ratios = {name: [] for name in calls}, []
    with torch.no_grad():
        for _ in range(11):
            for call in calls.values():
                warm_up(call, "cpu")
            found = time_in_rounds(calls, "cpu")
            for name, rounds in found.items():
                latencies[name].append(summarise(rounds).ci95)
            ratios.append(ratio(found["large"], found["small"]).ci95)
    for intervals in (*latencies.values(), ratios):
        agree = [overlap(one, other) for one, other in itertools.pairwise(intervals)]
        assert sum(agree) >= 9, intervals
    assert all(low > 1 for low, _ in ratios)  # not so wide that they say nothing


@pytest.mark.gpu
def test_device_events_see_the_work_of_the_gpu():
    square = torch.randn(4096, 4096, device="cuda")
    found = time_in_rounds({1: lambda: square @ square, 4: lambda: [square @ square for _ in range(4)]}, "cuda")
    assert ratio(found[4], found[1]).value == pytest.approx(4, rel=0.25)
