"""Tracing a network to an ONNX file of fixed shapes, and how its runtimes open files: for runtimes and formats."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy._static_shapes import StaticShapes


def trace_to_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    path: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
    opset: int,
) -> None:
    """Writes what one forward pass does, with the shapes of its inputs.

    Args:
        module: In eval mode, and run once before: what it keeps of a shape would be traced too.
        inputs: What its ``forward`` takes.
        path: The file.
        input_names: What the inputs are called there.
        output_names: The same of the outputs.
        opset: Version of ONNX's operators.
    """
    with _without_stdout(), _without_fast_path(), torch.no_grad(), StaticShapes():
        torch.onnx.export(
            module,
            inputs,
            path,
            input_names=list(input_names),
            output_names=list(output_names),
            opset_version=opset,
            dynamo=False,
        )


def session_options(threads: int | None) -> Any:
    """How ONNX Runtime runs a file.

    Args:
        threads: Of one forward pass; ``None`` for its own choice.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def openvino_properties(threads: int | None, precision: str = "f32") -> dict[str, Any]:
    """How OpenVINO runs a file, one pass at a time.

    Args:
        threads: Of one forward pass; ``None`` for its own choice.
        precision: ``f32`` or ``bf16``, of what is not quantised. Left alone, OpenVINO takes bfloat16 where the
            processor has it: files would differ from their source, and no ratio of times would be fair.
    """
    properties = {"NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    return properties if threads is None else {**properties, "INFERENCE_NUM_THREADS": str(threads)}


@contextlib.contextmanager
def _without_stdout() -> Iterator[None]:
    """The exporter's compiled part prints the whole graph when it fails; our error says why."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what it has printed and not yet written
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Torch's multi-head attention is otherwise one operator in eval mode, which exporters do not know."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(value=False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
