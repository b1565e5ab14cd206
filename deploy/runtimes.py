"""What runs networks, as data: torch in several forms, ONNX Runtime and OpenVINO; and whether their outputs agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effvit.deploy import _runtimes_compiled, _runtimes_onnx, _runtimes_openvino, _runtimes_torch
from effvit.deploy._detections import Matched, partners
from effvit.deploy._installed import check_compiler, has_bf16, missing
from effvit.deploy._runtimes_contract import Prepared, Runtime, Setting, converting, evaluating, require_cuda
from effvit.errors import ConfigError, ExportError, close_matches

__all__ = [
    "RUNTIMES",
    "Agreement",
    "Prepared",
    "Runtime",
    "Setting",
    "check",
    "compare",
    "is_installed",
    "prepare",
    "require",
]

# Lower precisions are autocast.
_TORCH = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime("eager", "torch, the network as it is", None, (), _TORCH, _runtimes_torch.eager),
        Runtime(
            "channels_last", "torch, maps in channels-last memory", None, (), _TORCH, _runtimes_torch.channels_last
        ),
        Runtime(
            "fused", "torch, the deploy form: fuse() and channels-last memory", None, (), _TORCH, _runtimes_torch.fused
        ),
        Runtime(
            "compile",
            "torch.compile with frozen weights, of the deploy form where the network has one",
            None,
            (),
            _TORCH,
            _runtimes_compiled.compiled,
            lambda _: check_compiler(),
        ),
        Runtime(
            "torchscript",
            "traced and frozen, of the deploy form where the network has one: how the papers measured",
            None,
            (),
            _TORCH,
            _runtimes_torch.torchscript,
        ),
        Runtime(
            "pt2",
            "torch.export and an AOTInductor package, of the deploy form where the network has one",
            None,
            (),
            _TORCH,
            _runtimes_compiled.pt2,
            lambda _: check_compiler(),
        ),
        Runtime(
            "onnx",
            "ONNX Runtime",
            "onnx",
            ("onnx", "onnxruntime"),
            {"cpu": ("fp32", "int8"), "cuda": ("fp32",)},
            _runtimes_onnx.onnx,
            _runtimes_onnx.check_onnx,
        ),
        Runtime(
            "openvino",
            "OpenVINO, from the same file as ONNX Runtime",
            "openvino",
            ("onnx", "openvino"),
            {"cpu": ("fp32", "bf16", "int8")},
            _runtimes_openvino.openvino,
        ),
    )
}


def is_installed(runtime: str) -> bool:
    """Whether the packages of a runtime are here.

    Args:
        runtime: A name from `RUNTIMES`.
    """
    return not missing(RUNTIMES[runtime].modules)


def require(runtime: str, setting: Setting) -> Runtime:
    """The runtime of a name, once it is known that it can run here; nothing is converted.

    Args:
        runtime: A name from `RUNTIMES`.
        setting: Device, precision and threads.

    Raises:
        ConfigError: No such runtime, it is not installed, there is no GPU, or it has not that device or precision.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"There is no runtime {runtime!r}. {close_matches(runtime, RUNTIMES)}")
    found = RUNTIMES[runtime]
    lacking = missing(found.modules)
    if lacking:
        raise ConfigError(
            f"The runtime {runtime!r} needs {' and '.join(lacking)}, which is not installed. "
            f'Install it with: pip install "effvit[{found.extra}]"'
        )
    if setting.device not in found.precisions:
        raise ConfigError(
            f"The runtime {runtime!r} does not run on {setting.device!r}. It runs on: {', '.join(found.devices)}."
        )
    if setting.precision not in found.precisions[setting.device]:
        raise ConfigError(
            f"The runtime {runtime!r} has no precision {setting.precision!r} on {setting.device}. "
            f"It has: {', '.join(found.precisions[setting.device])}."
        )
    if setting.threads < 1:
        raise ConfigError(f"threads must be at least 1, got {setting.threads}")
    if setting.device == "cuda":
        require_cuda()
    if found.check is not None:
        found.check(setting)
    return found


