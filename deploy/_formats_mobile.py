"""Files for telephones: CoreML and ExecuTorch."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effvit.deploy._formats_source import METADATA_KEY, Run, Source, as_list, graph_of, quiet


def on_macos() -> bool:
    """Whether CoreML can run here."""
    return sys.platform == "darwin"


def write_coreml(source: Source, path: Path, text: str) -> None:
    """Writes an ML Program for iOS 16 and later, in float32, which takes pixels as float32 in 0..255."""
    with quiet():
        import coremltools

        _register_bicubic()
        inputs = (source.inputs[0].float(), *source.inputs[1:])  # CoreML has no arrays of uint8
        graph = graph_of(Source(source.module, inputs, source.input_names, source.output_names))
        with contextlib.redirect_stderr(io.StringIO()):
            model = coremltools.convert(
                _in_known_operators(graph),
                inputs=[
                    coremltools.TensorType(name=name, shape=tuple(tensor.shape), dtype=tensor.numpy().dtype)
                    for name, tensor in zip(source.input_names, inputs, strict=True)
                ],
                outputs=[coremltools.TensorType(name=name) for name in source.output_names],
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=coremltools.precision.FLOAT32,
                skip_model_load=True,
            )
        model.user_defined_metadata[METADATA_KEY] = text
        model.save(str(path))


def _in_known_operators(graph: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The same graph without the operators that coremltools 9 does not know."""
    aten = torch.ops.aten
    graph = graph.run_decompositions(torch._decomp.get_decompositions([aten.addcmul, aten.index_copy]))  # noqa: SLF001 - its documented name
    for node in list(graph.graph.nodes):
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph_signature.replace_all_uses(node.name, node.args[0].name)  # it may be an output
            graph.graph.erase_node(node)
    graph.graph_module.recompile()
    return graph


def _register_bicubic() -> None:
    """Tells coremltools what a bicubically resized table is: a constant.

    Tables of attention biases and embeddings of positions are resized in the graph where images are not of the
    published size. CoreML has no such operator, and needs none for what does not depend on the image.
    """
    from coremltools.converters.mil import Builder, register_torch_op
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    def upsample_bicubic2d(context: Any, node: Any) -> None:
        table, size, align_corners = (entry.val for entry in _get_inputs(context, node)[:3])
        if table is None:
            raise NotImplementedError("CoreML has no bicubic resize of what depends on the image")
        resized = F.interpolate(
            torch.from_numpy(table), size=tuple(size), mode="bicubic", align_corners=bool(align_corners)
        )
        context.add(Builder.const(val=resized.numpy(), name=node.name))

    register_torch_op(torch_alias=["upsample_bicubic2d.vec"], override=True)(upsample_bicubic2d)


def attach_coreml(path: Path, text: str) -> None:
    """Puts metadata into the specification, in place of what is there."""
    with quiet():
        import coremltools

        model = coremltools.models.MLModel(str(path), skip_model_load=True)
        model.user_defined_metadata[METADATA_KEY] = text
        model.save(str(path))


def metadata_of_coreml(path: Path) -> str | None:
    """What `attach_coreml` has put there."""
    with quiet():
        import coremltools

        spec = coremltools.utils.load_spec(str(path))
    found: str | None = dict(spec.description.metadata.userDefined).get(METADATA_KEY)
    return found


def open_coreml(path: Path, threads: int | None) -> Run:  # noqa: ARG001 - every format's signature; CoreML decides
    """Loads a model into CoreML, on the CPU: on macOS only."""
    with quiet():
        import coremltools

        model = coremltools.models.MLModel(str(path), compute_units=coremltools.ComputeUnit.CPU_ONLY)
    names = [entry.name for entry in model.get_spec().description.input]
    outputs = [entry.name for entry in model.get_spec().description.output]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        known = [tensor.int() if tensor.dtype is torch.int64 else tensor.float() for tensor in tensors]
        found = model.predict({name: tensor.numpy() for name, tensor in zip(names, known, strict=True)})
        return [torch.from_numpy(found[name]) for name in outputs]

    return run


class _Contiguous(TorchFunctionMode):
    """A request for channels-last memory, a matter of speed in torch, becomes one for torch's usual layout."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if given.get("memory_format") is torch.channels_last:
            given["memory_format"] = torch.contiguous_format
        return func(*args, **given)


def write_executorch(source: Source, path: Path, text: str) -> None:
    """Writes a program for ExecuTorch's XNNPACK backend; the metadata is a method of its own that returns the text."""
    # Between XNNPACK's parts run kernels that want one layout of all their tensors: a map in channels-last memory of
    # which every second cell is taken ends the run (slice_copy, ExecuTorch 1.5).
    source.module.to(memory_format=torch.contiguous_format)
    with _Contiguous():
        graph = graph_of(source)
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        program = to_edge_transform_and_lower(
            graph, partitioner=[XnnpackPartitioner()], constant_methods={METADATA_KEY: text}
        ).to_executorch()
    path.write_bytes(program.buffer)


def metadata_of_executorch(path: Path) -> str | None:
    """What the program's method of that name returns."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)
    if METADATA_KEY not in program.method_names:
        return None
    return str(program.load_method(METADATA_KEY).execute([])[0])


def open_executorch(path: Path, threads: int | None) -> Run:  # noqa: ARG001 - every format's signature; it has no setting
    """Loads a program into ExecuTorch's runtime."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [output.clone() for output in as_list(method.execute(list(tensors)))]

    return run
