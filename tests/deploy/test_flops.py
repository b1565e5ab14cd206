"""Multiply-accumulates of layers, and of a detector whose figure MMDetection prints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effvit.backbones import create_backbone, without_memory
from effvit.deploy.flops import count_macs, count_parts
from effvit.tasks.detectors.factory import DetectorSettings, make_detector


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_of_layers(device):
    layers = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    network = nn.Sequential(*layers).to(device)
    convolution, linear = 2 * 8 * 3 * 9 * 16, 2 * 128 * 5
    images = torch.zeros(2, 3, 8, 8, device=device)
    assert count_macs(network, images) == convolution + linear
    assert count_parts(network, images, parts=("4", "", "0", "1")) == [linear, convolution + linear, convolution, 0]


def test_macs_of_attention():
    query = torch.zeros(2, 4, 10, 16, device="meta")

    class Attention(nn.Module):
        def forward(self, query):
            return nn.functional.scaled_dot_product_attention(query, query, query)

    assert count_macs(Attention(), query) == 2 * (2 * 4 * 10 * 10 * 16)


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(AttributeError, match="backbone"):
        count_parts(nn.Sequential(nn.ReLU()), torch.zeros(1), parts=("backbone",))


def test_retinanet_on_resnet50_costs_what_mmdetection_prints():
    """``get_flops.py`` in MMDetection's documentation: 239.32 G at 1280x800, 37.74 M parameters.

    It counts normalisation and activations too, 0.3 % of it, and leaves out what their ResNet freezes: the stem and the
    first stage.
    """
    with without_memory():
        backbone = create_backbone("timm/resnet50")
        detector = make_detector("retinanet", backbone, 80, DetectorSettings()).eval()
        image = torch.zeros(1, 3, 800, 1280)
    frozen = ("model.conv1.", "model.bn1.", "model.layer1.")
    left_out = sum(p.numel() for name, p in backbone.named_parameters() if name.startswith(frozen))
    assert count_macs(detector, image) / 1e9 == pytest.approx(239.32, rel=0.004)
    count = sum(parameter.numel() for parameter in detector.parameters())
    assert (count - left_out) / 1e6 == pytest.approx(37.74, abs=0.005)
