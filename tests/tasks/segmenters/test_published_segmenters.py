"""Files of mmsegmentation and ml-cvnets in our segmenters: the published ones by their structure, and what fits not.

The names and shapes are written down from the official code (snap-research/EfficientFormer ``segmentation``,
open-mmlab/mmsegmentation ``FPN``, ``FPNHead`` and ``FCNHead``, apple/ml-cvnets ``cvnets/models/segmentation``).
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch

from effvit.backbones import create_backbone, read_checkpoint
from effvit.errors import CheckpointError
from effvit.tasks.segmenters.factory import SegmenterSettings, make_segmenter
from effvit.tasks.segmenters.published import backbone_options_in, is_published, load_published

_SPEC = importlib.util.spec_from_file_location("official_networks", Path(__file__).parents[1] / "official_networks.py")
official = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(official)


def conv_module(name, out, into, side):
    yield f"{name}.conv.weight", (out, into, side, side)
    yield from official.norm(f"{name}.bn", out)


def mmseg_heads(widths, classes=150, channels=256, width=128, auxiliary=None):
    """mmsegmentation's FPN and FPNHead, and FCNHead."""
    for index, into in enumerate(widths):
        yield from official.layer(f"neck.lateral_convs.{index}.conv", channels, into, 1, 1)
        yield from official.layer(f"neck.fpn_convs.{index}.conv", channels, channels, 3, 3)
        for step in range(max(1, index)):
            name = f"decode_head.scale_heads.{index}.{2 * step}"
            yield from conv_module(name, width, width if step else channels, 3)
    yield from official.layer("decode_head.conv_seg", classes, width, 1, 1)
    if auxiliary is not None:
        yield from conv_module("auxiliary_head.convs.0", 256, auxiliary, 3)
        yield from official.layer("auxiliary_head.conv_seg", classes, 256, 1, 1)


def drawn(entries, prefix=""):
    torch.manual_seed(0)
    state = {}
    for name, shape in entries:
        state[prefix + name] = official.random_entry(name, shape)
        if name.endswith("running_var"):
            state[prefix + name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state


def mmseg_file(network, heads):
    """A checkpoint as mmsegmentation 0.x writes it."""
    state = drawn(network, "backbone.") | drawn(heads)
    meta = {"iter": 40000, "mmseg_version": "0.19.0", "CLASSES": ("wall",), "PALETTE": [[120, 120, 120]]}
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


SNAP = {
    "efficientformer_l1": (partial(official.efficientformer, grid=16), (48, 96, 224, 448)),
    "efficientformerv2_s0": (
        partial(official.efficientformerv2, official.S0_WIDTHS, official.S0_RATIOS, 2, grid=16),
        official.S0_WIDTHS,
    ),
    "efficientformerv2_s2": (
        partial(official.efficientformerv2, official.S2_WIDTHS, official.S2_RATIOS, 4, grid=16),
        official.S2_WIDTHS,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "efficientformerv2_s0" else pytest.mark.slow) for name in SNAP],
)
def test_snaps_files_load_whole(name, tmp_path):
    network, widths = SNAP[name]
    path = tmp_path / f"fpn_{name}_ade20k_40k.pth"
    torch.save(mmseg_file(network(), mmseg_heads(widths)), path)
    state = read_checkpoint(path)
    assert is_published(state)
    options = backbone_options_in(state, name)
    assert options == {"official_grid": 16}
    segmenter = make_segmenter("semantic_fpn", name, 150, SegmenterSettings(), backbone_options=options)
    report = load_published(segmenter, state, path)
    assert report.resized == report.mismatched == ()
    assert all(entry.startswith("backbone.norm.") for entry in report.missing)  # of the classifier
    assert all(entry.endswith("attention_biases") for entry in report.unexpected)  # of the classifier too
    own = segmenter.state_dict()
    assert {*report.matched, *report.missing} == own.keys() - {"backbone.norm.num_batches_tracked"}
    arrived = {value.flatten()[0].item() for value in own.values()}
    unread = {*report.unexpected} | {entry for entry in state if "bias_idxs" in entry}
    assert all(value.flatten()[0].item() in arrived for entry, value in state.items() if entry not in unread)
    for ours, theirs in (
        ("neck.laterals.p2", "neck.lateral_convs.0.conv"),
        ("neck.outputs.p5", "neck.fpn_convs.3.conv"),
        ("head.conv_seg", "decode_head.conv_seg"),
    ):
        assert torch.equal(own[f"{ours}.weight"], state[f"{theirs}.weight"])
        assert torch.equal(own[f"{ours}.bias"], state[f"{theirs}.bias"])
    theirs = [entry for entry in state if "scale_heads" in entry]
    assert all(torch.equal(own[entry.replace("decode_head", "head")], state[entry]) for entry in theirs)
    assert not segmenter.align_corners
    with torch.no_grad():
        assert segmenter.eval()(torch.randn(1, 3, 64, 96))["logits"].isfinite().all()


