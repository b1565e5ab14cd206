"""The runtimes that torch itself has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effvit.deploy._formats_source import quiet
from effvit.deploy._runtimes_contract import (
    TYPES,
    Flat,
    Prepared,
    Setting,
    can_fuse,
    converting,
    copied,
    evaluating,
    flatten,
    prepared,
)
from effvit.errors import ConfigError


class _Autocast(nn.Module):
    """A network in mixed precision."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.device_type = device
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> Any:
        with torch.autocast(self.device_type, self.dtype):
            return self.module(*inputs)


def placed(
    module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting, *, channels_last: bool
) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Network and inputs on the device, in the precision and the memory format.

    Lower precision converts the whole network, which is fastest, where all its inputs are floats. A network with others
    (images as bytes, sizes) makes floats itself, and needs some of them exact, such as coordinates of boxes: it runs
    under autocast.

    Args:
        module: May be changed.
        inputs: Stay as they are.
        setting: Device and precision.
        channels_last: Whether maps and convolution weights lie channels-last.
    """
    dtype = TYPES[setting.precision]
    module = module.to(setting.device)
    inputs = tuple(tensor.detach().to(setting.device, copy=True) for tensor in inputs)
    if dtype != torch.float32:
        if all(tensor.is_floating_point() for tensor in inputs):
            module, inputs = module.to(dtype), tuple(tensor.to(dtype) for tensor in inputs)
        else:
            module = _Autocast(module, setting.device, dtype)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
        inputs = tuple(
            tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor for tensor in inputs
        )
    return module, inputs


def ready(call: Callable[..., Any], inputs: tuple[Tensor, ...], *, warm: int = 1) -> Prepared:
    """What runs `call` on `inputs`, once it has done so.

    Args:
        call: The network.
        inputs: Where it is.
        warm: Runs until it is as fast as it gets.
    """

    def run() -> Any:
        with evaluating():
            return call(*inputs)

    for _ in range(warm):
        run()
    return prepared(run)


def eager(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network as it is."""
    if setting.device != "cpu" or setting.precision != "fp32":
        module = copied(module, fused=False)
    return ready(*placed(module, inputs, setting, channels_last=False))


def channels_last(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network with channels-last maps."""
    return ready(*placed(copied(module, fused=False), inputs, setting, channels_last=True))


def fused(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network's deploy form.

    Raises:
        ConfigError: It has none.
    """
    if not can_fuse(module):
        raise ConfigError(
            f"{type(module).__name__} has nothing to fuse: neither it nor a part of it has a fuse() method. "
            "Use the runtime 'channels_last'."
        )
    return ready(*placed(copied(module, fused=True), inputs, setting, channels_last=True))


def torchscript(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The traced network, in its deploy form where it has one: what EfficientViT's speed test runs.

    Raises:
        ExportError: The network cannot be traced.
    """
    network, inputs = placed(copied(module, fused=True), inputs, setting, channels_last=False)
    with quiet(), converting(module, "TorchScript"):
        names = list(flatten(network(*inputs)))
        traced = torch.jit.trace(Flat(network).eval(), inputs, check_trace=False)  # type: ignore[no-untyped-call]
        frozen = torch.jit.freeze(traced)
        ran = ready(frozen, inputs, warm=3)  # the first runs profile and optimise
    return prepared(ran.run, lambda outputs: dict(zip(names, outputs, strict=True)))
