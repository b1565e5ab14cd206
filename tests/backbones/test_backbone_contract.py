"""What every registered network must answer, whatever its family.

What can be read off shapes is checked on every variant, without weights (torch's meta device). What needs arithmetic is
checked on the smallest variant of each family; the parity tests of the families take every variant.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from effvit.backbones import (
    Classifier,
    FeaturePyramid,
    backbone_info,
    create_backbone,
    create_classifier,
    list_backbones,
)
from effvit.backbones._registry import outline

NAMES = list_backbones()
FAMILIES = sorted({backbone_info(name).family for name in NAMES})
SMALLEST = [
    min((name for name in NAMES if backbone_info(name).family == family), key=lambda name: backbone_info(name).params)
    for family in FAMILIES
]


@pytest.fixture(scope="module", params=NAMES)
def shape_only(request):
    trunk = outline(request.param)
    with torch.device("meta"):
        head, head_dist = (trunk.make_classifier(1000) for _ in range(2))
    return Classifier(trunk, head, head_dist if trunk.distilled else None).eval()


@pytest.fixture(scope="module", params=SMALLEST)
def backbone(request):
    torch.manual_seed(0)
    return create_backbone(request.param).eval()


def check_maps(network, maps, batch, size):
    assert list(maps) == [spec.level for spec in network.feature_maps]
    strides = [spec.stride for spec in network.feature_maps]
    assert strides == sorted(strides)
    for spec in network.feature_maps:
        assert spec.stride == 2 ** int(spec.level[1:])
        expected = (batch, spec.channels, *(math.ceil(side / spec.stride) for side in size))
        assert tuple(maps[spec.level].shape) == expected


def test_parameters_are_the_published_count(shape_only):
    assert sum(p.numel() for p in shape_only.parameters()) == shape_only.backbone.info.params


def test_macs_are_as_listed(shape_only):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shape_only(torch.zeros(1, 3, *shape_only.backbone.input_spec.size, device="meta"))
    assert counter.get_total_flops() == 2 * shape_only.backbone.info.macs


@pytest.mark.parametrize("size", [(32, 32), (97, 130), (800, 1216)])
def test_maps_of_every_variant_are_as_announced(shape_only, size):
    with torch.no_grad():
        check_maps(shape_only.backbone, shape_only.backbone(torch.zeros(1, 3, *size, device="meta")), 1, size)


def test_optimizer_groups_cover_every_parameter(shape_only):
    network = shape_only.backbone
    names = [name for name, _ in network.named_parameters()]
    assert network.no_weight_decay() <= set(names)
    depths = {name: network.layer_of(name) for name in names}
    assert set(depths.values()) == set(range(network.num_layers))
    assert network.layer_of("head.linear.weight") == network.num_layers


def test_input_spec_is_the_published_one(shape_only):
    spec = shape_only.backbone.input_spec
    assert min(spec.size) >= 32
    assert 0 < spec.crop <= 1
    assert spec.interpolation in {"bilinear", "bicubic"}
    assert len(spec.mean) == len(spec.std) == 3


def test_weights_can_be_found(shape_only):
    info = shape_only.backbone.info
    assert info.origin
    assert info.licence
    assert (info.url or info.page).startswith("https://")


@settings(max_examples=8, deadline=None)
@given(height=st.integers(32, 200), width=st.integers(32, 200))
def test_maps_are_as_announced_at_any_size(backbone, height, width):
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, height, width))
    check_maps(backbone, maps, 2, (height, width))
    assert all(feature.isfinite().all() for feature in maps.values())


def test_embedding_feeds_the_classifier(backbone):
    with torch.no_grad():
        embedding = backbone.embed(torch.randn(2, 3, 64, 64))
        assert embedding.shape == (2, backbone.num_features)
        assert backbone.make_classifier(7).eval()(embedding).shape == (2, 7)


def test_every_parameter_gets_a_gradient(backbone):
    images = torch.randn(2, 3, 96, 128)
    dense, classifying = copy.deepcopy(backbone).train(), copy.deepcopy(backbone).train()
    sum(feature.square().mean() for feature in dense(images).values()).backward()
    # Not the plain sum, which is constant behind a LayerNorm.
    (classifying.embed(images) * torch.randn(2, backbone.num_features)).sum().backward()
    unread = [name for name, parameter in dense.named_parameters() if parameter.grad is None]
    assert unread == [name for name, _ in dense.named_parameters() if name.startswith(backbone.embed_only)]
    assert [name for name, parameter in classifying.named_parameters() if parameter.grad is None] == []
    for network in (dense, classifying):
        assert all(parameter.grad.isfinite().all() for parameter in network.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("levels", [("p3", "p4", "p5", "p6", "p7"), ("p4", "p5")])
def test_a_pyramid_trains_what_its_levels_read_and_freezes_the_rest(backbone, levels):
    pyramid = FeaturePyramid(copy.deepcopy(backbone), levels, 8)
    assert {module.training for module in pyramid.backbone.modules()} == {False}
    sum(feature.square().mean() for feature in pyramid.train()(torch.randn(2, 3, 64, 96)).values()).backward()
    for name, parameter in pyramid.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_gradient_checkpointing_changes_nothing(backbone, randomise):
    states, gradients, saved = [], [], []
    for enable in (False, True):
        network = randomise(copy.deepcopy(backbone)).double().train()
        network.set_grad_checkpointing(enable)
        images = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=count: kept.append(x.numel()) or x, lambda x: x):
            loss = sum(feature.square().mean() for feature in network(images).values())
        loss.backward()
        saved.append(sum(count))
        states.append(network.state_dict())
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert saved[1] < saved[0]
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=1e-9), name
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-7, atol=1e-10 * largest), name


def test_bfloat16_autocast_stays_close(backbone, randomise):
    network = randomise(copy.deepcopy(backbone))
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = network(images)
        fused = copy.deepcopy(network).fuse()
        for candidate in (network, fused):
            with torch.autocast("cpu", torch.bfloat16):
                found = candidate(images)
            for level, feature in found.items():
                # In the mean: where tokens are chosen by rank, rounding may choose another for one that is as good.
                assert (feature.float() - expected[level]).abs().mean() < 0.1 * expected[level].abs().mean()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sum(feature.float().square().mean() for feature in network.train()(images.repeat(2, 1, 1, 1)).values())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_fuse_changes_nothing(backbone, randomise, relative_error):
    network = randomise(copy.deepcopy(backbone))
    fused = copy.deepcopy(network)
    assert fused.fuse() is fused
    assert fused.fuse() is fused
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    for size in (backbone.input_spec.size, (97, 260)):
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


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_exports(backbone, randomise, relative_error, fused):
    network = randomise(copy.deepcopy(backbone))
    if fused:
        network.fuse()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = network(images), torch.export.export(network, (images,)).module()(images)
    for level, feature in expected.items():
        assert relative_error(found[level], feature) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_exports_for_any_batch(backbone, relative_error, fused):
    network = copy.deepcopy(backbone)
    if fused:
        network.fuse()
    images = torch.randn(3, 3, *backbone.input_spec.size)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(network, (images[:2],), dynamic_shapes=sizes).module()
        for level, feature in network(images).items():
            assert relative_error(exported(images)[level], feature) < 1e-5


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:FutureWarning")
def test_traces(backbone, relative_error, fused):
    network = copy.deepcopy(backbone)
    if fused:
        network.fuse()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        traced = torch.jit.trace(network, (images,), strict=False, check_trace=False)
        for level, feature in network(images).items():
            assert relative_error(traced(images)[level], feature) < 1e-5


@pytest.mark.slow
def test_compiles_in_training_with_gradient_checkpointing(backbone):
    network = copy.deepcopy(backbone).train()
    network.set_grad_checkpointing()
    torch._dynamo.reset()
    images = torch.randn(2, 3, 64, 96)
    sum(feature.square().mean() for feature in torch.compile(network, backend="aot_eager")(images).values()).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == name.startswith(backbone.embed_only), name


@pytest.mark.slow
def test_compiles(backbone, randomise, relative_error, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = randomise(copy.deepcopy(backbone))
    images = torch.randn(1, 3, *backbone.input_spec.size)
    for candidate in (network, copy.deepcopy(network).fuse()):
        torch._dynamo.reset()
        with torch.no_grad():
            expected, found = candidate(images), torch.compile(candidate, fullgraph=True)(images)
        for level, feature in expected.items():
            assert relative_error(found[level], feature) < 1e-4
