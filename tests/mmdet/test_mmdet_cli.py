"""A user's configuration of MMDetection through the real command line: trained, evaluated, applied."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mmdet

SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs"
OWN = """\
_base_ = {base!r}
model = dict(rpn_head=dict(feat_channels=32, in_channels=32), neck=dict(out_channels=32))
model["roi_head"] = dict(
    bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=64),
    mask_roi_extractor=dict(out_channels=32), mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32),
)
"""


def test_a_users_configuration_trains_is_evaluated_and_predicts(cli, coco_root, tmp_path):
    config = tmp_path / "my_mask_rcnn.py"
    config.write_text(OWN.format(base=os.path.relpath(SHIPPED / "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", tmp_path)))
    run = tmp_path / "run"
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", config, "--model.backbone", "mobilevit_xxs",
        "--data.root", coco_root, "--data.image_size", "[96,64]", "--data.num_workers", "0", "--trainer.max_steps", 3,
        "--model.norm_eval", "false", "--run_dir", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    config.unlink()  # the checkpoint holds what it needs of it
    done = cli.run("validate", "--checkpoint", run / "last.ckpt")
    assert done.code == 0, done.err
    metrics = json.loads((run / "validate" / "metrics.json").read_text())
    assert {"val/AP", "val/mask_AP"} <= metrics.keys()
    done = cli.run("predict", "--checkpoint", run / "last.ckpt", "--images", coco_root / "val")
    assert done.code == 0, done.err
    assert (run / "predictions" / "predictions.json").is_file()


def test_a_wrong_name_of_a_configuration_offers_the_shipped_ones(cli, coco_root, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", "faster_rcnn/faster-rcnn_r50_fpn_1x_coc.py",
        "--model.backbone", "mobilevit_xxs", "--data.root", coco_root, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 2
    assert "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py" in done.err
