"""The clock: stable before it counts, everything in the same rounds; and runs that agree with each other."""

from __future__ import annotations

import gc
import itertools

import pytest
import torch

from effvit.deploy import timing
from effvit.deploy.statistics import ratio
from effvit.deploy.timing import pinned, time_in_rounds, warm_up


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
    assert found.seconds == pytest.approx(sum(falling) + 2)  # the last of them, and two that agree with it


def test_warm_up_of_what_is_steady_takes_three_windows(clock):
    found = warm_up(clock.call(itertools.repeat(0.01)), "cpu", window=0.05)
    assert found.stable
    assert 0.15 <= found.seconds <= 0.18


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


def test_threads_are_pinned_for_a_while():
    before = torch.get_num_threads()
    seen = []
    with pytest.raises(TypeError), pinned(before + 1):
        seen.append(torch.get_num_threads(), "an error")
    with pinned(before + 1):
        seen.append(torch.get_num_threads())
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


@pytest.mark.gpu
def test_device_events_see_the_work_of_the_gpu():
    """A call returns at once, long before four products of matrices are done."""
    square = torch.randn(4096, 4096, device="cuda")
    found = time_in_rounds({1: lambda: square @ square, 4: lambda: [square @ square for _ in range(4)]}, "cuda")
    assert ratio(found[4], found[1]).value > 2
