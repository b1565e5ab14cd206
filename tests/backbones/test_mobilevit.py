"""MobileViT against timm, and under Apple's names."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effvit.backbones import (
    _cvnets_fused,
    backbone_info,
    create_backbone,
    create_classifier,
    list_backbones,
    load_checkpoint,
)
from effvit.backbones._cvnets_patches import cut_patches, merge_patches
from effvit.errors import ConfigError

NAMES = list_backbones("mobilevit_*")
XXS = "mobilevit_xxs"
DEPTHS = {"2": 2, "3": 4, "4": 3}  # transformer layers by stage


def apple_name(key):
    """timm's key as Apple's files spell it."""
    key = re.sub(r"^stem\.", "conv_1.block.", key)
    key = re.sub(r"^final_conv\.", "conv_1x1_exp.block.", key)
    key = re.sub(r"^head\.fc\.", "classifier.fc.", key)
    for timm_layer, layer in (("conv1_1x1", "exp_1x1"), ("conv2_kxk", "conv_3x3"), ("conv3_1x1", "red_1x1")):
        key = key.replace(f".{timm_layer}.", f".block.{layer}.block.")
    key = key.replace(".conv_kxk.", ".local_rep.conv_3x3.block.")
    key = key.replace(".conv_1x1.weight", ".local_rep.conv_1x1.block.conv.weight")
    key = key.replace(".conv_proj.", ".conv_proj.block.").replace(".conv_fusion.", ".fusion.block.")
    key = re.sub(r"^stages\.(\d)\.1\.norm\.", lambda found: f"stages.{found[1]}.1.global_rep.{DEPTHS[found[1]]}.", key)
    for ours, theirs in (
        ("norm1", "pre_norm_mha.0"),
        ("attn.qkv", "pre_norm_mha.1.qkv_proj"),
        ("attn.proj", "pre_norm_mha.1.out_proj"),
        ("norm2", "pre_norm_ffn.0"),
        ("mlp.fc1", "pre_norm_ffn.1"),
        ("mlp.fc2", "pre_norm_ffn.4"),
    ):
        key = re.sub(rf"\.transformer\.(\d)\.{re.escape(ours)}\.", rf".global_rep.\1.{theirs}.", key)
    key = re.sub(r"^stages\.(\d)\.", lambda found: f"layer_{int(found[1]) + 1}.", key)
    return key.replace(".bn.", ".norm.")


def apple_file(peer):
    """Apple's state dict of a network whose first convolution reads BGR."""
    state = {apple_name(key): value for key, value in peer.state_dict().items()}
    state["conv_1.block.conv.weight"] = state["conv_1.block.conv.weight"].flip(1)
    return state


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


def timm_maps(peer, images):
    """timm's maps, the last one before the expansion."""
    outputs = []
    handles = [stage.register_forward_hook(lambda _, __, output: outputs.append(output)) for stage in peer.stages]
    logits = peer(images)
    for handle in handles:
        handle.remove()
    return logits, outputs


@pytest.fixture(scope="module")
def xxs():
    torch.manual_seed(1)
    return timm.create_model(XXS)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_maps_equal_timm(name, randomise, relative_error, tmp_path):
    peer = randomise(timm.create_model(name))
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    ours = loaded(create_classifier(name), tmp_path / "timm.pth")
    assert_loaded(ours, peer)
    for size in ((256, 256), (97, 133)):  # maps of whole patches, and odd ones, which are resized for the attention
        images = torch.rand(2 if name == XXS else 1, 3, *size)
        with torch.no_grad():
            logits, maps = timm_maps(peer, images)
            assert relative_error(ours(images), logits) < 1e-5
            for found, expected in zip(ours.backbone(images).values(), maps, strict=True):
                assert found.shape == expected.shape
                assert relative_error(found, expected) < 1e-5


