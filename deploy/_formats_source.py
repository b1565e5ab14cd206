"""What every format starts from: a network with example inputs, and its graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx.experimental._config as shape_config  # its documented place
from torch import Tensor, nn

from effvit.deploy._runtimes_contract import flatten

#: What a loaded file is: input tensors to output tensors, on the CPU.
Run = Callable[[Sequence[Tensor]], list[Tensor]]

#: Under this name the metadata, one JSON object, lies in a file of any format.
METADATA_KEY = "effvit"


class Deployable(Protocol):
    """What a task gives for export: an ``nn.Module`` with normalisation and decoding inside, and what it is."""

    @property
    def task(self) -> str:
        """``classification``, ``detection`` or ``segmentation``."""

    @property
    def open_sides(self) -> range | None:
        """Sides in pixels of the images that a graph of no fixed size takes; ``None`` where it is made for one size."""

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

    def onnx_translations(self) -> Mapping[Any, Callable[..., Any]]:
        """What operators of its own are in ONNX; graphs for any number of images may have some."""

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
        open_sides: Sides that its images may have; ``None`` for the size of `inputs`.
        onnx_translations: See `Deployable`.
    """

    module: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_batch: bool = False
    open_sides: range | None = None
    onnx_translations: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)


class _WholeSteps(nn.Module):
    """A network whose images have sides that are known to be multiples of a step.

    Of a side that is ``step * n``, torch's algebra of shapes sees what comes out of strided layers, such as ``2 * n``,
    and decides in seconds what takes it minutes, or what it cannot decide, of a side that is only known as a number.

    Args:
        module: The network.
        step: In pixels.
    """

    def __init__(self, module: nn.Module, step: int) -> None:
        super().__init__()
        self.module = module
        self.step = step

    def forward(self, images: Tensor, *others: Tensor) -> Any:
        """What the network returns."""
        height, width = (side // self.step * self.step for side in images.shape[2:])
        return self.module(images.view(*images.shape[:2], height, width), *others)


def as_list(outputs: Any) -> list[Tensor]:
    """What a network returns, in a list."""
    return list(flatten(outputs).values())


def warm_up(source: Source) -> None:
    """One forward pass, which fills what a network keeps of a shape: a table made inside a graph is in each pass."""
    with torch.no_grad():
        source.module(*source.inputs)


def graph_of(source: Source) -> torch.export.ExportedProgram:
    """The graph of one forward pass, as ``torch.export`` records it."""
    warm_up(source)
    module = source.module if source.open_sides is None else _WholeSteps(source.module, source.open_sides.step)
    with torch.no_grad(), quiet(), open_shapes():
        return torch.export.export(module, source.inputs, dynamic_shapes=_open_shapes(source), strict=False)


@contextmanager
def open_shapes() -> Iterator[None]:
    """Within it, a side that is left open is not taken for a constant where it is 1 in the example.

    Asking that of each shape takes most of the time of recording, too.
    """
    with shape_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


def _open_shapes(source: Source) -> Any:
    """Which sides of the inputs are left open, as ``torch.export`` words it."""
    every = {0: torch.export.Dim("batch")} if source.dynamic_batch else {}
    shapes: list[dict[int, Any]] = [dict(every) for _ in source.inputs]
    if source.open_sides is not None:
        for place, name in ((2, "rows"), (3, "columns")):
            shapes[0][place] = _side(name, source.open_sides)
    if not any(shapes):
        return None
    own = tuple(shape or None for shape in shapes)
    return own if source.open_sides is None or len(own) == 1 else (own[0], own[1:])  # as `_WholeSteps` takes them


def _side(name: str, sides: range) -> Any:
    """A side in whole steps."""
    return sides.step * torch.export.Dim(name, min=sides[0] // sides.step, max=sides[-1] // sides.step)


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
