"""EfficientViT against timm, which gives Microsoft's outputs, and against published counts."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from effvit.backbones import create_backbone, create_classifier, list_backbones
from effvit.backbones._layers import ConvNorm, NormLinear

NAMES = list_backbones("efficientvit_*")
# Counted on the official code (MACs of one 224x224 image, attention included), and after its own BatchNorm folding.
MACS = dict(zip(NAMES, (79.2e6, 167.1e6, 201.0e6, 262.7e6, 299.3e6, 521.6e6), strict=True))
FOLDED_PARAMETERS = dict(zip(NAMES, (2_334_916, 2_964_256, 4_168_338, 6_875_890, 8_776_340, 12_436_260), strict=True))


def with_weights_of(peer, network):
    """Copies timm's weights; the names are the same."""
    state = peer.state_dict()
    trunk = {key: value for key, value in state.items() if not key.startswith("head.")}
    network.backbone.load_state_dict(trunk)
    network.head.load_state_dict({key.removeprefix("head."): value for key, value in state.items() if key not in trunk})
    return network.eval()


@pytest.fixture(params=NAMES)
def pair(request, randomise):
    peer = randomise(timm.create_model(request.param))
    return peer, with_weights_of(peer, create_classifier(request.param))


def test_logits_and_maps_equal_timm(pair, relative_error):
    peer, ours = pair
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(images), peer(images)) < 1e-5
        expected = peer.forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours.backbone(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


def test_training_step_equals_timm(randomise):
    peer = randomise(timm.create_model("efficientvit_m1")).double()
    ours = with_weights_of(peer, create_classifier("efficientvit_m1").double())
    peer.train()
    ours.train()
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    for network in (peer, ours):
        network(images).square().sum().backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.backbone.named_parameters():
        gradient = expected[name].grad
        # The absolute part is for biases whose gradient is zero but for rounding.
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=1e-8 * float(gradient.abs().max()) + 1e-10), (
            name
        )
    buffers = dict(peer.named_buffers())
    for name, buffer in ours.backbone.named_buffers():
        assert torch.allclose(buffer, buffers[name]), name


@pytest.mark.parametrize("size", [(400, 400), (420, 506), (448, 448)])
def test_dense_form_equals_timm_built_for_large_images(randomise, relative_error, size):
    # From 400 pixels on, timm's windows are 7x7 in every stage, as in the official detection file.
    peer = randomise(timm.create_model("efficientvit_m0", img_size=min(size), num_classes=0))
    ours = create_backbone("efficientvit_m0", dense=True).eval()
    ours.load_state_dict(peer.state_dict())
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = peer.forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


def test_small_square_map_is_one_window_with_a_resized_table(randomise, relative_error):
    ours = randomise(create_backbone("efficientvit_m0"))
    peer = timm.create_model("efficientvit_m0", img_size=320, num_classes=0).eval()  # third stage: 5x5
    state = ours.state_dict()
    for name, table in state.items():
        if name.endswith("attention_biases") and table.shape[1] == 16:
            image = F.interpolate(table.view(1, 4, 4, 4), size=(5, 5), mode="bicubic", align_corners=False)
            state[name] = image.view(4, 25)
    peer.load_state_dict(state)
    images = torch.randn(1, 3, 320, 320)
    with torch.no_grad():
        expected = peer.forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_published_macs(name):
    network = create_classifier(name).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 224, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(MACS[name], abs=0.1e6)


@pytest.mark.parametrize("name", NAMES)
def test_folded_parameter_count(name):
    network = create_classifier(name)
    folded = sum(
        sum(p.numel() for p in module.fold().parameters()) - sum(p.numel() for p in module.parameters())
        for module in network.modules()
        if isinstance(module, ConvNorm)
    )
    before = sum(p.numel() for p in network.parameters())
    head = network.head
    assert isinstance(head, NormLinear)
    unfused_head = sum(p.numel() for p in head.parameters())
    head.fuse()
    folded += sum(p.numel() for p in head.parameters()) - unfused_head
    assert before + folded == FOLDED_PARAMETERS[name]


