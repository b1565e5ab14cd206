"""Where the time of a forward pass goes: by kind of work, by type of block, by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from effvit.deploy.records import Subject

#: Kinds of work. The first two compute, the next three wait for memory: EfficientViT (arXiv 2305.07027), figure 2.
WORK = ("convolution", "matrix", "normalisation", "elementwise", "reshape", "activation", "pooling", "other")
MEMORY_BOUND = ("normalisation", "elementwise", "reshape")


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
        work: Share of each kind of work in the time inside operators, all eight of `WORK`; they add up to 1.
        blocks: The same by type of block, the class's name, most expensive first: the kinds that it does, as shares of
            the whole pass, so that all together add up to 1.
        counts: How many blocks of each type there are.
        memory_bound: Share of `MEMORY_BOUND` kinds of work.
        unknown: Names of operators that no kind of work is known for and their share, which ``other`` is the sum of.
        stages: Median seconds of each stage, measured without the profiler, in the order of the network, and ``rest``,
            what runs outside of all.
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
    raise NotImplementedError
