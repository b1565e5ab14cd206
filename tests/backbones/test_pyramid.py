"""The pyramid: official EfficientViTFPN, MMDetection's FPN on an ordinary backbone, ViTDet's on one map."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effvit.backbones import Backbone, FeatureMap, FeaturePyramid, PyramidNeck, create_backbone
from effvit.errors import ConfigError


class Ordinary(Backbone):
    """A ResNet-like stand-in: maps c2 to c5."""

    def __init__(self):
        super().__init__()
        self.feature_maps = tuple(FeatureMap(f"c{n}", 4 * n, 2**n) for n in (2, 3, 4, 5))
        self.convs = nn.ModuleList(nn.Conv2d(3, spec.channels, 1) for spec in self.feature_maps)

    def forward(self, images):
        maps = {}
        for spec, conv in zip(self.feature_maps, self.convs, strict=True):
            size = [-(-side // spec.stride) for side in images.shape[2:]]
            maps[spec.level] = conv(F.adaptive_avg_pool2d(images, size))
        return maps

    def embed(self, images): ...
    def make_classifier(self, num_classes): ...
    def no_weight_decay(self): ...
    def layer_of(self, parameter_name): ...
    def fuse(self): ...
    @classmethod
    def convert_key(cls, key): ...


def sizes(pyramid):
    return {level: tuple(feature.shape[2:]) for level, feature in pyramid.items()}


@pytest.fixture(scope="module")
def backbone():
    return create_backbone("efficientvit_m0").eval()


def test_retinanet_levels_on_efficientvit(backbone):
    pyramid = FeaturePyramid(backbone, out_channels=32)
    assert (pyramid.levels, pyramid.strides) == (("p3", "p4", "p5", "p6", "p7"), (8, 16, 32, 64, 128))
    with torch.no_grad():
        features = pyramid(torch.randn(2, 3, 128, 256))
    assert tuple(features) == pyramid.levels
    assert sizes(features) == {"p3": (16, 32), "p4": (8, 16), "p5": (4, 8), "p6": (2, 4), "p7": (1, 2)}
    assert {feature.shape[:2] for feature in features.values()} == {(2, 32)}


def test_mask_rcnn_levels_need_two_transposed_convolutions(backbone):
    pyramid = FeaturePyramid(backbone, ("p2", "p3", "p4", "p5", "p6"), out_channels=16)
    assert list(pyramid.upsamplers) == ["p3", "p2"]
    assert list(pyramid.downsamplers) == []
    with torch.no_grad():
        features = pyramid(torch.randn(1, 3, 64, 64))
    assert tuple(features) == pyramid.levels
    assert sizes(features) == {"p2": (16, 16), "p3": (8, 8), "p4": (4, 4), "p5": (2, 2), "p6": (1, 1)}


def test_odd_sizes_follow_the_tensors(backbone):
    with torch.no_grad():
        features = FeaturePyramid(backbone, out_channels=16)(torch.randn(1, 3, 97, 355))
    assert sizes(features) == {"p3": (14, 46), "p4": (7, 23), "p5": (4, 12), "p6": (2, 6), "p7": (1, 3)}


def test_official_arithmetic_on_efficientvit(backbone):
    pyramid = FeaturePyramid(backbone, out_channels=16)
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        for module in pyramid.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
                nn.init.normal_(module.bias)
        maps = backbone(images)
        inner = {n: pyramid.laterals[f"p{n}"](maps[f"c{n}"]) for n in (4, 5, 6)}
        for n in (5, 4):
            inner[n] = inner[n] + F.interpolate(inner[n + 1], size=inner[n].shape[2:], mode="nearest")
        inner[3] = F.conv_transpose2d(inner[4], pyramid.upsamplers["p3"].weight, pyramid.upsamplers["p3"].bias, 2)
        expected = {f"p{n}": pyramid.outputs[f"p{n}"](inner[n]) for n in (3, 4, 5, 6)}
        expected["p7"] = pyramid.downsamplers["p7"](maps["c6"])
        found = pyramid(images)
    for level, feature in expected.items():
        assert torch.equal(found[level], feature), level


def test_ordinary_backbone_is_mmdetections_retinanet():
    pyramid = FeaturePyramid(Ordinary(), out_channels=8)
    assert list(pyramid.laterals) == ["p3", "p4", "p5"]
    assert list(pyramid.upsamplers) == []
    p6, p7 = pyramid.downsamplers["p6"], pyramid.downsamplers["p7"]
    assert (p6.in_channels, p7.in_channels, p6.stride, p6.padding) == (20, 8, (2, 2), (1, 1))
    images = torch.randn(1, 3, 100, 140)
    with torch.no_grad():
        features = pyramid(images)
        expected = p6(pyramid.backbone(images)["c5"])
        assert torch.equal(features["p6"], expected)
        assert torch.equal(features["p7"], p7(expected))  # no ReLU between
    assert sizes(features) == {"p3": (13, 18), "p4": (7, 9), "p5": (4, 5), "p6": (2, 3), "p7": (1, 2)}


def test_all_levels_of_an_ordinary_backbone_need_nothing_extra():
    pyramid = FeaturePyramid(Ordinary(), ("p2", "p3", "p4", "p5"), out_channels=8)
    assert list(pyramid.laterals) == list(pyramid.outputs) == ["p2", "p3", "p4", "p5"]
    assert len(pyramid.upsamplers) == len(pyramid.downsamplers) == 0


def test_initialisation_is_mmdetections(backbone):
    pyramid = FeaturePyramid(backbone)
    lateral, transposed = pyramid.laterals["p6"], pyramid.upsamplers["p3"]
    bound = (6 / (lateral.in_channels + lateral.out_channels)) ** 0.5  # Xavier-uniform
    assert lateral.weight.abs().max() <= bound
    assert lateral.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert transposed.weight.std().item() == pytest.approx((2 / (256 * 4)) ** 0.5, rel=0.05)  # Kaiming-normal, fan out
    assert transposed.weight.abs().max() > 3 * transposed.weight.std()
    for module in (*pyramid.laterals.values(), *pyramid.outputs.values(), transposed, pyramid.downsamplers["p7"]):
        assert module.bias.abs().sum() == 0


def test_pyramid_makes_the_backbone_dense():
    backbone = create_backbone("efficientvit_m4")
    FeaturePyramid(backbone)
    tables = [p for n, p in backbone.named_parameters() if n.endswith("attention_biases")]
    assert {table.shape[1] for table in tables} == {49}
    assert all(table.requires_grad for table in tables)


@pytest.mark.parametrize("levels", [(), ("c3",), ("p3", "p5"), ("p5", "p4"), ("p",)])
def test_malformed_levels_are_refused(backbone, levels):
    with pytest.raises(ConfigError, match="pyramid levels"):
        FeaturePyramid(backbone, levels)


def test_levels_that_the_backbone_cannot_anchor_are_refused(backbone):
    with pytest.raises(ConfigError, match="c4, c5, c6"):
        FeaturePyramid(backbone, ("p2", "p3"))


class OneMap(Ordinary):
    """A plain-ViT-like stand-in: c4 alone, 12 channels."""

    def __init__(self):
        super().__init__()
        self.feature_maps = (FeatureMap("c4", 12, 16),)
        self.convs = nn.ModuleList([nn.Conv2d(3, 12, 1)])


def vitdet_norm(x, norm):
    """Detectron2's LayerNorm over channels, by its formula."""
    mean = x.mean(1, keepdim=True)
    variance = (x - mean).square().mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_simple_pyramid_is_vitdets(randomise, relative_error):
    pyramid = randomise(FeaturePyramid(OneMap(), ("p2", "p3", "p4", "p5"), out_channels=8))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        found = pyramid(images)
        feature = pyramid.backbone(images)["c4"]
        finest, finer, same, coarser = pyramid.simple.values()
        first, norm, _, second = finest[:4]
        halved = F.conv_transpose2d(feature, first.weight, first.bias, 2)
        scaled = {
            "p2": F.conv_transpose2d(F.gelu(vitdet_norm(halved, norm)), second.weight, second.bias, 2),
            "p3": F.conv_transpose2d(feature, finer[0].weight, finer[0].bias, 2),
            "p4": feature,
            "p5": F.max_pool2d(feature, 2),
        }
        assert [x.shape[1] for x in scaled.values()] == [3, 6, 12, 12]
        for (level, x), layers in zip(scaled.items(), (finest, finer, same, coarser), strict=True):
            pointwise, norm1, mixing, norm2 = layers[-4:]
            assert pointwise.bias is mixing.bias is None
            expected = vitdet_norm(F.conv2d(x, pointwise.weight), norm1)
            expected = vitdet_norm(F.conv2d(expected, mixing.weight, padding=1), norm2)
            assert relative_error(found[level], expected) < 1e-5, level
    assert sizes(found) == {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3)}


