"""What every registered network must answer, whatever its family."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from effvit.backbones import FeaturePyramid, backbone_info, create_backbone, create_classifier, list_backbones

NAMES = list_backbones()


@pytest.fixture(scope="module", params=NAMES)
def backbone(request):
    torch.manual_seed(0)
    return create_backbone(request.param).eval()


def test_published_parameter_count(backbone):
    info = backbone_info(backbone.info.name)
    head = backbone.make_classifier(1000)
    assert sum(p.numel() for module in (backbone, head) for p in module.parameters()) == info.params


@pytest.mark.parametrize("size", [(32, 32), (97, 130)])
def test_maps_are_as_announced(backbone, size):
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    assert list(maps) == [spec.level for spec in backbone.feature_maps]
    strides = [spec.stride for spec in backbone.feature_maps]
    assert strides == sorted(strides)
    for spec in backbone.feature_maps:
        assert spec.stride == 2 ** int(spec.level[1:])
        expected = (2, spec.channels, *(math.ceil(side / spec.stride) for side in size))
        assert tuple(maps[spec.level].shape) == expected
        assert maps[spec.level].isfinite().all()


def test_embedding_feeds_the_classifier(backbone):
    with torch.no_grad():
        embedding = backbone.embed(torch.randn(2, 3, 64, 64))
        assert embedding.shape == (2, backbone.num_features)
        assert backbone.make_classifier(7).eval()(embedding).shape == (2, 7)


def test_optimizer_groups_cover_every_parameter(backbone):
    names = [name for name, _ in backbone.named_parameters()]
    assert backbone.no_weight_decay() <= set(names)
    depths = [backbone.layer_of(name) for name in names]
    assert depths == sorted(depths)
    assert set(depths) == set(range(backbone.num_layers))
    assert backbone.layer_of("head.linear.weight") == backbone.num_layers


def test_input_spec_is_the_published_one(backbone):
    spec = backbone.input_spec
    assert min(spec.size) >= 32
    assert 0 < spec.crop <= 1
    assert len(spec.mean) == len(spec.std) == 3


def test_every_parameter_gets_a_gradient(backbone):
    network = copy.deepcopy(backbone).train()
    maps = network(torch.randn(2, 3, 96, 128))
    sum(feature.square().mean() for feature in maps.values()).backward()
    without = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_bfloat16_autocast_stays_close(backbone, randomise, relative_error):
    network = randomise(copy.deepcopy(backbone))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = network(images)
        fused = copy.deepcopy(network).fuse()
        for candidate in (network, fused):
            with torch.autocast("cpu", torch.bfloat16):
                found = candidate(images)
            for level, feature in found.items():
                assert relative_error(feature.float(), expected[level]) < 0.1


def test_fuse_changes_nothing(backbone, randomise, relative_error):
    network = randomise(copy.deepcopy(backbone))
    fused = copy.deepcopy(network)
    assert fused.fuse() is fused
    assert fused.fuse() is fused
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    for size in ((224, 224), (97, 260)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = network(images)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                found = fused(images.to(memory_format=memory_format))
                for level, feature in expected.items():
                    assert relative_error(found[level], feature) < 1e-5


def test_fused_pyramid_and_classifier_change_nothing(backbone, randomise, relative_error):
    images = torch.randn(1, 3, 96, 130)
    for network in (FeaturePyramid(copy.deepcopy(backbone)), create_classifier(backbone.info.name)):
        randomise(network)
        with torch.no_grad():
            expected, found = network(images), network.fuse()(images)
        if isinstance(expected, torch.Tensor):
            expected, found = {"logits": expected}, {"logits": found}
        for key, value in expected.items():
            assert relative_error(found[key], value) < 1e-5


def test_gradients_reach_the_image_of_a_fused_network(backbone, randomise, relative_error):
    network = randomise(copy.deepcopy(backbone))
    gradients = []
    for candidate in (network, copy.deepcopy(network).fuse()):
        images = torch.randn(1, 3, 96, 130, generator=torch.Generator().manual_seed(1)).requires_grad_()
        sum(feature.square().mean() for feature in candidate(images).values()).backward()
        gradients.append(images.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


@pytest.mark.slow
def test_compiles(backbone, randomise, relative_error, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = randomise(copy.deepcopy(backbone))
    images = torch.randn(1, 3, 224, 224)
    for candidate in (network, copy.deepcopy(network).fuse()):
        torch._dynamo.reset()
        with torch.no_grad():
            expected, found = candidate(images), torch.compile(candidate, fullgraph=True)(images)
        for level, feature in expected.items():
            assert relative_error(found[level], feature) < 1e-4