def prepare(module: nn.Module, inputs: tuple[Tensor, ...], runtime: str, setting: Setting) -> Prepared:
    """Makes a network ready to run in a runtime.

    torch's threads are set to the setting's and stay so: `Prepared.run` needs them, and the process has only one such
    number. Whoever needs the number before runs both inside ``effvit.deploy.timing.pinned``, as `benchmark` does.

    Args:
        module: The network in eval mode, on the CPU, in float32. It is not changed.
        inputs: What its ``forward`` takes, on the CPU; `Prepared.run` runs on them.
        runtime: A name from `RUNTIMES`.
        setting: Device, precision, threads, and where converted files are kept.

    Raises:
        ConfigError: See `require`; also a network in training mode, and one that the runtime has no form of.
        ExportError: The network cannot be converted.
    """
    found = require(runtime, setting)
    if module.training:
        raise ConfigError(f"{type(module).__name__} is in training mode. Call eval() before it is measured.")
    torch.set_num_threads(setting.threads)
    start = time.perf_counter()
    # Not every network runs in every type of floats; one that does not run at all is its author's to see as it is.
    lowered = setting.precision != "fp32"
    with evaluating(), converting(module, f"{runtime} in {setting.precision}") if lowered else nullcontext():
        ready = found.prepare(module, inputs, setting)
    ready.seconds = time.perf_counter() - start
    if (setting.device, setting.precision) == ("cpu", "bf16") and not has_bf16():
        ready.note = "this processor has no bf16 instructions: emulated"
    _name(ready, getattr(module, "output_names", None))
    return ready


def _name(ready: Prepared, names: object) -> None:
    """Lets the network's own names of its outputs stand for positions."""
    if not isinstance(names, Sequence):
        return
    outputs = ready.outputs

    def named() -> list[Tensor]:
        tensors = outputs()
        if len(names) == len(tensors):
            ready.names[:] = names
        return tensors

    ready.outputs = named


#: By how much of the largest value a first choice has to lead for rounding not to change it.
CLEAR_LEAD = 0.1
#: Of how many such images a share says something.
ENOUGH_CLEAR = 8
_DETECTIONS = {"boxes", "scores", "labels"}


@dataclass(frozen=True)
class Agreement:
    """How far two runs of one network differ.

    Attributes:
        error: Largest difference, relative to the largest expected magnitude of the same tensor; the worst tensor's.
            Infinite where either has a value that is not finite.
        worst: That tensor's name.
        top1: Share of rows with the same first choice, where the only output is ``(B, K)``, of those rows alone whose
            first choice leads the second by a tenth of the largest value: where it does not, as in untrained networks,
            rounding may choose. ``None`` with fewer than 8 such rows.
        matched: Where the outputs are detections: how many have a partner of the same class and place in the other
            run; `error` is of partners then.
    """

    error: float
    worst: str
    top1: float | None = None
    matched: Matched | None = None


