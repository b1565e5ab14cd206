"""Files of MMDetection in our detectors: the published ones by their structure, and those that do not fit.

The names and shapes below and in ``official_networks.py`` are written down from the official code and MMDetection's,
not derived from ours.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effvit.backbones import create_backbone, open_checkpoint, read_checkpoint
from effvit.errors import CheckpointError
from effvit.tasks.detectors._mmdet_checkpoint import backbone_options_in, is_mmdet, load_mmdet
from effvit.tasks.detectors.factory import DetectorSettings, make_detector

_SPEC = importlib.util.spec_from_file_location("official_networks", Path(__file__).parents[1] / "official_networks.py")
official = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(official)
efficientformer, efficientformerv2, efficientvit = (
    official.efficientformer,
    official.efficientformerv2,
    official.efficientvit,
)
S0_WIDTHS, S0_RATIOS, S2_WIDTHS, S2_RATIOS = (
    official.S0_WIDTHS,
    official.S0_RATIOS,
    official.S2_WIDTHS,
    official.S2_RATIOS,
)
fpn, random_entry = official.fpn_layers, official.random_entry

# ---- MMDetection's necks and heads: our name of a layer, its name there, and its shape


def transposed(level, index, output, channels=256):
    yield f"pyramid.upsamplers.{level}", f"neck.extra_trans_convs.{index}.conv", (channels, channels, 2, 2)
    yield f"pyramid.outputs.{level}", f"neck.extra_fpn_convs.{output}.conv", (channels, channels, 3, 3)


def retina_head(classes=80, channels=256, convs=4):
    ours = "head.{}_head"
    for index in range(convs):
        for branch, there in (("classification", "cls"), ("regression", "reg")):
            name = f"{ours.format(branch)}.conv.{index}.0"
            yield name, f"bbox_head.{there}_convs.{index}.conv", (channels, channels, 3, 3)
    yield "head.classification_head.cls_logits", "bbox_head.retina_cls", (9 * classes, channels, 3, 3)
    yield "head.regression_head.bbox_reg", "bbox_head.retina_reg", (36, channels, 3, 3)


def box_heads(classes=80, channels=256, hidden=1024):
    yield "rpn.head.conv.0.0", "rpn_head.rpn_conv", (channels, channels, 3, 3)
    yield "rpn.head.cls_logits", "rpn_head.rpn_cls", (3, channels, 1, 1)
    yield "rpn.head.bbox_pred", "rpn_head.rpn_reg", (12, channels, 1, 1)
    head = "roi_head.bbox_head"
    yield "roi_heads.box_head.fc6", f"{head}.shared_fcs.0", (hidden, 49 * channels)
    yield "roi_heads.box_head.fc7", f"{head}.shared_fcs.1", (hidden, hidden)
    yield "roi_heads.box_predictor.cls_score", f"{head}.fc_cls", (classes + 1, hidden)
    yield "roi_heads.box_predictor.bbox_pred", f"{head}.fc_reg", (4 * classes, hidden)


def mask_head(classes=80, channels=256, convs=4):
    for index in range(convs):
        name = f"roi_head.mask_head.convs.{index}.conv"
        yield f"roi_heads.mask_head.{index}.0", name, (channels, channels, 3, 3)
    yield "roi_heads.mask_predictor.conv5_mask", "roi_head.mask_head.upsample", (channels, channels, 2, 2)
    yield "roi_heads.mask_predictor.mask_fcn_logits", "roi_head.mask_head.conv_logits", (classes, channels, 1, 1)


MICROSOFT = (("p4", "p5", "p6"), (128, 256, 384))
PUBLISHED = {
    "retinanet_efficientvit_m4": (
        efficientvit,
        [
            *fpn(*MICROSOFT),
            ("pyramid.downsamplers.p7", "neck.fpn_convs.3.conv", (256, 384, 3, 3)),
            *transposed("p3", 0, 0),
            *retina_head(),
        ],
    ),
    "mask_rcnn_efficientvit_m4": (
        efficientvit,
        [*fpn(*MICROSOFT), *transposed("p3", 0, 1), *transposed("p2", 1, 0), *box_heads(), *mask_head()],
    ),
    "mask_rcnn_efficientformer_l1": (
        efficientformer,
        [*fpn(("p2", "p3", "p4", "p5"), (48, 96, 224, 448)), *box_heads(), *mask_head()],
    ),
    "mask_rcnn_efficientformerv2_s0": (
        partial(efficientformerv2, S0_WIDTHS, S0_RATIOS, 2),
        [*fpn(("p2", "p3", "p4", "p5"), S0_WIDTHS), *box_heads(), *mask_head()],
    ),
    "mask_rcnn_efficientformerv2_s2": (
        partial(efficientformerv2, S2_WIDTHS, S2_RATIOS, 4),
        [*fpn(("p2", "p3", "p4", "p5"), S2_WIDTHS), *box_heads(), *mask_head()],
    ),
}


def mmdet_file(network, layers):
    """A checkpoint as MMDetection 2.x writes it."""
    torch.manual_seed(0)
    state = {}
    for name, shape in network:
        state[f"backbone.{name}"] = random_entry(name, shape)
        if name.endswith("running_var"):
            state[f"backbone.{name}".replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    for _, name, shape in layers:
        bias = shape[1] if "trans_convs" in name or "upsample" in name else shape[0]
        state[f"{name}.weight"], state[f"{name}.bias"] = random_entry(name, shape), random_entry(name, (bias,))
    meta = {
        "epoch": 12,
        "iter": 87960,
        "mmdet_version": "2.19.0",
        "config": "model = dict(...)",
        "CLASSES": ("person",),
    }
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def official_neck(state, maps, strides):
    """Pyramid levels by the description of MMDetection's FPN and of the official neck, by the file's own names."""

    def conv(x, name, **options):
        return F.conv2d(x, state[f"neck.{name}.conv.weight"], state[f"neck.{name}.conv.bias"], **options)

    merged = [conv(x, f"lateral_convs.{i}") for i, x in enumerate(maps)]
    for fine, coarse in reversed(list(itertools.pairwise(range(len(maps))))):
        merged[fine] = merged[fine] + F.interpolate(merged[coarse], size=merged[fine].shape[2:], mode="nearest")
    outputs = [conv(x, f"fpn_convs.{i}", padding=1) for i, x in enumerate(merged)]
    finer, x, count = [], merged[0], sum("extra_trans_convs" in name for name in state) // 2
    for i in range(count):
        name = f"neck.extra_trans_convs.{i}.conv"
        x = F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)
        finer.insert(0, x)
    finer = [conv(x, f"extra_fpn_convs.{i}", padding=1) for i, x in enumerate(finer)]
    if f"neck.fpn_convs.{len(maps)}.conv.weight" in state:
        outputs.append(conv(maps[-1], f"fpn_convs.{len(maps)}", stride=2, padding=1))
    while len(finer) + len(outputs) < len(strides):
        outputs.append(outputs[-1][..., ::2, ::2])
    return finer + outputs


QUICK = ("retinanet_efficientvit_m4", "mask_rcnn_efficientformerv2_s0")


@pytest.mark.parametrize(
    "published",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PUBLISHED],
)
def test_published_files_load_whole(published, tmp_path):
    kind, _, backbone = published.partition("_efficient")
    backbone = f"efficient{backbone}"
    network, layers = PUBLISHED[published]
    path = tmp_path / f"{published}_fpn_1x_coco.pth"
    torch.save(mmdet_file(network(), layers), path)
    state = read_checkpoint(path)
    assert is_mmdet(state)
    options = backbone_options_in(state, backbone)
    assert options == ({} if "vit" in backbone else {"official_grid": 25})

    detector = make_detector(kind, create_backbone(backbone, **options), 80, DetectorSettings()).eval()
    report = load_mmdet(detector, state, path)
    own = detector.state_dict()
    assert report.resized == report.mismatched == ()
    assert all(name.startswith("pyramid.backbone.norm.") for name in report.missing)  # of the classifier
    assert all(name.endswith("attention_biases") for name in report.unexpected)  # of the classifier too
    assert {*report.matched, *report.missing} == own.keys() - {"pyramid.backbone.norm.num_batches_tracked"}
    for ours, theirs, _ in layers:
        for parameter in ("weight", "bias"):
            assert torch.equal(own[f"{ours}.{parameter}"], state[f"{theirs}.{parameter}"]), ours
    arrived = {value.flatten()[0].item() for name, value in own.items() if "backbone" in name}
    unread = {*report.unexpected} | {name for name in state if "bias_idxs" in name}
    trunk = {name: value for name, value in state.items() if name.startswith("backbone.") and name not in unread}
    assert all(value.flatten()[0].item() in arrived for value in trunk.values())

    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        maps = list(detector.pyramid.backbone(images).values())
        expected = official_neck(state, maps, detector.pyramid.strides)
        found = detector.pyramid(images)
        detector.predict(images, [(96, 160)], [(96, 160)])
    for level, feature in zip(found.values(), expected, strict=True):
        assert torch.allclose(level, feature, rtol=1e-5, atol=1e-5 * float(feature.abs().max()))


# ---- small detectors, for what does not fit

SMALL = DetectorSettings(pyramid_channels=8, head_convs=1, head_channels=4)
M0 = (("p4", "p5", "p6"), (64, 128, 192))
M0_WIDTHS = {"widths": (64, 128, 192), "kernels": (5, 5, 5, 5)}


def small_file(kind="retinanet", classes=3, channels=8, convs=1, **network):
    layers = [*fpn(*M0, channels=channels)]
    if kind == "retinanet":
        layers += [("", "neck.fpn_convs.3.conv", (channels, 192, 3, 3)), *transposed("p3", 0, 0, channels)]
        layers += retina_head(classes, channels, convs)
    else:
        layers += [*transposed("p3", 0, 1, channels), *transposed("p2", 1, 0, channels)]
        layers += box_heads(classes, channels, 4)
    if kind == "mask_rcnn":
        layers += mask_head(classes, channels, convs)
    return mmdet_file(efficientvit(**{**M0_WIDTHS, **network}), layers)


def small_detector(kind="retinanet", backbone="efficientvit_m0"):
    return make_detector(kind, create_backbone(backbone), 3, SMALL)


@pytest.fixture(scope="module")
def detectors():
    return {kind: small_detector(kind) for kind in ("retinanet", "faster_rcnn", "mask_rcnn")}


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
@pytest.mark.parametrize("prefix", ["", "module.", "detector.model."])
def test_any_prefix(kind, prefix, detectors):
    state = {prefix + name: value for name, value in small_file(kind)["state_dict"].items()}
    assert is_mmdet(state)
    report = load_mmdet(detectors[kind], state, "x.pth")
    assert report.missing == report.unexpected == report.mismatched == ()
    weight = detectors[kind].pyramid.laterals["p5"].weight
    assert torch.equal(weight, state[f"{prefix}neck.lateral_convs.1.conv.weight"])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (
            "retinanet",
            "mask_rcnn",
            r"x\.pth holds a Mask R-CNN of MMDetection, not a RetinaNet.*--model.detector mask_rcnn",
        ),
        ("mask_rcnn", "retinanet", "holds a RetinaNet of MMDetection, not a Mask R-CNN"),
        ("faster_rcnn", "mask_rcnn", "holds a Mask R-CNN of MMDetection, not a Faster R-CNN"),
        ("mask_rcnn", "faster_rcnn", "holds a Faster R-CNN of MMDetection, not a Mask R-CNN"),
    ],
)
def test_a_file_of_another_detector_is_named(kind, given, message, detectors):
    with pytest.raises(CheckpointError, match=message):
        load_mmdet(detectors[kind], small_file(given)["state_dict"], "x.pth")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("bbox_head.retina_cls", "bbox_head.atss_cls", r"none of ours \(bbox_head.atss_cls, .*--model.detector mmdet"),
        ("bbox_head.retina_cls", "bbox_head.cls_branches.0", "none of ours"),
        ("roi_head.bbox_head.", "roi_head.bbox_head.0.", "none of ours"),  # Cascade R-CNN
    ],
)
def test_a_file_of_a_detector_that_we_have_not_is_refused(old, new, message, detectors):
    kind = "retinanet" if "retina" in old else "faster_rcnn"
    state = {name.replace(old, new): value for name, value in small_file(kind)["state_dict"].items()}
    with pytest.raises(CheckpointError, match=message):
        load_mmdet(detectors[kind], state, "x.pth")


@pytest.mark.parametrize("kind", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_another_number_of_classes_is_refused(kind, detectors):
    with pytest.raises(CheckpointError, match=r"trained on 80 classes and this detector is for 3"):
        load_mmdet(detectors[kind], small_file(kind, classes=80)["state_dict"], "x.pth")


def test_the_number_of_classes_is_told_of_a_head_with_other_anchors(detectors):
    state = small_file(classes=80)["state_dict"]
    for name, outputs in (("retina_cls", 80), ("retina_reg", 4)):
        state[f"bbox_head.{name}.weight"] = torch.zeros(3 * outputs, 8, 3, 3)
        state[f"bbox_head.{name}.bias"] = torch.zeros(3 * outputs)
    with pytest.raises(CheckpointError, match=r"trained on 80 classes and this detector is for 3"):
        load_mmdet(detectors["retinanet"], state, "x.pth")


def test_another_backbone_is_refused_and_named(monkeypatch):
    monkeypatch.setattr("effvit.backbones._checkpoint.list_backbones", lambda: ["efficientvit_m0", "efficientvit_m1"])
    detector = small_detector(backbone="efficientvit_m1")
    before = detector.pyramid.backbone.patch_embed.conv1.conv.weight.clone()
    with pytest.raises(CheckpointError, match=r"does not fill efficientvit_m1: these look like .* efficientvit_m0"):
        load_mmdet(detector, small_file()["state_dict"], "x.pth")
    assert torch.equal(detector.pyramid.backbone.patch_embed.conv1.conv.weight, before)


def test_snaps_dense_network_is_told_from_others(monkeypatch):
    monkeypatch.setattr("effvit.backbones._checkpoint.list_backbones", lambda: ["efficientformer_l1"])
    layers = [*fpn(("p2", "p3", "p4", "p5"), (48, 96, 224, 448), 8), *box_heads(3, 8, 4), *mask_head(3, 8, 1)]
    detector = make_detector("mask_rcnn", create_backbone("mobilevit_xxs"), 3, SMALL)
    with pytest.raises(CheckpointError, match="these look like the weights of efficientformer_l1"):
        load_mmdet(detector, mmdet_file(efficientformer(), layers)["state_dict"], "x.pth")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("retinanet", {"convs": 2}, r"head_convs.*it also has bbox_head.cls_convs.1.conv.weight, .* and 1 more"),
        ("mask_rcnn", {"convs": 0}, "it lacks roi_head.mask_head.convs.0.conv.weight"),
        ("retinanet", {"channels": 16}, r"neck.lateral_convs.0.conv.weight \(16, 64, 1, 1\) for \(8, 64, 1, 1\)"),
    ],
)
def test_other_layers_are_named(kind, options, message, detectors):
    before = {name: value.clone() for name, value in detectors[kind].state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_mmdet(detectors[kind], small_file(kind, **options)["state_dict"], "x.pth")
    assert all(torch.equal(value, before[name]) for name, value in detectors[kind].state_dict().items())


def test_the_plain_neck_of_mmdetection_has_no_finer_levels(detectors):
    state = {name: value for name, value in small_file()["state_dict"].items() if "extra" not in name}
    with pytest.raises(CheckpointError, match=r"same strides: it lacks neck.extra_trans_convs"):
        load_mmdet(detectors["retinanet"], state, "x.pth")


def test_a_part_of_the_backbone_is_not_enough(detectors, monkeypatch):
    monkeypatch.setattr("effvit.backbones._checkpoint.list_backbones", lambda: ["efficientvit_m0"])
    state = {name: value for name, value in small_file()["state_dict"].items() if "blocks3.4" not in name}
    with pytest.raises(CheckpointError, match="does not fill efficientvit_m0"):
        load_mmdet(detectors["retinanet"], state, "x.pth")


def test_a_detector_without_counterpart_is_refused():
    detector = nn.Module()
    detector.backbone = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="weights Module cannot take"):
        load_mmdet(detector, small_file()["state_dict"], "x.pth")


def test_snaps_file_needs_its_own_tables():
    detector = make_detector("mask_rcnn", create_backbone("efficientformer_l1"), 3, SMALL)
    layers = [*fpn(("p2", "p3", "p4", "p5"), (48, 96, 224, 448), 8), *box_heads(3, 8, 4), *mask_head(3, 8, 1)]
    with pytest.raises(CheckpointError, match="official_grid=25"):
        load_mmdet(detector, mmdet_file(efficientformer(), layers)["state_dict"], "x.pth")


def test_a_file_of_something_else_is_refused(detectors):
    with pytest.raises(CheckpointError, match="holds no detector of MMDetection"):
        load_mmdet(detectors["retinanet"], {"backbone.patch_embed.0.c.weight": torch.zeros(1)}, "x.pth")


@pytest.mark.parametrize(
    "names",
    [
        ["backbone.patch_embed.0.c.weight", "decode_head.conv_seg.weight"],
        ["pyramid.backbone.stem.conv1.conv.weight", "pyramid.laterals.p4.weight", "head.regression_head.bbox_reg.bias"],
        ["rpn.head.cls_logits.weight", "roi_heads.box_head.fc6.weight", "roi_heads.mask_head.0.0.weight"],
        ["backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight"],
    ],
)
def test_other_files_are_not_mmdetections(names):
    assert not is_mmdet({name: torch.zeros(1) for name in names})


# ---- what a Runner stores beside the weights


class HistoryBuffer:
    """Pickled as MMDetection's: an array, and methods found by name."""

    def __init__(self):
        self._log_history = np.arange(3.0)
        self._statistics_methods = {"min": HistoryBuffer.min, "mean": self.mean}

    def min(self): ...
    def mean(self): ...


