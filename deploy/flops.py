"""What one forward pass of a network costs."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_macs(module: nn.Module, *inputs: object) -> int:
    """Multiply-accumulates of one forward pass: convolutions, linear layers and attention products.

    One multiply-accumulate is what the papers of these networks print as one FLOP. Sums, activations, normalisation,
    resizing and the pooling of regions are not counted.

    Args:
        module: Any network, in the mode in which it is to be counted. On torch's meta device nothing is computed.
        *inputs: What its ``forward`` takes, on the device of the module.
    """
    return count_parts(module, *inputs, parts=("",))[0]


def count_parts(module: nn.Module, *inputs: object, parts: tuple[str, ...]) -> list[int]:
    """What submodules do of one forward pass, see `count_macs`.

    Args:
        module: Any network.
        *inputs: What its ``forward`` takes.
        parts: Names of submodules, such as ``pyramid.backbone``; the empty name is the whole network.

    Raises:
        AttributeError: There is no such submodule.
    """
    for part in parts:
        module.get_submodule(part)
    # Older releases of torch count nothing for the kernel that attention has on a CPU.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # noqa: SLF001 - its name
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        module(*inputs)
    counts = counter.get_flop_counts()
    names = [".".join(filter(None, (type(module).__name__, part))) for part in parts]
    return [sum(counts.get(name, {}).values()) // 2 for name in names]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **_options: object) -> int:
    """Products of queries with keys, and of the result with values, of shapes ``(B, H, N, D)``."""
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
