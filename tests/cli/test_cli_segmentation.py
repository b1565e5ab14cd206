"""Training a segmenter, evaluating it and predicting with it through the real command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from effvit._cli.launch import stored_config
from effvit.datamodules import SegmentationFolder

TINY = (
    "--data.num_train 8 --data.num_val 4 --data.batch_size 4 --data.num_workers 0 --trainer.max_epochs 1 "
    "--trainer.check_val_every_n_epoch 1 "
    "--model.backbone efficientvit_m0 --model.pyramid_channels 16 --model.head_channels 16"
).split()


@pytest.fixture(scope="module")
def run(cli, tmp_path_factory):
    """Folder of a finished run on a few digits, and what it has printed."""
    folder = tmp_path_factory.mktemp("segmentation") / "tiny"
    done = cli.run("fit", "-c", "segmentation/digits", *TINY, "--run_dir", folder)
    assert done.code == 0, done.err
    return folder, done.out


@pytest.mark.slow  # five minutes on one core
def test_the_embedded_default_learns_from_scratch(cli, tmp_path):
    done = cli.run("fit", "-c", "segmentation/digits", "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    report = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["callbacks"]["RunReport"]
    assert report["evaluations"][-1][1]["mIoU"] >= 0.75


def test_a_run_leaves_everything_to_look_at(run):
    folder, text = run
    names = {path.name for path in folder.iterdir()}
    assert names >= {"predictions.png", "iou.png", "confusion.png", "curves.png", "per_class.csv", "best.ckpt"}
    assert re.search(r"mIoU +mAcc +aAcc", text)
    assert re.search(r"background +\d\.\d{3} +\d\.\d{3}", text)
    assert re.search(r"best\.ckpt +\(val/mIoU ", text)


def test_the_checkpoint_evaluates_to_the_metrics_of_the_run(run, cli):
    done = cli.run("validate", "--checkpoint", run[0])
    assert done.code == 0, done.err
    metrics = json.loads((run[0] / "validate" / "metrics.json").read_text())
    stored = torch.load(run[0] / "best.ckpt", weights_only=True)["callbacks"]["RunReport"]["evaluations"][-1][1]
    assert {"mIoU", "mAcc", "aAcc"} <= stored.keys()
    for name in ("mIoU", "mAcc", "aAcc"):
        assert metrics[f"val/{name}"] == pytest.approx(stored[name], abs=1e-6)
    assert (run[0] / "validate" / "predictions.png").is_file()


@pytest.mark.slow  # the counts of the evaluator on two ranks are in tests/tasks/metrics
def test_two_processes_find_the_miou_of_one(run, cli, tmp_path):
    metrics = cli.metrics_on_one_and_on_two(run[0], tmp_path)
    assert metrics[0] == metrics[1]
    assert metrics[0]["val/aAcc"] > 0


def test_what_the_first_weights_told_stays_with_the_run():
    """A published file, or another run, decides on settings that `test --checkpoint` has to find again without it."""
    given = {"checkpoint": "voc.pt", "align_corners": None, "rates": None, "output_stride": None}
    config = {"model": {"class_path": "effvit.tasks.Segmentation", "init_args": given}, "trainer": {}}
    told = {"align_corners": True, "rates": [1, 2, 3], "output_stride": 8, "backbone_options": {"dropout": 0.1}}
    checkpoint = {"effvit": {"config": yaml.safe_dump(config)}, "hyper_parameters": told}
    options = yaml.safe_load(stored_config(checkpoint, Path("a.ckpt"), "test"))["model"]["init_args"]
    assert options == {**told, "checkpoint": None, "pretrained": False}


def test_merged_values_need_no_quotes(cli):
    words = "fit -c segmentation/finetune --data.root my_scenes --print_config --data.merge".split()
    for text in ("{8:7,9:7}", "{8: 7, 9: 7}"):
        done = cli.run(*words, text)
        assert done.code == 0, done.err
        merge = yaml.safe_load(done.out)["data"]["init_args"]["merge"]
        assert {int(value): target for value, target in merge.items()} == {8: 7, 9: 7}


@pytest.mark.parametrize(
    ("option", "value", "match", "absent"),
    [
        ("crop_size", "128", "Expected a list, such as [512,512]. Got value: 128", "Did you mean"),
        ("crop_size", "[128]", "Expected a list, such as [512,512]. Got value: [128]", "Did you mean"),
        ("faults", "skp", "Expected one of 'error', 'skip'. Got value: skp\nDid you mean 'skip'?", "typing"),
        ("flip", "much", "Expected a float. Got value: much", "class 'float'"),
    ],
)
def test_a_value_of_another_sort_is_explained(cli, option, value, match, absent):
    done = cli.run("fit", "-c", "segmentation/finetune", "--data.root", "my_scenes", f"--data.{option}", value)
    assert done.code == 2
    assert match in done.err
    assert absent not in done.err


def test_a_checkpoint_of_another_task_is_named_so(run, cli, tmp_path):
    words = "--trainer.max_epochs 1 --data.num_train 16 --data.num_val 4 --model.pyramid_channels 16".split()
    start = ["--model.checkpoint", run[0] / "best.ckpt"]
    done = cli.run("fit", "-c", "detection/digits", *words, *start, "--run_dir", tmp_path / "run")
    assert done.code == 1
    assert "is of another task than this detection network: start from its backbone with --model.pretrained" in done.err


def test_predictions_are_a_data_set_again(run, cli, tmp_path):
    images, output = tmp_path / "photos", tmp_path / "found"
    images.mkdir()
    random = np.random.default_rng(0)
    sizes = {"wide.jpg": (40, 90), "tall.png": (97, 33)}
    for name, size in sizes.items():
        cv2.imwrite(str(images / name), random.integers(0, 255, (*size, 3), np.uint8))
    done = cli.run("predict", "--checkpoint", run[0], "--images", images, "--output", output)
    assert done.code == 0, done.err
    assert re.search(r"^2 images, \d+ classes found: ", done.out, re.MULTILINE)
    for name, size in sizes.items():
        mask = Image.open(output / "masks" / f"{name.partition('.')[0]}.png")
        assert mask.size == size[::-1]
        assert set(np.unique(np.asarray(mask))) <= set(range(11))
        assert (output / f"{name}.png").is_file()
    shutil.copytree(images, output / "images")
    data = SegmentationFolder(str(output), batch_size=1, val_batch_size=1, num_workers=0)
    data.setup("fit")
    assert data.categories == {0: "background", **{digit + 1: str(digit) for digit in range(10)}}
    entries = {entry["file_name"]: entry["classes"] for entry in json.loads((output / "predictions.json").read_text())}
    for _, [target] in data.val_dataloader():
        labels, counts = np.unique(target["mask"].numpy(), return_counts=True)
        shares = {entry["category_id"]: entry["share"] for entry in entries[target["file_name"].rpartition("/")[2]]}
        assert shares == pytest.approx(dict(zip(labels.tolist(), counts / counts.sum(), strict=True)), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ("fit -c segmentation/digit", "'segmentation/digits'"),
        ("fit -c segmentation/digits --model.head semantic_fnp", "Did you mean 'semantic_fpn'"),
        ("fit -c segmentation/digits --model.inference slid", "Did you mean 'slide'"),
        ("fit -c segmentation/digits --model.class_weights [1,2]", "2 numbers, and the data has 11 classes"),
        ("fit -c segmentation/finetune --data.root nowhere", "there is no folder nowhere"),
        ("predict --checkpoint RUN --images IMAGES --top 3", "is of segmentation, and --top is an option of classif"),
    ],
)
def test_mistakes_are_explained(run, cli, tmp_path, monkeypatch, words, match):
    monkeypatch.chdir(tmp_path)
    done = cli.run(*(str(run[0]) if word == "RUN" else word for word in words.split()))
    assert done.code != 0
    assert match in done.err
    assert not (tmp_path / "runs").exists()
