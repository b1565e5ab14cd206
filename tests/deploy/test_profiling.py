"""Kinds of work, types of block, stages: what they are called is exact, what they take is measured elsewhere."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from effvit.backbones import create_backbone, create_classifier
from effvit.deploy import profiling
from effvit.deploy._operators import kind_of
from effvit.deploy._structure import blocks_of, stages_of
from effvit.deploy.parts import called_in
from effvit.deploy.profiling import MEMORY_BOUND, WORK, profile
from effvit.deploy.records import Subject
from effvit.errors import ConfigError
from effvit.tasks.detection import Detection

SIDE = 64
STAGES = {
    "efficientvit_m0": "patch_embed stages.0 stages.1 stages.2 backbone head",
    "efficientformer_l1": "stem stages.0 stages.1 stages.2 stages.3 norm head head_dist",
    "efficientformerv2_s0": "stem stages.0 stages.1 stages.2 stages.3 norm head head_dist",
    "mobilevit_xxs": "stem stages.0 stages.1 stages.2 stages.3 stages.4 final_conv head",
    "mobilevitv2_050": "stem stages.0 stages.1 stages.2 stages.3 stages.4 head",
    "dynamicvit_tiny": "patch_embed "
    + " ".join(f"blocks.{number}" for number in range(12))
    + " norm score_predictor position head",
}
BLOCKS = {
    "efficientvit_m0": {"Stem": 1, "Block": 6, "Downsample": 2, "NormLinear": 1},
    "efficientformer_l1": {"Stem": 1, "PoolBlock": 14, "AttentionBlock": 1, "Downsample": 3},
    "efficientformerv2_s0": {"Stem": 1, "Block": 14, "Downsample": 3},
    "mobilevit_xxs": {"ConvNorm": 2, "InvertedResidual": 7, "MobileViTBlock": 3},
    "mobilevitv2_050": {"ConvNorm": 1, "InvertedResidual": 6, "MobileViTv2Block": 3},
    "dynamicvit_tiny": {"PatchEmbed": 1, "Block": 12, "ScorePredictor": 3},
}


def inputs(batch=1, side=SIDE):
    return (torch.zeros(batch, 3, side, side),)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_families_show_their_stages_and_blocks_and_no_operator_is_unknown(name):
    network = create_classifier(name).eval()
    called = called_in(network, inputs())
    assert list(stages_of(network, called)) == STAGES[name].split()
    blocks = blocks_of(network, called)
    found = list(blocks.values())
    assert {type_: found.count(type_) for type_ in BLOCKS[name]} == BLOCKS[name]
    for form in (network, network.fuse()):
        called = called_in(form, inputs())
        with torch.no_grad():
            operators = profiling._operators(form, inputs(), blocks_of(form, called), "cpu")
        assert len(operators) > 100
        assert {operator.name for operator in operators if kind_of(operator.name) is None} == set()
        assert "" not in {operator.block for operator in operators}
        assert {"reshape", "activation"} < {kind_of(operator.name) for operator in operators}


@pytest.mark.parametrize("name", ["ssdlite", "retinanet", pytest.param("mask_rcnn", marks=pytest.mark.slow)])
def test_detectors_show_their_parts_and_no_operator_is_unknown(name):
    backbone = "mobilevit_xxs" if name == "ssdlite" else "efficientvit_m0"
    network = Detection(backbone, {1: "one", 2: "two"}, detector=name).deployable().eval()
    images = network.example_inputs(1, (SIDE, SIDE))
    called = called_in(network, images)
    stages = list(stages_of(network, called))
    assert stages[0] in {"stem", "patch_embed"}
    assert {"ssdlite": {"coarser", "heads"}, "retinanet": {"pyramid", "head"}}.get(name, {"rpn", "roi_heads"}) < {
        *stages
    }
    with torch.no_grad():
        operators = profiling._operators(network, images, blocks_of(network, called), "cpu")
    assert {operator.name for operator in operators if kind_of(operator.name) is None} == set()
    assert "selection" in {kind_of(operator.name) for operator in operators}


def test_networks_of_timm_show_their_stages():
    pytest.importorskip("timm")
    network = create_classifier("timm/resnet18").eval()
    called = called_in(network, inputs())
    assert list(stages_of(network, called)) == (
        "conv1 bn1 act1 maxpool layer1 layer2 layer3 layer4 global_pool head".split()
    )
    assert list(blocks_of(network, called).values()).count("BasicBlock") == 8


def test_a_plain_network_shows_its_children():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Flatten()), nn.LazyLinear(2))
    called = called_in(network, inputs())
    assert list(stages_of(network, called)) == ["0", "1", "2"]
    assert blocks_of(network, called) == {network: "Sequential"}


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::_slow_conv2d_forward", "convolution"),
        ("mkldnn::_convolution_pointwise", "convolution"),
        ("aten::cudnn_convolution_add_relu", "convolution"),
        ("aten::conv_depthwise3d", "convolution"),
        ("aten::addmm_", "matrix"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "matrix"),
        ("aten::native_batch_norm", "normalisation"),
        ("aten::_batch_norm_impl_index", "normalisation"),
        ("aten::add_", "elementwise"),
        ("aten::_softmax", "elementwise"),
        ("aten::__and__", "elementwise"),
        ("aten::copy_", "reshape"),
        ("aten::index_select", "reshape"),
        ("aten::clamp_min_", "activation"),
        ("aten::hardswish_", "activation"),
        ("aten::max_pool2d_with_indices", "pooling"),
        ("aten::max", "elementwise"),
        ("torchvision::nms", "selection"),
        ("aten::unfold", "reshape"),
        ("mine::attention_of_the_future", None),
        ("aten::convolve_me", None),
    ],
)
def test_kinds_of_operators(operator, kind):
    assert kind_of(operator) == kind


def test_shares_add_up_and_what_is_unknown_is_named():
    operator = profiling._Operator
    tally = profiling._tally(
        [
            operator("aten::mm", "Block", 40.0),
            operator("aten::copy_", "Block", 30.0),
            operator("aten::copy_", "Stem", 10.0),
            operator("mine::magic", "Stem", 20.0),
        ]
    )
    assert tally.work == {**dict.fromkeys(WORK, 0.0), "matrix": 0.4, "reshape": 0.4, "other": 0.2}
    assert tally.blocks == {"Block": {"matrix": 0.4, "reshape": 0.3}, "Stem": {"reshape": 0.1, "other": 0.2}}
    assert tally.unknown == {"mine::magic": 0.2}


def test_an_interrupted_call_does_not_count():
    rows = [
        [profiling._Operator("aten::mm", "a", taken), profiling._Operator("aten::add", "a", 1.0)]
        for taken in (2.0, 90.0, 3.0)
    ]
    assert [operator.taken for operator in profiling._typical(rows)] == [3.0, 1.0]
    assert len(profiling._typical([*rows, rows[0][:1]])) == 7


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


class Network(nn.Module):
    """A stem, two stages of one and two blocks, and 0.5 s and 4 s of its own before and after them."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), clock.layer(1.0))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(nn.Sequential(nn.BatchNorm2d(4), clock.layer(seconds))) for seconds in stage))
            for stage in ((2.0,), (3.0, 5.0))
        )

    def forward(self, x):
        self.clock.now += 0.5
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        self.clock.now += 4.0
        return x + 1


