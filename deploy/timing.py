"""The clock: how long calls take, all of them in the same rounds.

On a CPU the monotonic clock, on a GPU events of the device, with all earlier work finished before each call: a sample
is the time of one call alone. Rounds visit all calls in turn, forwards and backwards alternately, so that what slows
the machine down for a while slows all of them down, and a drift cancels out of their ratios.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from effvit.deploy.protocols import ROUNDS, SECONDS

Call = Callable[[], Any]
Key = TypeVar("Key", bound=Hashable)

_WINDOWS = 3  # consecutive windows that must agree
_TOLERANCE = 0.05
_SHORT = 0.25  # of a visit: a call shorter than that is made once more before the samples, unmeasured


@dataclass(frozen=True)
class WarmUp:
    """How a call was warmed up.

    Attributes:
        stable: Whether its time had settled before the limit.
        seconds: How long that took.
    """

    stable: bool
    seconds: float


def warm_up(
    call: Call, device: str, *, window: float = 0.05, most: float = 3.0, tolerance: float = _TOLERANCE
) -> WarmUp:
    """Calls until the time of a call has settled: the medians of three windows in a row differ by little.

    Args:
        call: One forward pass.
        device: ``cpu`` or ``cuda``.
        window: Seconds of one window, which has at least one call. Three windows are the least.
        most: Seconds after which it ends in any case.
        tolerance: What the largest of the three medians may be above the least, as a share of it.
    """
    medians: list[float] = []
    start = time.perf_counter()
    while True:
        medians.append(statistics.median(_visit(call, device, window)))
        last = medians[-_WINDOWS:]
        stable = len(last) == _WINDOWS and max(last) <= (1 + tolerance) * min(last)
        seconds = time.perf_counter() - start
        if stable or seconds >= most:
            return WarmUp(stable, seconds)


def time_in_rounds(
    calls: Mapping[Key, Call], device: str, *, rounds: int = ROUNDS, seconds: float = SECONDS
) -> dict[Key, list[list[float]]]:
    """Times warm calls against each other.

    Args:
        calls: What to time, by any key.
        device: ``cpu`` or ``cuda``.
        rounds: How often each is visited.
        seconds: How long a visit is; it has at least one call.

    Returns:
        For each key the seconds of every measured call, round by round.
    """
    found: dict[Key, list[list[float]]] = {key: [] for key in calls}
    order = list(calls)
    with _no_garbage_collection():
        for number in range(rounds):
            for key in order if number % 2 == 0 else reversed(order):
                if not found[key] or statistics.median(found[key][0]) < _SHORT * seconds:
                    calls[key]()  # brings back to the caches what the others have pushed out
                found[key].append(_visit(calls[key], device, seconds))
    return found


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Pins torch to so many threads of the CPU while the context lasts.

    Args:
        threads: At least 1.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def true_float32() -> Iterator[None]:
    """Keeps GPUs from rounding float32 to TF32, 11 bits of mantissa, while the context lasts.

    torch does so in convolutions unless told otherwise, other runtimes do not: their times would not be of one work.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _visit(call: Call, device: str, seconds: float) -> list[float]:
    """Seconds of each call, as many as fit."""
    measure = _on_gpu if device == "cuda" else _on_cpu
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        samples.append(measure(call))
    return samples


def _on_cpu(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _on_gpu(call: Call) -> float:
    before: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    after: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    before.record()
    call()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1000


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Rubbish is collected first, and then not before the end: a collection would fall into someone's sample."""
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
