"""ONNX Runtime, and the ONNX file that OpenVINO reads too.

The file has the fixed shapes of the inputs, made by torch's trace-based exporter: it takes seconds where the one on
``torch.export`` takes up to a minute, and runs as fast. The network is not fused: the runtimes fold BatchNorm
themselves, and fused forms write in place, which exporters dislike.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effvit.deploy._files import whole_file
from effvit.deploy._formats_source import quiet
from effvit.deploy._onnx_trace import session_options, trace_to_onnx
from effvit.deploy._runtimes_contract import Flat, Prepared, Setting, converting, copied, flatten, prepared, run_once
from effvit.deploy._runtimes_files import as_array, digest, fingerprint, kept_in
from effvit.errors import ConfigError

# 17: LayerNormalization is one operator from there on.
OPSET = 17
PREFIX = "output_"  # of outputs in the file, where no name may be a number, or an input's
_QUANTISED = ["Conv", "MatMul", "Gemm"]  # where the work is; the rest stays in floats


def check_onnx(setting: Setting) -> None:
    """Refuses a GPU that the installed ONNX Runtime cannot use.

    Raises:
        ConfigError: It is built for CPUs.
    """
    import onnxruntime

    if setting.device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ConfigError(
            "The installed ONNX Runtime has no CUDA. Replace it: pip uninstall onnxruntime, then pip install "
            "onnxruntime-gpu."
        )


def onnx(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network in ONNX Runtime.

    Raises:
        ConfigError: CUDA is there but does not load, where ONNX Runtime would silently take the CPU.
        ExportError: The network cannot be converted.
    """
    import onnxruntime

    # Only float32 is float32; ONNX Runtime rounds to TF32 by default.
    on_gpu = [("CUDAExecutionProvider", {"use_tf32": "0"})] if setting.device == "cuda" else []
    with onnx_file(module, inputs, setting) as path, converting(module, "ONNX Runtime"):
        providers = [*on_gpu, "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(path, session_options(setting.threads), providers=providers)
    if on_gpu and "CUDAExecutionProvider" not in session.get_providers():
        raise ConfigError("ONNX Runtime could not load CUDA: do the versions of CUDA and cuDNN fit it?")
    # On a GPU, inputs and outputs would otherwise be copied there and back in each run.
    binding = session.io_binding()
    read = {found.name for found in session.get_inputs()}
    for name, tensor in named_inputs(inputs).items():
        if name in read:  # the exporter drops what nothing reads
            value = onnxruntime.OrtValue.ortvalue_from_numpy(as_array(tensor), setting.device, 0)
            binding.bind_ortvalue_input(name, value)
    names = [found.name for found in session.get_outputs()]
    for name in names:
        binding.bind_output(name, setting.device)

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding

    def named(bound: Any) -> dict[str, Tensor]:
        tensors = map(torch.from_numpy, bound.copy_outputs_to_cpu())
        return {name.removeprefix(PREFIX): tensor for name, tensor in zip(names, tensors, strict=True)}

    with converting(module, "ONNX Runtime"):
        kept = run_once(run)
    return prepared(run, named, kept=kept)


def named_inputs(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs by what they are called in the file."""
    return {f"input{position}": tensor for position, tensor in enumerate(inputs)}


@contextlib.contextmanager
def onnx_file(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Iterator[Path]:
    """The network's ONNX file, for the time of the context unless the setting has a folder.

    Args:
        module: Any network.
        inputs: Their shapes are the file's; int8 is calibrated on them.
        setting: With precision ``int8`` the file is quantised; others are the runtime's affair.

    Raises:
        ExportError: The network cannot be converted.
    """
    with kept_in(setting.folder) as folder:
        path = folder / f"{fingerprint(module, inputs, str(OPSET))}.onnx"
        if not path.exists():
            with whole_file(path) as unfinished:
                _export(module, inputs, unfinished)
        if setting.precision == "int8":
            floats, path = path, folder / f"{path.stem}_{digest(*map(as_array, inputs))}_int8.onnx"
            if not path.exists():
                with whole_file(path) as unfinished, converting(module, "int8"):
                    _quantise(floats, unfinished, inputs)
        yield path


def _export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    network = copied(module, fused=False)
    with quiet(), converting(module, "ONNX"):
        names = list(flatten(network(*inputs)))  # the first forward also fills timm's caches, which would be traced
        outputs = [PREFIX + name for name in names]
        trace_to_onnx(Flat(network), inputs, path, list(named_inputs(inputs)), outputs, OPSET)


def _quantise(floats: Path, path: Path, inputs: tuple[Tensor, ...]) -> None:
    """Static quantisation, calibrated on `inputs`; a scale for each tensor of activations or channel of weights."""
    import onnx as onnx_package
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """The inputs, once: ONNX Runtime asks for batches until there is none."""

        def __init__(self, batch: dict[str, np.ndarray[Any, Any]]) -> None:
            self.batches = [batch]

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            return self.batches.pop() if self.batches else None

    with tempfile.TemporaryDirectory(prefix="effvit_") as temporary, quiet():
        folded = Path(temporary) / "folded.onnx"
        quant_pre_process(floats, folded, skip_symbolic_shape=True)  # which needs sympy
        read = {found.name for found in onnx_package.load(folded).graph.input}
        batch = {name: as_array(tensor) for name, tensor in named_inputs(inputs).items() if name in read}
        quantize_static(
            folded,
            path,
            Reader(batch),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_QUANTISED,
            per_channel=True,
        )
