"""Networks of timm under our contract: equal to timm itself, what they keep of the contract, and what is refused."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effvit.backbones import (
    FeaturePyramid,
    _factory,
    backbone_info,
    create_backbone,
    create_classifier,
    list_backbones,
    load_checkpoint,
)
from effvit.errors import CheckpointError, ConfigError

NAMES = ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050", "convnext_atto", "efficientvit_m0"]


@pytest.fixture(scope="module", params=NAMES)
def backbone(request):
    torch.manual_seed(0)
    return create_backbone(f"timm/{request.param}").eval()


@pytest.fixture
def theirs(backbone, randomise):
    """The same network from timm, with other weights."""
    return randomise(timm.create_model(backbone.info.name.removeprefix("timm/")))


def check_maps(network, maps, batch, size):
    assert list(maps) == [spec.level for spec in network.feature_maps]
    for spec in network.feature_maps:
        assert spec.stride == 2 ** int(spec.level[1:])
        expected = (batch, spec.channels, *(math.ceil(side / spec.stride) for side in size))
        assert tuple(maps[spec.level].shape) == expected


def loss_of(maps):
    return sum(feature.square().mean() for feature in maps.values())


@settings(max_examples=4, deadline=None)
@given(height=st.integers(32, 160), width=st.integers(32, 160))
def test_maps_are_as_announced_at_any_size(backbone, height, width):
    with torch.no_grad():
        check_maps(backbone, backbone(torch.randn(1, 3, height, width)), 1, (height, width))


def test_logits_and_maps_are_timms(backbone, theirs, relative_error, tmp_path):
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_classifier(backbone.info.name).eval()
    report = load_checkpoint(ours, tmp_path / "weights.pth")
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    side = backbone.input_spec.size[0]
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5
        found = ours.backbone(images)
        last = {feature.shape[-1]: feature for feature in theirs.forward_intermediates(images, intermediates_only=True)}
    assert [feature.shape[-1] for feature in found.values()] == sorted(last, reverse=True)
    for feature in found.values():
        assert relative_error(feature, last[feature.shape[-1]]) < 1e-5


def test_what_is_listed_was_counted(backbone, theirs):
    info = backbone_info(backbone.info.name)
    assert info == backbone.info
    assert info.params == sum(parameter.numel() for parameter in theirs.parameters())
    assert info.top1 is None
    assert info.licence in {"apache-2.0", "mit"}
    assert info.url.startswith("https://huggingface.co/timm/")
    assert backbone.num_features == backbone.embed(torch.randn(1, 3, 64, 64)).shape[1]


@pytest.mark.parametrize(("name", "macs"), [("efficientvit_m0", 79.2e6), ("vit_tiny_patch16_224", 1254e6)])
def test_macs_are_those_of_the_fact_sheet(name, macs):
    assert backbone_info(f"timm/{name}").macs == pytest.approx(macs, rel=1e-3)


def test_input_spec_is_timms(backbone):
    config, spec = timm.models.get_pretrained_cfg(backbone.info.name.removeprefix("timm/")), backbone.input_spec
    assert (spec.size, spec.crop, spec.interpolation) == (config.input_size[1:], config.crop_pct, config.interpolation)
    assert (spec.mean, spec.std) == (config.mean, config.std)


def test_optimizer_groups_cover_every_parameter(backbone):
    names = {name for name, _ in backbone.named_parameters()}
    assert backbone.no_weight_decay() <= names
    assert {backbone.layer_of(name) for name in names} == set(range(backbone.num_layers))
    assert backbone.layer_of("head.weight") == backbone.num_layers
    assert backbone.num_layers > 2


def test_every_parameter_that_the_maps_read_gets_a_gradient(backbone):
    dense, classifying = copy.deepcopy(backbone).train(), copy.deepcopy(backbone).train()
    images = torch.randn(2, 3, 64, 96)
    loss_of(dense(images)).backward()
    for name, parameter in dense.named_parameters():
        assert (parameter.grad is None) == name.startswith(backbone.embed_only), name
    assert not any("attention_biases" in name for name in backbone.embed_only)
    (classifying.embed(images) * torch.randn(2, backbone.num_features)).sum().backward()
    assert [name for name, parameter in classifying.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", NAMES[:4])
def test_gradient_checkpointing_changes_no_gradient(name):
    torch.manual_seed(0)
    backbone, gradients, saved = create_backbone(f"timm/{name}"), [], []
    for enable in (False, True):
        network, count = copy.deepcopy(backbone).train(), []
        network.set_grad_checkpointing(enable)
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=count: kept.append(x.numel()) or x, lambda x: x):
            loss = loss_of(network(images))
        loss.backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        saved.append(sum(count))
    assert saved[1] < saved[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-3, atol=1e-6), name


def test_fuse_changes_nothing_and_freezes(backbone, randomise, relative_error):
    network = randomise(copy.deepcopy(backbone))
    fused = copy.deepcopy(network)
    assert fused.fuse() is fused
    assert fused.fuse() is fused
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    images = torch.randn(1, 3, 97, 130)
    with torch.no_grad():
        expected, found = network(images), fused(images)
    for level, feature in expected.items():
        assert relative_error(found[level], feature) < 1e-5


def test_pyramid_trains_under_autocast(backbone):
    levels = ("p3", "p4", "p5", "p6") if len(backbone.feature_maps) > 1 else ("p4", "p5")
    pyramid = FeaturePyramid(copy.deepcopy(backbone), levels=levels, out_channels=8).train()
    with torch.autocast("cpu", torch.bfloat16):
        maps = pyramid(torch.randn(2, 3, 97, 130))
        loss = sum(feature.float().square().mean() for feature in maps.values())
    loss.backward()
    assert list(maps) == list(levels)
    trained = {name: parameter for name, parameter in pyramid.named_parameters() if parameter.grad is not None}
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    assert len(trained) > 0.8 * len(list(pyramid.parameters()))  # the pyramid need not read the finest or coarsest map


def test_exports(backbone, relative_error):
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = backbone(images), torch.export.export(backbone, (images,)).module()(images)
    for level, feature in expected.items():
        assert relative_error(found[level], feature) < 1e-5


def test_efficientvit_is_ours(randomise, relative_error, tmp_path):
    """The same file in timm's network and in ours, through the same two lines."""
    torch.save(randomise(timm.create_model("efficientvit_m0")).state_dict(), tmp_path / "weights.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        peer, ours = (
            create_backbone(name, pretrained=tmp_path / "weights.pth").eval()(images)
            for name in ("timm/efficientvit_m0", "efficientvit_m0")
        )
    assert list(peer) == list(ours)
    for level, feature in ours.items():
        assert relative_error(peer[level], feature) < 1e-5


