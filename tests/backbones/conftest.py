"""Random weights that leave no part of a network at its neutral start."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def randomise():
    """Gives BatchNorm statistics, affine parameters and bias tables values that matter to the output."""

    def apply(network, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, buffer in network.named_buffers():
                if name.endswith("running_mean"):
                    buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
                elif name.endswith("running_var"):
                    buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            for name, parameter in network.named_parameters():
                if "bn.weight" in name:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
                elif "bn.bias" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
                elif name.endswith("attention_biases"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return network.eval()

    return apply


@pytest.fixture
def relative_error():
    """Largest difference, relative to the largest expected value."""

    def measure(found, expected):
        return ((found - expected).abs().max() / expected.abs().max()).item()

    return measure
