"""A user's configuration of MMDetection through the real command line: trained, evaluated, applied."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mmdet
import torch

SHIPPED = Path(mmdet.__file__).parent / ".mim" / "configs"
OWN = """\
_base_ = {base!r}
model = dict(rpn_head=dict(feat_channels=32, in_channels=32), neck=dict(out_channels=32))
model["roi_head"] = dict(
    bbox_roi_extractor=dict(out_channels=32), bbox_head=dict(in_channels=32, fc_out_channels=64),
    mask_roi_extractor=dict(out_channels=32), mask_head=dict(num_convs=1, in_channels=32, conv_out_channels=32),
)
"""


#: Commands, one after the other, in a process that has not imported anything of MMDetection before.
PROGRAM = """\
import json, sys
from effvit.cli import main
for words in json.loads(sys.argv[1]):
    print("effvit", *words, flush=True)
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            sys.exit(ended.code)
"""


def in_a_new_process(*commands, cwd):
    words = json.dumps([[str(word) for word in command] for command in commands])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, words], cwd=cwd, capture_output=True, text=True, check=False, timeout=240
    )


def test_a_users_configuration_trains_and_its_checkpoint_serves_a_new_process(cli, coco_root, tmp_path):
    config = tmp_path / "my_mask_rcnn.py"
    config.write_text(OWN.format(base=os.path.relpath(SHIPPED / "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", tmp_path)))
    run = tmp_path / "run"
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", config, "--model.backbone", "mobilevit_xxs",
        "--data.root", coco_root, "--data.image_size", "[96,64]", "--data.batch_size", 6, "--data.num_workers", "0",
        "--trainer.max_epochs", 1, "--model.norm_eval", "false", "--run_dir", run,
    )  # fmt: skip
    assert done.code == 0, done.err
    config.unlink()  # the checkpoint holds what it needs of it
    done = in_a_new_process(
        ["validate", "--checkpoint", run / "last.ckpt"],
        ["predict", "--checkpoint", run / "last.ckpt", "--images", coco_root / "val"],
        ["fit", "--resume", run / "last.ckpt", "--trainer.max_epochs", 2],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    metrics = json.loads((run / "validate" / "metrics.json").read_text())
    assert {"val/AP", "val/mask_AP"} <= metrics.keys()
    assert (run / "predictions" / "predictions.json").is_file()
    resumed = torch.load(run / "last.ckpt", weights_only=False)  # our own, a moment old
    assert resumed["global_step"] == resumed["state_dict"]["detector.steps"] == 4


def test_a_wrong_name_of_a_configuration_offers_the_shipped_ones(cli, coco_root, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/mmdet", "--model.mmdet_config", "faster_rcnn/faster-rcnn_r50_fpn_1x_coc.py",
        "--model.backbone", "mobilevit_xxs", "--data.root", coco_root, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 2
    assert "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py" in done.err
