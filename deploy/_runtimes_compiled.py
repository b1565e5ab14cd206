"""torch's compiler: at run time, and ahead of time into a package."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy._files import whole_file
from effvit.deploy._formats_source import quiet
from effvit.deploy._runtimes_contract import Prepared, Setting, converting, copied
from effvit.deploy._runtimes_files import fingerprint, kept_in
from effvit.deploy._runtimes_torch import placed, ready

# Weights become constants: they are packed for their convolutions, and what is made of them alone is made once.
_OPTIONS: dict[str, Any] = {"freezing": True}
_MANY = 10_000
_CACHE = "TORCHINDUCTOR_CACHE_DIR"


def compiled(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network under ``torch.compile`` with freezing, in channels-last memory.

    Raises:
        ExportError: The network cannot be compiled.
    """
    network, inputs = placed(copied(module, fused=True), inputs, setting, channels_last=True)
    # Each network and batch size is compiled on its own. torch counts them together where they share a class, makes
    # shapes dynamic from the second on, and silently stops compiling after the eighth.
    limits = torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY)  # noqa: SLF001
    # Not as options of torch.compile: those reach the backend alone, and weights would stay inputs of the graph.
    frozen = torch._inductor.config.patch(_OPTIONS)  # noqa: SLF001
    with quiet(), _cache(setting.folder), limits, frozen, converting(module, "torch.compile"):
        return ready(torch.compile(network, dynamic=False), inputs, setting, warm=2)


def pt2(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network exported by ``torch.export`` and compiled ahead of time by AOTInductor.

    Raises:
        ExportError: The network cannot be exported or compiled.
    """
    words = (setting.device, setting.precision, str(setting.threads))
    with kept_in(setting.folder) as folder, quiet(), converting(module, "AOTInductor"):
        path = folder / f"{fingerprint(module, inputs, *words)}.pt2"
        network, inputs = placed(copied(module, fused=True), inputs, setting, channels_last=True)
        if not path.exists():
            with whole_file(path) as unfinished, _cache(setting.folder):
                exported = torch.export.export(network, inputs, strict=False)
                written = torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - its documented name
                    exported, package_path=f"{unfinished}.pt2", inductor_configs=_OPTIONS
                )
                Path(written).rename(unfinished)
        package = torch._inductor.aoti_load_package(str(path))  # noqa: SLF001
        return ready(package, inputs, setting, warm=2)


@contextlib.contextmanager
def _cache(folder: Path | None) -> Iterator[None]:
    """Compiles into a folder of its own where there is one.

    torch's default is shared by all processes of a user, and one that is killed may leave broken files there.
    """
    if folder is None:
        yield
        return
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before
