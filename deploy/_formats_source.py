"""What every format starts from: a network with example inputs, and its graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

#: What a loaded file is: input tensors to output tensors, on the CPU.
Run = Callable[[Sequence[Tensor]], list[Tensor]]

#: Under this name the metadata, one JSON object, lies in a file of any format.
METADATA_KEY = "effvit"


class Deployable(Protocol):
    """What a task gives for export: an ``nn.Module`` with normalisation and decoding inside, and what it is."""

    @property
    def task(self) -> str:
        """``classification`` or ``detection``."""

    @property
    def dynamic_batch(self) -> bool:
        """Whether ``torch.export`` can record it for any number of images."""

    @property
    def input_names(self) -> Sequence[str]:
        """What ``forward`` takes, images first."""

    @property
    def output_names(self) -> Sequence[str]:
        """What ``forward`` returns, in that order."""

    def __call__(self, *inputs: Tensor) -> Any:
        """What `output_names` names."""

    def example_inputs(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Noise of ``batch`` images of ``size`` (height, width) in pixels, with what else ``forward`` takes."""

    def metadata(self) -> dict[str, Any]:
        """What users of a file have to know, JSON-able: task, categories, normalisation, thresholds."""


@dataclass(frozen=True)
class Source:
    """A network that is written to a file.

    Attributes:
        module: In eval mode, on the CPU, in float32.
        inputs: What its ``forward`` takes; of two images or more where the batch is to be dynamic.
        input_names: In the order of ``forward``.
        output_names: In the order in which it returns them.
        dynamic_batch: Whether the file is to take any number of images.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_batch: bool = False


def as_list(outputs: Any) -> list[Tensor]:
    """What a network returns, in a list."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def warm_up(source: Source) -> None:
    """One forward pass, which fills what a network keeps of a shape: a table made inside a graph is in each pass."""
    with torch.no_grad():
        source.module(*source.inputs)


def graph_of(source: Source) -> torch.export.ExportedProgram:
    """The graph of one forward pass, as ``torch.export`` records it."""
    warm_up(source)
    shapes = tuple({0: torch.export.Dim("batch")} for _ in source.inputs) if source.dynamic_batch else None
    with torch.no_grad(), quiet():
        return torch.export.export(source.module, source.inputs, dynamic_shapes=shapes, strict=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings and notes of exporters, which are about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
