"""Detectors of MMDetection, saved as its Runner saves, give the same maps and detections in ours."""

from __future__ import annotations

from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import get_state_dict, save_checkpoint, weights_to_cpu

from effvit.backbones import create_backbone, read_checkpoint
from effvit.errors import CheckpointError
from effvit.tasks.detectors._mmdet_checkpoint import backbone_options_in, load_mmdet
from effvit.tasks.detectors.factory import DetectorSettings, make_detector
from effvit.tasks.mmdetection import MMDetector

BASE = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models"
CLASSES, CHANNELS, HIDDEN = 5, 16, 32
SETTINGS = DetectorSettings(pyramid_channels=CHANNELS, head_convs=2, head_channels=HIDDEN)
RPN = f"rpn_head=dict(in_channels={CHANNELS}, feat_channels={CHANNELS})"
WIDTHS = f"in_channels={CHANNELS}, fc_out_channels={HIDDEN}"
BOXES = f"bbox_roi_extractor=dict(out_channels={CHANNELS}), bbox_head=dict({WIDTHS})"
MASK_WIDTHS = f"in_channels={CHANNELS}, conv_out_channels={CHANNELS}, num_convs=2"
MASKS = f"mask_roi_extractor=dict(out_channels={CHANNELS}), mask_head=dict({MASK_WIDTHS})"
RETINA = f"bbox_head=dict(in_channels={CHANNELS}, feat_channels={CHANNELS}, stacked_convs=2)"
HEADS = {
    "retinanet": ("retinanet_r50_fpn.py", RETINA),
    "faster_rcnn": ("faster-rcnn_r50_fpn.py", f"{RPN}, roi_head=dict({BOXES})"),
    "mask_rcnn": ("mask-rcnn_r50_fpn.py", f"{RPN}, roi_head=dict({BOXES}, {MASKS})"),
}
RESNET = "backbone=dict(depth=18, init_cfg=None), neck=dict(in_channels=[64, 128, 256, 512])"
FINAL = {"retina_cls.": 3.0, "fc_cls.": 6.0, "rpn_cls.": 3.0, "retina_reg.": 0.3, "fc_reg.": 0.3, "rpn_reg.": 0.3}


@torch.no_grad()
def spread(model):
    """Weights that leave no layer at a neutral start, and detections of every score."""
    generator = torch.Generator().manual_seed(1)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif name.endswith(("running_mean", ".bias", "biases", "biases_seg")):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
        elif not name.startswith("backbone.") and value.ndim > 1:
            factor = next((value for part, value in FINAL.items() if part in name), 1.4)
            value.copy_(torch.randn(value.shape, generator=generator) * factor / value[0].numel() ** 0.5)


def theirs_of(kind, backbone, tmp_path, options=None):
    """MMDetection's detector; on its own ResNet-18 where no backbone is given."""
    base, heads = HEADS[kind]
    resnet = RESNET.replace("neck=dict(", f"neck=dict(out_channels={CHANNELS}, ")
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(BASE / base)!r}\nmodel = dict({resnet}, {heads})\n")
    torch.manual_seed(0)
    detector = MMDetector(str(path), CLASSES, backbone=backbone, backbone_options=options)
    spread(detector.model)
    return detector.eval()


def save(model, path):
    """As ``Runner.save_checkpoint`` does, logs of the training included."""
    hub = MessageHub.get_instance(path.name)
    hub.update_scalar("train/loss", 1.5)
    hub.update_info("best", np.float32(0.25))
    content = {
        "meta": {"epoch": 12, "iter": 100, "cfg": "...", "dataset_meta": {"classes": ("a", "b")}},
        "state_dict": weights_to_cpu(get_state_dict(model)),
        "message_hub": hub.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        "param_schedulers": [{"last_step": np.int64(3)}],
    }
    save_checkpoint(content, str(path))


SLOW = [
    ("retinanet", "mobilevit_xxs", {}),
    ("retinanet", "dynamicvit_tiny", {}),
    ("retinanet", None, {}),
    ("faster_rcnn", "efficientvit_m0", {}),
    ("mask_rcnn", None, {}),
    ("mask_rcnn", "mobilevitv2_050", {}),
    ("mask_rcnn", "dynamicvit_tiny", {}),
]


@pytest.mark.parametrize(
    ("kind", "backbone", "options"),
    [
        ("retinanet", "efficientvit_m0", {}),
        ("mask_rcnn", "efficientformerv2_s0", {"official_grid": 5}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_maps_and_detections_are_equal(kind, backbone, options, tmp_path):
    theirs = theirs_of(kind, backbone, tmp_path, options)
    save(theirs.model, tmp_path / "epoch_12.pth")
    state = read_checkpoint(tmp_path / "epoch_12.pth")
    name = backbone or "timm/resnet18"
    assert backbone_options_in(state, name) == options
    torch.manual_seed(5)
    ours = make_detector(kind, create_backbone(name, **options), CLASSES, SETTINGS).eval()
    report = load_mmdet(ours, state, "epoch_12.pth")
    assert report.missing == report.unexpected == report.resized == report.mismatched == ()

    images = torch.randn(2, 3, 96, 160)
    sizes, original = [(96, 141), (70, 160)], [(192, 282), (100, 229)]
    images[0, :, :, 141:], images[1, :, 70:] = 0, 0
    with torch.no_grad():
        found, expected = ours.pyramid(images), theirs.model.extract_feat(images)
        for level, feature in zip(found.values(), expected, strict=True):
            assert torch.allclose(level, feature, rtol=1e-4, atol=1e-5 * float(feature.abs().max()))
        detections = zip(ours.predict(images, sizes, original), theirs.predict(images, sizes, original), strict=True)
    for own, other in detections:
        assert len(own["boxes"]) > 10
        assert torch.equal(own["labels"], other["labels"])
        assert torch.allclose(own["boxes"], other["boxes"], rtol=0, atol=1e-3)
        assert torch.allclose(own["scores"], other["scores"], rtol=0, atol=1e-5)
        assert own.get("rles") == other.get("rles")


@pytest.mark.slow
def test_a_cascade_is_none_of_ours(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(BASE / 'cascade-rcnn_r50_fpn.py')!r}\nmodel = dict(backbone=dict(init_cfg=None))\n")
    save(MMDetector(str(path), CLASSES, backbone="mobilevit_xxs").model, tmp_path / "epoch_12.pth")
    ours = make_detector("faster_rcnn", create_backbone("mobilevit_xxs"), CLASSES, SETTINGS)
    with pytest.raises(CheckpointError, match="none of ours"):
        load_mmdet(ours, read_checkpoint(tmp_path / "epoch_12.pth"), "epoch_12.pth")
