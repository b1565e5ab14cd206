"""The shipped recipes of the segmentation table hold the figures of the papers and of the official repositories."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from effvit._cli.segmentation_rows import DATA_SETS, ROWS
from effvit._cli.shipped import merged_config, shipped_configs, summary

CONFIGS = shipped_configs()
ADE20K = [row for row in ROWS if row.data_set == "ade20k"]
VOC = [row for row in ROWS if row.data_set == "voc"]


@functools.cache
def recipe(name):
    """Trainer, model, data, optimizer, schedule and everything of a recipe."""
    config = merged_config(CONFIGS[name])
    model = config["model"]["init_args"]
    return SimpleNamespace(
        all=config,
        trainer=config["trainer"],
        model=model,
        data=config["data"]["init_args"],
        optimizer=model["optimizer"],
        schedule=model["lr_scheduler"],
    )


def test_every_row_has_a_config_and_every_config_a_row():
    tables = ("segmentation/ade20k/", "segmentation/voc/")
    assert {name for name in CONFIGS if name.startswith(tables)} == {row.config for row in ROWS}
    published = {row.backbone: row.published.miou for row in ROWS if row.published}
    assert published == {
        "efficientformer_l1": 38.9,
        "efficientformer_l3": 43.5,
        "efficientformer_l7": 45.1,
        "efficientformerv2_s2": 42.4,
        "efficientformerv2_l": 45.2,
        "mobilevit_xxs": 73.6,
        "mobilevit_xs": 77.1,
        "mobilevit_s": 79.1,
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.config)
def test_a_row_says_in_its_first_line_whether_it_was_published(row):
    said, found = summary(CONFIGS[row.config]), recipe(row.config)
    assert (found.model["head"], found.model["backbone"]) == (row.head, row.backbone)
    assert found.all["model"]["class_path"] == "Segmentation"
    assert found.all["data"]["class_path"] == DATA_SETS[row.data_set].data_module
    if row.published is None:
        assert "not published" in said
    else:
        assert f"published by the authors (mIoU {row.published.miou})" in said


@pytest.mark.parametrize("row", ADE20K, ids=lambda row: row.backbone)
def test_ade20k(row):
    """models.md, section 3.8; segmentation/configs/sem_fpn of snap-research/EfficientFormer."""
    found = recipe(row.config)
    assert (found.trainer["max_steps"], found.trainer["max_epochs"]) == (40_000, -1)
    assert found.data["batch_size"] * 8 == 32
    assert found.optimizer["class_path"] == "torch.optim.AdamW"
    assert found.optimizer["init_args"] == {"lr": 2e-4, "weight_decay": 1e-4}
    second = row.backbone.startswith("efficientformerv2")
    assert found.schedule == {"class_path": "Poly", "init_args": {"power": 0.9, "min_lr": 1e-6 if second else 0.0}}
    assert found.model["backbone_options"] == {"official_grid": 512 // 32}
    assert found.model["avg_non_ignore"] is False
    assert not {"gradient_clip_val", "precision"} & set(found.trainer)
    assert not {"ema_decay", "auxiliary_weight"} & (set(found.all) | set(found.model))
    wanted = {
        "image_size": [2048, 512],
        "crop_size": [512, 512],
        "scale_range": [0.5, 2.0],
        "class_limit": 0.75,
        "flip": 0.5,
        "photometric": True,
        "resize": "align",
    }
    assert {name: found.data[name] for name in wanted} == wanted


@pytest.mark.parametrize("row", VOC, ids=lambda row: row.backbone)
def test_voc(row):
    """models.md, section 4.8; config/segmentation of the first release of apple/ml-cvnets."""
    found = recipe(row.config)
    assert (found.trainer["max_epochs"], found.data["batch_size"] * 4) == (50, 128)
    assert found.optimizer["class_path"] == "torch.optim.AdamW"
    assert (found.optimizer["init_args"]["lr"], found.optimizer["init_args"]["weight_decay"]) == (9e-4, 0.01)
    assert found.schedule["class_path"] == "WarmupCosine"
    assert found.schedule["init_args"] == {"warmup_steps": 500, "warmup_lr": 9e-5, "min_lr": 1e-6}
    assert found.model["head_lr_scale"] == 10
    assert (found.model["output_stride"], found.model["head_channels"]) == (16, 256)
    assert found.model["backbone_options"] == {"dropout": 0.05 if row.backbone == "mobilevit_xxs" else 0.1}
    assert found.all["ema_decay"] == pytest.approx(1 - 0.0005)
    assert found.trainer["sync_batchnorm"] is True
    wanted = {"crop_size": [512, 512], "short_side": [256, 1024], "flip": 0.5, "photometric": False, "aug": True}
    assert {name: found.data[name] for name in wanted} == wanted
