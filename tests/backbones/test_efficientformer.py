"""EfficientFormer against timm, which gives Snap's outputs, and against Snap's detection backbone, written out here."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.efficientformer import Attention as TimmAttention

from effvit.backbones import _efficientformer_fused as fused_form
from effvit.backbones import _windows, create_backbone, create_classifier, list_backbones, load_checkpoint
from effvit.errors import CheckpointError, ConfigError

NAMES = list_backbones("efficientformer_*")
L1 = "efficientformer_l1"
DEPTH = (3, 2, 6, 4)  # of L1, whose last block attends


def randomise_tables(network):
    for name, parameter in network.named_parameters():
        if "attention_biases" in name:
            torch.nn.init.normal_(parameter)
    return network


def snap_name(key):
    """timm's key as Snap's files spell it (their module tree: a list in which stages and downsamplings alternate)."""
    for number, part in {0: "conv1", 1: "norm1", 3: "conv2", 4: "norm2"}.items():
        key = key.replace(f"stem.{part}.", f"patch_embed.{number}.")
    key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"network.{2 * int(m[1])}.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.conv\.", lambda m: f"network.{2 * int(m[1]) - 1}.proj.", key)
    key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"network.{2 * int(m[1]) - 1}.", key)
    key = re.sub(r"\.ls([12])\.gamma$", r".layer_scale_\1", key)
    return key.replace("head_dist.", "dist_head.")


def detection_file(network):
    """A network with `official_grid` as Snap's detector has it inside."""
    state = {}
    for key, value in network.state_dict().items():
        if key.startswith("norm."):  # only their classifier has it
            continue
        state[snap_name(key)] = value
        if key.endswith("attention_biases_seg"):
            cells = value.shape[1]
            state[snap_name(key).replace("biases_seg", "biases")] = torch.randn(8, 49)  # loaded there, but not used
            state[snap_name(key).replace("biases_seg", "bias_idxs")] = torch.ones(49, 49, dtype=torch.long)
            state[snap_name(key).replace("biases_seg", "bias_idxs_seg")] = torch.zeros(cells, cells, dtype=torch.long)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_maps_equal_timm_through_its_file(name, randomise, relative_error, tmp_path):
    peer = randomise(timm.create_model(name))
    with torch.device("meta"):  # the file has all of it
        ours = create_classifier(name).eval()
    ours.to_empty(device="cpu")
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    report = load_checkpoint(ours, tmp_path / "weights.pth")
    assert report.missing == report.unexpected == report.resized == report.mismatched == ()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(images), peer(images)) < 1e-5
        expected = peer.forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours.backbone(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


def test_snaps_classification_file(randomise, tmp_path):
    peer = randomise(timm.create_model(L1))
    state = {snap_name(key): value for key, value in peer.state_dict().items()}
    for name in (
        "patch_embed.0.bias",
        "patch_embed.4.running_mean",
        "network.0.2.mlp.norm1.weight",
        "network.1.proj.weight",
        "network.4.5.layer_scale_2",
        "network.5.norm.running_var",
        "network.6.2.mlp.fc2.weight",
        "network.6.4.token_mixer.attention_biases",
        "network.6.4.token_mixer.attention_bias_idxs",
        "norm.weight",
        "dist_head.weight",
    ):
        assert name in state
    torch.save({"model": state, "epoch": 300, "optimizer": {}}, tmp_path / "efficientformer_l1_1000d.pth")
    ours = create_classifier(L1)
    report = load_checkpoint(ours, tmp_path / "efficientformer_l1_1000d.pth")
    assert report.missing == report.unexpected == report.resized == report.mismatched == ()
    loaded = ours.state_dict()
    for key, value in peer.state_dict().items():
        if not key.endswith("idxs"):
            assert torch.equal(loaded[key if key.startswith("head") else f"backbone.{key}"], value), key
    assert not torch.equal(ours.head.weight, ours.head_dist.weight)


def test_training_step_equals_timm(randomise):
    peer = randomise(timm.create_model(L1)).double().train()
    ours = create_classifier(L1).double().train()
    trunk = {key: value for key, value in peer.state_dict().items() if not key.startswith("head")}
    ours.backbone.load_state_dict({key: value for key, value in trunk.items() if not key.endswith("idxs")})
    ours.head.load_state_dict(peer.head.state_dict())
    ours.head_dist.load_state_dict(peer.head_dist.state_dict())
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    for network in (peer, ours):
        network(images).square().sum().backward()
    expected = dict(peer.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in peer.parameters())
    for name, parameter in ours.named_parameters():
        gradient = expected[name.removeprefix("backbone.")].grad
        # The absolute part is for biases before a BatchNorm, whose gradient is zero but for rounding.
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=1e-12 * largest), name
    buffers = dict(peer.named_buffers())
    for name, buffer in ours.backbone.named_buffers():
        assert torch.allclose(buffer, buffers[name]), name


