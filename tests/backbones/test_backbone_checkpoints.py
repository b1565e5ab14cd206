"""Checkpoints of every origin, and those that must be refused."""

from __future__ import annotations

import argparse
import os
import pickle
import re

import pytest
import safetensors.torch
import timm
import torch

from effvit.backbones import create_backbone, create_classifier, list_backbones, load_checkpoint, read_checkpoint
from effvit.errors import CheckpointError


def microsoft_name(key):
    """timm's key as Microsoft's files spell it (their module tree: Sequentials by number)."""
    key = key.replace(".conv.", ".c.")
    key = re.sub(r"^head\.linear\.", "head.l.", key)
    key = re.sub(r"^patch_embed\.conv(\d)\.", lambda m: f"patch_embed.{2 * (int(m[1]) - 1)}.", key)
    key = re.sub(r"^stages\.0\.blocks\.", "blocks1.", key)
    for number, part in enumerate(("res1", "patchmerge", "res2")):
        key = re.sub(rf"^stages\.([12])\.downsample\.{part}\.", lambda m, n=number: f"blocks{int(m[1]) + 1}.{n}.", key)
    return re.sub(r"^stages\.([12])\.blocks\.(\d+)\.", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}.", key)


def microsoft_file(peer, *, legacy=False):
    state = {}
    for key, value in peer.state_dict().items():
        pointwise = value.ndim == 4 and value.shape[2:] == (1, 1) and "se." not in key
        state[microsoft_name(key)] = value.flatten(1) if legacy and pointwise else value
        if key.endswith("attention_biases"):
            cells = value.shape[1]
            state[microsoft_name(key).replace("biases", "bias_idxs")] = torch.zeros(cells, cells, dtype=torch.long)
    return state


def assert_loaded(network, peer):
    state = network.state_dict()
    for key, value in peer.state_dict().items():
        ours = key if key in state or key.startswith("head.") else f"backbone.{key}"
        assert torch.equal(state[ours], value), key


@pytest.fixture(scope="module")
def m0():
    torch.manual_seed(1)
    return timm.create_model("efficientvit_m0")


@pytest.mark.parametrize("name", list_backbones("efficientvit_*"))
def test_microsofts_classification_file(name, tmp_path):
    peer = timm.create_model(name)
    path = tmp_path / "published.pth"
    torch.save({"model": microsoft_file(peer)}, path)
    network = create_classifier(name)
    report = load_checkpoint(network, path)
    assert_loaded(network, peer)
    assert report.missing == report.unexpected == report.resized == report.mismatched == ()
    assert len(report.matched) == len(peer.state_dict())


def test_microsofts_names_are_as_documented(m0):
    names = microsoft_file(m0)
    for name in (
        "patch_embed.6.c.weight",
        "blocks1.0.mixer.m.attn.attention_biases",
        "blocks1.0.mixer.m.attn.attention_bias_idxs",
        "blocks2.1.conv1.c.weight",
        "blocks2.1.se.fc1.bias",
        "blocks3.2.1.m.pw2.bn.bias",
        "blocks3.5.mixer.m.attn.proj.1.c.weight",
        "head.l.weight",
    ):
        assert name in names


@pytest.mark.parametrize("form", ["legacy", "training", "data parallel", "lightning", "ema", "safetensors", "old zip"])
def test_the_same_weights_in_many_wrappings(form, m0, tmp_path):
    state = m0.state_dict()
    path = tmp_path / "weights"
    if form == "legacy":
        torch.save({"model": microsoft_file(m0, legacy=True)}, path)
    elif form == "training":
        args = argparse.Namespace(lr=0.001, model="EfficientViT_M0")
        torch.save({"model": microsoft_file(m0), "epoch": 299, "optimizer": {"state": {}}, "args": args}, path)
    elif form == "data parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif form == "lightning":
        wrapped = {f"model.backbone.{key}": value for key, value in state.items() if not key.startswith("head")}
        wrapped |= {f"model.{key}": value for key, value in state.items() if key.startswith("head")}
        torch.save({"state_dict": wrapped, "epoch": 3, "pytorch-lightning_version": "2.6.6"}, path)
    elif form == "ema":
        torch.save({"model_ema": state}, path)
    elif form == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=False)
    network = create_classifier("efficientvit_m0", pretrained=path)
    assert_loaded(network, m0)


