"""Gradient checkpointing that leaves BatchNorm statistics as they are without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_later(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    """``block(*inputs)`` that keeps only its inputs and computes the rest again when gradients are wanted."""
    if torch.compiler.is_compiling():  # which counts a batch once, and knows no contexts
        compiled: Tensor = checkpoint(block, *inputs, use_reentrant=False)
        return compiled
    out: Tensor = checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), _fixed_statistics(block))
    )
    return out


@contextlib.contextmanager
def _fixed_statistics(block: nn.Module) -> Iterator[None]:
    """Keeps the second forward of a batch from being counted in the running statistics again."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [
        (norm, norm.momentum, None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone())
        for norm in norms
    ]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            if norm.num_batches_tracked is not None and count is not None:
                norm.num_batches_tracked.copy_(count)