@pytest.mark.parametrize("size", [(96, 160), (64, 352)])
def test_other_sizes_equal_timm_with_tables_resized_in_offset_space(size, randomise, relative_error):
    ours = randomise(create_backbone(L1))
    peer = timm.create_model(L1, num_classes=0).eval()
    grid = (size[0] // 32, size[1] // 32)
    mixer = peer.stages[3].blocks[4].token_mixer = TimmAttention(448, resolution=grid)
    state = ours.state_dict()
    name = "stages.3.blocks.4.token_mixer.attention_biases"
    resized = F.interpolate(state[name].view(1, 8, 7, 7), size=grid, mode="bicubic", align_corners=False)
    state[name] = resized.view(8, -1)
    peer.load_state_dict(state | {name.replace("biases", "bias_idxs"): mixer.attention_bias_idxs})
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = peer.eval().forward_intermediates(images, intermediates_only=True)
        for found, feature in zip(ours(images).values(), expected, strict=True):
            assert relative_error(found, feature) < 1e-5


def official_maps(state, images, grid):
    """Snap's detection backbone in evaluation, L1, from a file of theirs."""

    def norm(x, name):
        values = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def convolution(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def layer_norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def attention(tokens, name):
        points = [(y, x) for y in range(grid) for x in range(grid)]
        index = torch.tensor([[abs(a[0] - b[0]) * grid + abs(a[1] - b[1]) for b in points] for a in points])
        count = tokens.shape[1]
        query, key, value = linear(tokens, f"{name}.qkv").view(-1, count, 8, 192).split((32, 32, 128), 3)
        matrix = state[f"{name}.attention_biases_seg"][:, index]
        matrix = F.interpolate(matrix[None], size=(count, count), mode="bicubic")
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / 32**0.5 + matrix
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value)
        return linear(mixed.reshape(-1, count, 1024), f"{name}.proj")

    x = images
    for position in (0, 3):
        x = norm(convolution(x, f"patch_embed.{position}", stride=2, padding=1), f"patch_embed.{position + 1}").relu()
    maps = []
    for stage, depth in enumerate(DEPTH):
        if stage:
            name = f"network.{2 * stage - 1}"
            x = norm(convolution(x, f"{name}.proj", stride=2, padding=1), f"{name}.norm")
        for block in range(depth - (stage == 3)):
            name = f"network.{2 * stage}.{block}"
            mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            x = x + state[f"{name}.layer_scale_1"][:, None, None] * (mean - x)
            hidden = F.gelu(norm(convolution(x, f"{name}.mlp.fc1"), f"{name}.mlp.norm1"))
            narrow = norm(convolution(hidden, f"{name}.mlp.fc2"), f"{name}.mlp.norm2")
            x = x + state[f"{name}.layer_scale_2"][:, None, None] * narrow
        if stage == 3:
            tokens, name = x.flatten(2).transpose(1, 2), "network.6.4"
            mixed = attention(layer_norm(tokens, f"{name}.norm1"), f"{name}.token_mixer")
            tokens = tokens + state[f"{name}.layer_scale_1"] * mixed
            hidden = F.gelu(linear(layer_norm(tokens, f"{name}.norm2"), f"{name}.mlp.fc1"))
            tokens = tokens + state[f"{name}.layer_scale_2"] * linear(hidden, f"{name}.mlp.fc2")
            x = tokens.transpose(1, 2).reshape(x.shape)
        maps.append(F.group_norm(x, 1, state[f"norm{2 * stage}.weight"], state[f"norm{2 * stage}.bias"]))
    return maps


@pytest.mark.parametrize(("grid", "size"), [(25, (97, 256)), (16, (160, 96))])
def test_official_dense_network_from_snaps_detection_file(grid, size, randomise, relative_error, tmp_path):
    trained = randomise_tables(randomise(create_backbone(L1, official_grid=grid)))
    state = detection_file(trained)
    detector = {f"backbone.{key}": value for key, value in state.items()} | {
        "neck.lateral_convs.0.conv.bias": torch.ones(256)
    }
    torch.save({"meta": {"epoch": 12}, "state_dict": detector}, tmp_path / "mask_rcnn.pth")
    network = create_backbone(L1, official_grid=grid).eval()
    report = load_checkpoint(network, tmp_path / "mask_rcnn.pth")
    assert report.missing == ("norm.weight", "norm.bias")
    assert report.unexpected == (
        "backbone.network.6.4.token_mixer.attention_biases",
        "neck.lateral_convs.0.conv.bias",
    )
    assert report.resized == report.mismatched == ()
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = official_maps(state, images, grid)
        maps = [network(images).values(), network(images).values(), network.fuse()(images).values()]
        for found in maps:  # the second time from the cache
            for feature, value in zip(found, expected, strict=True):
                assert relative_error(feature, value) < 1e-5


@pytest.mark.parametrize("name", [L1, "efficientformerv2_s0"])
@pytest.mark.parametrize("grid", [0, -3, 25.0, "25", True])
def test_official_grid_that_is_no_side_is_refused(name, grid):
    with pytest.raises(
        ConfigError, match=re.escape(f"must be an int of at least 1 (Snap's are 25 and 16), got {grid!r}")
    ):
        create_backbone(name, official_grid=grid)


def test_official_grid_of_another_file_is_named(tmp_path):
    state = detection_file(create_backbone(L1, official_grid=16))
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in state.items()}}, tmp_path / "sem_fpn.pth")
    with pytest.raises(CheckpointError, match="build it with official_grid=16"):
        create_backbone(L1, official_grid=25, pretrained=tmp_path / "sem_fpn.pth")


