"""What the stand-ins for mmcv's compiled operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[int, int]


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is where it is float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def gradients_of(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all inputs of a function, computed anew: mmcv's backward functions get inputs, not the graph."""
    with torch.enable_grad():
        leaves = [wide(tensor.detach()).requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, wide(gradient))


def write(results: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for result, buffer in zip(results, into, strict=True):
        buffer.copy_(result)
