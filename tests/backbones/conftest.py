"""Random weights that leave no part of a network at its neutral start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


@pytest.fixture
def randomise():
    """Gives BatchNorm statistics, affine parameters, layer scales and bias tables values that matter to the output."""

    def apply(network, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
                elif name.endswith("running_var"):
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            for module in network.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
                if isinstance(module, NORMS):
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
            for name, parameter in network.named_parameters():
                if name.endswith("attention_biases"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
                elif name.endswith("gamma"):  # LayerScale, which starts at 1e-5 and would hide its branch
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.5 + 0.2)
        return network.eval()

    return apply


@pytest.fixture
def relative_error():
    """Largest difference, relative to the largest expected value."""

    def measure(found, expected):
        return ((found - expected).abs().max() / expected.abs().max()).item()

    return measure