# ---- small ones of mmsegmentation

M0 = {"widths": (64, 128, 192), "kernels": (5, 5, 5, 5)}


@pytest.fixture(scope="module")
def small():
    """A Semantic FPN on MobileViT, under mmsegmentation's names."""
    segmenter = make_segmenter("semantic_fpn", "mobilevit_xxs", 3, SMALL)
    trunk = {f"backbone.{name}": value.clone() for name, value in segmenter.backbone.state_dict().items()}
    heads = mmseg_heads((24, 48, 64, 80), 3, 8, 6, auxiliary=64)
    return segmenter, trunk | drawn(heads)


SMALL = SegmenterSettings(pyramid_channels=8, head_channels=6)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_any_prefix_and_an_auxiliary_head_that_is_left_out(prefix, small):
    segmenter, state = small
    report = load_published(segmenter, {prefix + name: value for name, value in state.items()}, "x.pth")
    assert report.missing == report.unexpected == report.mismatched == ()
    assert torch.equal(segmenter.head.conv_seg.bias, state["decode_head.conv_seg.bias"])


def test_an_auxiliary_head_is_loaded_where_there_is_one(small):
    _, state = small
    settings = SegmenterSettings(pyramid_channels=8, head_channels=6, auxiliary=True)
    segmenter = make_segmenter("semantic_fpn", "mobilevit_xxs", 3, settings)
    report = load_published(segmenter, state, "x.pth")
    assert "auxiliary.conv.conv.weight" in report.matched
    assert torch.equal(segmenter.auxiliary.conv.conv.weight, state["auxiliary_head.convs.0.conv.weight"])
    assert torch.equal(segmenter.auxiliary.conv_seg.bias, state["auxiliary_head.conv_seg.bias"])
    without = {name: value for name, value in state.items() if not name.startswith("auxiliary_head.")}
    with pytest.raises(CheckpointError, match=r"auxiliary head must be the file's.* it lacks auxiliary_head"):
        load_published(segmenter, without, "x.pth")


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


