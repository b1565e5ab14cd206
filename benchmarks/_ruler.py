"""The project's ruler: how every figure in ``benchmarks/README.md`` is taken.

One process; each variant is warmed and calibrated to a slot of time; then rounds visit all variants in turn, forwards
and backwards alternately, and note calls per CPU second (``process_time``, blind to other processes taking the core)
beside calls per wall second. A ratio is the median of the per-round ratios to the baseline, with its least and
greatest, so that what disturbs a round disturbs both sides of it. Absolute figures of a busy machine are worth little;
the ratios hold.

Peak memory has a process of its own for each variant: the high-water mark of its resident size while it runs, less the
resident size once model and input exist.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Variant = Callable[[], object]


@dataclass(frozen=True)
class Result:
    """One variant's figures.

    Attributes:
        name: The variant.
        cpu_rate: Items per CPU second, median of the rounds.
        wall_rate: Items per wall second, median of the rounds.
        ratio: Median of the per-round ratios of CPU rates to the baseline's.
        ratio_range: Least and greatest of them.
        wall_ratio: Median of the per-round ratios of wall rates.
    """

    name: str
    cpu_rate: float
    wall_rate: float
    ratio: float
    ratio_range: tuple[float, float]
    wall_ratio: float


@dataclass(frozen=True)
class Measurement:
    """All variants of one subject, measured together.

    Attributes:
        title: The subject, such as ``"efficientvit_m4, batch 16"``.
        results: The baseline first.
    """

    title: str
    results: tuple[Result, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Everything as one line of JSON."""
        return json.dumps(asdict(self))


def measure(
    title: str, variants: Mapping[str, Variant], *, items: int = 1, rounds: int = 7, slot: float = 0.3
) -> Measurement:
    """Times variants against the first of them.

    Args:
        title: The subject.
        variants: What to call, by name; the first is the baseline.
        items: Images (or boxes, ...) that one call works through.
        rounds: How often each variant is visited.
        slot: CPU seconds of one visit.
    """
    calls = {name: _calibrate(variant, slot) for name, variant in variants.items()}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            cpu_seconds, wall_seconds = _time(variants[name], calls[name])
            cpu[name].append(items * calls[name] / cpu_seconds)
            wall[name].append(items * calls[name] / wall_seconds)
    baseline = next(iter(variants))
    results = []
    for name in variants:
        ratios = [own / base for own, base in zip(cpu[name], cpu[baseline], strict=True)]
        walls = [own / base for own, base in zip(wall[name], wall[baseline], strict=True)]
        results.append(
            Result(
                name=name,
                cpu_rate=statistics.median(cpu[name]),
                wall_rate=statistics.median(wall[name]),
                ratio=statistics.median(ratios),
                ratio_range=(min(ratios), max(ratios)),
                wall_ratio=statistics.median(walls),
            )
        )
    return Measurement(title, tuple(results), environment())


def _calibrate(variant: Variant, slot: float) -> int:
    """Calls that fill a slot, after two that warm caches up."""
    variant()
    _time(variant, 1)
    seconds, _ = _time(variant, 1)
    return max(1, round(slot / max(seconds, 1e-6)))


def _time(variant: Variant, calls: int) -> tuple[float, float]:
    """CPU and wall seconds of `calls` calls."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        variant()
    return time.process_time() - cpu, time.perf_counter() - wall


def peak_memory(make: Callable[..., Variant], *arguments: Any) -> float:
    """Peak resident memory that one variant adds while it runs, in MB (10**6 bytes).

    Args:
        make: Module-level function that builds model and input and returns the call; it runs in a fresh process.
        *arguments: For `make`; plain values.

    Returns:
        The high-water mark during three calls, less the resident size before the first.
    """
    peak: float = in_own_process(_peak_here, make, arguments)
    return peak


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a fresh process, so that nothing that ran before has shaped the allocator.

    Args:
        function: A module's own function.
        *arguments: Plain values.
    """
    # "spawn": a forked child would inherit this process's memory, and its high-water mark.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _peak_here(make: Callable[..., Variant], arguments: tuple[Any, ...]) -> float:
    from effvit.deploy.memory import peak_of

    return peak_of(make(*arguments)) / 1e6


def environment() -> dict[str, str]:
    """What a figure depends on besides the code: machine, versions, threads, allocator."""
    import torch

    from effvit.deploy.environment import allocator, load, processor

    return {
        "cpu": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "allocator": allocator(),
        "load": " ".join(f"{value:.1f}" for value in load() or ()),
    }


def to_markdown(measurements: Sequence[Measurement], *, unit: str = "img") -> str:
    """One row for each subject: the baseline's rate, then each variant's ratio with its range.

    Args:
        measurements: Subjects with the same variants.
        unit: What an item is.
    """
    names = [result.name for result in measurements[0].results]
    header = ["", f"{names[0]} ({unit} per CPU second)", *names[1:]]
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for measurement in measurements:
        base, *others = measurement.results
        cells = [f"{other.ratio:.2f} ({other.ratio_range[0]:.2f}-{other.ratio_range[1]:.2f})" for other in others]
        lines.append("| " + " | ".join([measurement.title, f"{base.cpu_rate:.1f}", *cells]) + " |")
    return "\n".join(lines)
