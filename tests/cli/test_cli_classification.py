"""Classification through the real command line: what a run leaves, what it rebuilds, and what is refused."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
import torch
import yaml

from effvit._cli.launch import Run
from effvit._cli.lightning import EffvitCLI
from effvit._cli.shipped import find_config
from effvit.cli import main
from effvit.tasks import Classification

#: Digits and a network small enough to train in seconds; what it learns is not the point here.
TINY = "--data.image_size 32 --trainer.limit_train_batches 4 --data.batch_size 16".split()


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory, cli):
    """Folder of a finished two-epoch run with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = cli.run("fit", "-c", "classification/digits", *TINY, "--trainer.max_epochs", 2, "--run_dir", folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of two classes, red and blue, with 10 training and 4 validation images each."""
    root = tmp_path_factory.mktemp("folders") / "images"
    random = np.random.default_rng(0)
    for split, number in (("train", 10), ("val", 4)):
        for name, channel in (("blue", 0), ("red", 2)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 90, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                cv2.imwrite(str(folder / f"{index}.jpg"), pixels)
    return root


@pytest.fixture(scope="module")
def transfer_run(tmp_path_factory, cli, digits_run, photographs):
    """A run on the folder that starts from the digits' weights."""
    folder = tmp_path_factory.mktemp("runs") / "transfer"
    done = cli.run(
        "fit", "-c", "classification/transfer", "--model.backbone", "efficientvit_m0", "--model.pretrained",
        digits_run / "best.ckpt", "--data.root", photographs, "--data.image_size", 32, "--data.num_workers", 0,
        "--data.batch_size", 10, "--trainer.max_epochs", 2, "--run_dir", folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def logged(folder, name):
    with (folder / "logs" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_a_run_leaves_config_logs_checkpoints_and_pictures(digits_run):
    config = yaml.safe_load((digits_run / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"] == "efficientvit_m0"
    assert config["data"]["init_args"]["image_size"] == 32
    assert len(logged(digits_run, "val/top1")) == 2
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        assert cv2.imread(str(digits_run / name)).shape[0] > 100, name
    with (digits_run / "per_class.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [str(digit) for digit in range(10)]
    said = (digits_run / "log.txt").read_text()
    assert "global batch 16 = 16 images x 1 processes x 1 accumulated; learning rate 0.004; 4 steps an epoch" in said
    content = torch.load(digits_run / "best.ckpt", weights_only=True)
    assert content["hyper_parameters"]["categories"] == {digit: str(digit) for digit in range(10)}
    assert content["current_model_state"].keys() == content["state_dict"].keys()


def test_validate_rebuilds_data_and_network_and_gives_the_same_figure(digits_run, cli, tmp_path):
    done = cli.run("validate", "--checkpoint", digits_run / "last.ckpt", "--run_dir", tmp_path / "again")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["val/top1"] == pytest.approx(logged(digits_run, "val/top1")[-1])
    assert metrics["val/loss"] == pytest.approx(logged(digits_run, "val/loss")[-1], rel=1e-5)
    assert {"val/top5", "val/ece"} <= metrics.keys()


@pytest.mark.slow  # resuming is the trainer's, which tests/cli/test_cli_runs.py stops and resumes each time
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(digits_run, cli, tmp_path, monkeypatch):
    stopped = tmp_path / "stopped"
    step = Classification.training_step

    def break_down(task, batch, batch_idx):
        if task.global_step == 7:
            raise RuntimeError("the machine breaks down")
        return step(task, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(Classification, "training_step", break_down)
        words = ["fit", "-c", "classification/digits", *TINY, "--trainer.max_epochs", "2", "--run_dir", str(stopped)]
        with pytest.raises(RuntimeError, match="breaks down"):
            main([*words, "--save_every_n_steps", "3"])
    assert torch.load(stopped / "last.ckpt", weights_only=True)["global_step"] == 6
    done = cli.run("fit", "--resume", stopped / "last.ckpt")
    assert done.code == 0, done.err
    whole, again = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (digits_run, stopped))
    for kind in ("state_dict", "current_model_state"):
        assert all(torch.equal(again[kind][name], value) for name, value in whole[kind].items()), kind
    assert again["lr_schedulers"] == whole["lr_schedulers"]


def test_weights_of_another_set_are_fine_tuned_through_the_same_command(transfer_run):
    said = (transfer_run / "log.txt").read_text()
    assert "691 matched" in said
    assert "head.linear.weight and 1 more, which start untrained" in said
    content = torch.load(transfer_run / "best.ckpt", weights_only=True)
    assert content["hyper_parameters"]["categories"] == {0: "blue", 1: "red"}


def test_predict_names_the_images_of_a_folder(transfer_run, photographs, cli, tmp_path):
    done = cli.run(
        "predict", "--checkpoint", transfer_run, "--images", photographs / "val", "--output", tmp_path / "found",
        "--format", "csv",
    )  # fmt: skip
    assert done.code == 0, done.err
    with (tmp_path / "found" / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["file_name"] for row in rows}) == 8
    assert {value for row in rows for value in row.values()} & {"blue", "red"}


def test_the_classes_of_the_checkpoint_must_be_those_of_the_data(digits_run, photographs, cli):
    done = cli.run(
        "validate", "--checkpoint", digits_run, "--data", "ImageFolder", "--data.root", photographs,
    )  # fmt: skip
    assert done.code == 1
    assert "was trained on 10 classes" in done.err


@pytest.mark.parametrize("backbone", ["efficientformerv2_s0", "dynamicvit_tiny"])
def test_the_backbone_is_one_flag(backbone, photographs, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "classification/transfer", "--model.backbone", backbone, "--data.root", photographs,
        "--data.image_size", 64, "--data.num_workers", 0, "--trainer.max_steps", 2, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "top1" in done.out
    assert (tmp_path / "run" / "patches.png").exists() == (backbone == "dynamicvit_tiny")


@pytest.mark.parametrize(("backbone", "size"), [("mobilevit_xxs", 256), ("efficientvit_m0", 224)])
def test_the_size_of_the_images_follows_from_the_backbone(backbone, size, photographs, tmp_path):
    class BuildOnly(EffvitCLI):
        def _run_subcommand(self, subcommand):
            pass

    words = ["-c", str(find_config("classification/transfer")), "--model.backbone", backbone]
    words += ["--data.root", str(photographs), "--data.num_workers", "0"]
    built = BuildOnly(Run("fit", words, tmp_path / "run", "default"))
    built.datamodule.setup("fit")
    images, _ = next(iter(built.datamodule.val_dataloader()))
    assert images.shape[2:] == (size, size)
    assert built.datamodule.published["crop"] == built.model.input_spec.crop


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.backbone", "mobilevit_xs5"], "Did you mean 'mobilevit_xs'"),
        (["--model.mixup", "-1"], "mixup and cutmix must be 0"),
        (["--data.root", "nowhere"], "nowhere"),
        (["--data.augmentation.policy", "randaugment"], "Did you mean 'rand_augment'"),
        (["--model.teacher", "efficientvit_m00"], "Did you mean 'efficientvit_m0'"),
        (["--model.pretrained", "nothing.pth"], "there is no checkpoint file nothing.pth"),
        (["--model.freeze", "head"], "freeze must be 'backbone', a number of steps or a list of names, not 'head'"),
        (["--data.batch_size", "1"], "batch_size 1 leaves BatchNorm"),
        (["--model.labelsmoothing", "0.1"], "Did you mean 'label_smoothing'"),
    ],
)
def test_mistakes_are_named_with_what_to_do(words, message, photographs, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli.run(
        "fit", "-c", "classification/transfer", "--data.root", photographs, "--data.num_workers", 0,
        "--data.image_size", 32, *words,
    )  # fmt: skip
    assert done.code in {1, 2}
    assert message in done.err
    assert "Traceback" not in done.err
