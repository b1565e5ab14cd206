"""EfficientFormerV2 against timm, against Snap's names and dense form, and at sizes that neither takes."""

from __future__ import annotations

import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effvit.backbones import (
    _windows,
    backbone_info,
    create_backbone,
    create_classifier,
    list_backbones,
    load_checkpoint,
)
from effvit.backbones._layers import DropPath
from effvit.backbones.efficientformerv2 import Attention, AttentionDownsample, Block
from effvit.errors import CheckpointError

NAMES = list_backbones("efficientformerv2_*")
S0 = "efficientformerv2_s0"


def tables(network):
    return {name for name, _ in network.named_parameters() if "attention_biases" in name}


def check_maps(found, expected, relative_error, tolerance=1e-5):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < tolerance


def official(state):
    """A timm state dict under Snap's names."""
    stage_of = {"0": "network.0", "1": "network.2", "2": "network.4", "3": "network.6"}
    renamed = {}
    for key, value in state.items():
        parts = key.split(".")
        where, leaf = parts[0], parts[-1]
        if where == "stem":
            index = {("conv1", "conv"): 0, ("conv1", "bn"): 1, ("conv2", "conv"): 3, ("conv2", "bn"): 4}
            name = f"patch_embed.{index[parts[1], parts[2]]}.{leaf}"
        elif where == "head_dist":
            name = f"dist_head.{leaf}"
        elif where != "stages":
            name = key
        elif parts[2] == "downsample":
            name = f"network.{2 * int(parts[1]) - 1}."
            if parts[3] == "attn":
                name += "attn." + official_attention(parts[4:])
            else:
                plain = {"conv": "proj", "bn": "norm"} if parts[1] != "3" else {"conv": "conv", "bn": "bn"}
                name += f"{plain[parts[4]]}.{leaf}"
        else:
            name = f"{stage_of[parts[1]]}.{parts[3]}."
            if parts[4] in {"ls1", "ls2"}:
                name += f"layer_scale_{parts[4][2]}"
            elif parts[4] == "token_mixer":
                name += "token_mixer." + official_attention(parts[5:])
            elif parts[6] == "conv":
                name += f"mlp.{parts[5]}.{leaf}"
            else:
                name += f"mlp.{ {'fc1': 'norm1', 'mid': 'mid_norm', 'fc2': 'norm2'}[parts[5]] }.{leaf}"
        renamed[name] = value[:, None, None] if "layer_scale" in name else value
    return renamed


def official_attention(parts):
    if parts[:2] == ["q", "local"]:
        return f"q.local.0.{parts[2]}"
    if not {"conv", "bn"} & set(parts):
        return ".".join(parts)
    index = ["conv", "bn"].index(parts[-2]) + (parts[0] == "proj")
    return ".".join([*parts[:-2], str(index), parts[-1]])


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_maps_equal_timm(name, randomise, relative_error, tmp_path):
    peer = randomise(timm.create_model(name))
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    ours = create_classifier(name).eval()
    report = load_checkpoint(ours, tmp_path / "timm.pth")
    assert (report.missing, report.unexpected, report.resized, report.mismatched) == ((), (), (), ())
    images = torch.randn(2 if name == S0 else 1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(images), peer(images)) < 1e-5
        expected = peer.forward_intermediates(images, intermediates_only=True)
        check_maps(ours.backbone(images).values(), expected, relative_error)


def test_official_checkpoint_loads_by_content(randomise, tmp_path):
    peer = randomise(timm.create_model(S0))
    state = official(peer.state_dict())
    tables = [key for key in state if key.endswith("attention_biases")]
    for key in tables:
        state[key.replace("biases", "bias_idxs")] = torch.zeros(49, state[key].shape[1], dtype=torch.long)
    assert len(tables) == 5
    assert len(state) == 573  # the entries of Snap's file
    torch.save({"model": state, "epoch": 449}, tmp_path / "eformer_s0_450.pth")
    ours = create_classifier(S0, pretrained=tmp_path / "eformer_s0_450.pth")
    report = load_checkpoint(ours, tmp_path / "eformer_s0_450.pth")
    assert (report.missing, report.unexpected, report.resized, report.mismatched) == ((), (), (), ())
    for name, value in peer.state_dict().items():
        prefix = "" if name.startswith("head") else "backbone."
        assert torch.equal(ours.state_dict()[prefix + name], value), name


