"""A user's configuration of MMDetection through the real command line: trained, evaluated, applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import pytest
import torch

SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs"
OWN = """\
_base_ = {base!r}
model = dict(
    rpn_head=dict(feat_channels=32, in_channels=32), neck=dict(out_channels=32),
    train_cfg=dict(rpn_proposal=dict(max_per_img=20)),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(max_per_img=5)))
model["roi_head"] = dict(
    bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=64),
    mask_roi_extractor=dict(out_channels=32), mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32),
)
"""


def in_a_new_process(words, cwd):
    """A command where nothing of MMDetection has been imported before, unlike here."""
    command = [sys.executable, "-m", "effvit", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=240)


@pytest.fixture
def trained(cli, make_coco, save_coco, tmp_path):
    """A run of one step whose configuration is gone; its data lie in ``data``."""
    for split, first in (("train", 1), ("val", 11)):
        ids = [first, first + 1]
        data = make_coco([(i, 96, 64) for i in ids], [(i, 3, (10.0, 8, 40, 30)) for i in ids])
        save_coco(tmp_path / "data", data, split)
    config = tmp_path / "my_mask_rcnn.py"
    config.write_text(OWN.format(base=os.path.relpath(SHIPPED / "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", tmp_path)))
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", config, "--model.backbone", "mobilevit_xxs",
        "--data.root", tmp_path / "data", "--data.image_size", "[96,64]", "--data.batch_size", 2,
        "--data.num_workers", "0", "--trainer.max_epochs", 1, "--model.norm_eval", "false",
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    config.unlink()  # the checkpoint holds what it needs of it
    return tmp_path / "run"


def test_a_checkpoint_is_evaluated_in_a_new_process(trained, tmp_path):
    done = in_a_new_process(["validate", "--checkpoint", trained / "last.ckpt"], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    metrics = json.loads((trained / "validate" / "metrics.json").read_text())
    assert {"val/AP", "val/mask_AP"} <= metrics.keys()


@pytest.mark.slow
def test_a_checkpoint_predicts_in_a_new_process(trained, tmp_path):
    images = tmp_path / "data" / "val"
    done = in_a_new_process(["predict", "--checkpoint", trained / "last.ckpt", "--images", images], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (trained / "predictions" / "predictions.json").is_file()


@pytest.mark.slow
def test_a_run_is_resumed_in_a_new_process(trained, tmp_path):
    done = in_a_new_process(["fit", "--resume", trained / "last.ckpt", "--trainer.max_epochs", 2], cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    resumed = torch.load(trained / "last.ckpt", weights_only=False)  # our own, a moment old
    assert resumed["global_step"] == resumed["state_dict"]["detector.steps"] == 2


def test_a_wrong_name_of_a_configuration_offers_the_shipped_ones(cli, coco_root, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", "faster_rcnn/faster-rcnn_r50_fpn_1x_coc.py",
        "--model.backbone", "mobilevit_xxs", "--data.root", coco_root, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 2
    assert "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py" in done.err
