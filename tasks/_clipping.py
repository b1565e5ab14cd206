"""Adaptive gradient clipping, which the published recipes of EfficientViT and EfficientFormer use."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_LEAST_NORM = 1e-3


def clip_adaptively(parameters: Iterable[Tensor], factor: float) -> None:
    """Scales gradients in place that are large against the weights that they belong to.

    "High-Performance Large-Scale Image Recognition Without Normalization", arXiv 2102.06171, section 4.1, equation 3:
    the gradient of each output unit has at most ``factor`` times the norm of that unit's weights, which counts as 0.001
    at least. A vector counts as one unit, as in timm's ``adaptive_clip_grad``.

    Args:
        parameters: Those without a gradient are left alone.
        factor: The clipping factor lambda, positive.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        most = _unit_norm(parameter.detach()).clamp_(min=_LEAST_NORM).mul_(factor)
        norm = _unit_norm(parameter.grad)
        scale = torch.where(norm < most, torch.ones_like(norm), most / norm.clamp(min=1e-6))
        parameter.grad.mul_(scale)


def _unit_norm(value: Tensor) -> Tensor:
    """Euclidean norm over all dimensions but the first, or of a whole vector; broadcasts against ``value``."""
    dimensions = tuple(range(1, value.dim())) or None
    norm: Tensor = torch.linalg.vector_norm(value, dim=dimensions, keepdim=dimensions is not None)
    return norm
