"""MobileViTv2 against timm, and under Apple's names."""

from __future__ import annotations

import copy
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effvit.backbones import backbone_info, create_backbone, create_classifier, list_backbones, load_checkpoint
from effvit.backbones._mobilevitv2_fused import position_mask

NAMES = list_backbones("mobilevitv2_*")
SMALLEST = "mobilevitv2_050"
DEPTHS = {"2": 2, "3": 4, "4": 3}  # transformer layers by stage


def apple_name(key):
    """timm's key as Apple's files spell it."""
    key = re.sub(r"^stem\.", "conv_1.block.", key)
    key = re.sub(r"^head\.fc\.", "classifier.1.", key)
    for timm_layer, layer in (("conv1_1x1", "exp_1x1"), ("conv2_kxk", "conv_3x3"), ("conv3_1x1", "red_1x1")):
        key = key.replace(f".{timm_layer}.", f".block.{layer}.block.")
    key = key.replace(".conv_kxk.", ".local_rep.0.block.")
    key = key.replace(".conv_1x1.weight", ".local_rep.1.block.conv.weight")
    key = key.replace(".conv_proj.", ".conv_proj.block.")
    key = re.sub(r"^stages\.(\d)\.1\.norm\.", lambda found: f"stages.{found[1]}.1.global_rep.{DEPTHS[found[1]]}.", key)
    for ours, theirs in (
        ("norm1", "pre_norm_attn.0"),
        ("attn.qkv_proj", "pre_norm_attn.1.qkv_proj.block.conv"),
        ("attn.out_proj", "pre_norm_attn.1.out_proj.block.conv"),
        ("norm2", "pre_norm_ffn.0"),
        ("mlp.fc1", "pre_norm_ffn.1.block.conv"),
        ("mlp.fc2", "pre_norm_ffn.3.block.conv"),
    ):
        key = re.sub(rf"\.transformer\.(\d)\.{re.escape(ours)}\.", rf".global_rep.\1.{theirs}.", key)
    key = re.sub(r"^stages\.(\d)\.", lambda found: f"layer_{int(found[1]) + 1}.", key)
    return key.replace(".bn.", ".norm.")


def ours_of(state):
    """timm's state dict under the names of a ``Classifier``."""
    return {
        key.replace("head.fc.", "head.") if key.startswith("head") else f"backbone.{key}": value
        for key, value in state.items()
    }


def assert_loaded(network, peer):
    state = network.state_dict()
    for name, value in ours_of(peer.state_dict()).items():
        assert torch.equal(state[name], value), name


