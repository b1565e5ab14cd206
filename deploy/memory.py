"""The peak of memory that running a network adds to what the network and its input take.

On a CPU each variant has a process of its own, forked from a fresh one that has imported torch and nothing more:
whatever ran before would have shaped the allocator, and its freed pages would hide what the network takes. The fresh
process is a program of its own (``python -m effvit.deploy._memory_child``) and not one of ``multiprocessing``, which
would run the user's script again where that has no ``if __name__ == "__main__"``. What it needs, the network among it,
travels in a file. The process has the allocator's default settings, or those of the environment (``MALLOC_*``): what
this process has set for itself does not reach it.

The figure is the high-water mark of the resident size while the network runs, less the resident size before; and what
the first run kept: a runtime's memory for the next run, a network's tables for the shape of its maps.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy.environment import peak_resident_memory, resident_memory, trim_memory
from effvit.deploy.runtimes import RUNTIMES, Prepared, Setting, prepare
from effvit.errors import ConfigError, EffvitError

_CLEAR = Path("/proc/self/clear_refs")
_CALLS = 3
_PATIENCE = 600.0  # seconds for one variant, conversion included


def peak_memories(
    module: nn.Module, inputs: tuple[Tensor, ...], variants: Sequence[tuple[str, Setting]]
) -> list[int | ConfigError | None]:
    """Bytes that running adds, at the peak, to what network and input take, on the CPU.

    Each variant is alone in its process, but torch is imported once for all.

    Args:
        module: The network in eval mode, on the CPU, in float32.
        inputs: What its ``forward`` takes, on the CPU.
        variants: Runtimes, see ``effvit.deploy.runtimes``, with their settings: precision, threads; with a folder,
            converted files are found there and not made again.

    Returns:
        For each variant its bytes; ``None`` where the system does not tell (it needs Linux's ``/proc``); or why it has
        no figure, such as a network that cannot be sent to another process.
    """
    if not _CLEAR.exists():
        return [None for _ in variants]
    with tempfile.TemporaryDirectory(prefix="effvit_memory_") as name:
        folder = Path(name)
        try:
            torch.save((module, inputs), folder / "network.pt")
        except Exception as error:  # noqa: BLE001 - whatever the parts of somebody's network raise when they are pickled
            return [_unsent(module, error) for _ in variants]
        torch.save([(runtime, setting) for runtime, setting in variants], folder / "variants.pt")
        errors = _run_child(folder, _PATIENCE * len(variants))
        return [_answer(module, folder / f"{number}.json", errors) for number in range(len(variants))]


def _run_child(folder: Path, patience: float) -> str:
    """Runs the program on what lies in a folder; gives what it says on the error stream."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    command = [sys.executable, "-m", "effvit.deploy._memory_child", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}  # so that it finds what this process finds
    # A session of its own, so that a fork of it, which does the work, can be ended with it.
    with subprocess.Popen(  # noqa: S603 - our own program
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        try:
            return child.communicate(timeout=patience)[1].strip()
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return f"no answer in {patience:.0f} s"
            raise


def _answer(module: nn.Module, path: Path, errors: str) -> int | ConfigError | None:
    if not path.is_file():
        last = errors.splitlines()[-1] if errors else "the system ended it; was there enough memory?"
        return _unsent(module, last)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return _unsent(module, found["error"]) if "error" in found else int(found["bytes"])


def _unsent(module: nn.Module, reason: object) -> ConfigError:
    kind = type(module)
    advice = ""
    if any(type(part).__module__ == "__main__" for part in module.modules()):
        advice = " Define the classes of the network in a module, not in the script that runs."
    return ConfigError(
        f"{kind.__name__} could not run in a process of its own, which peak memory needs: {reason}.{advice}"
    )


def measure_here(folder: Path, number: int) -> None:
    """Measures one variant in this process, which ought to be a fresh one, and writes its answer beside the question.

    Args:
        folder: What `peak_memories` has written.
        number: Of the variant.
    """
    answer: dict[str, Any]
    try:
        # Our own file of a moment ago: whole networks are code, which weights_only refuses.
        module, inputs = torch.load(folder / "network.pt", weights_only=False)
        runtime, setting = torch.load(folder / "variants.pt", weights_only=False)[number]
        prepared = prepare(module, inputs, runtime, setting)
        answer = {"bytes": prepared.kept + peak_of(prepared.run)}
    except EffvitError as error:
        answer = {"error": f"{error}".rstrip(".")}
    except Exception as error:  # noqa: BLE001 - whatever somebody's network raises
        answer = {"error": f"{type(error).__name__}: {error}".rstrip(". :")}
    (folder / f"{number}.json").write_text(json.dumps(answer), encoding="utf-8")


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call adds to this process at its peak: the most of three calls.

    Args:
        call: Anything.

    Raises:
        OSError: The system has no ``/proc/self/clear_refs``.
    """
    gc.collect()
    trim_memory()  # or the calls would live on pages that were freed before, uncounted
    # Building may have peaked higher than running ever will; 5 resets the mark (man 5 proc). ru_maxrss cannot be reset,
    # and it outlives exec, so it would also hold the parent's peak.
    _CLEAR.write_text("5", encoding="ascii")
    before = resident_memory()
    for _ in range(_CALLS):
        call()
    return peak_resident_memory() - before


def peak_on_gpu(prepared: Prepared, runtime: str) -> int | None:
    """Bytes of GPU memory that running adds at its peak; ``None`` of a runtime that does not take it through torch.

    Args:
        prepared: What runs.
        runtime: Its name.
    """
    if RUNTIMES[runtime].modules:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(_CALLS):
        prepared.run()
    torch.cuda.synchronize()
    return prepared.kept + torch.cuda.max_memory_allocated() - before