def test_names_are_as_apple_spells_them(xxs):
    names = apple_file(xxs)
    assert len(names) == len(xxs.state_dict())
    for name in (
        "conv_1.block.norm.running_mean",
        "layer_1.0.block.exp_1x1.block.conv.weight",
        "layer_2.2.block.red_1x1.block.norm.weight",
        "layer_3.1.local_rep.conv_1x1.block.conv.weight",
        "layer_4.1.global_rep.3.pre_norm_mha.1.qkv_proj.bias",
        "layer_5.1.global_rep.2.pre_norm_ffn.4.weight",
        "layer_5.1.global_rep.3.weight",
        "layer_5.1.fusion.block.conv.weight",
        "conv_1x1_exp.block.conv.weight",
        "classifier.fc.bias",
    ):
        assert name in names


def test_apples_file_loads_and_reads_rgb(xxs, tmp_path):
    torch.save(apple_file(xxs), tmp_path / "mobilevit_xxs.pt")
    assert_loaded(loaded(create_classifier(XXS), tmp_path / "mobilevit_xxs.pt"), xxs)


def test_apples_training_checkpoint_gives_the_averaged_weights(xxs, tmp_path):
    average = apple_file(xxs)
    content = {
        "epoch": 3,
        "model_state_dict": {name: value + 1 for name, value in average.items()},
        "optim_state_dict": {"state": {}, "param_groups": []},
        "ema_state_dict": average,
    }
    torch.save(content, tmp_path / "checkpoint.pt")
    assert_loaded(loaded(create_classifier(XXS), tmp_path / "checkpoint.pt"), xxs)


def test_trunk_of_an_apple_detector_loads_without_expansion(xxs, tmp_path):
    trunk = {f"encoder.{name}": value for name, value in apple_file(xxs).items() if "conv_1x1_exp" not in name}
    torch.save({**trunk, "ssd_heads.0.proj_layer.block.conv.weight": torch.zeros(1)}, tmp_path / "ssd.pt")
    ours = create_backbone(XXS)
    report = load_checkpoint(ours, tmp_path / "ssd.pt")
    assert {name.split(".")[0] for name in report.missing} == {"final_conv"}
    assert torch.equal(ours.state_dict()["stem.conv.weight"], xxs.state_dict()["stem.conv.weight"])


