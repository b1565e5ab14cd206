"""Trainings of minutes through the real command line, with the accuracy that they must reach."""

from __future__ import annotations

import csv

import pytest
import torch

from effvit.backbones import backbone_info, list_backbones


def logged(folder, name):
    """A logged value over the run, from the CSV."""
    with (folder / "logs" / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def smallest_of_each_family():
    rows = sorted(map(backbone_info, list_backbones()), key=lambda row: row.params)
    return sorted({row.family: row.name for row in reversed(rows)}.values())


@pytest.mark.slow
def test_the_embedded_default_reaches_97_percent(cli, tmp_path):
    done = cli.run("fit", "-c", "classification/digits", "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert max(logged(tmp_path / "run", "val/top1")) >= 0.97


@pytest.mark.slow
@pytest.mark.realdata
def test_ants_and_bees_are_told_apart_from_random_weights(real_data, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "classification/transfer", "--model.backbone", "mobilevit_xxs", "--data.root",
        real_data / "ants_bees", "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    # Guesses at 80 images have a standard deviation of 0.056 around 0.5; the last epochs hardly differ.
    assert sum(logged(tmp_path / "run", "val/top1")[-5:]) / 5 > 0.62


@pytest.mark.slow
@pytest.mark.parametrize("backbone", smallest_of_each_family())
def test_every_family_learns_the_digits_from_scratch(backbone, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "classification/digits", "--model.backbone", backbone, "--model.optimizer.init_args.lr", 0.001,
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    # Transformers without any convolution learn slowly from 1,438 images.
    assert max(logged(tmp_path / "run", "val/top1")) >= (0.5 if backbone.startswith("dynamicvit") else 0.95)


@pytest.mark.slow
def test_dynamicvit_keeps_its_accuracy_while_it_drops_patches(cli, tmp_path):
    """The paper's claim on the digits: within a point of the dense network, at the kept shares that were asked for."""
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    done = cli.run(
        "fit", "-c", "classification/digits_dynamicvit", "--model.backbone_options.keep_ratio", 1.0,
        "--model.backbone_lr_scale", 1.0, "--trainer.max_epochs", 16, "--run_dir", dense,
    )  # fmt: skip
    assert done.code == 0, done.err
    best = dense / "best.ckpt"
    done = cli.run(
        "fit", "-c", "classification/digits_dynamicvit", "--model.pretrained", best, "--model.teacher", best,
        "--trainer.log_every_n_steps", 1, "--run_dir", sparse,
    )  # fmt: skip
    assert done.code == 0, done.err
    steps = -(-1438 // 32)
    for stage in (1, 2, 3):
        kept = torch.tensor(logged(sparse, f"train/kept_{stage}")[-steps:])
        assert float(kept.mean()) == pytest.approx(0.7**stage, abs=0.02), stage
    assert max(logged(sparse, "val/top1")) >= max(logged(dense, "val/top1")) - 0.01
