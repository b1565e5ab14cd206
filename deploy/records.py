"""What a measurement leaves: plain records that files and tables are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Subject:
    """A network that is measured.

    Attributes:
        name: What tables call it.
        module: The network in eval mode, on the CPU, in float32.
        size: Height and width of its images in pixels.
        make_inputs: Batch size to what its ``forward`` takes, on the CPU.
        accuracy: What it reaches, in percent; ``None`` where nobody knows.
        accuracy_name: What that is, such as ``"top-1, published"``.
        parts: Names of its submodules by part of a detector, such as ``{"backbone": ("detector.pyramid.backbone",)}``.
    """

    name: str
    module: nn.Module
    size: tuple[int, int]
    make_inputs: Callable[[int], tuple[Tensor, ...]]
    accuracy: float | None = None
    accuracy_name: str = ""
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """Seconds of one forward pass of a whole batch.

    Attributes:
        median: Median of the medians of the rounds, so that no round counts more for having more samples.
        mean: Mean of all samples.
        p95: Their 95th percentile.
        p99: Their 99th percentile.
        ci95: 95 % confidence interval of `median`, from the rounds; see `effvit.deploy.statistics`.
        rounds: All samples, as they were taken, round by round.
    """

    median: float
    mean: float
    p95: float
    p99: float
    ci95: tuple[float, float]
    rounds: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one variant is as another, both measured in the same rounds.

    Attributes:
        value: Median over the rounds, of each the ratio of both medians.
        ci95: 95 % confidence interval of `value`, from the rounds; see `effvit.deploy.statistics`.
    """

    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Record:
    """One network in one runtime at one batch size.

    Attributes:
        model: Name of the network.
        runtime: Name of the runtime.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        device: ``cpu`` or ``cuda``.
        threads: Threads that the work was pinned to.
        batch: Images in a batch.
        asked_batch: Images that were asked for, more than `batch` where they did not fit.
        size: Height and width of an image in pixels.
        latency: Seconds of a batch; ``None`` where the runtime could not be measured.
        throughput: Images a second, of the median.
        peak_memory: Bytes that running adds to what model and input take, see `effvit.deploy.memory`; ``None`` where it
            was not measured.
        params: Parameters of the network.
        macs: Multiply-accumulates of one image.
        error: Largest difference from eager, relative to the largest output.
        agreement: Share of images with eager's first choice, in ``[0, 1]``, of those where it leads clearly; ``None``
            for fewer than eight of them, and for other outputs than classes.
        prepare_seconds: What conversion or compilation took.
        speedup: Against the first runtime asked for, of the same network and batch; ``None`` where that has no latency.
        parts: Median seconds of backbone, pyramid, heads and post-processing of a detector.
        accuracy: What the network reaches, in percent.
        accuracy_name: What that is.
        note: Why there is no figure, or what is special about it.
    """

    model: str
    runtime: str
    precision: str
    device: str
    threads: int
    batch: int
    asked_batch: int
    size: tuple[int, int]
    latency: Statistics | None
    throughput: float | None
    peak_memory: int | None
    params: int
    macs: int
    error: float | None
    agreement: float | None
    prepare_seconds: float | None
    speedup: Ratio | None
    parts: Mapping[str, float] = field(default_factory=dict)
    accuracy: float | None = None
    accuracy_name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All that one command has measured.

    Attributes:
        records: In the order in which they were asked for.
        environment: Machine, versions and load, see `environment`.
        command: The words of the command line, or how it was called.
    """

    records: tuple[Record, ...]
    environment: Mapping[str, Any]
    command: str = ""
