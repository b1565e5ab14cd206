"""What the networks of ``effvit tables`` cost, counted on networks without memory for their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        backbone_params: Parameters of the backbone that are read.
        params: Those of the whole network.
        backbone_macs: Multiply-accumulates of the backbone for one image.
        macs: Those of the whole network.
    """

    backbone_params: int
    params: int
    backbone_macs: int
    macs: int


def count(network: nn.Module, backbone: nn.Module, image_size: tuple[int, int]) -> Cost:
    """Counts parameters and multiply-accumulates; to be called within `without_memory`.

    Parameters are those that are trained: a network freezes those of a backbone that none of its maps depends on.

    Args:
        network: The whole of it, in eval mode.
        backbone: A part of it.
        image_size: Height and width in pixels.
    """
    import torch

    from effvit.deploy.flops import count_parts

    place = next(name for name, module in network.named_modules() if module is backbone)
    backbone_macs, macs = count_parts(network, torch.zeros(1, 3, *image_size), parts=(place, ""))
    return Cost(_parameters(backbone), _parameters(network), backbone_macs, macs)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