def test_profile_of_a_small_network(clock):
    network = Network(clock).eval()
    threads = torch.get_num_threads()
    found = profile(Subject("small", network, (8, 8), lambda batch: inputs(batch, 8)), 2)
    assert found.stages == {"stem": 1.0, "stages.0": 2.0, "stages.1": 8.0, "rest": 4.5}
    assert found.seconds == sum(found.stages.values()) == 15.5
    assert (found.model, found.batch, found.size, found.device, found.threads) == ("small", 2, (8, 8), "cpu", 1)
    assert found.counts == {"Block": 3, "Network": 1} == dict.fromkeys(found.blocks, 1) | {"Block": 3}
    assert found.blocks["Block"].keys() <= {"normalisation", "reshape"}
    assert found.blocks["Block"]["normalisation"] > 0
    assert "normalisation" not in found.blocks["Network"]
    assert {"convolution", "elementwise"} <= found.blocks["Network"].keys()
    assert sum(found.work.values()) == pytest.approx(1)
    assert sum(share for work in found.blocks.values() for share in work.values()) == pytest.approx(1)
    assert found.memory_bound == pytest.approx(sum(found.work[kind] for kind in MEMORY_BOUND))
    assert 0 < found.memory_bound < 1
    assert not found.unknown
    assert torch.get_num_threads() == threads
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in network.modules())


@pytest.mark.parametrize(("batch", "threads", "device"), [(0, 1, "cpu"), (1, 0, "cpu"), (1, 1, "cuda"), (1, 1, "tpu")])
def test_what_cannot_be_profiled_is_refused(monkeypatch, batch, threads, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    subject = Subject("none", nn.Identity(), (8, 8), lambda batch: inputs(batch, 8))
    with pytest.raises(ConfigError, match=r"at least 1|device"):
        profile(subject, batch, threads=threads, device=device)


def test_a_network_is_left_without_ranges_after_an_error():
    network = create_backbone("efficientvit_m0").eval()
    blocks = blocks_of(network, called_in(network, inputs()))
    with pytest.raises(RuntimeError), torch.no_grad():
        profiling._operators(network, (torch.zeros(1, 5, SIDE, SIDE),), blocks, "cpu")
    assert not any(own._forward_hooks or own._forward_pre_hooks for own in network.modules())


@pytest.mark.parametrize("level", [None, "3"])
def test_the_profilers_setting_is_as_before(monkeypatch, level):
    monkeypatch.delenv("KINETO_LOG_LEVEL", raising=False)
    if level is not None:
        monkeypatch.setenv("KINETO_LOG_LEVEL", level)
    with profiling._quiet():
        assert os.environ["KINETO_LOG_LEVEL"] == (level or "99")
    assert os.environ.get("KINETO_LOG_LEVEL") == level