def test_our_own_classifier_file_loads_into_both(tmp_path, randomise):
    source = randomise(create_classifier("efficientvit_m0"))
    torch.save(source.state_dict(), tmp_path / "ours.pth")
    network = create_classifier("efficientvit_m0", pretrained=tmp_path / "ours.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(network.state_dict()[key], value)
    report = load_checkpoint(network.backbone, tmp_path / "ours.pth")
    assert not report.missing
    assert all(key.startswith("head.") for key in report.unexpected)


def test_detection_file_with_7x7_tables(tmp_path):
    """The published detectors: MMDetection's wrapper, 49 entries in every table, a neck and a head beside the trunk."""
    peer = timm.create_model("efficientvit_m4", img_size=448, num_classes=0)
    for name, parameter in peer.named_parameters():
        if name.endswith("attention_biases"):
            torch.nn.init.normal_(parameter)
    state = {f"backbone.{key}": value for key, value in microsoft_file(peer).items()}
    state |= {
        "neck.lateral_convs.0.conv.weight": torch.zeros(256, 128, 1, 1),
        "bbox_head.retina_cls.bias": torch.zeros(720),
    }
    path = tmp_path / "retinanet_efficientvit_m4_fpn_1x_coco.pth"
    torch.save({"state_dict": state, "meta": {"mmdet_version": "2.28", "CLASSES": ("person",)}}, path)

    dense = create_backbone("efficientvit_m4", dense=True)
    report = load_checkpoint(dense, path)
    assert_loaded(dense, peer)
    assert report.resized == ()
    assert report.unexpected == ("neck.lateral_convs.0.conv.weight", "bbox_head.retina_cls.bias")

    report = load_checkpoint(create_backbone("efficientvit_m4"), path)
    assert len(report.resized) == 3
    assert all("stages.2.blocks" in name for name in report.resized)
    assert "3 of them resized" in str(report)


def test_classification_file_into_the_dense_form_is_resized_bicubic(m0, tmp_path):
    path = tmp_path / "classifier.pth"
    torch.save({"model": microsoft_file(m0)}, path)
    network = create_backbone("efficientvit_m0", dense=True)
    report = load_checkpoint(network, path)
    name = "stages.2.blocks.0.mixer.m.attn.attention_biases"
    assert name in report.resized
    table = m0.get_parameter(name)
    expected = torch.nn.functional.interpolate(table.view(1, 4, 4, 4), size=(7, 7), mode="bicubic", align_corners=False)
    assert torch.allclose(network.get_parameter(name), expected.view(4, 49))


def test_head_of_another_class_count_starts_fresh(m0, tmp_path):
    torch.save(m0.state_dict(), tmp_path / "x.pth")
    network = create_classifier("efficientvit_m0", num_classes=10, pretrained=tmp_path / "x.pth")
    assert network.head.linear.weight.shape == (10, 192)
    report = load_checkpoint(network, tmp_path / "x.pth")
    assert set(report.mismatched) == {"head.linear.weight", "head.linear.bias"}


def test_distillation_head_is_reported_and_not_needed(m0, tmp_path):
    state = microsoft_file(m0) | {"head_dist.l.weight": torch.zeros(1000, 192)}
    torch.save({"model": state}, tmp_path / "x.pth")
    report = load_checkpoint(create_classifier("efficientvit_m0"), tmp_path / "x.pth")
    assert report.unexpected == ("head_dist.l.weight",)
    assert not report.missing


def test_another_variant_is_named(tmp_path):
    torch.save({"model": microsoft_file(timm.create_model("efficientvit_m1"))}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"does not fill efficientvit_m4.*weights of efficientvit_m1"):
        create_backbone("efficientvit_m4", pretrained=tmp_path / "x.pth")


def test_another_network_is_refused_unless_told_otherwise(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050", num_classes=2).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"not \(all of\) its weights"):
        create_backbone("efficientvit_m0", pretrained=tmp_path / "x.pth")
    report = load_checkpoint(create_backbone("efficientvit_m0"), tmp_path / "x.pth", strict=False)
    assert report.matched == ()
    assert "more" in str(report)


def test_partial_trunk_fails_and_leaves_the_network_alone(m0, tmp_path):
    state = {key: value for key, value in m0.state_dict().items() if "stages.2.blocks.1" not in key}
    torch.save(state, tmp_path / "x.pth")
    network = create_backbone("efficientvit_m0")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"missing: stages\.2\.blocks\.1"):
        load_checkpoint(network, tmp_path / "x.pth")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    report = load_checkpoint(network, tmp_path / "x.pth", strict=False)
    assert len(report.missing) + len(report.matched) == sum("num_batches" not in key for key in before) + sum(
        "num_batches" in key for key in state if not key.startswith("head")
    )


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickle_payload_is_refused_and_never_executed(form, m0, tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "x.pth"
    content = {"model": m0.state_dict(), "meta": Payload(marker)}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"refused.*nothing of it was executed"):
        create_backbone("efficientvit_m0", pretrained=path)
    assert not marker.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_truncated_file_is_called_damaged(form, share, m0, tmp_path):
    path = tmp_path / "x.pth"
    if form == "safetensors":
        safetensors.torch.save_file(m0.state_dict(), path)
    else:
        torch.save(m0.state_dict(), path, _use_new_zipfile_serialization=form == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        create_backbone("efficientvit_m0", pretrained=path)


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", b"\xff\xd8\xff\xe0 a photograph"])
def test_file_that_is_no_checkpoint(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "x.pth")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint file"):
        create_backbone("efficientvit_m0", pretrained=tmp_path / "nowhere.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.zeros(3), {"model": {"a": 1}}])
def test_file_without_weights(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_checkpoint(tmp_path / "x.pth")


def test_a_second_head_is_made_where_the_file_has_one(m0, tmp_path):
    torch.manual_seed(2)
    state = microsoft_file(m0)
    second = {
        key.replace("head.", "head_dist."): torch.rand(value.shape)
        for key, value in state.items()
        if key.startswith("head.") and value.is_floating_point()
    }
    torch.save({"model": state | second}, tmp_path / "distilled.pth")
    torch.save({"model": state}, tmp_path / "plain.pth")
    distilled = create_classifier("efficientvit_m0", pretrained=tmp_path / "distilled.pth").eval()
    plain = create_classifier("efficientvit_m0", pretrained=tmp_path / "plain.pth").eval()
    assert plain.head_dist is None
    assert torch.equal(distilled.head_dist.linear.weight, second["head_dist.l.weight"])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = distilled.backbone.embed(images)
        mean = (distilled.head(features) + distilled.head_dist(features)) / 2
        assert torch.allclose(distilled(images), mean)
        fused = distilled.fuse()(images)
    assert torch.allclose(fused, mean, atol=1e-4 * float(mean.abs().max()))
    report = load_checkpoint(create_classifier("efficientvit_m0"), tmp_path / "distilled.pth")
    assert {name.split(".")[0] for name in report.unexpected} == {"head_dist"}


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientformerv2_s0"])
def test_tables_of_a_grid_that_is_not_square_are_refused(name, tmp_path):
    state = create_backbone(name).state_dict()
    tables = {key: torch.zeros(len(value), 950) for key, value in state.items() if key.endswith("attention_biases")}
    torch.save(state | tables, tmp_path / "wide.pth")
    with pytest.raises(CheckpointError, match=rf"does not fill {name}(.|\n)*{len(tables)} mismatched"):
        create_backbone(name, pretrained=tmp_path / "wide.pth")


@pytest.mark.parametrize("name", ["efficientformer_l1", "efficientformerv2_s0"])
def test_a_dense_file_asks_for_the_option_that_it_belongs_to(name, tmp_path):
    torch.manual_seed(0)
    dense = create_backbone(name, official_grid=16)
    # Snap's dense files still have the classifier's tables, which nothing reads.
    old = {key: value for key, value in create_backbone(name).state_dict().items() if key.endswith("attention_biases")}
    torch.save(
        {"state_dict": {f"backbone.{key}": value for key, value in (dense.state_dict() | old).items()}},
        tmp_path / "dense.pth",
    )
    with pytest.raises(CheckpointError, match="official_grid=16"):
        create_backbone(name, pretrained=tmp_path / "dense.pth")
    with pytest.raises(CheckpointError, match="official_grid=16"):
        create_backbone(name, official_grid=25, pretrained=tmp_path / "dense.pth")
    loaded = create_backbone(name, official_grid=16, pretrained=tmp_path / "dense.pth")
    for key, value in dense.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_a_file_with_two_networks_is_refused(m0, tmp_path):
    state = {f"{who}.backbone.{key}": value for who in ("student", "teacher") for key, value in m0.state_dict().items()}
    torch.save(state, tmp_path / "pair.pth")
    with pytest.raises(CheckpointError, match=r"two networks, under 'student.backbone.' and under 'teacher.backbone.'"):
        create_backbone("efficientvit_m0", pretrained=tmp_path / "pair.pth")


def test_a_part_that_may_be_absent_may_not_be_of_another_shape(tmp_path, caplog):
    state = create_backbone("dynamicvit_tiny").state_dict()
    name = "score_predictor.0.in_conv.1.weight"
    torch.save({**state, name: torch.zeros(5, 5)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=f"mismatched: {name}"):
        create_backbone("dynamicvit_tiny", pretrained=tmp_path / "wrong.pth")
    torch.save({key: value for key, value in state.items() if "score" not in key}, tmp_path / "deit.pth")
    create_backbone("dynamicvit_tiny", pretrained=tmp_path / "deit.pth")
    assert "no weights for score_predictor.0.in_conv.0.weight and 29 more, which start untrained" in caplog.text


def test_a_head_that_starts_untrained_is_said(m0, tmp_path, caplog):
    torch.save(
        {key: value for key, value in m0.state_dict().items() if not key.startswith("head")}, tmp_path / "trunk.pth"
    )
    create_backbone("efficientvit_m0", pretrained=tmp_path / "trunk.pth")
    assert "untrained" not in caplog.text
    create_classifier("efficientvit_m0", pretrained=tmp_path / "trunk.pth")
    assert "no weights for head.bn.weight and 5 more, which start untrained" in caplog.text


def test_loading_into_a_fused_network_leaves_no_constants_behind(randomise):
    networks = [randomise(create_backbone("efficientvit_m0"), seed).fuse() for seed in (1, 2)]
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = networks[0](images)["c6"]
        networks[1](images)
        networks[1].load_state_dict(networks[0].state_dict())
        assert torch.equal(networks[1](images)["c6"], expected)


def test_weights_that_no_program_can_fetch():
    with pytest.raises(CheckpointError, match=r"Drive; see https.*Pass the path .*keep_ratio=1.0 downloads DeiT"):
        create_backbone("dynamicvit_small", pretrained=True)
