"""MMDetection's own Runner trains and validates a user's configuration with a backbone of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from effvit.backbones import create_backbone

SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs"

#: What a user adds to MMDetection's RetinaNet: the import, a backbone, a neck, and own data.
CONFIG = """
_base_ = ["{shipped}/retinanet/retinanet_r50_fpn_1x_coco.py"]
custom_imports = dict(imports=["effvit.tasks.mmdetection"])
model = dict(
    backbone=dict(_delete_=True, type="effvit.Backbone", name="efficientvit_m0"),
    neck=dict(_delete_=True, type="effvit.FeaturePyramid", backbone="efficientvit_m0", out_channels=32),
    bbox_head=dict(num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1),
    test_cfg=dict(score_thr=0.0))
train_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(96, 64), keep_ratio=True), dict(type="RandomFlip", prob=0.5), dict(type="PackDetInputs")]
test_pipeline = [
    dict(type="LoadImageFromFile"), dict(type="Resize", scale=(96, 64), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))]
metainfo = dict(classes=("disc", "bar", "ring"))
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root="{root}", metainfo=metainfo, ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"), filter_cfg=dict(filter_empty_gt=True, min_size=1), pipeline=train_pipeline))
val_dataloader = dict(
    num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root="{root}", metainfo=metainfo, ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"), pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file="{root}/annotations/instances_val.json")
test_evaluator = val_evaluator
train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=2, val_interval=2)
param_scheduler = []
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2, by_epoch=False))
env_cfg = dict(mp_cfg=dict(mp_start_method="fork", opencv_num_threads=1))
work_dir = "{root}/work"
"""


@pytest.mark.slow
def test_the_runner_trains_and_validates(coco_root):
    path = coco_root / "my_retinanet.py"
    path.write_text(CONFIG.format(shipped=SHIPPED, root=coco_root))
    runner = Runner.from_cfg(Config.fromfile(path))
    runner.train()
    assert type(runner.model.backbone).__name__ == "RegisteredBackbone"
    lines = [json.loads(line) for file in (coco_root / "work").rglob("scalars.json") for line in file.open()]
    assert [line["loss"] > 0 for line in lines if "loss" in line] == [True, True]
    assert any("coco/bbox_mAP" in line for line in lines)
    saved = torch.load(coco_root / "work" / "iter_2.pth", weights_only=False)["state_dict"]  # our own, a moment old
    assert {name.split(".")[0] for name in saved} == {"backbone", "neck", "bbox_head"}
    assert any(name.startswith("backbone.network.") for name in saved)


@pytest.mark.slow
def test_a_fresh_process_needs_no_more_than_the_configuration(tmp_path):
    """``custom_imports`` alone brings the operators and the registry, before MMDetection's models are imported."""
    config = tmp_path / "config.py"
    config.write_text(
        'custom_imports = dict(imports=["effvit.tasks.mmdetection"])\n'
        'model = dict(type="effvit.Backbone", name="mobilevit_xxs")\n'
    )
    program = (
        "from mmengine.config import Config; from mmengine.registry import MODELS\n"
        f"print(type(MODELS.build(Config.fromfile({str(config)!r}).model)).__name__)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split()[-1:] == ["RegisteredBackbone"], done.stderr


def test_the_documented_configuration_builds(tmp_path, monkeypatch):
    page = Path(__file__).resolve().parents[2] / "docs" / "detection.md"
    (text,) = re.findall(r"^```py\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    base = "retinanet_r50_fpn_1x_coco.py"
    (tmp_path / "config.py").write_text(text.replace(base, str(SHIPPED / "retinanet" / base)))
    torch.save(create_backbone("efficientvit_m4").state_dict(), tmp_path / "efficientvit_m4.pth")
    monkeypatch.chdir(tmp_path)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(Config.fromfile("config.py").model)
    maps = model.eval().extract_feat(torch.zeros(1, 3, 64, 64))
    assert [tuple(level.shape[1:]) for level in maps] == [(256, side, side) for side in (8, 4, 2, 1, 1)]
