"""The engine: networks in runtimes, each checked against eager, all timed in the same rounds."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effvit.deploy._files import file_name
from effvit.deploy._fit import fitting_batch, is_out_of_memory, largest_fitting
from effvit.deploy._runtimes_files import kept_in
from effvit.deploy.environment import allocator, environment
from effvit.deploy.flops import count_macs
from effvit.deploy.memory import peak_memories, peak_on_gpu
from effvit.deploy.parts import time_parts
from effvit.deploy.protocols import ROUNDS, SECONDS
from effvit.deploy.records import Ratio, Record, Report, Statistics, Subject
from effvit.deploy.runtimes import RUNTIMES, Agreement, Prepared, Setting, check, compare, prepare, require
from effvit.deploy.statistics import ratio, summarise
from effvit.deploy.timing import pinned, time_in_rounds, true_float32, warm_up
from effvit.errors import ConfigError, ExportError

Progress = Callable[[str], None]


@dataclass
class _Variant:
    """A network in a runtime in a precision."""

    runtime: str
    setting: Setting
    prepared: Prepared | None = None
    prepare_seconds: float | None = None
    agreement: Agreement | None = None
    latency: Statistics | None = None
    peak: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class _Case:
    """A network at a batch size, in all its variants."""

    subject: Subject
    asked: int
    macs: int
    batch: int = 0
    inputs: tuple[Tensor, ...] = ()
    variants: list[_Variant] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


def benchmark(
    subjects: Sequence[Subject],
    *,
    runtimes: Sequence[str] = ("eager",),
    batches: Sequence[int] = (1,),
    precisions: Sequence[str] = ("fp32",),
    device: str = "cpu",
    threads: int = 1,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    memory: bool = True,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Measures networks in runtimes.

    At each batch size everything is made ready, checked against eager's outputs, warmed up until its time has settled,
    and then timed in the same rounds, networks beside each other too: ratios between any two records of one batch size
    are of the same rounds. Of a batch that does not fit into memory a smaller one is measured, about the largest that
    does; a network that a runtime cannot take has a record that says why. On a GPU ``fp32`` is float32 everywhere,
    never TF32.

    Args:
        subjects: Networks, each with a name of its own.
        runtimes: Names, see ``effvit.deploy.runtimes``; speed-ups are against the first, where it has a time.
        batches: Images in a batch.
        precisions: ``fp32``, ``bf16``, ``fp16``, ``int8``; a runtime without one of them has a record that says so.
        device: ``cpu`` or ``cuda``.
        threads: Threads that a forward pass is pinned to.
        rounds: How often each variant is visited.
        seconds: How long a visit is, at least one forward pass.
        memory: Whether peak memory is measured too; on a CPU that takes a process for each variant.
        folder: Where converted files are kept and found again; by default they are thrown away.
        progress: Gets a line at each step.

    Raises:
        ConfigError: A value out of its range, an unknown runtime, one that is not installed, no GPU, or a network of
            which not even one image fits into memory.
        ExportError: A runtime's outputs in float32 are not eager's: the worst tensor and its error are named. In a
            coarser precision the record says so, and the others are measured.
    """
    settings = _settings(subjects, runtimes, precisions, Setting(device=device, threads=threads))
    _check_numbers(batches, rounds, seconds)
    say = progress or (lambda _: None)
    records: dict[str, list[Record]] = {subject.name: [] for subject in subjects}
    with pinned(threads), true_float32(), kept_in(folder) as files:
        surroundings = environment(device, threads)
        if memory and device == "cpu":
            surroundings["allocator_of_memory"] = allocator()  # of fresh processes, see effvit.deploy.memory
        for batch in batches:
            cases = [_make_ready(subject, batch, settings, files, say) for subject in subjects]
            _time(cases, device, rounds, seconds, say)
            _time_parts(cases, device, say)
            _measure_memory(cases, device, memory, say)
            for case in cases:
                records[case.subject.name] += _records(case)
            del cases
            _release(device)
    return Report(tuple(record for own in records.values() for record in own), surroundings)


def _settings(
    subjects: Sequence[Subject], runtimes: Sequence[str], precisions: Sequence[str], base: Setting
) -> list[tuple[str, Setting]]:
    """What is to be measured of each network; everything that can be refused is refused here."""
    names = [subject.name for subject in subjects]
    for what, given in (("networks", names), ("runtimes", runtimes), ("precisions", precisions)):
        if not given or len(set(given)) < len(given):
            raise ConfigError(f"benchmark needs {what}, each once, not {list(given)}")
    found = []
    for precision in precisions:
        setting = Setting(base.device, precision, base.threads)
        able = 0
        for runtime in runtimes:
            has = _precisions(runtime, setting)
            if precision in has or not has or len(runtimes) == 1:
                require(runtime, setting)
            able += precision in has
            found.append((runtime, setting))
        if not able:
            given = ", ".join(runtimes)
            raise ConfigError(f"None of the runtimes {given} has precision {precision!r} on {base.device}.")
    return found