def test_a_runners_logs_are_passed_over(tmp_path, monkeypatch, detectors):
    package, module = ModuleType("mmengine"), ModuleType("mmengine.logging")
    module.HistoryBuffer, HistoryBuffer.__module__ = HistoryBuffer, "mmengine.logging"
    monkeypatch.setitem(sys.modules, "mmengine", package)
    monkeypatch.setitem(sys.modules, "mmengine.logging", module)
    content = small_file() | {"message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}, "resumed_keys": {1, 2}}}
    content["meta"]["best_score"] = np.float64(0.327)
    torch.save(content, tmp_path / "epoch_12.pth")
    monkeypatch.delitem(sys.modules, "mmengine.logging")
    monkeypatch.delitem(sys.modules, "mmengine")
    opened = open_checkpoint(tmp_path / "epoch_12.pth")
    assert opened["meta"]["CLASSES"] == ("person",)
    assert not hasattr(opened["message_hub"]["log_scalars"]["train/loss"], "_log_history")
    report = load_mmdet(detectors["retinanet"], read_checkpoint(tmp_path / "epoch_12.pth"), "epoch_12.pth")
    assert report.missing == report.unexpected == ()
    torch.save({"hyper_parameters": {"lr": np.float64(0.1)}, "state_dict": {}}, tmp_path / "run.ckpt")
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path / "run.ckpt")


class Payload:
    """Would do what it was given, if it were unpickled."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def test_nothing_in_a_file_is_executed(tmp_path):
    state, marker = {"bbox_head.retina_cls.bias": torch.zeros(9)}, tmp_path / "executed"
    torch.save({"state_dict": state, "meta": Payload(marker.touch)}, tmp_path / "x.pth")
    assert list(read_checkpoint(tmp_path / "x.pth")) == list(state)
    for payload in (Payload(eval, f"open({str(marker)!r}, 'w')"), Payload(os.mkdir, str(marker))):
        torch.save({"state_dict": state, "meta": payload}, tmp_path / "x.pth")
        with pytest.raises(CheckpointError, match=r"refused and nothing of it was executed"):
            read_checkpoint(tmp_path / "x.pth")
    assert not marker.exists()
