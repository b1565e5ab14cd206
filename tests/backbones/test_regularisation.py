"""Stochastic depth and dropout: where they act in training, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from effvit.backbones import create_backbone, create_classifier, list_backbones
from effvit.backbones._layers import drop_paths
from effvit.backbones.mobilevit import TransformerLayer
from effvit.errors import ConfigError

# The smallest network of each family with options of the kind, its options, and timm's name of it.
DEEP = [
    ("efficientformer_l1", {}, "efficientformer_l1"),
    ("efficientformerv2_s0", {}, "efficientformerv2_s0"),
    ("dynamicvit_tiny", {"keep_ratio": 1.0}, "deit_tiny_patch16_224"),
]
DROPPED = [
    *((name, options | {"drop_path_rate": 0.4}) for name, options, _ in DEEP),
    ("dynamicvit_tiny", {"drop_path_rate": 0.4}),
    ("mobilevit_xxs", {"dropout": 0.3}),
    ("mobilevit_xxs", {"classifier_dropout": 0.5}),
]


@pytest.mark.parametrize(("name", "options", "peer_name"), DEEP)
def test_stochastic_depth_is_timms(name, options, peer_name, randomise, tmp_path):
    # The same draws: one of each branch in turn, none where the rate is 0.
    peer = randomise(timm.create_model(peer_name, drop_path_rate=0.4))
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    ours = create_classifier(name, pretrained=tmp_path / "weights.pth", drop_path_rate=0.4, **options).double().train()
    peer = peer.double().train()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    outputs = []
    with torch.no_grad():
        for network in (peer, ours):
            torch.manual_seed(3)
            outputs.append(network(images))
        assert not torch.allclose(ours(images), outputs[1], rtol=1e-3)
    expected = torch.stack(outputs[0]).mean(0) if isinstance(outputs[0], tuple) else outputs[0]
    assert torch.allclose(outputs[1], expected, rtol=1e-6, atol=1e-8)


def test_rates_grow_from_nothing_to_the_given_one():
    assert drop_paths(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_paths(0.2, 1) == [0.0]


def test_dropout_of_a_mobilevit_layer_comes_last_in_each_branch():
    # As Apple's pre_norm_mha and pre_norm_ffn: norm, attention, dropout; norm, two linears, dropout.
    layer = TransformerLayer(16).train()
    layer.dropout.p = 0.4
    tokens = torch.randn(6, 5, 16)
    torch.manual_seed(1)
    found = layer(tokens)
    torch.manual_seed(1)
    middle = tokens + F.dropout(layer.attn(layer.norm1(tokens)), 0.4)
    expected = middle + F.dropout(layer.mlp.fc2(F.silu(layer.mlp.fc1(layer.norm2(middle)))), 0.4)
    assert torch.equal(found, expected)


def test_mobilevits_layers_and_classifier_have_their_dropout():
    network = create_backbone("mobilevit_xxs", dropout=0.05, classifier_dropout=0.1).train()
    rates = [module.dropout.p for module in network.modules() if isinstance(module, TransformerLayer)]
    assert rates == [0.05] * 9
    embedding = network.embed(torch.randn(64, 3, 32, 32))
    assert (embedding == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(("name", "options"), DROPPED)
def test_only_training_is_random(name, options, randomise, relative_error):
    network = randomise(create_backbone(name, **options))
    kept = {option: value for option, value in options.items() if option == "keep_ratio"}
    plain = create_backbone(name, **kept).eval()
    plain.load_state_dict(network.state_dict())
    images = torch.randn(6, 3, 32, 32)
    with torch.no_grad():
        expected = plain.embed(images)
        assert torch.equal(network.embed(images), expected)
        assert relative_error(copy.deepcopy(network).fuse().embed(images), expected) < 1e-5
        network.train()
        for module in network.modules():  # batch statistics are of what was dropped, too
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        assert not torch.equal(network.embed(images), network.embed(images))


@pytest.mark.parametrize("rate", [-0.1, 1.0, "much", True])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("efficientformer_l1", "drop_path_rate"),
        ("efficientformerv2_s0", "drop_path_rate"),
        ("dynamicvit_tiny", "drop_path_rate"),
        ("mobilevit_xxs", "dropout"),
        ("mobilevit_xxs", "classifier_dropout"),
    ],
)
def test_rates_out_of_range_are_refused(name, option, rate):
    with (
        torch.device("meta"),
        pytest.raises(ConfigError, match=rf"{option} must be a number of at least 0 and below 1"),
    ):
        create_backbone(name, **{option: rate})


@pytest.mark.parametrize("name", list_backbones())
def test_an_unknown_option_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} has no option 'drop_paths'"):
        create_backbone(name, drop_paths=0.1)