def loaded(network, path):
    report = load_checkpoint(network, path)
    assert (report.missing, report.unexpected, report.resized, report.mismatched) == ((), (), (), ())
    return network.eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_maps_equal_timm(name, randomise, relative_error, tmp_path):
    peer = randomise(timm.create_model(name))
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    ours = loaded(create_classifier(name), tmp_path / "timm.pth")
    assert_loaded(ours, peer)
    images = torch.rand(2 if name == SMALLEST else 1, 3, 256, 256)
    with torch.no_grad():
        assert relative_error(ours(images), peer(images)) < 1e-5
        expected = peer.forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours.backbone(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


def test_odd_maps_give_timms_logits_and_timms_maps_resized(randomise, relative_error):
    peer = randomise(timm.create_model(SMALLEST))
    ours = create_classifier(SMALLEST).eval()
    ours.load_state_dict(ours_of(peer.state_dict()))
    for network in (ours, copy.deepcopy(ours).fuse()):
        for size in ((224, 224), (97, 133), (33, 32)):
            images = torch.rand(2, 3, *size)
            with torch.no_grad():
                assert relative_error(network(images), peer(images)) < 1e-5
                grown = peer.forward_intermediates(images, intermediates_only=True)
                found = network.backbone(images)
            announced = [tuple(math.ceil(side / spec.stride) for side in size) for spec in ours.backbone.feature_maps]
            assert [tuple(feature.shape[2:]) for feature in found.values()] == announced
            assert [tuple(feature.shape[2:]) for feature in grown] != announced
            for feature, timms, sides in zip(found.values(), grown, announced, strict=True):
                # At an equal size this changes nothing.
                expected = F.interpolate(timms, size=sides, mode="bilinear", align_corners=True)
                assert relative_error(feature, expected) < 1e-5


def test_apples_file_loads_and_its_colours_stay(randomise, tmp_path):
    peer = timm.create_model(SMALLEST)
    state = {apple_name(key): value for key, value in peer.state_dict().items()}
    for name in (
        "conv_1.block.norm.running_mean",
        "layer_3.1.local_rep.0.block.norm.weight",
        "layer_3.1.local_rep.1.block.conv.weight",
        "layer_4.1.global_rep.3.pre_norm_attn.1.qkv_proj.block.conv.weight",
        "layer_4.1.global_rep.4.weight",
        "layer_5.1.global_rep.2.pre_norm_ffn.3.block.conv.bias",
        "layer_5.1.conv_proj.block.conv.weight",
        "classifier.1.bias",
    ):
        assert name in state
    torch.save(state, tmp_path / "mobilevitv2-0.5.pt")
    assert_loaded(loaded(create_classifier(SMALLEST), tmp_path / "mobilevitv2-0.5.pt"), peer)
    flipped = create_backbone(SMALLEST, pretrained=tmp_path / "mobilevitv2-0.5.pt", channel_order="bgr")
    assert torch.equal(flipped.get_parameter("stem.conv.weight"), peer.state_dict()["stem.conv.weight"].flip(1))


def test_training_step_equals_timm(randomise):
    peer = randomise(timm.create_model(SMALLEST)).double()
    ours = create_classifier(SMALLEST).double()
    ours.load_state_dict(ours_of(peer.state_dict()))
    images = torch.rand(2, 3, 160, 128, dtype=torch.float64)
    for network in (peer.train(), ours.train()):
        network(images).square().sum().backward()
    expected = ours_of({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in ours.named_parameters():
        # The absolute part is for gradients that are zero but for rounding.
        absolute = 1e-8 * float(expected[name].abs().max()) + 1e-10
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-6, atol=absolute), name
    buffers = ours_of(dict(peer.named_buffers()))
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, buffers[name]), name


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_mask_leaves_each_position_its_cells(rows, columns):
    height, width = 2 * rows, 2 * columns
    mask = position_mask(torch.zeros((), dtype=torch.float64), height, width)
    assert mask.dtype == torch.float64
    for position in range(4):
        image = mask[position].view(height, width)
        assert (image[position // 2 :: 2, position % 2 :: 2] == 0).all()
        assert image.isinf().sum() == height * width * 3 / 4


def test_masks_are_made_once_for_each_shape_and_follow_the_network(randomise, relative_error):
    network = randomise(create_backbone(SMALLEST)).fuse()
    images = torch.rand(1, 3, 96, 64)
    block = network.stages[2][1]
    with torch.inference_mode():
        expected = network(images)["c5"]
        network(images.repeat(2, 1, 1, 1))
        assert len(block._masks._kept) == 1
        network(images.mT)
        assert len(block._masks._kept) == 2
    tracked = images.clone().requires_grad_()
    network(tracked)["c5"].sum().backward()
    assert tracked.grad.abs().sum() > 0
    with torch.no_grad():
        assert relative_error(network.double()(images.double())["c5"], expected.double()) < 1e-5


def test_layers_count_stem_residuals_and_attention_blocks():
    network = create_backbone("mobilevitv2_200")
    assert network.num_layers == 1 + (1 + 2 + 1 + 1 + 1) + 3
    assert network.layer_of("stem.conv.weight") == 0
    assert network.layer_of("stages.1.1.conv1_1x1.conv.weight") == 3
    assert network.layer_of("stages.4.1.transformer.2.mlp.fc2.bias") == 9
    assert network.layer_of("head.weight") == 10


def test_published_facts():
    spec = create_backbone(SMALLEST).input_spec
    assert (spec.size, spec.interpolation) == ((256, 256), "bicubic")
    assert round(256 / spec.crop) == 288
    assert [backbone_info(name).top1 for name in NAMES] == [70.18, 75.56, 78.09, 79.65, 80.38, 80.84, 81.17]
    assert all(f"/timm/{name}.cvnets_in1k/" in backbone_info(name).url for name in NAMES)
    assert create_backbone(SMALLEST).no_weight_decay() == set()
