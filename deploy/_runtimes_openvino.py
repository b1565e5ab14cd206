"""OpenVINO, from the ONNX file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy._installed import has_bf16
from effvit.deploy._onnx_trace import openvino_properties
from effvit.deploy._runtimes_contract import Prepared, Setting, converting, prepared, run_once
from effvit.deploy._runtimes_files import as_array
from effvit.deploy._runtimes_onnx import PREFIX, named_inputs, onnx_file
from effvit.errors import ConfigError

_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}


def openvino(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network in OpenVINO.

    Raises:
        ConfigError: bf16 on a processor without it, where OpenVINO would silently run in float32.
        ExportError: The network cannot be converted.
    """
    from openvino import Core

    if setting.precision == "bf16" and not has_bf16():
        raise ConfigError("OpenVINO has no bf16 on this processor, which has no bf16 instructions. Use fp32 or int8.")
    properties = openvino_properties(setting.threads, _HINTS[setting.precision])
    with onnx_file(module, inputs, setting) as path, converting(module, "OpenVINO"):
        compiled = Core().compile_model(path, "CPU", properties)
    request = compiled.create_infer_request()
    read = {name for port in compiled.inputs for name in port.get_names()}
    arrays = {name: as_array(tensor) for name, tensor in named_inputs(inputs).items() if name in read}
    names = [port.get_any_name().removeprefix(PREFIX) for port in compiled.outputs]

    def run() -> Any:
        request.infer(arrays, share_inputs=True, share_outputs=True)  # or each call would copy them
        return request

    def named(done: Any) -> dict[str, Tensor]:
        return {name: torch.from_numpy(done.get_output_tensor(place).data) for place, name in enumerate(names)}

    with converting(module, "OpenVINO"):
        kept = run_once(run)
    return prepared(run, named, kept=kept)
