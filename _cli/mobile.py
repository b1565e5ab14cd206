"""The protocol ``mobile``: files for telephones, written here and run where that is possible."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effvit._cli.subjects import Spec
from effvit.errors import ConfigError, ExportError

if TYPE_CHECKING:
    from effvit.deploy.export import Export
    from effvit.deploy.formats import Format
    from effvit.deploy.records import Record, Report

_FORMATS = ("coreml", "executorch")
_IMAGENET_CLASSES = 1000


@dataclass
class _File:
    """A network in a format: what was written, and how to run it where it runs."""

    spec: Spec
    format: str
    size: tuple[int, int]
    module: Any
    written: Export | None = None
    run: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)


def measure_mobile(specs: Sequence[Spec], folder: Path, *, rounds: int, seconds: float) -> Report:
    """Writes a CoreML and an ExecuTorch file of each network for one image, and times those that run here.

    Args:
        specs: The networks, as classifiers of ImageNet.
        folder: Where the files go.
        rounds: How often each file is visited.
        seconds: Seconds of a visit.

    Raises:
        ConfigError: Neither format is installed.
    """
    import torch

    from effvit.deploy.environment import environment
    from effvit.deploy.records import Report
    from effvit.deploy.statistics import summarise
    from effvit.deploy.timing import time_in_rounds, warm_up

    surroundings = environment("cpu", torch.get_num_threads())
    formats = _installed()
    files = [_write(spec, entry, folder) for spec in specs for entry in formats]
    calls = {number: file.run for number, file in enumerate(files) if file.run is not None}
    for number, call in calls.items():
        if not warm_up(call, "cpu").stable:
            files[number].notes.append("its time had not settled when the rounds began")
    found = time_in_rounds(calls, "cpu", rounds=rounds, seconds=seconds) if calls else {}
    latencies = {number: summarise(own) for number, own in found.items()}
    records = tuple(_record(file, latencies.get(number)) for number, file in enumerate(files))
    return Report(records, surroundings)


def _installed() -> list[Format]:
    from effvit.deploy.formats import FORMATS, check_writable

    def reason(entry: Format) -> str | None:
        try:
            check_writable(entry)
        except ConfigError as error:
            return str(error)
        return None

    reasons = {name: reason(FORMATS[name]) for name in _FORMATS}
    missing = [text for text in reasons.values() if text is not None]
    if len(missing) == len(reasons):
        raise ConfigError(" ".join(missing))
    for text in missing:
        print(f"not measured: {text}", file=sys.stderr)
    return [FORMATS[name] for name, text in reasons.items() if text is None]


def _write(spec: Spec, entry: Format, folder: Path) -> _File:
    from effvit.backbones import outline
    from effvit.deploy._files import file_name
    from effvit.deploy.export import export
    from effvit.deploy.exported import open_exported
    from effvit.tasks import Classification

    print(f"{spec.text}: {entry.name}", file=sys.stderr, flush=True)
    categories = {number: f"class {number}" for number in range(_IMAGENET_CLASSES)}
    task = Classification(backbone=spec.name, categories=categories, backbone_options=spec.options or None)
    module = task.deployable().eval()
    file = _File(spec, entry.name, spec.size or outline(spec.name).input_spec.size, module)
    path = folder / f"{file_name(spec.text)}{entry.suffix}"
    try:
        file.written = export(module, entry.name, path, size=file.size, batch=1)
    except ExportError as error:
        file.notes.append(str(error))
        return file
    if not entry.runs_here():
        file.notes.append(f"written to {file.written.path}, which runs on macOS only")
        return file
    opened = open_exported(file.written.path)
    images = module.example_inputs(1, file.size)[0]
    images = images.float() if opened.metadata["inputs"][0]["dtype"] == "float32" else images
    file.run = partial(opened.run, images)
    file.notes.append("its runtime decides on its threads, which the record has as 0")
    return file


def _record(file: _File, latency: Any) -> Record:
    from effvit.deploy.flops import count_macs
    from effvit.deploy.records import Record

    parity = file.written.parity if file.written else None
    return Record(
        model=file.spec.text,
        runtime=file.format,
        precision="fp32",
        device="cpu",
        threads=0,
        batch=1,
        asked_batch=1,
        size=file.size,
        latency=latency,
        throughput=1 / latency.median if latency else None,
        peak_memory=None,
        params=sum(parameter.numel() for parameter in file.module.parameters()),
        macs=count_macs(file.module, *file.module.example_inputs(1, file.size)),
        error=parity.errors[parity.worst] if parity else None,
        agreement=None,
        prepare_seconds=file.written.seconds if file.written else None,
        speedup=None,
        note="; ".join(file.notes),
    )