@settings(max_examples=10, deadline=None)
@given(height=st.integers(32, 260), width=st.integers(32, 260), dense=st.booleans())
def test_any_size_gives_rounded_up_maps_and_fuses(height, width, dense):
    torch.manual_seed(height * 1000 + width)
    network = create_backbone("efficientvit_m0", dense=dense).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("attention_biases", "bn.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        both, second = network(images), network(images[1:])
        network.fuse()
        fused, fused_second = network(images), network(images[1:])
    for spec in network.feature_maps:
        assert both[spec.level].shape[2:] == (-(-height // spec.stride), -(-width // spec.stride))
        scale = both[spec.level].abs().max()
        assert ((both[spec.level][1:] - second[spec.level]).abs().max() / scale) < 1e-5
        assert ((both[spec.level] - fused[spec.level]).abs().max() / scale) < 1e-5
        assert ((second[spec.level] - fused_second[spec.level]).abs().max() / scale) < 1e-5


def test_prepare_for_dense_equals_the_network_before():
    network = create_backbone("efficientvit_m0").eval()
    for name, parameter in network.named_parameters():
        if name.endswith("attention_biases"):
            torch.nn.init.normal_(parameter)
    images = torch.randn(1, 3, 448, 480)  # third stage: 7x8, windows of 7x7
    with torch.no_grad():
        expected = network(images)["c6"]
        network.prepare_for_dense()
        assert {p.shape[1] for n, p in network.named_parameters() if n.endswith("attention_biases")} == {49}
        assert torch.equal(network(images)["c6"], expected)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_every_bias_table(dense, training):
    network = create_backbone("efficientvit_m0", dense=dense).train(training)
    for name, parameter in network.named_parameters():
        if "bn.weight" in name:
            torch.nn.init.ones_(parameter)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        network(images)  # fills the cache, which the next forward must not use
    network(images)["c6"].square().mean().backward()
    for name in network.no_weight_decay():
        assert network.get_parameter(name).grad.abs().sum() > 0, name


def _change_in_place(network):
    for name in network.no_weight_decay():
        network.get_parameter(name).data.add_(0)
        with torch.no_grad():
            network.get_parameter(name).mul_(-2)


def _load(network):
    network.load_state_dict(
        {key: -2 * value for key, value in network.state_dict().items() if "biases" in key}, strict=False
    )


def _assign(network):
    state = {key: -2 * value for key, value in network.state_dict().items() if "biases" in key}
    network.load_state_dict(state, strict=False, assign=True)


def _swap_data(network):
    network.train()
    for name in network.no_weight_decay():
        network.get_parameter(name).data = -2 * network.get_parameter(name).data
    network.eval()


@pytest.mark.parametrize("change", [_change_in_place, _load, _assign, _swap_data])
@pytest.mark.parametrize("copied", [False, True])
def test_no_stale_bias_is_ever_used(change, copied, randomise):
    network = randomise(create_backbone("efficientvit_m0"))
    fresh = copy.deepcopy(network)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        before = network(images)["c6"]
        if copied:
            network = copy.deepcopy(network)
        change(network)
        change(fresh)
        after = network(images)["c6"]
        assert torch.equal(after, fresh(images)["c6"])
    assert not torch.allclose(after, before)


def test_bias_is_expanded_once_for_each_shape(randomise, monkeypatch):
    from effvit.backbones import _windows

    calls = []
    expand = _windows.expand_bias
    monkeypatch.setattr(_windows, "expand_bias", lambda *arguments: calls.append(arguments) or expand(*arguments))
    network = randomise(create_backbone("efficientvit_m0"))
    with torch.no_grad():
        network(torch.randn(1, 3, 160, 160))
        once = len(calls)
        network(torch.randn(3, 3, 160, 160))
        assert len(calls) == once == 6  # one for each block
        network(torch.randn(1, 3, 96, 160))
        assert len(calls) > once


@pytest.mark.parametrize("fused", [False, True])
def test_inference_mode_and_moves_leave_nothing_behind(randomise, fused, relative_error):
    network = randomise(create_backbone("efficientvit_m0"))
    if fused:
        network.fuse()
    images = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = network(images)["c6"]
    network.requires_grad_(requires_grad=False)
    tracked = images.clone().requires_grad_()
    network(tracked)["c6"].sum().backward()
    assert tracked.grad.abs().sum() > 0
    network.double()
    with torch.no_grad():
        assert relative_error(network(images.double())["c6"], expected.double()) < 1e-5


def test_only_bias_tables_are_spared_weight_decay():
    names = create_backbone("efficientvit_m4").no_weight_decay()
    assert len(names) == 6
    assert all(name.endswith("mixer.m.attn.attention_biases") for name in names)


def test_layers_count_stem_downsamplings_and_blocks():
    network = create_backbone("efficientvit_m5")
    assert network.num_layers == 1 + 1 + (1 + 3) + (1 + 4)
    assert network.layer_of("patch_embed.conv1.conv.weight") == 0
    assert network.layer_of("stages.0.blocks.0.dw0.m.conv.weight") == 1
    assert network.layer_of("stages.1.downsample.res1.0.m.conv.weight") == 2
    assert network.layer_of("stages.1.blocks.2.dw0.m.conv.weight") == 5
    assert network.layer_of("stages.2.blocks.3.dw0.m.conv.weight") == 10
