"""What runs leave, and what they rebuild, through the real command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from effvit._cli.shipped import shipped_configs
from effvit.tasks import Detection


def wait_for(path, process, seconds=120.0):
    """Waits until a running command has written a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path} after {seconds} s"
        time.sleep(0.05)


def test_a_run_leaves_config_logs_checkpoints_and_pictures(tiny_run):
    config = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert config["model"]["init_args"]["backbone"] == "efficientvit_m0"
    assert config["data"]["init_args"]["num_train"] == 24
    header = (tiny_run / "logs" / "metrics.csv").read_text().splitlines()[0]
    assert "train/loss" in header
    assert "val/AP50" in header
    assert list((tiny_run / "logs").glob("events.out.tfevents.*"))
    for name in ("predictions.png", "curves.png"):
        assert cv2.imread(str(tiny_run / name)).shape[0] > 100
    log = (tiny_run / "log.txt").read_text()
    assert "allocator: " in log
    assert "torch " + torch.__version__ in log


def test_a_checkpoint_holds_raw_and_averaged_weights_and_its_categories(tiny_run):
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(tiny_run / name, weights_only=True)
        averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
        assert averaged.keys() == raw.keys()
        assert any(not torch.equal(averaged[key], raw[key]) for key in raw)
        assert checkpoint["hyper_parameters"]["categories"] == {digit: str(digit) for digit in range(10)}


def test_test_rebuilds_everything_from_the_checkpoint(tiny_run, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_run, moved)
    done = cli.run("test", "--checkpoint", moved / "best.ckpt")
    assert done.code == 0, done.err
    assert "AP50" in done.out
    assert (moved / "test" / "config.yaml").is_file()


def test_validation_of_the_last_checkpoint_gives_the_ap_of_the_run(tiny_run, cli, tmp_path):
    import csv

    with (tiny_run / "logs" / "metrics.csv").open() as file:
        logged = [float(row["val/AP50"]) for row in csv.DictReader(file) if row["val/AP50"]][-1]
    done = cli.run("validate", "--checkpoint", tiny_run / "last.ckpt", "--run_dir", tmp_path / "again")
    assert done.code == 0, done.err
    assert f"{logged:.3f}" in done.out


def test_predict_writes_pictures_and_coco_results(tiny_run, cli, tmp_path, coco_root):
    output = tmp_path / "found"
    done = cli.run(
        "predict", "--checkpoint", tiny_run, "--images", coco_root / "val", "--output", output, "--score_threshold", 0
    )
    assert done.code == 0, done.err
    names = sorted(path.name for path in (coco_root / "val").iterdir())
    assert sorted(path.name for path in output.glob("*.png")) == [f"{name}.png" for name in names]
    entries = json.loads((output / "predictions.json").read_text())
    sizes = {name: cv2.imread(str(coco_root / "val" / name)).shape[:2] for name in names}
    assert "6 images" in done.out
    for entry in entries:
        height, width = sizes[entry["file_name"]]
        x, y, w, h = entry["bbox"]
        assert 0 <= x <= x + w <= width + 0.02
        assert 0 <= y <= y + h <= height + 0.02
        assert entry["category_id"] in range(10)
        assert 0.05 <= entry["score"] <= 1