def test_both_heads_of_a_distilled_network_are_averaged(randomise, relative_error, tmp_path):
    theirs = randomise(timm.create_model("efficientformer_l1"))
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = create_classifier("timm/efficientformer_l1", pretrained=tmp_path / "weights.pth").eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(images), theirs(images)) < 1e-5


def test_a_network_for_one_size_names_it():
    backbone = create_backbone("timm/efficientformer_l1").eval()
    with torch.no_grad():
        check_maps(backbone, backbone(torch.randn(1, 3, 224, 224)), 1, (224, 224))
    with pytest.raises(ConfigError, match=r"efficientformer_l1 only takes images of 224 x 224 .* not 256 x 320"):
        backbone(torch.randn(1, 3, 256, 320))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "repvit_m0_9"])
def test_a_head_that_does_not_go_on_top_is_refused(name):
    """The heads of the one read different tokens; those of the other are under names of their own."""
    with pytest.raises(ConfigError, match="can only be a backbone"):
        create_classifier(f"timm/{name}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnt50", {}, r"no network 'resnt50'\. Did you mean .*'timm/resnet50'.*effvit backbones 'timm/\*'"),
        ("xyzxyzxyz", {}, r"no network 'xyzxyzxyz'.*effvit backbones"),
        ("resnet50.a9_in1k", {}, r"no weights 'timm/resnet50.a9_in1k'\. Choose from: timm/resnet50.a1_in1k"),
        ("resnet10t", {"dens": True}, "timm/resnet10t has no option 'dens'"),
        ("resnet10t", {"num_classes": 3}, "'num_classes' cannot be set here"),
        ("vit_small_patch14_dinov2", {}, "maps of stride 14; a pyramid needs powers of two"),
    ],
)
def test_what_there_is_not_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"timm/{name}", **options)


def test_options_reach_timm():
    gated = create_backbone("timm/resnet10t", block_args={"attn_layer": "se"})
    assert gated.info.params > backbone_info("timm/resnet10t").params
    small = create_backbone("timm/vit_tiny_patch16_224", img_size=64)
    assert small.input_spec.size == (64, 64)
    assert small.model.pos_embed.shape[1] == 17


def test_pretrained_fetches_the_hubs_file_with_our_downloader(monkeypatch, tmp_path, randomise):
    from safetensors.torch import save_file

    theirs, asked = randomise(timm.create_model("resnet10t")), []
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(_factory, "fetch", lambda url, *, sha256: asked.append(url) or tmp_path / "model.safetensors")
    ours = create_backbone("timm/resnet10t", pretrained=True)
    assert asked == ["https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"]
    assert torch.equal(ours.model.layer4[0].conv1.weight, theirs.layer4[0].conv1.weight)
    with pytest.raises(CheckpointError, match="no weights are published"):
        create_backbone("timm/mobilenetv2_035", pretrained=True)


def test_timms_names_are_listed_only_when_asked_for():
    assert not any(name.startswith("timm/") for name in list_backbones())
    assert list_backbones("timm/efficientvit_m[0-2]") == [f"timm/efficientvit_m{number}" for number in range(3)]
    assert "timm/resnet50.a1_in1k" in list_backbones("timm/resnet50.*")
    assert len(list_backbones("timm/*")) > 1000


def test_without_timm_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for ask in (create_backbone, backbone_info, list_backbones):
        with pytest.raises(ConfigError, match=r'pip install "effvit\[timm\]"'):
            ask("timm/resnet12t")
