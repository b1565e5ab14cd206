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

    Found by asking for the gradients of one forward in training mode, in which nothing is computed: parameters, buffers
    and image are on torch's meta device.

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
    parameters = {
        name: torch.empty_like(parameter, device="meta").requires_grad_()
        for name, parameter in backbone.named_parameters()
    }
    buffers = {name: torch.empty_like(buffer, device="meta") for name, buffer in backbone.named_buffers()}
    images = torch.empty(2, 3, _SIDE, _SIDE, device="meta", dtype=next(iter(parameters.values())).dtype)
    maps: dict[str, Tensor] = torch.func.functional_call(backbone, {**parameters, **buffers}, (images,))
    read = [maps[level].sum() for level in levels if maps[level].requires_grad]
    if not read:
        return list(parameters)
    gradients = torch.autograd.grad(read, list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
