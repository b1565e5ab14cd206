"""What the deploy forms of several families are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def frozen(tensor: Tensor) -> nn.Parameter:
    """A constant copy that moves with its module."""
    return nn.Parameter(tensor.detach().clone(memory_format=torch.preserve_format), requires_grad=False)


def channels_last(convolution: nn.Conv2d) -> nn.Conv2d:
    """The convolution, frozen, with its weight in the layout of the maps that it reads."""
    return convolution.requires_grad_(False).to(memory_format=torch.channels_last)


def bias_of(convolution: nn.Conv2d) -> Tensor:
    """The bias of a folded convolution, which always has one."""
    assert convolution.bias is not None
    return convolution.bias


def accumulate(onto: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``onto + left @ right``, in place where no gradient is recorded; `onto` must be the caller's own."""
    same = onto.dtype == left.dtype == right.dtype
    if torch.is_grad_enabled() or not same:  # autocast only casts what is not in place
        return torch.addmm(onto, left, right)
    return onto.addmm_(left, right)