def test_classifiers_file_starts_the_official_dense_network(randomise, tmp_path, caplog):
    classifier = randomise(create_classifier(L1))
    torch.save(classifier.backbone.state_dict(), tmp_path / "classifier.pth")
    network = create_backbone(L1, official_grid=25, pretrained=tmp_path / "classifier.pth")
    assert "start untrained" in caplog.text
    table = network.stages[3].blocks[4].token_mixer.attention_biases_seg
    assert table.shape == (8, 625)
    assert not table.any()
    assert torch.equal(
        network.stages[3].blocks[4].mlp.fc1.weight, classifier.backbone.stages[3].blocks[4].mlp.fc1.weight
    )


def test_official_dense_network_on_its_own_grid_is_the_classifiers_trunk(randomise, relative_error):
    trunk = randomise(create_backbone(L1))
    network = create_backbone(L1, official_grid=7).eval()
    state = trunk.state_dict()
    name = "stages.3.blocks.4.token_mixer.attention_biases"
    state[name + "_seg"] = state.pop(name)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert [key.split(".")[0] for key in missing] == [
        "norm0",
        "norm0",
        "norm2",
        "norm2",
        "norm4",
        "norm4",
        "norm6",
        "norm6",
    ]
    assert not unexpected
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for found, expected in zip(network(images).values(), trunk(images).values(), strict=True):
            assert relative_error(found, F.group_norm(expected, 1)) < 1e-5
        assert torch.equal(network.embed(images), trunk.embed(images))


