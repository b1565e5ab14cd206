"""Semantic FPN and DeepLabv3 against written-out arithmetic, torchvision and published parameter counts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from effvit.backbones import Backbone, FeatureMap, FeaturePyramid, create_backbone
from effvit.errors import ConfigError
from effvit.tasks.segmenters.deeplabv3 import ASPPHead, DeepLabV3
from effvit.tasks.segmenters.factory import HEADS, SegmenterSettings, make_segmenter, unread_settings
from effvit.tasks.segmenters.semantic_fpn import SemanticFPN

SMALL = {"pyramid_channels": 16, "head_channels": 16}
#: One variant of each family.
FAMILIES = (
    "efficientvit_m0",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    pytest.param("efficientformer_l1", marks=pytest.mark.slow),
    pytest.param("dynamicvit_tiny", marks=pytest.mark.slow),
    pytest.param("timm/resnet18", marks=pytest.mark.slow),
)


class Ordinary(Backbone):
    """A ResNet-like stand-in: maps c2 to c5, or the last of them dilated."""

    def __init__(self, strides=(4, 8, 16, 32)):
        super().__init__()
        self.feature_maps = tuple(FeatureMap(f"c{n}", 4 * n, stride) for n, stride in enumerate(strides, 2))
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


def randomise(network):
    """No norm or bias is left at its neutral start."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.normal_(module.bias)
    return network.eval()


# ---- Semantic FPN


