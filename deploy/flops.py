"""What one forward pass of a network costs."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(module: nn.Module, *inputs: object) -> int:
    """Multiply-accumulates of one forward pass: convolutions, linear layers and attention products.

    One multiply-accumulate is what the papers of these networks print as one FLOP. Sums, activations, normalisation,
    resizing and the pooling of regions are not counted.

    Args:
        module: Any network, in the mode in which it is to be counted. On torch's meta device nothing is computed.
        *inputs: What its ``forward`` takes, on the device of the module.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops()) // 2