def _precisions(runtime: str, setting: Setting) -> Sequence[str]:
    """What a runtime has on a device; nothing where there is no such runtime, or not on this device."""
    return RUNTIMES[runtime].precisions.get(setting.device, ()) if runtime in RUNTIMES else ()


def _check_numbers(batches: Sequence[int], rounds: int, seconds: float) -> None:
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise ConfigError(f"batches are numbers from 1 on, each once, not {list(batches)}")
    if rounds < 1 or seconds < 0:
        raise ConfigError(f"rounds must be at least 1 and seconds at least 0, not {rounds} and {seconds}")


def _make_ready(
    subject: Subject, asked: int, settings: Sequence[tuple[str, Setting]], files: Path, say: Progress
) -> _Case:
    """Prepares and checks all variants, at the largest batch that fits."""
    say(f"{subject.name}, batch {asked}: counting")
    case = _Case(subject, asked, count_macs(subject.module, *subject.make_inputs(1)))

    def fits(batch: int) -> bool:
        try:
            _prepare_all(case, batch, settings, files, say)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if batch == 1:
                raise ConfigError(f"{subject.name} does not fit into memory, not even a batch of 1: {error}") from error
        else:
            return True
        case.variants, case.inputs = [], ()  # after the except clause: the error holds what its frames held
        _release(settings[0][1].device)
        say(f"{subject.name}: batch {batch} does not fit into memory")
        return False

    likely = asked
    if settings[0][1].device == "cpu":
        likely = fitting_batch(subject.module, subject.make_inputs, asked, _held_at_once(settings))
    largest_fitting(likely, fits)
    return case


def _held_at_once(settings: Sequence[tuple[str, Setting]]) -> int:
    """How many runtimes hold the memory of a pass at one time: those with memory of their own, and the one that runs.

    torch's runtimes give back between passes what they need.
    """
    keeping = sum(bool(RUNTIMES[runtime].modules) for runtime, _ in settings)
    return keeping + (keeping < len(settings))


def _prepare_all(case: _Case, batch: int, settings: Sequence[tuple[str, Setting]], files: Path, say: Progress) -> None:
    case.batch, case.inputs = batch, case.subject.make_inputs(batch)
    case.variants = []
    base = settings[0][1]
    eager = prepare(case.subject.module, case.inputs, "eager", Setting(base.device, "fp32", base.threads))
    expected = eager.outputs()
    folder = files / file_name(case.subject.name) / f"batch{batch}"
    folder.mkdir(parents=True, exist_ok=True)
    for runtime, setting in settings:
        say(f"{case.subject.name}, batch {batch}: {runtime} {setting.precision}")
        variant = _Variant(runtime, Setting(setting.device, setting.precision, setting.threads, folder))
        if batch < case.asked:
            variant.notes.append(f"batch {case.asked} does not fit into memory, {batch} does")
        case.variants.append(variant)
        if _is_plain(variant):
            variant.prepared, variant.prepare_seconds = eager, eager.seconds
            variant.agreement = compare(expected, expected, eager.names)
        else:
            _prepare(variant, case, expected, eager.names)


def _prepare(variant: _Variant, case: _Case, expected: list[Tensor], names: Sequence[str]) -> None:
    setting = variant.setting
    has = _precisions(variant.runtime, setting)
    if setting.precision not in has:
        variant.notes.append(f"{variant.runtime} has no {setting.precision} on {setting.device}, only {', '.join(has)}")
        return
    try:
        prepared = prepare(case.subject.module, case.inputs, variant.runtime, setting)
    except (ConfigError, ExportError) as error:
        if is_out_of_memory(error):
            raise
        variant.notes.append(str(error))
        return
    found = prepared.outputs()
    try:
        variant.agreement = _agreement(case, variant, found, expected, names)
    except ExportError as error:
        if setting.precision == "fp32":
            raise
        # Untrained weights may be too close calls for few bits; what the others take is known all the same.
        variant.notes.append(str(error))
        return
    variant.prepared, variant.prepare_seconds = prepared, prepared.seconds
    if prepared.note:
        variant.notes.append(prepared.note)


def _agreement(
    case: _Case, variant: _Variant, found: list[Tensor], expected: list[Tensor], names: Sequence[str]
) -> Agreement:
    """How well a variant agrees with eager, if well enough."""
    who, precision = f"{case.subject.name} in {variant.runtime}", variant.setting.precision
    try:
        agreement = compare(found, expected, names, precision)
    except ExportError as error:
        raise ExportError(f"{who} ({precision}) differs from eager: {error}") from error
    check(agreement, who, precision)
    return agreement