def test_official_dense_network_says_what_it_is():
    with torch.device("meta"):
        network, trunk = create_backbone(L1, official_grid=25), create_backbone(L1)
    count = {id(each): sum(parameter.numel() for parameter in each.parameters()) for each in (network, trunk)}
    assert network.info.params - trunk.info.params == count[id(network)] - count[id(trunk)]
    assert network.info.top1 is None
    maps = network(torch.zeros(1, 3, 800, 1216, device="meta"))
    assert [tuple(feature.shape[1:]) for feature in maps.values()] == [
        (spec.channels, 800 // spec.stride, 1216 // spec.stride) for spec in network.feature_maps
    ]


def test_every_parameter_of_the_official_dense_network_learns():
    network = create_backbone(L1, official_grid=25)
    network.prepare_for_dense()
    sum(
        (feature * torch.randn_like(feature)).mean() for feature in network(torch.randn(2, 3, 96, 128)).values()
    ).backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert without == {"norm.weight", "norm.bias"}


@pytest.mark.parametrize("size", [(32, 32), (33, 65), (64, 130)])
@pytest.mark.parametrize("small", [True, False])
def test_fused_form_is_exact_at_every_border(size, small, randomise, relative_error, monkeypatch):
    # Both forms of the pooling, and the cells in parts, whatever the size of the map.
    monkeypatch.setattr(fused_form, "_SMALL_MAP", 2**30 if small else 0)
    monkeypatch.setattr(fused_form, "_LARGE_HIDDEN", 2**30 if small else 0)
    monkeypatch.setattr(fused_form, "_PART_OF_HIDDEN", 2**12)
    network = randomise(create_backbone(L1))
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        expected = network(images)
        network.fuse()
        alone = network(images[1:2])
        for level, feature in network(images).items():
            assert relative_error(feature, expected[level]) < 1e-5
            assert relative_error(alone[level], expected[level][1:2]) < 1e-5


def test_inputs_of_fused_blocks_stay_as_they_are(randomise):
    network = randomise(create_backbone(L1)).fuse()
    blocks = [stage.blocks[0] for stage in network.stages] + [network.stages[3].blocks[4]]
    for block in blocks:
        for size in ((7, 9), (24, 36)):
            x = torch.randn(2, block.narrow.shape[0], *size).contiguous(memory_format=torch.channels_last)
            before = x.clone()
            with torch.no_grad():
                block(x)
            assert torch.equal(x, before)


def _change_in_place(network):
    for name, parameter in network.named_parameters():
        if "attention_biases" in name:
            with torch.no_grad():
                parameter.mul_(-2)


def _load(network):
    network.load_state_dict(
        {key: -2 * value for key, value in network.state_dict().items() if "attention_biases" in key}, strict=False
    )


@pytest.mark.parametrize("change", [_change_in_place, _load])
@pytest.mark.parametrize("official_grid", [None, 25])
def test_no_stale_bias_is_ever_used(change, official_grid, randomise):
    network = randomise_tables(randomise(create_backbone(L1, official_grid=official_grid)))
    fresh = copy.deepcopy(network)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        before = network(images)["c5"]
        change(network)
        change(fresh)
        after = network(images)["c5"]
        assert torch.equal(after, fresh(images)["c5"])
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("official_grid", [None, 3])
def test_functional_call_reads_the_tables_that_it_is_given(official_grid, randomise):
    network = randomise_tables(randomise(create_backbone(L1, official_grid=official_grid)))
    given = {
        name: -2 * parameter.detach() for name, parameter in network.named_parameters() if "attention_biases" in name
    }
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        before = network(images)["c5"]
        found = torch.func.functional_call(network, given, (images,))["c5"]
        assert torch.equal(network(images)["c5"], before)  # nothing of the call stays
        network.load_state_dict(given, strict=False)
        assert torch.equal(found, network(images)["c5"])
    assert not torch.allclose(found, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("official_grid", [None, 25])
def test_bias_is_expanded_once_for_each_shape(fused, official_grid, monkeypatch):
    calls = []
    name = "expand_bias" if official_grid is None else "stretch_bias"
    expand = getattr(_windows, name)
    monkeypatch.setattr(_windows, name, lambda *arguments: calls.append(arguments) or expand(*arguments))
    network = create_backbone(L1, official_grid=official_grid).eval()
    if fused:
        network.fuse()
    with torch.no_grad():
        for batch, size in ((1, (96, 160)), (3, (96, 160)), (1, (96, 128)), (2, (96, 160))):
            network(torch.randn(batch, 3, *size))
    assert len(calls) == 2


def test_biases_decay_like_the_official_optimizers():
    assert create_backbone(L1).no_weight_decay() == set()


def test_layers_count_stem_downsamplings_and_blocks():
    with torch.device("meta"):
        network = create_backbone("efficientformer_l3", official_grid=25)
    assert network.num_layers == 1 + 4 + (1 + 4) + (1 + 12) + (1 + 6)
    assert network.layer_of("stem.conv1.weight") == 0
    assert network.layer_of("stages.0.blocks.0.ls1.gamma") == 1
    assert network.layer_of("stages.1.downsample.conv.weight") == 5
    assert network.layer_of("stages.2.blocks.11.mlp.fc1.weight") == 22
    assert network.layer_of("stages.3.downsample.norm.bias") == 23
    assert network.layer_of("stages.3.blocks.1.mlp.fc1.weight") == 25
    assert network.layer_of("stages.3.blocks.3.norm1.weight") == 26  # number 2 is where the published ones flatten
    assert network.layer_of("stages.3.blocks.6.norm1.weight") == network.layer_of("norm.weight") == 29
    assert network.layer_of("norm6.weight") == network.num_layers