def with_value(state, name, value):
    return {**state, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: with_value(state, "decode_head.conv_seg.bias", torch.zeros(150)),
            r"x\.pth was trained on 150 classes and this segmenter is for 3.*--model.pretrained",
        ),
        (
            lambda state: without(state, "scale_heads.3.4"),
            r"pyramid_channels, head_channels.*it lacks decode_head.scale_heads.3.4.conv.weight",
        ),
        (
            lambda state: with_value(state, "decode_head.scale_heads.4.0.conv.weight", torch.zeros(6, 8, 3, 3)),
            r"it also has decode_head.scale_heads.4.0.conv.weight",
        ),
        (
            lambda state: with_value(state, "decode_head.conv_seg.weight", torch.zeros(3, 128, 1, 1)),
            r"of another shape are decode_head.conv_seg.weight \(3, 128, 1, 1\) for \(3, 6, 1, 1\)",
        ),
        (
            lambda state: {name.replace("scale_heads", "aspp_modules"): value for name, value in state.items()},
            r"none of ours \(decode_head.aspp_modules, decode_head.conv_seg\).*only files of Semantic FPN",
        ),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(change, message, small):
    segmenter, state = small
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_published(segmenter, change(state), "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_a_file_of_another_backbone_or_segmenter_is_named(small, monkeypatch):
    monkeypatch.setattr("effvit.backbones._checkpoint.list_backbones", lambda: ["mobilevit_xxs", "mobilevit_xs"])
    _, state = small
    other = make_segmenter("semantic_fpn", "mobilevit_xs", 3, SMALL)
    with pytest.raises(CheckpointError, match=r"does not fill mobilevit_xs: these look like .* mobilevit_xxs"):
        load_published(other, state, "x.pth")
    deeplab = make_segmenter("deeplabv3", "mobilevit_xxs", 3, SegmenterSettings(head_channels=4))
    with pytest.raises(CheckpointError, match=r"holds a Semantic FPN of mmsegmentation.*--model.head semantic_fpn"):
        load_published(deeplab, state, "x.pth")


def test_snaps_file_needs_its_own_tables():
    network, widths = SNAP["efficientformerv2_s0"]
    state = mmseg_file(network(), mmseg_heads(widths, 3, 8, 6))["state_dict"]
    segmenter = make_segmenter("semantic_fpn", "efficientformerv2_s0", 3, SMALL)
    with pytest.raises(CheckpointError, match="official_grid=16"):
        load_published(segmenter, state, "x.pth")


# ---- ml-cvnets


def block(name, out, into, side=1):
    yield f"{name}.block.conv.weight", (out, into, side, side)
    yield from official.norm(f"{name}.block.norm", out)


def apple_head(into=80, width=4, classes=3, *, first):
    """DeepLabv3 of ml-cvnets of version 0.1 or of a later one; the later with an auxiliary head."""
    aspp = "seg_head.aspp.aspp_layer"
    for branch in range(4):
        yield from block(f"{aspp}.convs.{branch}", width, into, 3 if branch else 1)
    yield from block(f"{aspp}.convs.4.aspp_pool.conv_1x1", width, into)
    yield from block(f"{aspp}.project", width, 5 * width)
    classifier = "seg_head.classifier.classifier" if first else "seg_head.classifier"
    yield from official.layer(f"{classifier}.block.conv", classes, width, 1, 1)
    projection, last = ("aux_projection", "aux_classifier") if first else ("0", "2")
    yield from block(f"seg_head.aux_head.{projection}", 128, 64, 3)
    yield from official.layer(f"seg_head.aux_head.{last}.block.conv", classes, 128, 1, 1)


def apple_file(*, first, **head):
    trunk = create_backbone("mobilevit_xxs").state_dict()
    encoder = {f"encoder.{name}": value for name, value in trunk.items() if "final_conv" not in name}
    # Apple's name of the first convolution, by which its colours go; the others are tested with the backbone.
    encoder["encoder.conv_1.block.conv.weight"] = encoder.pop("encoder.stem.conv.weight")
    return encoder | drawn(apple_head(first=first, **head))


def apple_segmenter(state=None, **settings):
    options = {} if state is None else backbone_options_in(state, "mobilevit_xxs")
    settings = SegmenterSettings(**{"head_channels": 4, **settings})
    return make_segmenter("deeplabv3", "mobilevit_xxs", 3, settings, backbone_options=options)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_apples_files_load_whole(first, auxiliary, tmp_path):
    torch.save(apple_file(first=first), tmp_path / "deeplabv3_mobilevit_xxs.pt")
    state = read_checkpoint(tmp_path / "deeplabv3_mobilevit_xxs.pt")
    assert is_published(state)
    segmenter = apple_segmenter(state, auxiliary=auxiliary)
    report = load_published(segmenter, state, "x.pt")
    assert report.unexpected == report.mismatched == report.resized == ()
    assert all(name.startswith("backbone.final_conv.") for name in report.missing)
    own = segmenter.state_dict()
    assert {*report.matched, *report.missing} == own.keys() - {"backbone.final_conv.bn.num_batches_tracked"}
    aspp = "seg_head.aspp.aspp_layer"
    for ours, theirs in (
        ("head.branches.0", f"{aspp}.convs.0"),
        ("head.branches.3", f"{aspp}.convs.3"),
        ("head.pool", f"{aspp}.convs.4.aspp_pool.conv_1x1"),
        ("head.project", f"{aspp}.project"),
        *([("auxiliary.conv", f"seg_head.aux_head.{'aux_projection' if first else '0'}")] if auxiliary else []),
    ):
        assert torch.equal(own[f"{ours}.conv.weight"], state[f"{theirs}.block.conv.weight"])
        assert torch.equal(own[f"{ours}.bn.running_var"], state[f"{theirs}.block.norm.running_var"])
    assert torch.equal(
        own["head.conv_seg.bias"], state[f"seg_head.{'classifier.' * (2 if first else 1)}block.conv.bias"]
    )
    # The first version reads BGR and does not align corners; a later one is the other way round in both.
    stem = state["encoder.conv_1.block.conv.weight"]
    assert torch.equal(own["backbone.stem.conv.weight"], stem.flip(1) if first else stem)
    assert segmenter.align_corners == (not first)


def test_what_of_apples_does_not_fit_is_named(monkeypatch):
    monkeypatch.setattr("effvit.backbones._checkpoint.list_backbones", lambda: ["mobilevit_xxs", "mobilevit_xs"])
    state = apple_file(first=True)
    segmenter = apple_segmenter()
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    many = {**state, "seg_head.classifier.classifier.block.conv.bias": torch.zeros(21)}
    for given, message in (
        (many, "trained on 21 classes and this segmenter is for 3"),
        (without(state, "project"), r"another head.*it lacks seg_head.aspp.aspp_layer.project"),
        (
            apple_file(first=True, width=8),
            r"head_channels .*must be the file's.*convs.0.block.conv.weight \(8, 80, 1, 1\)",
        ),
        (without(state, "stages.4.0"), "does not fill mobilevit_xxs"),
        ({"seg_head.psp_layer.weight": torch.zeros(1)}, "a segmenter other than DeepLabv3 of ml-cvnets"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_published(segmenter, given, "x.pt")
        assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())
    xs = make_segmenter("deeplabv3", "mobilevit_xs", 3, SegmenterSettings(head_channels=4))
    with pytest.raises(CheckpointError, match="these look like the weights of mobilevit_xxs"):
        load_published(xs, state, "x.pt")
    fpn = make_segmenter("semantic_fpn", "mobilevit_xxs", 3, SMALL)
    with pytest.raises(CheckpointError, match=r"holds a DeepLabv3 of ml-cvnets.*--model.head deeplabv3"):
        load_published(fpn, state, "x.pt")
    with pytest.raises(CheckpointError, match=r"it lacks seg_head\.aux_head\.aux_projection"):
        load_published(apple_segmenter(auxiliary=True), without(state, "aux_head"), "x.pt")


def test_only_segmenters_are_taken_for_them():
    assert not is_published({"backbone.stem.conv.weight": torch.zeros(1), "head.conv_seg.bias": torch.zeros(1)})
    assert not is_published({"encoder.conv_1.block.conv.weight": torch.zeros(1), "ssd_heads.0.x": torch.zeros(1)})
    assert (
        backbone_options_in(
            {"encoder.x": torch.zeros(1), "seg_head.classifier.block.conv.bias": torch.zeros(1)}, "mobilevitv2_050"
        )
        == {}
    )
