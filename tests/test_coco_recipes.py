"""The shipped recipes of the COCO tables hold the figures of the papers and of the official repositories."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest

from effvit._cli.coco_rows import ROWS
from effvit._cli.shipped import merged_config, shipped_configs, summary
from effvit.backbones import list_backbones

CONFIGS = shipped_configs()
COCO = [row.config for row in ROWS]

#: Detector and family: epochs, images of a step on the published number of GPUs, learning rate, weight decay, steps of
#: the warm-up, image size, backbone BatchNorm in eval mode, weights averaged. The columns of models.md, section 8.
TWO_STAGE_1X = {"epochs": 12, "batch": 2 * 8, "warmup": 500, "size": [1333, 800], "ema": None}
RECIPES = {
    ("retinanet", "efficientvit"): {**TWO_STAGE_1X, "lr": 1e-4, "decay": 0.05, "factor": 1e-3, "norm_eval": True},
    ("mask_rcnn", "efficientvit"): {**TWO_STAGE_1X, "lr": 1e-4, "decay": 0.05, "factor": 1e-3, "norm_eval": True},
    ("mask_rcnn", "dynamicvit"): {**TWO_STAGE_1X, "lr": 1e-4, "decay": 0.05, "factor": 1e-3, "norm_eval": True},
    ("mask_rcnn", "efficientformer"): {**TWO_STAGE_1X, "lr": 2e-4, "decay": 1e-4, "factor": 1e-6, "norm_eval": False},
    ("mask_rcnn", "efficientformerv2"): {**TWO_STAGE_1X, "lr": 2e-4, "decay": 0.05, "factor": 1e-6, "norm_eval": False},
}
SSDLITE_DECAY = {"mobilevit": 0.01, "mobilevitv2": 0.05}


def family(name):
    return name.rpartition("_")[0]


@functools.cache
def recipe(name):
    """Trainer, model, data, optimizer, schedule and everything of a recipe."""
    config = merged_config(CONFIGS[name])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    return SimpleNamespace(
        all=config,
        trainer=config["trainer"],
        model=model,
        data=data,
        optimizer=model["optimizer"]["init_args"],
        schedule=model["lr_scheduler"]["init_args"],
    )


def test_every_variant_of_every_family_has_a_row_and_every_row_a_config():
    assert {name for name in CONFIGS if name.startswith("detection/coco/")} == set(COCO)
    assert len(set(COCO)) == len(COCO)
    assert {row.backbone for row in ROWS} == set(list_backbones())
    for row in ROWS:
        expected = {"efficientvit": {"retinanet", "mask_rcnn"}, "mobilevit": {"ssdlite"}, "mobilevitv2": {"ssdlite"}}
        built = {other.detector for other in ROWS if other.backbone == row.backbone}
        assert built == expected.get(family(row.backbone), {"mask_rcnn"}), row.backbone


@pytest.mark.parametrize("row", ROWS, ids=COCO)
def test_a_row_says_in_its_first_line_whether_it_was_published(row):
    said, found = summary(CONFIGS[row.config]), recipe(row.config)
    assert (found.model["detector"], found.model["backbone"]) == (row.detector, row.backbone)
    assert (found.all["model"]["class_path"], found.all["data"]["class_path"]) == ("Detection", "CocoDetection")
    if row.published is None:
        assert "not published" in said
        assert row.checkpoint is None
        return
    assert "not published" not in said
    assert "published by the authors" in said or "LSNet paper only" in said
    assert f"AP {row.published.box[0]}" in said
    if row.published.mask:
        assert f"mask AP {row.published.mask[0]}" in said
    assert ("unconfirmed" in said) == (row.published.by == "unconfirmed")


@pytest.mark.parametrize("row", [row for row in ROWS if row.detector != "ssdlite"], ids=lambda row: row.config)
def test_1x(row):
    found, published = recipe(row.config), RECIPES[row.detector, family(row.backbone)]
    assert found.trainer["max_epochs"] == published["epochs"]
    assert found.data["batch_size"] * 8 == published["batch"]
    assert found.data["image_size"] == published["size"]
    assert found.data["flip"] == 0.5
    assert found.model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert found.optimizer == {"lr": published["lr"], "weight_decay": published["decay"]}
    assert found.model["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.MultiStepLR"
    assert found.schedule == {"milestones": [8, 11]}
    assert (found.model["warmup_steps"], found.model["warmup_factor"]) == (published["warmup"], published["factor"])
    assert found.model["norm_eval"] is published["norm_eval"]
    assert found.all.get("ema_decay") is published["ema"]
    assert not {"gradient_clip_val", "precision"} & set(found.trainer)  # fp32, no clipping
    assert found.trainer.get("sync_batchnorm", False) is row.backbone.startswith("efficientformerv2")
    snap = row.backbone.startswith("efficientformer")
    assert found.model.get("backbone_options") == ({"official_grid": 25} if snap else None)


@pytest.mark.parametrize("row", [row for row in ROWS if row.detector == "ssdlite"], ids=lambda row: row.config)
def test_ssdlite(row):
    found = recipe(row.config)
    assert found.trainer["max_epochs"] == 200
    assert 128 % found.data["batch_size"] == 0
    assert (found.data["image_size"], found.data["resize"], found.data["augmentation"]) == ([320, 320], "squash", "ssd")
    assert found.model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert found.optimizer["lr"] == 9e-4
    assert found.optimizer["weight_decay"] == SSDLITE_DECAY[family(row.backbone)]
    assert found.model["lr_scheduler"]["class_path"] == "WarmupCosine"
    assert found.schedule == {"warmup_steps": 500, "warmup_lr": 9e-5, "min_lr": 1e-6}
    assert found.all["ema_decay"] == pytest.approx(1 - 0.0005)
    assert found.trainer["sync_batchnorm"] is True
    assert found.model["norm_eval"] is False
    dropout = {"mobilevit_xxs": 0.05, "mobilevit_xs": 0.1, "mobilevit_s": 0.1}.get(row.backbone)
    assert found.model.get("backbone_options") == (dropout and {"dropout": dropout})


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn", "mask_rcnn"])
def test_the_recipe_of_a_detector_is_that_of_efficientvit_m4(detector):
    found = recipe(f"detection/{detector}_1x")
    assert (found.model["detector"], found.model["backbone"]) == (detector, "efficientvit_m4")
    same = recipe("detection/coco/retinanet_efficientvit_m4")
    assert {**found.all, "base": None, "model": None} == {**same.all, "base": None, "model": None}
    assert {**found.model, "detector": None} == {**same.model, "detector": None}
