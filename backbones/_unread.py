"""Which parameters of a backbone some of its maps do not depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection

    from effvit.backbones._contract import Backbone

_SIDE = 64


def freeze_unread(backbone: Backbone, levels: Collection[str]) -> None:
    """Freezes the parameters that would never get a gradient, which distributed training takes for an error.

    Args:
        backbone: Any, in its dense form.
        levels: Names of the maps that are read.
    """
    for name in unread_parameters(backbone, levels):
        backbone.get_parameter(name).requires_grad_(False)


def unread_parameters(backbone: Backbone, levels: Collection[str]) -> list[str]:
    """Names of the parameters that would never get a gradient from these maps.

    Found in the graph that autograd records of one forward in training mode. (On torch's meta device, where nothing
    would be computed, that forward takes ten times as long: most operators are then interpreted in Python.)

    Args:
        backbone: Any; it is not changed.
        levels: Names of the maps that are read.
    """
    modes = {module: module.training for module in backbone.modules()}
    recomputes = backbone.grad_checkpointing
    backbone.set_grad_checkpointing(enable=False)  # a second forward, later, would see the real parameters
    backbone.train()
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            return _trace(backbone, levels)
    finally:
        for module, mode in modes.items():
            module.training = mode
        if recomputes:
            backbone.set_grad_checkpointing()


def _trace(backbone: Backbone, levels: Collection[str]) -> list[str]:
    # Copies of what a forward in training mode changes, and of tensors of inference mode, which no graph may hold.
    parameters = {name: _leaf(parameter) for name, parameter in backbone.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    like = next(iter(parameters.values()))
    images = torch.zeros(2, 3, _SIDE, _SIDE, device=like.device, dtype=like.dtype)
    with torch.random.fork_rng([like.device] if like.device.type == "cuda" else []):
        maps: dict[str, Tensor] = torch.func.functional_call(backbone, {**parameters, **buffers}, (images,))
    read = _leaves_below([maps[level] for level in levels])
    return [name for name, parameter in parameters.items() if id(parameter) not in read]


def _leaf(parameter: Tensor) -> Tensor:
    return (parameter.clone() if parameter.is_inference() else parameter).detach().requires_grad_()


def _leaves_below(outputs: list[Tensor]) -> set[int]:
    """Identities of the tensors that gradients of the outputs would reach."""
    waiting = [output.grad_fn for output in outputs]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        new = {following for following, _ in node.next_functions} - seen
        seen |= new
        waiting += new
    return leaves
