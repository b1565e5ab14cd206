"""The runtimes that torch itself has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from effvit.deploy._fit import kept_tensors
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
from effvit.deploy.timing import true_float32
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

    Lower precision is autocast: as the papers measured on GPUs, and as networks with bytes or sizes as inputs need,
    which make floats themselves and some of them exact, such as coordinates of boxes.

    Args:
        module: May be changed.
        inputs: Stay as they are, and are shared with whatever else is prepared on them.
        setting: Device and precision.
        channels_last: Whether maps and convolution weights lie channels-last.
    """
    dtype = TYPES[setting.precision]
    module = module.to(setting.device)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    if dtype != torch.float32:
        module = _Autocast(module, setting.device, dtype)
    return module, tuple(_placed(tensor, setting.device, channels_last and tensor.ndim == 4) for tensor in inputs)


#: Copies of inputs that are in use, by device, memory format and how often the input had been changed by then.
_Copies = dict[tuple[str, bool, int], TensorWeakRef]
_COPIES: MutableMapping[Tensor, _Copies] = WeakTensorKeyDictionary()


def _placed(tensor: Tensor, device: str, channels_last: bool) -> Tensor:
    """The tensor there, not once more where it is already."""
    copies = _COPIES.setdefault(tensor, {})
    key = device, channels_last, 0 if tensor.is_inference() else tensor._version  # noqa: SLF001
    known: Tensor | None = copies[key]() if key in copies else None
    if known is not None:
        return known
    found = tensor.detach().to(device)
    if channels_last:
        found = found.contiguous(memory_format=torch.channels_last)
    copies[key] = TensorWeakRef(found)
    return found


def _exact(setting: Setting) -> contextlib.AbstractContextManager[None]:
    """On a GPU, fp32 is no TF32."""
    on_gpu = (setting.device, setting.precision) == ("cuda", "fp32")
    return true_float32() if on_gpu else contextlib.nullcontext()


def ready(call: Callable[..., Any], inputs: tuple[Tensor, ...], setting: Setting, *, warm: int = 0) -> Prepared:
    """What runs `call` on `inputs`, once it has done so.

    Args:
        call: The network.
        inputs: Where it is.
        setting: Its device and precision.
        warm: Runs that a compiler needs until it is as fast as it gets; what these keep is the network in its form. 0
            for a network of Python, whose first run may keep tables that it makes for the shape of its maps.
    """

    def run() -> Any:
        with evaluating(), _exact(setting):
            return call(*inputs)

    kept = 0 if warm else kept_tensors(run)
    for _ in range(warm):
        run()
    return prepared(run, kept=kept)


def eager(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network as it is."""
    if setting.device != "cpu" or setting.precision != "fp32":
        module = copied(module, fused=False)
    return ready(*placed(module, inputs, setting, channels_last=False), setting)


def channels_last(module: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Prepared:
    """The network with channels-last maps."""
    return ready(*placed(copied(module, fused=False), inputs, setting, channels_last=True), setting)


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
    return ready(*placed(copied(module, fused=True), inputs, setting, channels_last=True), setting)


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
        ran = ready(frozen, inputs, setting, warm=3)  # the first runs profile and optimise
    return prepared(ran.run, lambda outputs: dict(zip(names, outputs, strict=True)))
