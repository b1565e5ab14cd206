"""Where the time of a forward pass goes: by kind of work, by type of block, by stage."""

from __future__ import annotations

import copy
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent

from effvit.deploy._operators import WORK, kind_of
from effvit.deploy._structure import blocks_of, stages_of
from effvit.deploy.parts import BEFORE, REST, called_in, timed_passes
from effvit.deploy.records import Subject
from effvit.deploy.timing import pinned
from effvit.errors import ConfigError

__all__ = ["MEMORY_BOUND", "WORK", "Profile", "profile"]

#: What waits for memory more than it computes: EfficientViT (arXiv 2305.07027), figure 2.
MEMORY_BOUND = ("normalisation", "elementwise", "reshape")
_RANGE = "effvit block "
_SECONDS = 1.0  # of passes that are measured, with the profiler and without
_MOST = 7  # passes with the profiler: it takes longer to read thousands of events than to record them
_LEAST = 3


@dataclass(frozen=True)
class Profile:
    """Where the time of one forward pass goes.

    Attributes:
        model: Name of the network.
        device: ``cpu`` or ``cuda``.
        threads: Threads that the work was pinned to.
        batch: Images in a batch.
        size: Height and width of an image in pixels.
        seconds: Median seconds of one pass, measured without the profiler.
        work: Share of each kind of work in the time inside operators, all of `WORK`; they add up to 1.
        blocks: The same by type of block, the class's name, most expensive first: the kinds that it does, as shares of
            the whole pass, so that all together add up to 1.
        counts: How many blocks of each type there are.
        memory_bound: Share of `MEMORY_BOUND` kinds of work.
        unknown: Names of operators that no kind of work is known for and their share, which ``other`` is the sum of.
        stages: Median seconds of each stage, measured without the profiler, in the order of the network, and ``rest``,
            what runs outside of all. Of one pass they add up to its seconds; of medians, up to the noise.
    """

    model: str
    device: str
    threads: int
    batch: int
    size: tuple[int, int]
    seconds: float
    work: Mapping[str, float]
    blocks: Mapping[str, Mapping[str, float]]
    counts: Mapping[str, int]
    memory_bound: float
    unknown: Mapping[str, float]
    stages: Mapping[str, float]


def profile(subject: Subject, batch: int = 1, *, device: str = "cpu", threads: int = 1) -> Profile:
    """Profiles one network as it is given: fused or in another memory layout where it comes so.

    Args:
        subject: The network and its inputs.
        batch: Images in a batch, at least 1.
        device: ``cpu`` or ``cuda``; on a GPU the time of its kernels counts, on the CPU that of operators.
        threads: Threads of the CPU to use, at least 1.

    Raises:
        ConfigError: A value out of its range, or no GPU.
    """
    if batch < 1 or threads < 1:
        raise ConfigError(f"a profile needs a batch and threads of at least 1, not {batch} and {threads}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device {device!r} is not here: a profile runs on cpu, or on cuda where torch finds a GPU")
    module = subject.module if device == "cpu" else copy.deepcopy(subject.module).to(device)
    inputs = [tensor.to(device) for tensor in subject.make_inputs(batch)]
    with pinned(threads), torch.no_grad():
        called = called_in(module, inputs)
        stages = stages_of(module, called)
        owners = {submodule: name for name, modules in stages.items() for submodule in modules}
        passes = timed_passes(module, inputs, owners, device=device, seconds=_SECONDS)
        seconds = statistics.median(sum(row.values()) for row in passes)
        blocks = blocks_of(module, called)
        count = max(_LEAST, min(_MOST, round(_SECONDS / seconds)))
        tally = _tally(_typical(_operators(module, inputs, blocks, device) for _ in range(count)))
    by_stage = {name: statistics.median(row[name] for row in passes) for name in stages}
    by_stage["rest"] = statistics.median(row[BEFORE] + row[REST] for row in passes)
    used = Counter(blocks.values())
    return Profile(
        model=subject.name,
        device=device,
        threads=threads,
        batch=batch,
        size=subject.size,
        seconds=seconds,
        work=tally.work,
        blocks=tally.blocks,
        counts={name: used[name] for name in tally.blocks},
        memory_bound=sum(tally.work[kind] for kind in MEMORY_BOUND),
        unknown=tally.unknown,
        stages=by_stage,
    )


