"""Writing a trained network to a file that runs elsewhere, checked against its source."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from effvit.deploy._formats_source import Deployable, Source
from effvit.deploy._runtimes_contract import converting, copied
from effvit.deploy.exported import Exported
from effvit.deploy.formats import FORMATS, Format, check_writable, format_of
from effvit.deploy.parity import Parity, parity
from effvit.errors import ConfigError, ExportError

#: Images of a graph that is to take any number of them: torch.export keeps a size of 1 as it is.
_TRACED_BATCH = 2
#: Sizes of the batches that a file for any batch is checked with: others than the traced one.
_CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The file; OpenVINO's ``.xml``, which its ``.bin`` lies beside; CoreML's folder.
        format: Name of the format.
        metadata: What was stored in it.
        parity: How close to its source it is; ``None`` where the format does not run on this machine.
        seconds: What writing took, without the comparison.
    """

    path: Path
    format: str
    metadata: Mapping[str, Any]
    parity: Parity | None
    seconds: float


def check_export(task: str, format_name: str, path: str | Path | None = None, *, batch: int | None = None) -> Format:
    """Refuses what cannot be done, before any work.

    Args:
        task: ``classification`` or ``detection``.
        format_name: Name of the format.
        path: Where the file is to go; ``None`` where that is not known yet.
        batch: Images that the file is to take at a time; ``None`` for any number where the format can.

    Returns:
        The format.

    Raises:
        ConfigError: An unknown format, one that is not installed, a path of another suffix, a batch below 1.
        ExportError: The format cannot hold a network of this task.
    """
    entry = format_of(format_name)
    if task not in entry.tasks:
        others = ", ".join(other.name for other in FORMATS.values() if task in other.tasks)
        raise ExportError(f"the format {entry.name} cannot hold a network for {task}; those that can: {others}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch must be at least 1, or left out for any number, not {batch}")
    if path is not None and Path(path).suffix != entry.suffix:
        raise ConfigError(f"a file of {entry.name} must end in {entry.suffix}, which {path} does not")
    check_writable(entry)
    return entry


def export(
    module: Deployable,
    format_name: str,
    path: str | Path,
    *,
    size: tuple[int, int],
    batch: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    samples: Sequence[tuple[Tensor, ...]] = (),
) -> Export:
    """Writes a network to a file and checks that the file says what the network says.

    All is written beside `path` first and renamed when it is known to be right, so that an error leaves nothing behind
    and an older file as it was.

    Args:
        module: The network; it stays as it is.
        format_name: Name of the format.
        path: Where the file is to go.
        size: Height and width of its images in pixels.
        batch: Images that it is to take at a time; ``None`` for any number, where the format and the
            network can, otherwise for 1.
        metadata: What is stored beside what the network says of itself: source, resize policy.
        samples: What ``forward`` takes of one real image each (a batch of 1), all of the same `size`. Without any,
            noise is compared.

    Returns:
        What was written.

    Raises:
        ConfigError: See `check_export`.
        ExportError: The network cannot be written to this format, or the file disagrees with it: the message names the
            worst output.
    """
    entry = check_export(module.task, format_name, path, batch=batch)
    path = Path(path)
    if batch is None and not (entry.dynamic_batch and module.dynamic_batch):
        batch = 1
    module = _own_copy(module)
    source = _source(module, size, batch)
    facts = {**module.metadata(), **(metadata or {}), **_facts(entry, source, size, batch)}
    with _staged(path) as staged:
        started = time.perf_counter()
        with converting(source.module, entry.name):
            entry.write(source, staged, json.dumps(facts))
        seconds = time.perf_counter() - started
        found = None
        if entry.runs_here():
            batches = _batches(module, samples, size, batch)
            with converting(source.module, f"{entry.name} so that it runs"):
                run = entry.open(staged, None)
                found = parity(module, Exported(path, entry.name, facts, run), batches)
            facts["parity"] = found.as_dict()
            if entry.attach is not None:
                entry.attach(staged, json.dumps(facts))
    return Export(path, entry.name, facts, found, seconds)


def _own_copy(module: Deployable) -> Deployable:
    """On the CPU, in float32, in eval mode: exporters change memory formats and fill caches."""
    assert isinstance(module, nn.Module)
    own: Any = copied(module, fused=False).cpu().float()
    return cast("Deployable", own)


def _source(module: Deployable, size: tuple[int, int], batch: int | None) -> Source:
    assert isinstance(module, nn.Module)
    return Source(
        module=module,
        inputs=module.example_inputs(batch or _TRACED_BATCH, size),
        input_names=tuple(module.input_names),
        output_names=tuple(module.output_names),
        dynamic_batch=batch is None,
    )


def _facts(entry: Format, source: Source, size: tuple[int, int], batch: int | None) -> dict[str, Any]:
    """What `Exported` reads, and with what it was made."""
    return {
        "format": entry.name,
        "size": list(size),
        "batch": batch,
        "inputs": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [batch, *tensor.shape[1:]],
            }
            for name, tensor in zip(source.input_names, source.inputs, strict=True)
        ],
        "output_names": list(source.output_names),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path in a folder beside, whose content takes the place of `path` at the end, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    try:
        yield folder / path.name
        _move_into_place(folder, path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(folder: Path, target: Path) -> None:
    """Renames all that lies in a folder; what is replaced comes back where one of them cannot be."""
    old = folder / "replaced"
    written = sorted(folder.iterdir())  # OpenVINO's .bin before its .xml
    old.mkdir()
    moved: list[Path] = []
    try:
        for item in written:
            place = target / item.name
            if place.exists():
                place.rename(old / item.name)
            moved.append(place)
            item.rename(place)
    except OSError:
        for place in moved:
            if place.exists():
                place.rename(folder / place.name)
            if (old / place.name).exists():
                (old / place.name).rename(place)
        raise


def _batches(
    module: Deployable, samples: Sequence[tuple[Tensor, ...]], size: tuple[int, int], batch: int | None
) -> list[tuple[Tensor, ...]]:
    """Samples put together to batches that the file takes; the last is filled up by beginning again."""
    if not samples:
        number = batch or sum(_CHECKED_BATCHES)
        noise = module.example_inputs(number, size)  # at once: it is the same at each call
        samples = [tuple(tensor[one : one + 1] for tensor in noise) for one in range(number)]
    sizes = _CHECKED_BATCHES if batch is None else (batch,)
    batches: list[tuple[Tensor, ...]] = []
    taken = 0
    while taken < len(samples) or len(batches) < len(sizes):
        number = sizes[len(batches) % len(sizes)]
        chosen = [samples[(taken + step) % len(samples)] for step in range(number)]
        batches.append(tuple(torch.cat(parts) for parts in zip(*chosen, strict=True)))
        taken += number
    return batches