def test_coarser_levels_than_vitdets_come_from_the_level_before():
    pyramid = FeaturePyramid(OneMap(), out_channels=8)
    assert (pyramid.levels, pyramid.strides) == (("p3", "p4", "p5", "p6", "p7"), (8, 16, 32, 64, 128))
    assert list(pyramid.simple) == ["p3", "p4", "p5"]
    with torch.no_grad():
        found = pyramid(torch.randn(1, 3, 128, 256))
        assert torch.equal(found["p6"], pyramid.downsamplers["p6"](found["p5"]))
        assert torch.equal(found["p7"], pyramid.downsamplers["p7"](found["p6"]))
    assert tuple(found) == pyramid.levels
    assert {feature.shape[:2] for feature in found.values()} == {(1, 8)}


def test_simple_pyramid_rounds_odd_maps_up():
    with torch.no_grad():
        found = FeaturePyramid(OneMap(), out_channels=8)(torch.randn(1, 3, 33, 355))
    assert sizes(found) == {"p3": (6, 46), "p4": (3, 23), "p5": (2, 12), "p6": (1, 6), "p7": (1, 3)}


def test_every_parameter_of_a_simple_pyramid_learns():
    pyramid = FeaturePyramid(OneMap(), ("p2", "p3", "p4", "p5", "p6"), out_channels=8)
    sum(
        (feature * torch.randn_like(feature)).sum() for feature in pyramid(torch.randn(2, 3, 96, 96)).values()
    ).backward()
    assert [name for name, parameter in pyramid.named_parameters() if parameter.grad is None] == []


