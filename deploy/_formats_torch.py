"""Files that torch itself runs: TorchScript and AOTInductor packages."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 - registers nms, which files of detectors call
from torch import Tensor

from effvit.deploy._formats_source import METADATA_KEY, Run, Source, as_list, graph_of, quiet, warm_up
from effvit.deploy._runtimes_contract import copied

_ENTRY = f"{METADATA_KEY}.json"


def write_torchscript(source: Source, path: Path, text: str) -> None:
    """Traces the network, fused where it can be, and freezes it: what the papers' speed tests run."""
    module = copied(source.module, fused=True)
    warm_up(Source(module, source.inputs, source.input_names, source.output_names))
    with quiet(), torch.no_grad():
        # Tracing again to compare would record other caches than the first time; parity is checked on the file instead.
        traced = torch.jit.trace(module, source.inputs, check_trace=False)  # type: ignore[no-untyped-call]
        torch.jit.save(torch.jit.freeze(traced), path, _extra_files={_ENTRY: text})


def attach_torchscript(path: Path, text: str) -> None:
    """Puts metadata among the file's extra files, in place of what is there."""
    with quiet():
        loaded = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        torch.jit.save(loaded, path, _extra_files={_ENTRY: text})


def metadata_in_zip(path: Path) -> str | None:
    """The extra file of metadata of a TorchScript file or an AOTInductor package; nothing of it is run."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(f"/extra/{_ENTRY}")]
        return archive.read(names[-1]).decode() if names else None


def open_torchscript(path: Path, threads: int | None) -> Run:
    """Loads a TorchScript file."""
    _pin(threads)
    with quiet():
        loaded = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return _runner(loaded)


def write_pt2(source: Source, path: Path, text: str) -> None:
    """Compiles the network into a package of machine code and weights."""
    graph = graph_of(source)
    with quiet():
        torch._inductor.aoti_compile_and_package(graph, package_path=str(path))  # noqa: SLF001 - its documented name
    attach_pt2(path, text)


def attach_pt2(path: Path, text: str) -> None:
    """Puts metadata among the package's extra files, in place of what is there."""
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].split("/")[0]
        entries = [entry for entry in archive.infolist() if not entry.filename.endswith(f"/extra/{_ENTRY}")]
        kept = [(entry, archive.read(entry)) for entry in entries]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in kept:
            archive.writestr(entry, content)
        archive.writestr(f"{root}/extra/{_ENTRY}", text)


def open_pt2(path: Path, threads: int | None) -> Run:
    """Loads a package: machine code that runs with all rights of the process."""
    _pin(threads)
    with quiet():
        loaded = torch._inductor.aoti_load_package(str(path))  # noqa: SLF001 - its documented name
    return _runner(loaded)


def _pin(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)  # of the whole process: torch knows no other


def _runner(loaded: Callable[..., Any]) -> Run:
    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [output.clone() for output in as_list(loaded(*tensors))]

    return run
