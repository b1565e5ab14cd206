"""What every runtime takes and gives, and what several of them need."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy._fit import is_out_of_memory
from effvit.deploy.environment import resident_memory, trim_memory
from effvit.errors import ConfigError, EffvitError, ExportError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How a network is to run.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16``, ``fp16`` or ``int8``. ``bf16`` and ``fp16`` of torch's runtimes are autocast;
            ``fp32`` on a GPU is float32, never TF32.
        threads: Threads of one forward pass.
        folder: Where converted files are kept and found again; ``None`` keeps none.
    """

    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1
    folder: Path | None = None


@dataclass
class Prepared:
    """A network that is ready to run on the inputs it was prepared with.

    Attributes:
        run: One forward pass; on a GPU it may return before the work is done.
        outputs: The tensors of one run, flattened in the order of the network's dicts and tuples, on the CPU, floats as
            float32.
        seconds: What conversion and compilation took, with the first runs that they need.
        names: What those tensors are called, once `outputs` has been called: by the network's ``output_names`` where it
            has them, otherwise by keys such as ``c4`` or positions.
        kept: Bytes that the first run took and did not give back: of a runtime with memory of its own for the next
            run, of a network of torch for tables of its maps' shape. Peak memory counts them.
        note: What whoever reads its time has to know.
    """

    run: Callable[[], Any]
    outputs: Callable[[], list[Tensor]]
    seconds: float = 0.0
    names: list[str] = field(default_factory=list)
    kept: int = 0
    note: str = ""


Prepare = Callable[[nn.Module, tuple[Tensor, ...], Setting], Prepared]


@dataclass(frozen=True)
class Runtime:
    """Something that runs networks.

    Attributes:
        name: What users type.
        description: A sentence for them.
        extra: The extra of ``effvit`` that installs it; ``None`` where torch has it.
        modules: Packages that it needs besides torch.
        precisions: What it runs, by device.
        prepare: Makes a network ready.
        check: Refuses a setting that this machine lacks something for, before any work.
    """

    name: str
    description: str
    extra: str | None
    modules: tuple[str, ...]
    precisions: Mapping[str, tuple[str, ...]]
    prepare: Prepare
    check: Callable[[Setting], None] | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Where it runs."""
        return tuple(self.precisions)


@contextlib.contextmanager
def evaluating() -> Iterator[None]:
    """No gradients, and ordinary tensors: those of inference mode can be neither compiled nor kept."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def flatten(outputs: Any, prefix: str = "") -> dict[str, Tensor]:
    """The tensors that a network returns, by name.

    Args:
        outputs: A tensor, or dicts, tuples and lists of them, as deep as they are.
        prefix: Of all names.

    Returns:
        Names are keys and positions, joined by dots; a single tensor is called ``output``.
    """
    if isinstance(outputs, Tensor):
        return {prefix or "output": outputs}
    if isinstance(outputs, Mapping):
        entries: Iterator[tuple[Any, Any]] = iter(outputs.items())
    elif isinstance(outputs, Sequence) and not isinstance(outputs, str):
        entries = iter(enumerate(outputs))
    else:
        return {}
    flat: dict[str, Tensor] = {}
    for key, value in entries:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def run_once(run: Callable[[], Any]) -> int:
    """Runs a runtime that keeps its memory for the next run; gives the bytes by which the process has grown."""
    trim_memory()
    before = resident_memory()
    run()
    trim_memory()  # what the run has freed again is not kept; the peak of later runs has it
    return max(resident_memory() - before, 0)


def prepared(run: Callable[[], Any], named: Callable[[Any], dict[str, Tensor]] = flatten, *, kept: int = 0) -> Prepared:
    """What `run` is, with its outputs taken as torch tensors.

    Args:
        run: One forward pass.
        named: The tensors, by name, of what it returns.
        kept: See `Prepared`.
    """

    def outputs() -> list[Tensor]:
        found = named(run())
        if not found:
            raise ExportError("The network returns no tensors, so there is nothing to compare.")
        ready.names[:] = list(found)
        return [on_cpu(tensor) for tensor in found.values()]

    ready = Prepared(run, outputs, kept=kept)
    return ready


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU that the next run does not overwrite, floats as float32."""
    tensor = tensor.detach().to("cpu", copy=True).contiguous()
    return tensor.float() if tensor.is_floating_point() else tensor


class Flat(nn.Module):
    """A network whose outputs are a tuple of tensors, for what knows no dicts.

    Args:
        module: Any network.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the network returns, flattened."""
        return tuple(flatten(self.module(*inputs)).values())


def copied(module: nn.Module, *, fused: bool) -> nn.Module:
    """A copy in eval mode that may be changed, its parameters frozen.

    Args:
        module: It stays as it is.
        fused: Whether to fuse the topmost submodules of the copy that can be; a copy without any is as `module`.
    """
    own = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
    if fused:
        _fuse(own)
    return own


def can_fuse(module: nn.Module) -> bool:
    """Whether the network or a part of it has ``fuse``."""
    return any(callable(getattr(part, "fuse", None)) for part in module.modules())


def _fuse(module: nn.Module) -> None:
    fuse = getattr(module, "fuse", None)
    if callable(fuse):
        fuse()
        return
    for child in module.children():
        _fuse(child)


@contextlib.contextmanager
def converting(module: nn.Module, target: str) -> Iterator[None]:
    """Whatever a converter fails with becomes an error that says which network it could not take.

    Args:
        module: The network.
        target: What it is converted for.

    Raises:
        ExportError: Any error but that memory ran out, and our own.
    """
    try:
        yield
    except EffvitError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ExportError(
            f"{type(module).__name__} cannot be converted for {target}: {type(error).__name__}: {reason}"
        ) from error


def require_cuda() -> None:
    """Refuses where there is no GPU.

    Raises:
        ConfigError: torch sees none.
    """
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no GPU"
        raise ConfigError(f"There is no CUDA device here ({built}). Use the device 'cpu'.")