@pytest.mark.parametrize("published", ["apple", "timm"])
@pytest.mark.parametrize("order", ["auto", "rgb", "bgr"])
def test_channel_order_says_what_the_file_reads(xxs, tmp_path, published, order):
    weight = xxs.state_dict()["stem.conv.weight"]
    state = {apple_name(key) if published == "apple" else key: value for key, value in xxs.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    found = create_backbone(XXS, pretrained=tmp_path / "weights.pt", channel_order=order).state_dict()
    flipped = order == "bgr" or (order, published) == ("auto", "apple")
    assert torch.equal(found["stem.conv.weight"], weight.flip(1) if flipped else weight)
    assert torch.equal(found["stages.0.0.conv3_1x1.conv.weight"], xxs.state_dict()["stages.0.0.conv3_1x1.conv.weight"])


def test_unknown_channel_order_is_refused():
    with pytest.raises(ConfigError, match=r"channel_order must be .* got 'grb'"):
        create_backbone(XXS, channel_order="grb")


def test_training_step_equals_timm(randomise):
    peer = randomise(timm.create_model(XXS)).double()
    ours = create_classifier(XXS).double()
    ours.load_state_dict(ours_of(peer.state_dict()))
    images = torch.rand(2, 3, 160, 128, dtype=torch.float64)
    for network in (peer.train(), ours.train()):
        network(images).square().sum().backward()
    expected = ours_of({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in ours.named_parameters():
        # The absolute part is for gradients that are zero but for rounding, such as a key's bias.
        absolute = 1e-8 * float(expected[name].abs().max()) + 1e-10
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-6, atol=absolute), name
    buffers = ours_of(dict(peer.named_buffers()))
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, buffers[name]), name


@settings(max_examples=10, deadline=None)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    channels=st.integers(1, 3),
    last=st.booleans(),
)
def test_patches_are_the_cells_of_one_position(batch, rows, columns, channels, last):
    grid = torch.randn(batch, 2 * rows, 2 * columns, channels)
    if not last:  # a map in contiguous memory, seen channels last
        grid = grid.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    patches = cut_patches(grid)
    for position in range(4):
        expected = grid[:, position // 2 :: 2, position % 2 :: 2].flatten(1, 2)
        assert torch.equal(patches[:, position], expected)
    assert torch.equal(merge_patches(patches, 2 * rows, 2 * columns), grid)
    assert torch.equal(merge_patches(patches.flatten(0, 1), 2 * rows, 2 * columns), grid)


@settings(max_examples=8, deadline=None)
@given(height=st.integers(32, 180), width=st.integers(32, 180))
def test_fused_equals_eager_at_any_size(height, width):
    torch.manual_seed(height * 1000 + width)
    network = create_backbone(XXS).eval()
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # which start at zero and would hide that one is lost
            torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    images = torch.rand(2, 3, height, width)
    with torch.no_grad():
        expected = network(images)
        found = network.fuse()(images)
    for level, feature in expected.items():
        assert ((found[level] - feature).abs().max() / feature.abs().max()) < 1e-5


def test_a_batch_in_parts_is_the_batch(randomise, relative_error, monkeypatch):
    network = randomise(create_backbone(XXS)).fuse()
    images = torch.rand(3, 3, 64, 96)
    batches = []
    for stage in network.stages:
        stage[0].depthwise.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[0].shape[0]))
    with torch.no_grad():
        expected = network(images)
        assert batches == [3] * 5
        monkeypatch.setattr(_cvnets_fused, "LARGE", 2 * 32 * 32 * 48 * 4)  # two images of the first stage's width
        batches.clear()
        found = network(images)
    assert batches == [2, 1, 2, 1, 3, 3, 3]
    for level, feature in expected.items():
        assert found[level].is_contiguous(memory_format=torch.channels_last)
        assert relative_error(found[level], feature) < 1e-6


def test_fused_inference_leaves_maps_alone(randomise):
    network = randomise(create_backbone(XXS)).fuse()
    images = torch.rand(1, 3, 64, 64)
    kept = []
    for stage in network.stages:
        for block in stage:
            block.register_forward_pre_hook(lambda _, inputs: kept.append((inputs[0], inputs[0].clone())))
    with torch.no_grad():
        maps = network(images)
        again = network(images)
    assert len(kept) == 2 * 10
    assert all(torch.equal(value, before) for value, before in kept)
    assert all(torch.equal(maps[level], again[level]) for level in maps)


def test_layers_count_stem_residuals_and_attention_blocks():
    network = create_backbone("mobilevit_s")
    assert network.num_layers == 1 + (1 + 3 + 1 + 1 + 1) + 3
    assert network.layer_of("stem.conv.weight") == 0
    assert network.layer_of("stages.0.0.conv1_1x1.conv.weight") == 1
    assert network.layer_of("stages.1.2.conv1_1x1.conv.weight") == 4
    assert network.layer_of("stages.2.1.transformer.1.attn.qkv.weight") == 6
    assert network.layer_of("stages.4.1.norm.weight") == 10
    assert network.layer_of("final_conv.conv.weight") == 10
    assert network.layer_of("head.weight") == 11


def test_published_facts():
    spec = create_backbone(XXS).input_spec
    assert (spec.size, spec.interpolation) == ((256, 256), "bilinear")
    assert round(256 / spec.crop) == 288
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert [backbone_info(name).top1 for name in NAMES] == [78.3, 74.7, 69.0]
    assert all(f"/timm/{name}.cvnets_in1k/" in backbone_info(name).url for name in NAMES)
    assert create_backbone(XXS).no_weight_decay() == set()
