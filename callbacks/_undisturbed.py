"""A network used in the middle of its training, and everything as it was afterwards."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from effvit.callbacks import _random_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

_CUDNN = ("enabled", "benchmark", "deterministic", "allow_tf32")


@contextmanager
def undisturbed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores what a forward pass or its measurement may change, whatever happens inside.

    That is: mode and buffers of every module (a network in training may have parts in eval mode), values of
    parameters and buffers (a BatchNorm that was left in training mode), ``requires_grad`` and ``grad`` of every
    parameter, all random number generators, the number of threads, and the switches of cuDNN. Memory: one copy of the
    weights, on their device.

    Args:
        module: The network, or what holds it.
        device: Where it is.
    """
    random = _random_state.capture(device)
    threads = torch.get_num_threads()
    cudnn = {name: getattr(torch.backends.cudnn, name) for name in _CUDNN}
    states = [(child, child.training, dict(child._buffers)) for child in module.modules()]  # noqa: SLF001 - non-persistent ones too
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    values = _copies(module)
    try:
        yield
    finally:
        for child, training, buffers in states:
            child.training = training
            child._buffers.clear()  # noqa: SLF001 - a network may have made a new one
            child._buffers.update(buffers)  # noqa: SLF001
        for parameter, wanted, gradient in flags:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        _put_back(values)
        for name, value in cudnn.items():
            setattr(torch.backends.cudnn, name, value)
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # blocks of other shapes than those of training would be of no use to it
        _random_state.restore(random, device)


def _copies(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Every parameter and buffer, with its value."""
    tensors: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        tensors[id(tensor)] = tensor
    return [(tensor, tensor.detach().clone()) for tensor in tensors.values()]


@torch.no_grad()
def _put_back(values: list[tuple[Tensor, Any]]) -> None:
    # Only what has changed: a network may have derived something from its weights, and would see them change.
    for tensor, before in values:
        if not torch.equal(tensor, before):
            tensor.copy_(before)