class _MemoryRanOutError(Exception):
    """A variant, by its number, took more memory than there is."""


@contextlib.contextmanager
def _may_run_out(variant: _Variant, doing: str) -> Iterator[None]:
    """A lack of memory becomes a note."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        variant.notes.append(f"memory ran out while {doing}")


def _time(cases: Sequence[_Case], device: str, rounds: int, seconds: float, say: Progress) -> None:
    """Warms all variants up, times them in the same rounds; without those that run out of memory."""
    ready = [variant for case in cases for variant in case.variants if variant.prepared is not None]
    say(f"warming up {len(ready)} variants")
    calls = {}
    for number, variant in enumerate(ready):
        assert variant.prepared is not None
        with _may_run_out(variant, "warming up"):
            warm = warm_up(variant.prepared.run, device)
            calls[number] = _told(number, variant.prepared.run)
            if not warm.stable:
                variant.notes.append(f"its time had not settled after {warm.seconds:.0f} s of warming up")
        if number not in calls:
            variant.prepared = None
            _release(device)
    found = None
    while found is None:
        say(f"timing {len(calls)} variants in {rounds} rounds")
        try:
            found = time_in_rounds(calls, device, rounds=rounds, seconds=seconds)
        except _MemoryRanOutError as error:
            (number,) = error.args
            ready[number].notes.append("memory ran out while timing")
            ready[number].prepared = None
            del calls[number]
        if found is None:
            _release(device)  # after the except clause: the error holds what its frames held
    for number, own in found.items():
        ready[number].latency = summarise(own)


def _told(number: int, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, telling whose it is where it runs out of memory."""

    def run() -> Any:
        try:
            return call()
        except Exception as error:
            if is_out_of_memory(error):
                raise _MemoryRanOutError(number) from error
            raise

    return run


def _time_parts(cases: Sequence[_Case], device: str, say: Progress) -> None:
    """Times the parts of the networks that have some, in eager."""
    for case in cases:
        eager = next((own for own in case.variants if _is_plain(own) and own.latency is not None), None)
        if not case.subject.parts or eager is None:
            continue
        say(f"{case.subject.name}, batch {case.batch}: parts")
        with _may_run_out(eager, "timing parts"):
            module, inputs = case.subject.module, case.inputs
            if device != "cpu":
                module, inputs = copy.deepcopy(module).to(device), tuple(tensor.to(device) for tensor in inputs)
            case.parts = time_parts(module, inputs, case.subject.parts, device=device)


def _is_plain(variant: _Variant) -> bool:
    return (variant.runtime, variant.setting.precision) == ("eager", "fp32")


def _measure_memory(cases: Sequence[_Case], device: str, memory: bool, say: Progress) -> None:
    """Measures memory where it is asked for, and lets go of what was prepared."""
    for case in cases:
        for variant in case.variants:
            if memory and device == "cuda" and variant.prepared is not None and variant.latency is not None:
                with _may_run_out(variant, "measuring memory"):
                    variant.peak = peak_on_gpu(variant.prepared, variant.runtime)
            variant.prepared = None
    _release(device)
    for case in cases if memory and device != "cuda" else ():
        say(f"{case.subject.name}, batch {case.batch}: memory")
        timed = [variant for variant in case.variants if variant.latency is not None]
        wanted = [(variant.runtime, variant.setting) for variant in timed]
        found = peak_memories(case.subject.module, case.inputs, wanted)
        for variant, peak in zip(timed, found, strict=True):
            if isinstance(peak, ConfigError):
                variant.notes.append(str(peak))
            else:
                variant.peak = peak


def _records(case: _Case) -> list[Record]:
    first = case.variants[0].latency
    subject = case.subject
    params = sum(parameter.numel() for parameter in subject.module.parameters())
    return [
        Record(
            model=subject.name,
            runtime=variant.runtime,
            precision=variant.setting.precision,
            device=variant.setting.device,
            threads=variant.setting.threads,
            batch=case.batch,
            asked_batch=case.asked,
            size=subject.size,
            latency=variant.latency,
            throughput=case.batch / variant.latency.median if variant.latency else None,
            peak_memory=variant.peak,
            params=params,
            macs=case.macs,
            error=variant.agreement.error if variant.agreement else None,
            agreement=variant.agreement.top1 if variant.agreement else None,
            prepare_seconds=variant.prepare_seconds,
            speedup=_speedup(first, variant.latency),
            parts=case.parts if _is_plain(variant) else {},
            accuracy=subject.accuracy,
            accuracy_name=subject.accuracy_name,
            note="; ".join(variant.notes),
        )
        for variant in case.variants
    ]


def _speedup(first: Statistics | None, own: Statistics | None) -> Ratio | None:
    return None if first is None or own is None else ratio(first.rounds, own.rounds)


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