def test_training_step_equals_timm(randomise):
    peer = randomise(timm.create_model(S0)).double()
    ours = create_classifier(S0).double()
    state = peer.state_dict()
    ours.load_state_dict({key if key.startswith("head") else f"backbone.{key}": value for key, value in state.items()})
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    for network in (peer.train(), ours.train()):
        network(images).square().sum().backward()
    expected = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name.removeprefix("backbone.")].grad
        # The absolute part is for biases before a BatchNorm, whose gradient is zero but for rounding.
        absolute = 1e-8 * float(gradient.abs().max()) + 1e-10
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=absolute), name
    buffers = dict(peer.named_buffers())
    for name, buffer in ours.named_buffers():
        assert torch.allclose(buffer, buffers[name.removeprefix("backbone.")]), name


def resized(table, height, width):
    """A table of absolute offsets as an image of another size."""
    side = round(table.shape[1] ** 0.5)
    image = F.interpolate(table.view(1, -1, side, side), size=(height, width), mode="bicubic", align_corners=False)
    return image.flatten(2)[0]


@pytest.mark.parametrize("size", [(90, 188), (320, 192)])  # timm takes those whose map of stride 16 has even sides
def test_other_sizes_equal_timm_built_for_them(size, randomise, relative_error):
    ours = randomise(create_backbone(S0))
    state = ours.state_dict()
    coarse, fine = ([-(-side // stride) for side in size] for stride in (32, 16))
    for name, table in state.items():
        if name.endswith("attention_biases"):
            state[name] = resized(table, *(fine if "downsample" in name else coarse))
    peer = timm.create_model(S0, img_size=size, num_classes=0).eval()
    peer.load_state_dict(state)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = peer.forward_intermediates(images, intermediates_only=True)
        check_maps(ours(images).values(), expected, relative_error)


def test_tables_of_another_size_are_resized_when_loaded(randomise, tmp_path):
    peer = randomise(timm.create_model(S0, img_size=96))
    torch.save(peer.state_dict(), tmp_path / "small.pth")
    ours = create_backbone(S0)
    report = load_checkpoint(ours, tmp_path / "small.pth")
    assert set(report.resized) == tables(ours)
    for name in report.resized:
        side = 14 if "downsample" in name else 7
        assert torch.allclose(ours.get_parameter(name), resized(peer.state_dict()[name], side, side))


@settings(max_examples=5, deadline=None)
@given(height=st.integers(32, 170), width=st.integers(32, 170), grid=st.sampled_from([None, 3]))
def test_any_size_is_of_each_image_alone_and_fuses(height, width, grid):
    torch.manual_seed(height * 1000 + width)
    network = create_backbone(S0, official_grid=grid).eval()
    for name, parameter in network.named_parameters():
        if name.endswith(("attention_biases", "attention_biases_seg", "gamma", "bn.weight")):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    images = torch.randn(2, 3, height, width)
    with torch.no_grad():
        both, second = network(images), network(images[1:])
        network.fuse()
        fused, fused_second = network(images), network(images[1:])
    for spec in network.feature_maps:
        level, scale = spec.level, both[spec.level].abs().max()
        assert both[level].shape[2:] == (-(-height // spec.stride), -(-width // spec.stride))
        assert ((both[level][1:] - second[level]).abs().max() / scale) < 1e-5
        assert ((both[level] - fused[level]).abs().max() / scale) < 1e-5
        assert ((second[level] - fused_second[level]).abs().max() / scale) < 1e-5


def test_odd_map_is_attended_as_part_of_the_even_one(randomise):
    """Half the sides of 5x7 are 3x4, upsampled to 6x8: the map of those sides, less its last row and column."""
    attention = randomise(Attention(16, halved=True, grid=7, official=False))
    odd = torch.randn(2, 16, 5, 7)
    even = F.pad(odd, (0, 1, 0, 1))  # what the convolution's own zero padding reads there
    with torch.no_grad():
        assert torch.allclose(attention(odd), attention(even)[:, :, :5, :7], rtol=1e-4, atol=1e-5)


def official_bias(table, grid, stride, cells):
    """Snap's dense files: offsets numbered as they come, gathered into a matrix, and that resized bicubically."""
    keys = list(itertools.product(range(grid), range(grid)))
    numbers = {}
    rows = []
    for top, left in itertools.product(range(-(-grid // stride)), repeat=2):
        offsets = [(abs(top * stride - y), abs(left * stride - x)) for y, x in keys]
        rows.append([numbers.setdefault(offset, len(numbers)) for offset in offsets])
    matrix = table[:, torch.tensor(rows)]
    return F.interpolate(matrix[None], size=cells, mode="bicubic")


def heads_of(x):
    return x.flatten(2).unflatten(1, (8, -1)).transpose(2, 3)


@pytest.mark.parametrize("size", [(6, 10), (8, 8)])
@pytest.mark.parametrize("halved", [False, True])
def test_official_dense_attention(size, halved, randomise):
    module = randomise(Attention(16, halved=halved, grid=4, official=True))
    torch.nn.init.normal_(module.attention_biases_seg)
    x = torch.randn(2, 16, *size)
    with torch.no_grad():
        small = module.stride_conv(x) if halved else x
        height, width = small.shape[2:]
        logits = heads_of(module.q(small)) @ heads_of(module.k(small)).transpose(2, 3) * 32**-0.5
        logits += official_bias(module.attention_biases_seg, 4, 1, (height * width, height * width))
        weights = module.talking_head2(module.talking_head1(logits).softmax(-1))
        values = module.v(small)
        out = (weights @ heads_of(values)).transpose(2, 3).reshape(values.shape) + module.v_local(values)
        if halved:
            out = F.interpolate(out, scale_factor=2, mode="bilinear")
        assert torch.allclose(module(x), module.proj(F.gelu(out)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 10), (8, 8)])
def test_official_dense_downsampling_attention(size, randomise):
    module = randomise(AttentionDownsample(16, 24, grid=8, official=True))
    torch.nn.init.normal_(module.attention_biases_seg)
    x = torch.randn(2, 16, *size)
    with torch.no_grad():
        query = module.q.proj(module.q.local(x) + F.avg_pool2d(x, 1, 2))
        logits = heads_of(query) @ heads_of(module.k(x)).transpose(2, 3) * 16**-0.5
        queries, cells = query.shape[2] * query.shape[3], size[0] * size[1]
        logits += official_bias(module.attention_biases_seg, 8, 2, (queries, cells))
        values = module.v(x)
        local = module.v_local(values)
        out = (logits.softmax(-1) @ heads_of(values)).transpose(2, 3).reshape(local.shape) + local
        assert torch.allclose(module(x), module.proj(F.gelu(out)), rtol=1e-4, atol=1e-5)


def dense_file(path, randomise, grid):
    """A detector's checkpoint of MMDetection around Snap's dense network; returns that network in our form."""
    network = randomise(create_backbone(S0, official_grid=grid))
    state = {}
    for key, value in official(network.state_dict()).items():
        if key.endswith("attention_biases_seg"):
            torch.nn.init.normal_(value)
            state["backbone." + key.removesuffix("_seg")] = torch.zeros(8, 196 if ".attn." in key else 49)  # not read
            state["backbone." + key.replace("biases", "bias_idxs")] = torch.zeros(1, value.shape[1], dtype=torch.long)
        if not key.startswith("norm."):
            state["backbone." + key] = value
    state["neck.lateral_convs.0.conv.weight"] = torch.zeros(256, 32, 1, 1)
    torch.save({"meta": {"epoch": 12}, "state_dict": state}, path)
    return network


def test_official_detection_checkpoint_loads_by_content(randomise, tmp_path):
    published = dense_file(tmp_path / "mask_rcnn.pth", randomise, 5)
    ours = create_backbone(S0, official_grid=5)
    report = load_checkpoint(ours, tmp_path / "mask_rcnn.pth")
    assert all(name.startswith("norm.") for name in report.missing)
    assert report.resized == report.mismatched == ()
    assert {name for name in report.unexpected if not name.endswith("attention_biases")} == {
        "neck.lateral_convs.0.conv.weight"
    }
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        for found, expected in zip(ours.eval()(images).values(), published(images).values(), strict=True):
            assert torch.equal(found, expected)
    with pytest.raises(CheckpointError, match="official_grid=5"):
        create_backbone(S0, official_grid=3, pretrained=tmp_path / "mask_rcnn.pth")


def test_official_grid_starts_from_the_classifier_with_new_tables(randomise, tmp_path, caplog):
    peer = randomise(timm.create_model(S0))
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    ours = create_backbone(S0, official_grid=4, pretrained=tmp_path / "timm.pth")
    assert "attention_biases_seg" in caplog.text
    assert {name: tuple(ours.get_parameter(name).shape) for name in tables(ours)} == {
        "stages.2.blocks.4.token_mixer.attention_biases_seg": (8, 16),
        "stages.2.blocks.5.token_mixer.attention_biases_seg": (8, 16),
        "stages.3.downsample.attn.attention_biases_seg": (8, 64),
        "stages.3.blocks.2.token_mixer.attention_biases_seg": (8, 16),
        "stages.3.blocks.3.token_mixer.attention_biases_seg": (8, 16),
    }
    assert all(not ours.get_parameter(name).any() for name in tables(ours))
    assert torch.equal(
        ours.state_dict()["stages.3.blocks.3.ls1.gamma"], peer.state_dict()["stages.3.blocks.3.ls1.gamma"]
    )
    whole = create_classifier(S0, official_grid=4)
    assert sum(parameter.numel() for parameter in whole.parameters()) == whole.backbone.info.params
    assert whole.backbone.info.top1 is None


def test_bias_is_expanded_once_for_each_shape_and_not_all_are_kept(randomise, monkeypatch):
    calls = []
    for function in ("expand_bias", "stretch_bias"):
        expand = getattr(_windows, function)
        monkeypatch.setattr(_windows, function, lambda *a, e=expand: calls.append(a) or e(*a))
    network = randomise(create_backbone(S0))
    with torch.no_grad():
        network(torch.randn(1, 3, 96, 160))
        network(torch.randn(3, 3, 96, 160))
        assert len(calls) == 5  # one for each attention
        network(torch.randn(1, 3, 160, 96))
        assert len(calls) == 10
        network(torch.randn(1, 3, 96, 160))
        assert len(calls) == 10
        monkeypatch.setattr(_windows, "_KEPT_BYTES", 0)  # no room but for the newest
        network.train().eval()
        for size in [(96, 160), (96, 160), (160, 96), (160, 96), (96, 160)]:
            network(torch.randn(1, 3, *size))
        assert len(calls) == 25


def _load(network):
    state = {key: -2 * value for key, value in network.state_dict().items() if "attention_biases" in key}
    network.load_state_dict(state, strict=False)


def _step(network):
    for name in tables(network):
        with torch.no_grad():
            network.get_parameter(name).mul_(-2)


def _swap_data(network):
    network.train()
    for name in tables(network):
        network.get_parameter(name).data = -2 * network.get_parameter(name).data
    network.eval()


@pytest.mark.parametrize("change", [_load, _step, _swap_data])
@pytest.mark.parametrize("grid", [None, 3])
def test_no_stale_bias_is_ever_used(change, grid, randomise):
    network = randomise(create_backbone(S0, official_grid=grid))
    for name in tables(network):
        torch.nn.init.normal_(network.get_parameter(name))
    fresh = copy.deepcopy(network)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        before = network(images)["c5"]
        change(network)
        change(fresh)
        after = network(images)["c5"]
        assert torch.equal(after, fresh(images)["c5"])
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("grid", [None, 3])
def test_functional_call_reads_the_tables_that_it_is_given(grid, randomise):
    network = randomise(create_backbone(S0, official_grid=grid))
    for name in tables(network):
        torch.nn.init.normal_(network.get_parameter(name))
    given = {name: -2 * network.get_parameter(name).detach() for name in tables(network)}
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        before = network(images)["c5"]
        found = torch.func.functional_call(network, given, (images,))["c5"]
        assert torch.equal(network(images)["c5"], before)  # nothing of the call stays
        network.load_state_dict(given, strict=False)
        assert torch.equal(found, network(images)["c5"])
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("grid", [None, 3])
def test_gradients_reach_every_table_after_inference(grid, randomise):
    network = randomise(create_backbone(S0, official_grid=grid))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        network(images)  # fills the cache, which the next forward must not use
    network(images)["c5"].square().mean().backward()
    for name in tables(network):
        assert network.get_parameter(name).grad.abs().sum() > 0, name


def test_fused_network_works_through_a_large_batch_in_parts(randomise, relative_error):
    network = randomise(create_backbone(S0))
    images = torch.randn(9, 3, 224, 224)
    untouched = images.clone()
    with torch.no_grad():
        expected = network(images)
        network.fuse()
        found = network(images)
        kept = {level: feature.clone() for level, feature in found.items()}
        network(images.flip(0))
    assert torch.equal(images, untouched)
    for level, feature in expected.items():
        assert relative_error(found[level], feature) < 1e-5
        assert torch.equal(found[level], kept[level])  # nothing of a result is memory that a later call works in


def test_drop_path_is_as_published():
    with torch.device("meta"):
        ours, peer = create_backbone("efficientformerv2_s2"), timm.create_model("efficientformerv2_s2")
    expected = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in peer.stages for block in stage.blocks]
    found = [module.drop_path.rate for module in ours.modules() if isinstance(module, Block)]
    assert found == pytest.approx(expected)
    assert found[-1] == pytest.approx(0.02)
    assert [backbone_info(name).drop_path for name in NAMES] == [0.1, 0.0, 0.0, 0.02]  # L, S0, S1, S2
    drop = DropPath(0.25)
    dropped = drop(torch.ones(4000, 1, 2, 2))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(dropped.amax((1, 2, 3)), dropped.amin((1, 2, 3)))
    assert torch.equal(drop.eval()(torch.ones(4)), torch.ones(4))


def test_layers_count_stem_downsamplings_and_blocks():
    with torch.device("meta"):
        network = create_backbone("efficientformerv2_s1")
    assert network.num_layers == 1 + 3 + (1 + 3) + (1 + 9) + (1 + 6)
    assert network.layer_of("stem.conv1.conv.weight") == 0
    assert network.layer_of("stages.0.blocks.0.ls2.gamma") == 1
    assert network.layer_of("stages.1.downsample.conv.bn.weight") == 4
    assert network.layer_of("stages.1.blocks.0.mlp.fc1.conv.weight") == 5
    assert network.layer_of("stages.3.downsample.attn.attention_biases") == 18
    assert network.layer_of("stages.3.blocks.5.token_mixer.q.conv.weight") == network.num_layers - 1
    assert network.layer_of("norm.weight") == network.num_layers - 1
