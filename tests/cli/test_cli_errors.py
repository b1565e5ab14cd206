"""Mistakes on the command line and in data and checkpoints: each has a message to act on, and exit status 1 or 2."""

from __future__ import annotations

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image


class _Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def write_config(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tset"], "there is no verb 'tset'. Did you mean 'test'"),
        (["fit"], "needs -c NAME or --resume FILE"),
        (["fit", "-c", "detection/digit"], "Did you mean 'detection/digits'"),
        (["fit", "-c", "detection/digits", "--model.backbone", "efficientvit_m9"], "Did you mean 'efficientvit_m"),
        (
            ["fit", "-c", "detection/digits", "--model.backbon", "x"],
            "'backbon' is not accepted\nDid you mean 'backbone'",
        ),
        (["fit", "-c", "detection/digits", "--trainer.max_epoch", "3"], "Did you mean '--trainer.max_epochs'"),
        (["fit", "-c", "detection/digits", "--modle.backbone", "x"], "Did you mean '--model.backbone'"),
        (["fit", "-c", "detection/digits", "--model", "Detecton"], "Did you mean 'Detection'"),
        (["fit", "-c", "detection/digits", "--data", "HandwritenDigits"], "Did you mean 'HandwrittenDigits'"),
        (["fit", "-c", "detection/digits", "--model.optimizer", "AdamV"], "Did you mean 'Adam'"),
        (["fit", "-c", "detection/digits", "--model.detector", "retinnet"], "Did you mean 'retinanet'"),
        (["fit", "-c", "detection/digits", "--model.coco_backend", "hotcoca"], "Did you mean 'hotcoco'"),
        (
            ["fit", "-c", "detection/digits", "--model.score_threshold", "3"],
            r"score_threshold must be in \[0, 1\], not 3",
        ),
        (["fit", "-c", "detection/digits", "--trainer.max_epochs", "many"], "trainer.max_epochs"),
        (["backbones", "efficentvit_m4"], "Did you mean 'efficientvit_m4'"),
    ],
)
def test_what_is_not_understood_is_named_with_what_comes_close(cli, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli.run(*words)
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert len(done.err.splitlines()) < 12
    assert not list(tmp_path.iterdir())


def test_a_misspelt_key_in_a_file_is_named(cli, tmp_path):
    path = write_config(tmp_path / "mine.yaml", "model: {init_args: {head_conv: 3}}\n")
    done = cli.run("fit", "-c", "detection/digits", "-c", path)
    assert done.code == 2
    assert "Did you mean 'head_convs'" in done.err


def test_no_such_data_folder(cli, tmp_path):
    done = cli.run("fit", "-c", "detection/retinanet_1x", "--data.root", tmp_path / "nowhere")
    assert done.code == 1
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.err


def test_a_json_that_is_not_coco(cli, coco_root):
    (coco_root / "annotations" / "instances_train.json").write_text('{"pictures": []}')
    done = cli.run("fit", "-c", "detection/retinanet_1x", "--data.root", coco_root)
    assert done.code == 1
    assert "instances_train.json" in done.err
    assert "images" in done.err


def test_a_missing_image_stops_training_by_name(cli, coco_root, tmp_path):
    (coco_root / "train" / "000003.jpg").unlink()
    done = cli.run(
        "fit", "-c", "detection/finetune", "--data.root", coco_root,
        "--data.image_size", "[64,64]", "--data.num_workers", "2", "--model.pyramid_channels", "16",
        "--trainer.max_epochs", "1", "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 1
    assert "000003.jpg" in done.err
    assert len(done.err.splitlines()) < 20


def test_predicting_on_what_is_no_image(cli, tiny_run, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"not a picture")
    done = cli.run("predict", "--checkpoint", tiny_run, "--images", folder)
    assert done.code == 1
    assert "b.jpg" in done.err
    done = cli.run("predict", "--checkpoint", tiny_run, "--images", tmp_path / "none")
    assert done.code == 1
    assert str(tmp_path / "none") in done.err


def test_checkpoints_that_cannot_be_used(cli, tiny_run, tmp_path):
    whole = (tiny_run / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    done = cli.run("test", "--checkpoint", tmp_path / "cut.ckpt")
    assert done.code == 1
    assert "cut.ckpt" in done.err
    assert "damaged" in done.err
    done = cli.run("test", "--checkpoint", tiny_run / "bets.ckpt")
    assert done.code == 1
    assert "best.ckpt, last.ckpt" in done.err
    torch.save({"weights": 3}, tmp_path / "other.ckpt")
    done = cli.run("test", "--checkpoint", tmp_path / "other.ckpt")
    assert done.code == 1
    assert "other.ckpt" in done.err


@pytest.mark.parametrize(
    "verb", [["test", "--checkpoint"], ["fit", "--resume"], ["predict", "--images", ".", "--checkpoint"]]
)
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_payload_is_refused_and_never_run(cli, tmp_path, verb, kind):
    trap, path = tmp_path / "executed", tmp_path / "evil.ckpt"
    content = {"state_dict": {}, "extra": _Payload(trap)}
    if kind == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    done = cli.run(*verb, path)
    assert done.code == 1
    assert "evil.ckpt" in done.err
    assert "code" in done.err
    assert not trap.exists()


def test_a_checkpoint_of_another_backbone_or_other_classes(cli, tiny_run, coco_root):
    done = cli.run("test", "--checkpoint", tiny_run, "--model.backbone", "efficientvit_m1")
    assert done.code == 1
    assert "is of a network with backbone 'efficientvit_m0', and this one has 'efficientvit_m1'" in done.err
    done = cli.run("test", "--checkpoint", tiny_run, "--data", "CocoDetection", "--data.root", coco_root)
    assert done.code == 1
    assert "10 classes" in done.err
    assert "declares 3" in done.err
    done = cli.run(
        "fit", "-c", "detection/retinanet_1x", "--data.root", coco_root, "--model.backbone", "efficientvit_m0",
        "--model.pyramid_channels", "16", "--model.head_convs", "1", "--model.checkpoint", tiny_run / "best.ckpt",
    )  # fmt: skip
    assert done.code == 1
    assert "trained on 10 classes, the data has 3" in done.err


def test_a_checkpoint_is_not_used_on_fewer_classes(cli, tiny_coco_run, tmp_path):
    """Labels would shift silently: the third class of three is the second of two."""
    data, run = tiny_coco_run
    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data" / "annotations").iterdir():
        content = json.loads(path.read_text())
        content["categories"] = content["categories"][1:]
        known = {entry["id"] for entry in content["categories"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] in known]
        path.write_text(json.dumps(content))
    for words in (["test", "--checkpoint"], ["fit", "--resume"]):
        done = cli.run(*words, run / "last.ckpt", "--data.root", tmp_path / "data")
        assert done.code == 1
        assert "trained on 3 classes" in done.err
        assert "(missing)" in done.err


def test_a_truncated_image_met_by_a_worker_is_named_in_one_line(cli, coco_root, tmp_path):
    path = coco_root / "train" / "000003.jpg"
    path.write_bytes(path.read_bytes()[:400])
    done = cli.run(
        "fit", "-c", "detection/finetune", "--data.root", coco_root, "--data.image_size", "[64,64]",
        "--data.num_workers", "1", "--model.pyramid_channels", "16", "--trainer.max_epochs", "1",
        "--trainer.limit_val_batches", "0", "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 1
    told = done.err[done.err.index("effvit: ") :]
    assert "000003.jpg" in told
    assert "Traceback" not in told


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="there is a GPU")
def test_an_accelerator_that_is_not_there(cli, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/digits", *cli.tiny, "--trainer.accelerator", "gpu", "--run_dir", tmp_path / "run"
    )
    assert done.code == 2
    assert "gpu" in done.err.lower()


def test_weights_that_were_never_trained_are_not_evaluated_in_silence(cli, tmp_path):
    done = cli.run("validate", "-c", "detection/digits", *cli.tiny, "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert "never trained" in (tmp_path / "run" / "log.txt").read_text()


def test_check_data_reports_every_fault_and_fails(cli, coco_root):
    assert cli.run("check-data", coco_root).code == 0
    path = coco_root / "annotations" / "instances_train.json"
    data = json.loads(path.read_text())
    data["annotations"][0]["bbox"] = [3, 3, 0, 5]
    data["annotations"][1]["category_id"] = 77
    data["annotations"][2]["bbox"] = [float("nan"), 1, 2, 2]
    data["images"].append(dict(data["images"][0]))
    path.write_text(json.dumps(data))
    (coco_root / "train" / "000004.jpg").write_bytes(b"")
    done = cli.run("check-data", coco_root)
    assert done.code == 1
    for told in ("no area", "77", "nan", "000004.jpg", "disc"):
        assert told in done.out.lower(), told


@pytest.mark.realdata
def test_check_data_finds_the_two_boxes_without_area_of_the_blood_cells(cli, real_data):
    done = cli.run("check-data", real_data / "blood_cells", "--skip_images")
    assert done.code == 1
    assert done.out.count("has no area") == 2
    assert "RBC" in done.out


def test_lists_answer_for_people_and_for_programs(cli):
    rows = json.loads(cli.run("backbones", "efficientvit_m[45]", "--json").out)
    assert [row["name"] for row in rows] == ["efficientvit_m4", "efficientvit_m5"]
    assert rows[0]["params"] == 8_804_228
    assert [level["stride"] for level in rows[0]["feature_maps"]] == [16, 32, 64]
    assert "detection/digits" in cli.run("configs").out
    assert cli.run("--help").code == 0
