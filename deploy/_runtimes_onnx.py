"""ONNX Runtime, and the ONNX file that OpenVINO reads too.

The file has the fixed shapes of the inputs, made by torch's trace-based exporter: it takes seconds where the one on
``torch.export`` takes up to a minute, and runs as fast. The network is not fused: the runtimes fold BatchNorm
themselves, and fused forms write in place, which exporters dislike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effvit.deploy._runtimes_contract import Flat, Prepared, Setting, converting, copied, flatten, prepared
from effvit.errors import ConfigError

# 17: LayerNormalization is one operator from there on.
OPSET = 17
_QUANTISED = ["Conv", "MatMul", "Gemm"]  # where the work is; the rest stays in floats
_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


def onnx(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network in ONNX Runtime."""
    import onnxruntime

    providers = _providers(setting)  # refused before the conversion
    with onnx_file(module, inputs, setting) as path, converting(module, "ONNX Runtime"):
        session = onnxruntime.InferenceSession(path, _options(setting), providers=providers)
        if providers[0][0] not in session.get_providers():
            raise ConfigError(f"ONNX Runtime could not load its {providers[0][0]}: do CUDA and cuDNN fit its version?")
    binding = session.io_binding()  # on a GPU, inputs and outputs would otherwise be copied there and back in each run
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
        return dict(zip(names, map(torch.from_numpy, bound.copy_outputs_to_cpu()), strict=True))

    with converting(module, "ONNX Runtime"):
        run()
    return prepared(run, named)


def _providers(setting: Setting) -> list[tuple[str, dict[str, str]]]:
    import onnxruntime

    if setting.device == "cpu":
        return [("CPUExecutionProvider", {})]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ConfigError(
            "This ONNX Runtime has no CUDA. Replace it: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    return [("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]  # float32 is float32


def _options(setting: Setting) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    return options


def named_inputs(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Inputs by what they are called in the file."""
    return {f"input{position}": tensor for position, tensor in enumerate(inputs)}


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the contiguous array that runtimes want."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


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
    with tempfile.TemporaryDirectory(prefix="effvit_") as temporary:
        folder = setting.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{_fingerprint(module, inputs)}.onnx"
        if not path.exists():
            with _written_whole(path) as unfinished:
                _export(module, inputs, unfinished)
        if setting.precision == "int8":
            floats, path = path, folder / f"{path.stem}_{_digest(*map(as_array, inputs))}_int8.onnx"
            if not path.exists():
                with _written_whole(path) as unfinished, converting(module, "int8"):
                    _quantise(floats, unfinished, inputs)
        yield path


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path`, which becomes `path` once all went well."""
    unfinished = path.with_name(f"{path.stem}.{os.getpid()}.part.onnx")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    network = copied(module, fused=False)
    with quiet_exporter(), converting(module, "ONNX"):
        names = list(flatten(network(*inputs)))  # the first forward also fills timm's caches, which would be traced
        torch.onnx.export(
            Flat(network),
            inputs,
            path,
            input_names=list(named_inputs(inputs)),
            output_names=names,
            opset_version=OPSET,
            dynamo=False,
        )


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """No warnings of an exporter: that it is the old one, that shapes become constants, what it could not fold."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _Calibration:
    """The inputs, once; ONNX Runtime asks for batches until there is none."""

    def __init__(self, batch: dict[str, np.ndarray[Any, Any]]) -> None:
        self.batches = [batch]

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        return self.batches.pop() if self.batches else None


def _quantise(floats: Path, path: Path, inputs: tuple[Tensor, ...]) -> None:
    """Static quantisation, calibrated on `inputs`; a scale for each tensor of activations or channel of weights."""
    import onnx as onnx_package
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(_Calibration, CalibrationDataReader):  # type: ignore[misc]
        """What ONNX Runtime takes for a calibration set."""

    with tempfile.TemporaryDirectory(prefix="effvit_") as temporary, quiet_exporter():
        folded = Path(temporary) / "folded.onnx"
        quant_pre_process(floats, folded, skip_symbolic_shape=True)
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


def _fingerprint(module: nn.Module, inputs: tuple[Tensor, ...]) -> str:
    """The same for the same network and shapes: layers, plain attributes such as thresholds, and weights."""
    texts = [torch.__version__, str(OPSET), repr(module)]
    texts += [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs]
    for name, part in module.named_modules():
        for key, value in sorted(vars(part).items()):
            if (isinstance(value, _PLAIN) and not key.startswith("_")) or dataclasses.is_dataclass(value):
                texts.append(f"{name}.{key}={value!r}")
    state = (*module.parameters(), *module.buffers())
    return _digest("\n".join(texts), *(as_array(tensor.reshape(-1).view(torch.uint8)) for tensor in state))


def _digest(*contents: str | np.ndarray[Any, Any]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(content.encode() if isinstance(content, str) else content.data)
    return digest.hexdigest()