def test_levels_that_vitdets_pyramid_lacks_are_refused():
    with pytest.raises(ConfigError, match="p2, the finest"):
        FeaturePyramid(OneMap(), ("p1", "p2", "p3", "p4"))
    with pytest.raises(ConfigError, match="share no stride"):
        FeaturePyramid(OneMap(), ("p5", "p6"))


R_CNN = ("p2", "p3", "p4", "p5", "p6")


@settings(max_examples=12, deadline=None)
@given(height=st.integers(32, 200), width=st.integers(32, 200), one_map=st.booleans(), levels=st.integers(5, 7))
def test_pooled_levels_are_every_second_cell_of_the_level_before(height, width, one_map, levels):
    names = tuple(f"p{n}" for n in range(2, 2 + levels))
    pyramid = FeaturePyramid(OneMap() if one_map else Ordinary(), names, out_channels=4, coarser="pool")
    assert len(pyramid.downsamplers) == 0
    assert not any(name.startswith("downsamplers") for name in pyramid.state_dict())
    with torch.no_grad():
        found = pyramid(torch.randn(1, 3, height, width))
    assert tuple(found) == names
    for before, level in itertools.pairwise(names[3:]):
        assert torch.equal(found[level], found[before][..., ::2, ::2]), level
        assert sizes(found)[level] == tuple(-(-side // 2) for side in found[before].shape[2:])


def test_pooling_leaves_the_other_levels_and_their_names_alone():
    torch.manual_seed(0)
    convolved = FeaturePyramid(Ordinary(), R_CNN, out_channels=4)
    pooled = FeaturePyramid(Ordinary(), R_CNN, out_channels=4, coarser="pool")
    expected = {name: value for name, value in convolved.state_dict().items() if "downsamplers.p6" not in name}
    assert list(pooled.state_dict()) == list(expected)
    pooled.load_state_dict(expected)
    images = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        own, other = pooled(images), convolved(images)
    assert all(torch.equal(own[level], other[level]) for level in R_CNN[:4])
    assert torch.equal(own["p6"], own["p5"][..., ::2, ::2])


def test_the_coarsest_map_of_efficientvit_is_no_pooled_one(backbone):
    pooled = FeaturePyramid(backbone, R_CNN, out_channels=8, coarser="pool")
    convolved = FeaturePyramid(backbone, R_CNN, out_channels=8)
    assert list(pooled.state_dict()) == list(convolved.state_dict())
    convolved.load_state_dict(pooled.state_dict())
    images = torch.randn(1, 3, 96, 130)
    with torch.no_grad():
        found, expected = pooled(images), convolved(images)
    assert all(torch.equal(found[level], expected[level]) for level in R_CNN)


def test_dynamicvit_gets_vitdets_five_levels():
    pyramid = FeaturePyramid(create_backbone("dynamicvit_tiny"), R_CNN, out_channels=8, coarser="pool").eval()
    assert list(pyramid.simple) == ["p2", "p3", "p4", "p5"]
    with torch.no_grad():
        found = pyramid(torch.randn(1, 3, 96, 128))
    assert sizes(found) == {"p2": (24, 32), "p3": (12, 16), "p4": (6, 8), "p5": (3, 4), "p6": (2, 2)}
    assert torch.equal(found["p6"], found["p5"][..., ::2, ::2])


def test_every_parameter_below_pooled_levels_learns():
    pyramid = FeaturePyramid(Ordinary(), R_CNN, out_channels=4, coarser="pool")
    pyramid(torch.randn(1, 3, 64, 64))["p6"].square().sum().backward()
    assert pyramid.outputs["p5"].weight.grad.abs().sum() > 0


def test_another_way_to_coarser_levels_is_refused(backbone):
    with pytest.raises(ConfigError, match="coarser must be one of conv, pool, not 'maxpool'"):
        FeaturePyramid(backbone, coarser="maxpool")


@pytest.mark.parametrize("coarser", ["conv", "pool"])
@pytest.mark.parametrize("make", [Ordinary, OneMap])
def test_a_neck_is_the_pyramid_without_its_backbone(make, coarser):
    pyramid = FeaturePyramid(make(), R_CNN, out_channels=8, coarser=coarser)
    neck = PyramidNeck(pyramid.backbone.feature_maps, R_CNN, 8, coarser)
    assert [f"backbone.{name}" for name in pyramid.backbone.state_dict()] + list(neck.state_dict()) == list(
        pyramid.state_dict()
    )
    neck.load_state_dict({name: value for name, value in pyramid.state_dict().items() if "backbone." not in name})
    assert (neck.levels, neck.strides, neck.out_channels) == (R_CNN, (4, 8, 16, 32, 64), 8)
    images = torch.randn(1, 3, 75, 64)
    with torch.no_grad():
        maps = pyramid.backbone(images)
        for found in (neck(maps), neck.merge(maps), pyramid.merge(maps)):
            for level, expected in pyramid(images).items():
                assert torch.equal(found[level], expected), level


def test_norms_of_maps_that_no_level_reads_are_frozen():
    pyramid = FeaturePyramid(create_backbone("efficientformer_l1", official_grid=2), out_channels=8)
    frozen = [name for name, parameter in pyramid.named_parameters() if not parameter.requires_grad]
    assert frozen == [f"backbone.{norm}.{kind}" for norm in ("norm", "norm0") for kind in ("weight", "bias")]


def test_building_changes_nothing_but_what_is_frozen():
    backbone = create_backbone("dynamicvit_tiny", keep_ratio=0.7)
    backbone.prepare_for_dense()
    before, generator = {name: value.clone() for name, value in backbone.state_dict().items()}, torch.get_rng_state()
    PyramidNeck(backbone.feature_maps, ("p4",), 8)  # what the pyramid itself draws
    after = torch.get_rng_state()
    torch.set_rng_state(generator)
    FeaturePyramid(backbone, ("p4",), out_channels=8)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_building_on_a_backbone_that_recomputes_leaves_it_as_it_was():
    backbone = create_backbone("mobilevit_xxs")
    backbone.set_grad_checkpointing()
    backbone.stages[0].eval()
    modes = [module.training for module in backbone.modules()]
    FeaturePyramid(backbone, out_channels=8)
    assert backbone.grad_checkpointing
    assert [module.training for module in backbone.modules()] == modes