def compare(
    found: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str] | None = None, precision: str = "fp32"
) -> Agreement:
    """Compares what two runs gave, tensor by tensor, detections with their partners.

    Args:
        found: From `Prepared.outputs`.
        expected: The same of another runtime, such as ``eager``.
        names: Of the tensors; their positions where not given.
        precision: That of `found`: a coarser one moves boxes further, see `Tolerance.overlap`.

    Raises:
        ExportError: They are not as many, or of other shapes.
    """
    if len(found) != len(expected):
        raise ExportError(f"There are {len(found)} output tensors where {len(expected)} were expected.")
    names = list(names or [f"output {position}" for position in range(len(expected))])
    for name, own, other in zip(names, found, expected, strict=True):
        if own.shape != other.shape:
            raise ExportError(f"{name} has shape {tuple(own.shape)} where {tuple(other.shape)} was expected.")
    top1 = _top1(found, expected)
    matched = None
    if set(names) >= _DETECTIONS:
        names, found, expected, matched = _beside(names, found, expected, TOLERANCES[precision].overlap)
    errors = {name: _error(own, other) for name, own, other in zip(names, found, expected, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    return Agreement(errors[worst], worst, top1, matched)


def _beside(
    names: list[str], found: Sequence[Tensor], expected: Sequence[Tensor], overlap: float
) -> tuple[list[str], list[Tensor], list[Tensor], Matched]:
    """Detections of all images beside their partners, without their labels, and how many have one."""
    own, other = (dict(zip(names, side, strict=True)) for side in (found, expected))
    images = list(partners(own, other, overlap))
    names = [name for name in names if name != "labels"]
    left = [torch.cat([image.found[name] for image in images]) for name in names]
    right = [torch.cat([image.expected[name] for image in images]) for name in names]
    return names, left, right, sum((image.matched for image in images), Matched())


def _error(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    own, other = found.detach().double(), expected.detach().double()
    if not (own.isfinite().all() and other.isfinite().all()):
        return float("inf")
    largest = float(other.abs().max())
    difference = float((own - other).abs().max())
    return difference / largest if largest else difference


def _top1(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    if len(expected) != 1 or expected[0].ndim != 2 or expected[0].shape[1] < 2 or not expected[0].is_floating_point():
        return None
    best = expected[0].topk(2, 1).values
    clear = best[:, 0] - best[:, 1] > CLEAR_LEAD * expected[0].abs().max()
    if clear.sum() < ENOUGH_CLEAR:
        return None
    return float((found[0].argmax(1) == expected[0].argmax(1))[clear].double().mean())


@dataclass(frozen=True)
class Tolerance:
    """What a precision may differ from eager in fp32.

    Attributes:
        error: Greatest `Agreement.error`.
        top1: Least `Agreement.top1`.
        unmatched: Share of the detections of both runs that may be without a partner, see `Matched.allowed`.
        overlap: Overlap (IoU) from which two boxes are the same detection.
        reason: Why so much.
    """

    error: float
    top1: float
    unmatched: float
    overlap: float
    reason: str


TOLERANCES = {
    "fp32": Tolerance(1e-3, 1.0, 0.01, 0.99, "only the order of sums may differ"),
    "bf16": Tolerance(0.1, 0.95, 0.2, 0.5, "8 bits of mantissa, rounded after each operation under autocast"),
    "fp16": Tolerance(0.02, 0.99, 0.1, 0.9, "11 bits of mantissa, rounded after each operation under autocast"),
    "int8": Tolerance(0.5, 0.8, 0.5, 0.5, "256 steps for each tensor, calibrated on one batch"),
}


def check(agreement: Agreement, runtime: str, precision: str) -> None:
    """Refuses a runtime whose outputs are not eager's.

    Args:
        agreement: From `compare`, against ``eager`` in ``fp32`` on the same device.
        runtime: Its name, for the message.
        precision: Says how much may differ.

    Raises:
        ExportError: More differs than `TOLERANCES` allows.
    """
    allowed = TOLERANCES[precision]
    if not agreement.error <= allowed.error:
        raise ExportError(
            f"{runtime} ({precision}) differs from eager: {agreement.worst} by {agreement.error:.2g} of its largest "
            f"value, where {allowed.error:g} is allowed ({allowed.reason}). So its time says nothing."
        )
    if agreement.top1 is not None and agreement.top1 < allowed.top1:
        raise ExportError(
            f"{runtime} ({precision}) chooses as eager does for {agreement.top1:.1%} of the images whose first "
            f"choice is clear, where {allowed.top1:.0%} is required. So its time says nothing."
        )
    matched = agreement.matched
    if matched is not None and matched.unmatched > matched.allowed(allowed.unmatched):
        raise ExportError(
            f"{runtime} ({precision}) differs from eager: beside {matched.detections} detections of eager's, "
            f"{matched.unmatched} of either have no partner of the same class and place, where "
            f"{matched.allowed(allowed.unmatched)} may. So its time says nothing."
        )