def smallest_of_each_family():
    from effvit.backbones import backbone_info, list_backbones

    rows = sorted(map(backbone_info, list_backbones()), key=lambda row: row.params)
    names = sorted({row.family: row.name for row in reversed(rows)}.values())
    # One that starts at stride 16, one with a single map; docs/backbones.md runs another, the rest takes its time.
    usual = ("efficientvit_m0", "dynamicvit_tiny")
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("backbone", smallest_of_each_family())
def test_the_backbone_is_one_flag(backbone, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/digits", "--model.backbone", backbone, *cli.tiny, "--trainer.max_epochs", 1,
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "AP50" in done.out
    assert (tmp_path / "run" / "predictions.png").is_file()


def test_a_backbone_takes_its_options_from_the_command_line(cli, tmp_path):
    words = ["fit", "-c", "detection/digits", "--model.backbone", "dynamicvit_tiny", *cli.tiny]
    done = cli.run(
        *words, "--model.backbone_options.keep_ratio", 0.5, "--model.gradient_checkpointing", "true",
        "--trainer.max_epochs", 1, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    task = Detection.load_from_checkpoint(tmp_path / "run" / "last.ckpt", map_location="cpu")
    backbone = task.detector.pyramid.backbone
    assert backbone.keep_ratio == 0.5
    assert backbone.grad_checkpointing
    done = cli.run("test", "--checkpoint", tmp_path / "run" / "last.ckpt")
    assert done.code == 0, done.err
    assert "AP50" in done.out
    done = cli.run(*words, "--model.backbone_options", "{keep_ration: 0.5}", "--run_dir", tmp_path / "typo")
    assert done.code == 2
    assert "keep_ratio" in done.err
    assert len(done.err.splitlines()) < 12


def test_a_checkpoint_needs_none_of_the_files_it_started_from(cli, tiny_coco_run, tmp_path):
    from effvit.backbones import create_backbone

    data, run = tiny_coco_run
    started = tmp_path / "backbone.pth"
    torch.save({"model": create_backbone("efficientvit_m0").state_dict()}, started)
    done = cli.run(
        "fit",
        "-c",
        run / "config.yaml",
        "--model.pretrained",
        started,
        "--data.root",
        data,
        "--run_dir",
        tmp_path / "run",
    )
    assert done.code == 0, done.err
    assert "matched" in (tmp_path / "run" / "log.txt").read_text()
    started.unlink()
    for words in (["test", "--checkpoint"], ["fit", "--resume"]):
        done = cli.run(*words, tmp_path / "run" / "last.ckpt")
        assert done.code == 0, done.err


def test_prediction_prepares_images_as_validation_did(tiny_run):
    stored = torch.load(tiny_run / "best.ckpt", weights_only=True)
    assert stored["effvit"]["inputs"] == {"image_size": (64, 64), "pad_divisor": 16, "resize": "keep_ratio"}
    assert stored["hyper_parameters"]["pad_divisor"] == 16


@pytest.mark.parametrize("extra", [["--trainer.precision", "bf16-mixed"], ["--trainer.logger", "false"]])
def test_the_embedded_default_takes_the_usual_options(cli, tmp_path, extra):
    words = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--run_dir", tmp_path / "run"]
    done = cli.run("fit", "-c", "detection/digits", *cli.tiny, *words, *extra)
    assert done.code == 0, done.err


def test_runs_are_numbered_and_never_share_a_folder(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"]
    for _ in range(2):
        assert cli.run("fit", "-c", "detection/digits", *cli.tiny, *words).code == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["digits", "digits-2"]


@pytest.mark.slow
def test_the_embedded_default_learns_to_find_digits(cli, tmp_path):
    """README's first command, from scratch, as promised there."""
    done = cli.run("fit", "-c", "detection/digits", "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    done = cli.run("validate", "--checkpoint", tmp_path / "run")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "validate" / "metrics.json").read_text())["val/AP50"] >= 0.8


@pytest.mark.realdata
def test_the_published_recipe_runs_on_real_images(cli, real_data, tmp_path):
    """The command of the documentation, at a size that a CPU does in seconds."""
    words = "--data.image_size [160,128] --model.pyramid_channels 16 --data.num_workers 0".split()
    done = cli.run(
        "fit", "-c", "detection/retinanet_1x", "--model.backbone", "efficientvit_m4", "--data.root",
        real_data / "coco_tiny", "--trainer.max_steps", "3", *words, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = cli.run("test", "--checkpoint", tmp_path / "run" / "last.ckpt")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())
    assert 0 <= metrics["test/AP50"] <= 1


def test_the_script_at_the_root_is_the_same_command():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "cli.py", "configs"], cwd=root, env=os.environ, capture_output=True, text=True, check=True
    )
    assert "detection/retinanet_1x" in done.stdout


def test_a_run_without_backbone_weights_and_with_fixed_statistics_says_so(cli, tmp_path, coco_root):
    words = "--data.image_size [64,64] --trainer.max_steps 1 --model.pyramid_channels 16 --data.num_workers 0".split()
    done = cli.run(
        "fit", "-c", "detection/retinanet_1x", "--data.root", coco_root, *words, "--run_dir", tmp_path / "run"
    )
    assert done.code == 0, done.err
    assert "--model.pretrained" in (tmp_path / "run" / "log.txt").read_text()


def test_configs_merge_from_left_to_right_and_options_win(cli, tmp_path):
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 7}\nmodel: {init_args: {head_convs: 3}}\n")
    done = cli.run(
        "fit", "--model.head_convs", "1", "-c", "detection/digits", "-c", tmp_path / "more.yaml", "--print_config"
    )
    config = yaml.safe_load(done.out)
    assert config["trainer"]["max_epochs"] == 7
    assert config["model"]["init_args"]["head_convs"] == 1
    shipped = yaml.safe_load(shipped_configs()["detection/digits"].read_text())["model"]["init_args"]
    assert config["model"]["init_args"]["pyramid_channels"] == shipped["pyramid_channels"]
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == shipped["optimizer"]["init_args"]["lr"]


def test_the_allocator_can_be_left_alone(cli, tmp_path):
    for choice, said in (("default", "allocator: default"), ("tuned", "allocator: ")):
        folder = tmp_path / choice
        done = cli.run(
            "fit", "-c", "detection/digits", *cli.tiny, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0",
            "--run_dir", folder, "--allocator", choice,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert said in (folder / "log.txt").read_text()


@pytest.mark.parametrize("sign", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_run_that_was_stopped_ends_with_the_same_losses(cli, tmp_path, sign):
    words = ["-c", "detection/digits", *cli.tiny, "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "1"]
    words += ["--save_every_n_steps", "1"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = cli.start("fit", *words, "--run_dir", whole, cwd=tmp_path)
    victim = cli.start("fit", *words, "--run_dir", stopped, cwd=tmp_path)
    wait_for(stopped / "last.ckpt", victim)
    os.kill(victim.pid, sign)
    said = victim.communicate()[0]
    assert victim.returncode == (143 if sign == signal.SIGTERM else -signal.SIGKILL), said
    step = torch.load(stopped / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 12
    assert process.wait() == 0, process.communicate()[0]
    process.stdout.close()
    resumed = cli.run("fit", "--resume", stopped / "last.ckpt")
    assert resumed.code == 0, resumed.err
    expected = {number: loss for number, loss in cli.losses(whole).items() if number >= step}
    found = {number: loss for number, loss in cli.losses(stopped).items() if number >= step}
    assert expected
    assert found == expected
    ends = [torch.load(folder / "last.ckpt", weights_only=True)["state_dict"] for folder in (whole, stopped)]
    for name, weight in ends[0].items():
        assert torch.equal(weight, ends[1][name]), name


@pytest.mark.slow  # the documented command trains on two processes, tests/tasks/metrics compare the digits
def test_two_processes_find_the_ap_of_one(tiny_run, cli, tmp_path):
    """The sharded validation of a checkpoint has the digits of the single process, images seen twice included."""
    metrics = cli.metrics_on_one_and_on_two(tiny_run, tmp_path)
    assert metrics[0] == metrics[1]


@pytest.mark.slow  # the documented command for two processes and tests/cli/test_scaling.py run one each time
def test_fit_runs_on_two_processes(cli, tmp_path):
    process = cli.start(
        "fit", "-c", "detection/digits", *cli.tiny, "--trainer.max_epochs", "1", "--run_dir", tmp_path / "run",
        "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", cwd=tmp_path,
    )  # fmt: skip
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert (tmp_path / "run" / "best.ckpt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_process_that_writes_no_log_repeats_no_early_message(cli, tmp_path, monkeypatch):
    """All but the first process of a distributed run: what is said before there is a run folder is said once."""
    from lightning.pytorch.utilities import rank_zero_only

    from effvit._cli.launch import Run
    from effvit._cli.lightning import EffvitCLI

    class BuildOnly(EffvitCLI):
        def _run_subcommand(self, subcommand):
            assert len(self._early.buffer) >= 1  # what the detector does not read

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    words = ["--config", str(shipped_configs()["detection/digits"]), *cli.tiny, "--model.detector", "ssdlite"]
    BuildOnly(Run("fit", words, tmp_path / "run", "default"))
    assert not (tmp_path / "run" / "log.txt").exists()
