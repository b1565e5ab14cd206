"""ONNX files, and OpenVINO's made from them."""

from __future__ import annotations

import contextlib
import io
import operator
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effvit.deploy._formats_source import METADATA_KEY, Run, Source, graph_of, open_shapes, quiet, warm_up
from effvit.deploy._onnx_trace import openvino_properties, session_options, trace_to_onnx

_OPSET = 18  # the oldest that torch's exporter of graphs writes without converting


def write_onnx(source: Source, path: Path, text: str) -> None:
    """Writes one file with the weights in it.

    Batches and images of any size need the graph of ``torch.export``: of a trace, reshapes inside MobileViT keep the
    batch that was traced, without a word. With fixed shapes the trace gives the same in a tenth of the time.
    """
    if source.dynamic_batch or source.open_sides is not None:
        _write_graph(source, path)
    else:
        _write_trace(source, path)
    attach_onnx(path, text)


def _write_graph(source: Source, path: Path) -> None:
    graph = graph_of(source)
    with quiet(), contextlib.redirect_stdout(io.StringIO()), open_shapes():
        from onnxscript.optimizer import fold_constants, remove_unused_nodes

        program = torch.onnx.export(
            graph,
            (),
            input_names=list(source.input_names),
            output_names=list(source.output_names),
            opset_version=_OPSET,
            dynamo=True,
            optimize=False,  # its rewriting takes a minute, and runtimes do the same when they load a file
            custom_translation_table={operator.floordiv: _floor_division, **source.onnx_translations},
            verbose=False,
        )
        assert program is not None  # only the older exporter gives none
        fold_constants(program.model)  # what is left, ONNX Runtime warns of
        remove_unused_nodes(program.model)
        program.save(path, external_data=False)


def _floor_division(one: Any, other: Any) -> Any:
    """``//`` of sizes.

    The exporter's own divides towards zero, which is another number for terms below 0, and torch may make such.
    """
    from onnxscript import opset18

    rest = opset18.Mod(one, other)  # of the sign of `other`, as in Python
    return opset18.Div(opset18.Sub(one, rest), other)


def _write_trace(source: Source, path: Path) -> None:
    warm_up(source)
    with quiet():
        trace_to_onnx(source.module, source.inputs, path, source.input_names, source.output_names, _OPSET)


def attach_onnx(path: Path, text: str) -> None:
    """Puts metadata into the file's ``metadata_props``, in place of what is there."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {METADATA_KEY: text})
    onnx.save(model, path)


def metadata_of_onnx(path: Path) -> str | None:
    """What `attach_onnx` has put there."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, session_options(1), providers=["CPUExecutionProvider"])
    found: str | None = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    return found


def open_onnx(path: Path, threads: int | None) -> Run:
    """Loads a file into ONNX Runtime, on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, session_options(threads), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def write_openvino(source: Source, path: Path, text: str) -> None:
    """Writes ``NAME.xml`` and, beside it, the weights as ``NAME.bin``, both of float32."""
    import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        through = Path(folder) / "model.onnx"
        write_onnx(source, through, text)
        model = openvino.Core().read_model(through)  # convert_model does the same, but reports its use over the network
        model.set_rt_info(text, METADATA_KEY)
        openvino.save_model(model, path, compress_to_fp16=False)


def attach_openvino(path: Path, text: str) -> None:
    """Puts metadata into the file's ``rt_info``, in place of what is there."""
    import openvino

    model = openvino.Core().read_model(path)
    model.set_rt_info(text, METADATA_KEY)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # the weights are read from the file while it is open
        openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
        del model
        for written in Path(folder).iterdir():
            written.replace(path.parent / written.name)


def metadata_of_openvino(path: Path) -> str | None:
    """What `attach_openvino` has put there."""
    import openvino

    model = openvino.Core().read_model(path)
    return str(model.get_rt_info(METADATA_KEY).astype(str)) if model.has_rt_info(METADATA_KEY) else None


def open_openvino(path: Path, threads: int | None) -> Run:
    """Compiles a file with OpenVINO, on the CPU, in float32."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", openvino_properties(threads))

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        found = compiled([tensor.numpy() for tensor in tensors])
        return [torch.from_numpy(found[index].copy()) for index in range(len(compiled.outputs))]

    return run
