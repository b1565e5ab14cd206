"""Writing a trained network to a file that runs elsewhere, checked against its source."""

from __future__ import annotations

import glob
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
from torch.nn import functional

from effvit.deploy._formats_source import Deployable, Source
from effvit.deploy._runtimes_contract import converting, copied
from effvit.deploy.exported import Exported
from effvit.deploy.formats import FORMATS, Format, check_writable, format_of
from effvit.deploy.parity import Parity, parity
from effvit.errors import ConfigError, ExportError

#: Images of a graph that is to take any number of them: torch.export keeps a size of 1 as it is.
_TRACED_BATCH = 2
#: Steps beyond the least size in which a graph for images of any size is recorded: not square, and so large that no map
#: of stride 256 (SSDLite's) has a side of 1, which would be taken for a constant.
_TRACED_STEPS = (9, 12)
#: Steps by which images are made larger where all have one size, so that such a graph is checked on a second one.
_CHECKED_STEPS = (1, 2)
#: A folder of an export that is older than this is of one that was killed.
_LEFT_OVER_SECONDS = 6 * 3600
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
        task: ``classification``, ``detection`` or ``segmentation``.
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
    size: tuple[int, int] | None,
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
        size: Height and width of its images in pixels; ``None`` for any, where the format and the network can.
        batch: Images that it is to take at a time; ``None`` for any number, where the format can, otherwise for 1.
        metadata: What is stored beside what the network says of itself: source, resize policy.
        samples: What ``forward`` takes of one real image each (a batch of 1), all of the same `size`, or of such as
            `open_sides` has. Without any, noise is compared.

    Returns:
        What was written.

    Raises:
        ConfigError: See `check_export`.
        ExportError: See `check_export` and `check_any_size`; the network cannot be written to this format, or the file
            disagrees with it: the message names the worst output.
    """
    entry = check_export(module.task, format_name, path, batch=batch)
    if size is None:
        check_any_size(module, entry)
    path = Path(path)
    if batch is None and module.task not in entry.dynamic_batch:
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
            batches = _batches(samples or _noise(module, source, batch), batch)
            if source.open_sides is not None:
                batches = _of_sizes(batches, source.open_sides)
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


def _source(module: Deployable, size: tuple[int, int] | None, batch: int | None) -> Source:
    assert isinstance(module, nn.Module)
    open_sides = module.open_sides if size is None else None
    if size is None:
        assert open_sides is not None  # see `check_any_size`
        size = open_sides[_TRACED_STEPS[0]], open_sides[_TRACED_STEPS[1]]
    return Source(
        module=module,
        inputs=module.example_inputs(batch or _TRACED_BATCH, size),
        input_names=tuple(module.input_names),
        output_names=tuple(module.output_names),
        dynamic_batch=batch is None,
        open_sides=open_sides,
        onnx_translations=module.onnx_translations(),
    )


def _facts(entry: Format, source: Source, size: tuple[int, int] | None, batch: int | None) -> dict[str, Any]:
    """What `Exported` reads, and with what it was made."""
    sides = source.open_sides
    return {
        "format": entry.name,
        "size": None if size is None else list(size),
        "sides": None if sides is None else {"least": sides[0], "most": sides[-1], "step": sides.step},
        "batch": batch,
        "inputs": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [batch, *(tensor.shape[1:] if size or place else (tensor.shape[1], None, None))],
            }
            for place, (name, tensor) in enumerate(zip(source.input_names, source.inputs, strict=True))
        ],
        "output_names": list(source.output_names),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_any_size(module: Deployable, entry: Format) -> range:
    """Refuses a file for images of any size where there can be none, before any work.

    Args:
        module: The network.
        entry: The format.

    Returns:
        The sides that its images may have, in pixels.

    Raises:
        ExportError: The format takes images of one size, or the network does.
    """
    how = "ask for one size, such as --image_size 256"
    if module.task not in entry.dynamic_size:
        others = " and ".join(other.name for other in FORMATS.values() if module.task in other.dynamic_size)
        raise ExportError(
            f"a file of {entry.name} for {module.task} takes images of one size; {others or 'none'} can take any: {how}"
        )
    if module.open_sides is None:
        about = module.metadata()
        name = (
            " on ".join(about[key] for key in ("detector", "head", "backbone") if key in about) or type(module).__name__
        )
        raise ExportError(f"{name} can only be exported for images of one size, on which its graph depends: {how}")
    return module.open_sides


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path in a folder beside, whose content takes the place of `path` at the end, and vanishes on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_over(path)
    folder = Path(tempfile.mkdtemp(prefix=_staging_prefix(path), dir=path.parent))
    try:
        yield folder / path.name
        _move_into_place(folder, path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _staging_prefix(path: Path) -> str:
    return f".{path.name}.export-"


def _remove_left_over(path: Path) -> None:
    """Removes what an export to the same file left behind that was killed before it could do so itself.

    Of another one that is still running, nothing is that old.
    """
    for folder in path.parent.glob(f"{glob.escape(_staging_prefix(path))}*"):
        if time.time() - folder.stat().st_mtime > _LEFT_OVER_SECONDS:
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


def _noise(module: Deployable, source: Source, batch: int | None) -> list[tuple[Tensor, ...]]:
    """Images of nothing, one by one."""
    number = batch or sum(_CHECKED_BATCHES)
    height, width = source.inputs[0].shape[2:]
    noise = module.example_inputs(number, (height, width))  # at once: it is the same at each call
    return [tuple(tensor[one : one + 1] for tensor in noise) for one in range(number)]


def _batches(samples: Sequence[tuple[Tensor, ...]], batch: int | None) -> list[tuple[Tensor, ...]]:
    """Samples put together to batches that the file takes; the last is filled up by beginning again."""
    sizes = _CHECKED_BATCHES if batch is None else (batch,)
    batches: list[tuple[Tensor, ...]] = []
    taken = 0
    while taken < len(samples) or len(batches) < len(sizes):
        number = sizes[len(batches) % len(sizes)]
        batches.append(_together([samples[(taken + step) % len(samples)] for step in range(number)]))
        taken += number
    return batches


def _together(samples: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One batch, in which images of several sizes are padded at the bottom and at the right."""
    height, width = (max(sample[0].shape[axis] for sample in samples) for axis in (2, 3))
    padded = [(_enlarged(sample[0], height, width), *sample[1:]) for sample in samples]
    return tuple(torch.cat(parts) for parts in zip(*padded, strict=True))


def _enlarged(images: Tensor, height: int, width: int) -> Tensor:
    return functional.pad(images, (0, width - images.shape[3], 0, height - images.shape[2]))


def _of_sizes(batches: list[tuple[Tensor, ...]], sides: range) -> list[tuple[Tensor, ...]]:
    """The batches, and where all have one size the first again with more padding, or with less of the images."""
    sizes = {batch[0].shape[2:] for batch in batches}
    if len(sizes) > 1:
        return batches
    images, *others = batches[0]
    height, width = (
        side + step * sides.step if side + step * sides.step in sides else side - step * sides.step
        for side, step in zip(images.shape[2:], _CHECKED_STEPS, strict=True)
    )
    return [*batches, (_enlarged(images, height, width), *others)]