def conv_norm_relu(state, name, x):
    x = F.conv2d(x, state[f"{name}.conv.weight"], padding=1)
    norm = [state[f"{name}.bn.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *norm).relu()


def mmseg_fpn(state, maps):
    """mmsegmentation's FPN and FPNHead of four levels, with our names."""
    levels = ("p2", "p3", "p4", "p5")

    def conv(x, name, **options):
        return F.conv2d(x, state[f"neck.{name}.weight"], state[f"neck.{name}.bias"], **options)

    merged = [conv(x, f"laterals.{level}") for level, x in zip(levels, maps, strict=True)]
    for i in (2, 1, 0):
        merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[2:], mode="nearest")
    outputs = [conv(x, f"outputs.{level}", padding=1) for level, x in zip(levels, merged, strict=True)]
    total = conv_norm_relu(state, "head.scale_heads.0.0", outputs[0])
    for i in (1, 2, 3):
        x = outputs[i]
        for k in range(i):
            x = conv_norm_relu(state, f"head.scale_heads.{i}.{2 * k}", x)
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + F.interpolate(x, size=total.shape[2:], mode="bilinear", align_corners=False)
    return F.conv2d(total, state["head.conv_seg.weight"], state["head.conv_seg.bias"])


@pytest.mark.parametrize("size", [(64, 96), (97, 131), (33, 33)])
def test_semantic_fpn_has_mmsegmentations_arithmetic(size):
    segmenter = randomise(SemanticFPN(Ordinary(), 7, pyramid_channels=8, head_channels=6))
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        found = segmenter(images)
        expected = mmseg_fpn(segmenter.state_dict(), segmenter.backbone(images).values())
    assert found.keys() == {"logits"}
    assert torch.equal(found["logits"], expected)


def test_semantic_fpn_has_the_published_parameters():
    segmenter = SemanticFPN(create_backbone("efficientformer_l1", official_grid=16), 150)
    head = sum(parameter.numel() for parameter in segmenter.head.parameters())
    # Seven convolutions 3x3 of mmsegmentation's head, the first of each level from 256 channels, each with its norm.
    assert head == 4 * 256 * 128 * 9 + 3 * 128 * 128 * 9 + 7 * 256 + 150 * 129
    neck = sum(parameter.numel() for parameter in segmenter.neck.parameters())
    assert neck == sum(width * 256 + 256 for width in (48, 96, 224, 448)) + 4 * (256 * 256 * 9 + 256)


def test_efficientvits_coarsest_stage_is_read():
    segmenter = make_segmenter("semantic_fpn", "efficientvit_m0", 3, SegmenterSettings(pyramid_channels=8))
    assert segmenter.neck.levels == ("p2", "p3", "p4", "p5", "p6")
    assert all(parameter.requires_grad for parameter in segmenter.backbone.parameters())


def test_logits_are_cut_where_levels_reach_beyond_the_image():
    segmenter = make_segmenter("semantic_fpn", "efficientvit_m0", 3, SegmenterSettings(**SMALL)).eval()
    images = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        whole = segmenter.decode(segmenter.backbone(images))
        assert whole.shape[2:] == (28, 36)  # twice and twice again the 7 x 9 cells of stride 16
        assert torch.equal(segmenter(images)["logits"], whole[..., :25, :33])


# ---- DeepLabv3


def test_aspp_equals_torchvisions():
    theirs, ours = randomise(ASPP(12, [2, 3, 5], 8)), randomise(ASPPHead(12, 8, (2, 3, 5), 4, 0.1))
    sources = [module for module in theirs.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
    layers = [*ours.branches, ours.pool, ours.project]
    targets = [part for layer in layers for part in (layer.conv, layer.bn)]
    for source, target in zip(sources, targets, strict=True):
        target.load_state_dict(source.state_dict())
    x = torch.randn(2, 12, 9, 13)
    with torch.no_grad():
        expected = ours.conv_seg(theirs(x))
        assert torch.allclose(ours(x), expected, rtol=1e-5, atol=1e-5)


# With aux 150,421 of it; see apple/ml-cvnets config/segmentation, version 0.1 and the current one.
@pytest.mark.parametrize(
    ("variant", "settings", "count"),
    [
        ("s", {}, 6_357_941),
        ("s", {"head_channels": 512, "output_stride": 8, "auxiliary": True}, 8_687_690),
        ("xs", {"head_channels": 512, "output_stride": 8, "auxiliary": True}, 4_743_386),
        ("xxs", {"head_channels": 512, "output_stride": 8, "auxiliary": True}, 3_516_954),
    ],
)
def test_deeplabv3_has_the_published_parameters(variant, settings, count):
    segmenter = make_segmenter("deeplabv3", f"mobilevit_{variant}", 21, SegmenterSettings(**settings))
    names = [name for name, _ in segmenter.named_parameters() if not name.startswith("backbone.final_conv.")]
    assert sum(segmenter.get_parameter(name).numel() for name in names) == count
    if "auxiliary" in settings and variant == "s":
        assert sum(parameter.numel() for parameter in segmenter.auxiliary.parameters()) == 150_421
    rates = [branch.conv.dilation[0] for branch in segmenter.head.branches]
    assert rates == ([1, 12, 24, 36] if segmenter.stride == 8 else [1, 6, 12, 18])


def dilations(backbone):
    return {
        name: module.dilation[0]
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1)
    }


def test_dilation_is_where_apple_has_it():
    block, mv2 = "stages.{}.1.conv_kxk.conv", "stages.{}.0.conv2_kxk.conv"
    built = {
        (name, stride): create_backbone(name, output_stride=stride)
        for name in ("mobilevit_xxs", "mobilevitv2_050")
        for stride in (8, 16)
    }
    assert dilations(built["mobilevit_xxs", 16]) == {}
    assert dilations(built["mobilevit_xxs", 8]) == {mv2.format(4): 2}
    assert dilations(built["mobilevitv2_050", 16]) == {block.format(4): 2}
    assert dilations(built["mobilevitv2_050", 8]) == {block.format(3): 2, mv2.format(4): 2, block.format(4): 4}
    for (_, stride), backbone in built.items():
        assert [spec.stride for spec in backbone.feature_maps] == [min(2**n, stride) for n in range(1, 6)]
        with torch.no_grad():
            maps = backbone.eval()(torch.randn(1, 3, 97, 131))
        for spec in backbone.feature_maps:
            assert maps[spec.level].shape[1:] == (spec.channels, -(-97 // spec.stride), -(-131 // spec.stride))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050"])
def test_a_dilated_backbone_stays_equal_when_fused(name):
    backbone = randomise(create_backbone(name, output_stride=8))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = backbone(images)["c5"]
        found = copy.deepcopy(backbone).fuse()(images)["c5"]
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
def test_timms_networks_are_dilated_where_timm_can():
    pytest.importorskip("timm")
    dilated = make_segmenter("deeplabv3", "timm/resnet10t", 3, SegmenterSettings(**SMALL, auxiliary=True))
    assert dilated.neck is None
    assert [(spec.level, spec.stride) for spec in dilated.backbone.feature_maps][-2:] == [("c4", 16), ("c5", 16)]
    assert dilated.auxiliary_map.level == "c4"
    merged = make_segmenter("deeplabv3", "timm/vit_tiny_patch16_224", 3, SegmenterSettings(**SMALL, output_stride=8))
    assert merged.neck is not None


def test_a_backbone_that_cannot_be_dilated_is_merged():
    segmenter = DeepLabV3(Ordinary(), 5, 8, (1, 2), output_stride=16, pyramid_channels=6)
    assert segmenter.neck.levels == ("p4", "p5")
    assert list(segmenter.neck.outputs) == ["p4"]
    images = torch.randn(2, 3, 64, 96)
    maps = segmenter.backbone(images)
    logits = segmenter(images)["logits"]
    assert logits.shape == (2, 5, 4, 6)
    maps = {level: feature.detach().requires_grad_() for level, feature in maps.items()}
    read = torch.autograd.grad(segmenter.decode(maps).square().sum(), list(maps.values()), allow_unused=True)
    assert [gradient is not None for gradient in read] == [False, False, True, True]
    frozen = {name for name, parameter in segmenter.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"backbone.convs.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}


@pytest.mark.parametrize("levels", [("p3", "p4", "p5"), ("p2", "p3", "p4", "p5")])
def test_a_pyramid_refuses_a_dilated_backbone(levels):
    with pytest.raises(ConfigError, match=r"c5 has stride 16.*output_stride"):
        FeaturePyramid(Ordinary((4, 8, 16, 16)), levels)
    with pytest.raises(ConfigError, match=r"c5 has stride 16"):
        SemanticFPN(Ordinary((4, 8, 16, 16)), 3)
    with pytest.raises(ConfigError, match=r"c5 has stride 16"):
        DeepLabV3(Ordinary((4, 8, 16, 16)), 3, output_stride=8)


def test_one_image_cannot_train_the_pooled_branch():
    segmenter = DeepLabV3(Ordinary(), 3, 8, (1,), output_stride=32)
    with pytest.raises(ConfigError, match="batch_size 2"):
        segmenter(torch.randn(1, 3, 64, 64))
    assert segmenter.eval()(torch.randn(1, 3, 64, 64))["logits"].shape == (1, 3, 2, 2)


# ---- both


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, head):
    torch.manual_seed(0)
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    segmenter = make_segmenter(head, name, 5, SegmenterSettings(**SMALL, auxiliary=True))
    for size in ((97, 131), (33, 33)):
        outputs = segmenter.train()(torch.randn(2, 3, *size))
        assert outputs["logits"].shape == (2, 5, *(-(-side // segmenter.stride) for side in size))
        assert outputs["auxiliary"].shape == (2, 5, *(-(-side // segmenter.auxiliary_map.stride) for side in size))
    sum(output.square().mean() for output in outputs.values()).backward()
    for parameter_name, parameter in segmenter.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name
    with torch.no_grad():
        assert segmenter.eval()(torch.randn(1, 3, 33, 33)).keys() == {"logits"}


@pytest.mark.parametrize("kind", [SemanticFPN, DeepLabV3])
def test_what_depends_on_the_classes_is_named(kind):
    few, many = (kind(Ordinary(), classes, head_channels=8, auxiliary=True) for classes in (3, 4))
    other = many.state_dict()
    changed = {name for name, value in few.state_dict().items() if value.shape != other[name].shape}
    assert changed == {name for name in other if name.startswith(few.class_parameters)}
    assert changed == {f"{part}.conv_seg.{kind}" for part in ("head", "auxiliary") for kind in ("weight", "bias")}


def test_the_auxiliary_head_only_helps_the_backbone():
    segmenter = SemanticFPN(Ordinary(), 3, 8, 8, auxiliary=True)
    segmenter(torch.randn(2, 3, 64, 64))["auxiliary"].sum().backward()
    touched = {name.split(".")[0] for name, value in segmenter.named_parameters() if value.grad is not None}
    assert touched == {"backbone", "auxiliary"}


@pytest.mark.parametrize(
    ("head", "settings", "message"),
    [
        ("deeplab", {}, r"no segmentation head 'deeplab'.*deeplabv3"),
        ("semantic_fpn", {"pyramid_channels": 0}, "out_channels of a pyramid must be at least 1"),
        ("semantic_fpn", {"head_channels": -1}, "head_channels must be at least 1"),
        ("semantic_fpn", {"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ("deeplabv3", {"output_stride": 4}, "output_stride must be one of 8, 16, 32, not 4"),
        ("deeplabv3", {"rates": (0, 6)}, r"rates must be .* not \[0, 6\]"),
        ("deeplabv3", {"rates": ()}, "rates must be"),
    ],
)
def test_settings_out_of_range_are_refused(head, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_segmenter(head, "efficientvit_m0", 3, SegmenterSettings(**settings))


def test_no_classes_and_contradictions_are_refused():
    with pytest.raises(ConfigError, match="num_classes must be at least 1"):
        make_segmenter("semantic_fpn", "efficientvit_m0", 0, SegmenterSettings())
    with pytest.raises(ConfigError, match=r"says output_stride 8 and the head's output_stride is 16"):
        make_segmenter("deeplabv3", "mobilevit_xxs", 3, SegmenterSettings(), backbone_options={"output_stride": 8})
    with pytest.raises(ConfigError, match="output_stride must be 8, 16 or 32"):
        create_backbone("mobilevit_xxs", output_stride=4)


def test_settings_that_a_head_does_not_read_are_told():
    settings = SegmenterSettings(output_stride=8, rates=(1, 2), dropout=0.2, auxiliary=True)
    assert unread_settings("semantic_fpn", settings) == ["output_stride", "rates"]
    assert unread_settings("deeplabv3", settings) == []
    with pytest.raises(ConfigError, match="no segmentation head"):
        unread_settings("fpn", settings)