@dataclass(frozen=True)
class _Tally:
    """Shares of the time inside operators, see `Profile`."""

    work: dict[str, float]
    blocks: dict[str, dict[str, float]]
    unknown: dict[str, float]


class _Operator(NamedTuple):
    """One call of an operator: its name, the type of the innermost block around it, and what it takes itself."""

    name: str
    block: str
    taken: float


def _tally(operators: Iterable[_Operator]) -> _Tally:
    """Adds up by kind of work and by type of block."""
    blocks: dict[str, Counter[str]] = defaultdict(Counter)
    unknown: Counter[str] = Counter()
    for name, block, taken in operators:
        kind = kind_of(name)
        if kind is None:
            unknown[name] += taken  # type: ignore[assignment] # a counter of microseconds
        blocks[block][kind or "other"] += taken  # type: ignore[assignment]
    total = sum(own.total() for own in blocks.values()) or 1.0
    order = sorted(blocks, key=lambda name: -blocks[name].total())
    shares = {name: {kind: blocks[name][kind] / total for kind in WORK if blocks[name][kind]} for name in order}
    return _Tally(
        work={kind: sum(own.get(kind, 0.0) for own in shares.values()) for kind in WORK},
        blocks={name: own for name, own in shares.items() if own},
        unknown={name: taken / total for name, taken in unknown.most_common()},
    )


def _typical(passes: Iterable[list[_Operator]]) -> list[_Operator]:
    """The median of each call over passes that call the same operators, or else the calls of all passes.

    What interrupts a pass, such as another process, hits one call of it and not the same one in most passes.
    """
    rows = list(passes)
    if len({tuple(operator[:2] for operator in row) for row in rows}) > 1:
        return [operator for row in rows for operator in row]
    return [
        calls[0]._replace(taken=statistics.median(call.taken for call in calls)) for calls in zip(*rows, strict=True)
    ]


def _operators(
    module: nn.Module, inputs: Sequence[Tensor], blocks: Mapping[nn.Module, str], device: str
) -> list[_Operator]:
    """The operators of one pass in the order of their calls, with the time of the CPU or of the kernels they start."""
    gpu = device != "cpu"
    profiler = torch.autograd.profiler.profile(use_kineto=True, use_device=device if gpu else None)
    with _quiet(), _ranges(blocks), profiler:
        module(*inputs)
        if gpu:
            torch.cuda.synchronize()
    return [
        _Operator(event.name, _block(event), event.self_device_time_total if gpu else event.self_cpu_time_total)
        for event in profiler.function_events or ()
        # Neither the ranges, time between operators in Python, nor the GPU's own rows, the same kernels once more.
        if not event.name.startswith(_RANGE) and event.device_type.name == "CPU"
    ]


def _block(event: FunctionEvent) -> str:
    """Type of the innermost block around an operator."""
    parent: Any = event
    while parent is not None and not parent.name.startswith(_RANGE):
        parent = parent.cpu_parent
    return "" if parent is None else parent.name.removeprefix(_RANGE)


@contextmanager
def _ranges(blocks: Mapping[nn.Module, str]) -> Iterator[None]:
    """Marks the calls of the blocks for the profiler while the context lasts."""
    opened: list[record_function] = []
    handles = []

    def leave(*_: object) -> None:
        opened.pop().__exit__(None, None, None)

    def entering(name: str) -> Any:
        def enter(*_: object) -> None:
            opened.append(record_function(_RANGE + name))
            opened[-1].__enter__()  # type: ignore[no-untyped-call]

        return enter

    try:
        for block, name in blocks.items():
            handles += [block.register_forward_pre_hook(entering(name)), block.register_forward_hook(leave)]
        yield
    finally:
        for handle in handles:
            handle.remove()
        while opened:  # after an error in a pass
            leave()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the profiler from writing about itself to the terminal, where the user has not set how much it may."""
    if "KINETO_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        del os.environ["KINETO_LOG_LEVEL"]
