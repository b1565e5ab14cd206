"""Detectors with masks, and what goes wrong with any, through the real command line."""

from __future__ import annotations

import json

import pytest
import torch
from pycocotools import mask as mask_api

from effvit.tasks.detectors.retinanet import RetinaNet

SMALL = "--model.detector mask_rcnn --model.head_channels 32 --model.roi_samples 32".split()


@pytest.fixture(scope="module")
def mask_run(cli, tmp_path_factory):
    """Folder of a finished run of Mask R-CNN, one epoch on small scenes."""
    folder = tmp_path_factory.mktemp("mask_runs") / "tiny"
    done = cli.run(
        "fit", "-c", "detection/digits", *cli.tiny, *SMALL, "--trainer.max_epochs", 1, "--model.score_threshold", 0,
        "--run_dir", folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder


def test_masks_follow_from_the_detector_and_are_evaluated(mask_run, cli):
    done = cli.run("validate", "--checkpoint", mask_run)
    assert done.code == 0, done.err
    metrics = json.loads((mask_run / "validate" / "metrics.json").read_text())
    assert {"val/AP", "val/AP50", "val/mask_AP", "val/mask_AP50", "val/mask_ARl"} <= metrics.keys()
    assert (mask_run / "predictions.png").stat().st_size > 10_000


def test_predicted_masks_are_coco_results(mask_run, cli, tmp_path, coco_root):
    done = cli.run(
        "predict", "--checkpoint", mask_run, "--images", coco_root / "val", "--output", tmp_path / "found",
        "--score_threshold", 0.2,
    )  # fmt: skip
    assert done.code == 0, done.err
    entries = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert entries
    for entry in entries:
        assert mask_api.decode(entry["segmentation"]).shape == tuple(entry["segmentation"]["size"])


@pytest.mark.slow  # the digits of the evaluator on two ranks are in tests/tasks/metrics
def test_two_processes_find_the_masks_ap_of_one(mask_run, cli, tmp_path):
    metrics = cli.metrics_on_one_and_on_two(mask_run, tmp_path)
    assert metrics[0] == metrics[1]
    assert metrics[0]["val/mask_AR100"] > 0


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_memory_that_runs_out_says_on_what_and_what_to_do(error, cli, tmp_path, monkeypatch):
    def exhausted(self, images, sizes, targets):
        raise error

    monkeypatch.setattr(RetinaNet, "loss", exhausted)
    done = cli.run("fit", "-c", "detection/digits", *cli.tiny, "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert "memory ran out at a batch of 4 images of 64 x 64 pixels. Take fewer images at a time" in done.err
    assert str(error).split(":")[0] in done.err


def test_other_errors_are_not_taken_for_a_lack_of_memory(cli, tmp_path, monkeypatch):
    def broken(self, images, sizes, targets):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(RetinaNet, "loss", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        cli.run("fit", "-c", "detection/digits", *cli.tiny, "--run_dir", tmp_path / "run")


def test_masks_cannot_be_chosen_against_the_detector(cli, tmp_path):
    done = cli.run("fit", "-c", "detection/digits", "--data.masks", "true", "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert "masks are loaded where --model.detector learns them: leave --data.masks out" in done.err


def test_a_run_of_another_detector_says_which_option_to_give(tiny_run, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/digits", *cli.tiny, *SMALL, "--model.checkpoint", tiny_run / "best.ckpt",
        "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 1
    assert "is of a network with detector 'retinanet', and this one has 'mask_rcnn'" in done.err
    assert "pass --model.detector retinanet" in done.err
