"""The shipped recipes hold the figures of the papers and of the official repositories; see the header of each file."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from effvit._cli.shipped import merged_config, shipped_configs, summary

CONFIGS = shipped_configs()

#: Recipe, published top-1 in per cent, images of a step, epochs.
PUBLISHED = [
    ("efficientvit_m0", 63.2, 2048, 300),
    ("efficientvit_m1", 68.4, 2048, 300),
    ("efficientvit_m2", 70.8, 2048, 300),
    ("efficientvit_m3", 73.4, 2048, 300),
    ("efficientvit_m4", 74.3, 2048, 300),
    ("efficientvit_m5", 77.1, 2048, 300),
    ("efficientvit_m5_cifar10", 98.0, 256, 300),
    ("efficientvit_m5_cifar100", 86.4, 256, 300),
    ("efficientvit_m5_flowers102", 97.1, 256, 300),
    ("efficientvit_m5_oxford_iiit_pets", 92.0, 256, 300),
    ("efficientvit_m5_stanford_cars", 89.7, 256, 300),
    ("efficientformer_l1", 79.2, 3072, 300),
    ("efficientformer_l3", 82.4, 3072, 300),
    ("efficientformer_l7", 83.3, 3072, 300),
    ("mobilevit_xxs", 69.0, 1024, 300),
    ("mobilevit_xs", 74.8, 1024, 300),
    ("mobilevit_s", 78.4, 1024, 300),
    ("dynamicvit_small", 79.32, 1024, 30),
]
NAMES = [row[0] for row in PUBLISHED]
TRANSFER = [name for name in NAMES if name.startswith("efficientvit_m5_")]
IMAGENET = [name for name in NAMES if name not in TRANSFER]
DEIT = [name for name in NAMES if not name.startswith("mobilevit")]


def recipe(name):
    """Trainer, model, data, optimizer, schedule and everything of a recipe."""
    config = merged_config(CONFIGS[f"classification/{name}"])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    return SimpleNamespace(
        all=config,
        trainer=config["trainer"],
        model=model,
        data=data,
        data_class=config["data"]["class_path"],
        optimizer=model["optimizer"]["init_args"],
        schedule=model["lr_scheduler"]["init_args"],
    )


@pytest.mark.parametrize(("name", "top1", "batch", "epochs"), PUBLISHED, ids=NAMES)
def test_a_recipe_names_its_number_and_its_batch(name, top1, batch, epochs):
    found = recipe(name)
    assert f"{top1} %" in summary(CONFIGS[f"classification/{name}"])
    assert found.model["lr_batch_size"] == batch
    assert batch % found.data["batch_size"] == 0
    assert found.trainer["max_epochs"] == epochs
    assert found.model["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert (found.optimizer["betas"], found.optimizer["eps"]) == ([0.9, 0.999], 1e-8)
    assert found.model["backbone"] == re.sub(r"(_m5)_.*", r"\1", name)
    assert found.all["model"]["class_path"] == "Classification"


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_of_today_are_shipped(name):
    found = recipe(name)
    assert found.trainer["precision"] == "bf16-mixed"
    assert found.model["channels_last"] is True
    assert "devices" not in found.trainer
    header = " ".join(CONFIGS[f"classification/{name}"].read_text().replace("#", "").split())
    assert "arXiv" in header
    assert "steps an epoch" in header or "an epoch and" in header or "_base/mobilevit" in header


@pytest.mark.parametrize("name", DEIT)
def test_the_augmentation_of_deit(name):
    found = recipe(name)
    names = ("label_smoothing", "mixup", "cutmix", "mix_probability", "switch_probability", "random_erasing")
    assert [found.model[key] for key in names] == [0.1, 0.8, 1.0, 1.0, 0.5, 0.25]
    augmentation = found.data["augmentation"]
    assert (augmentation["policy"], augmentation["magnitude"], augmentation["magnitude_std"]) == (
        "rand_augment",
        9,
        0.5,
    )
    assert augmentation["color_jitter"] == 0
    assert "ema_decay" not in found.all


@pytest.mark.parametrize("name", [name for name in IMAGENET if name.startswith("efficientvit")])
def test_efficientvit(name):
    found = recipe(name)
    assert found.optimizer["lr"] == pytest.approx(1e-3 * 2048 / 512)
    assert found.optimizer["weight_decay"] == 0.025
    assert found.schedule == {"warmup_epochs": 5, "warmup_lr": 1e-6, "min_lr": 1e-5, "delay_epochs": 1}
    assert found.model["clip_adaptive"] == 0.02
    assert (found.data_class, found.data["batch_size"], found.data["repeats"]) == ("ImageNet", 256, 3)
    assert not found.model.get("teacher")


@pytest.mark.parametrize("name", TRANSFER)
def test_efficientvit_on_small_sets(name):
    found = recipe(name)
    assert (found.optimizer["lr"], found.optimizer["weight_decay"]) == (1e-3, 1e-8)
    assert found.model["pretrained"] is True
    assert (found.data_class, found.data["name"]) == ("Transfer", name.removeprefix("efficientvit_m5_"))
    assert found.data["repeats"] == 3
    assert found.schedule == recipe("efficientvit_m5").schedule
    assert found.model["clip_adaptive"] == 0.02


@pytest.mark.parametrize("name", [name for name in IMAGENET if name.startswith("efficientformer")])
def test_efficientformer(name):
    found = recipe(name)
    assert found.optimizer["lr"] == pytest.approx(1e-3 * 3072 / 1024)
    assert found.optimizer["weight_decay"] == 0.025
    assert found.schedule == {"warmup_epochs": 5, "warmup_lr": 1e-5, "min_lr": 1e-5, "delay_epochs": 1}
    assert found.model["clip_adaptive"] == 0.01
    assert found.trainer["sync_batchnorm"] is True
    assert (found.data["batch_size"], found.data["repeats"]) == (128, 3)
    assert found.model["teacher"] == "timm/regnety_160.deit_in1k"
    assert (found.model["distillation"], found.model["distillation_alpha"]) == ("hard", 0.5)


@pytest.mark.parametrize("name", [name for name in IMAGENET if name.startswith("mobilevit")])
def test_mobilevit(name):
    found = recipe(name)
    assert (found.optimizer["lr"], found.optimizer["weight_decay"]) == (2e-3, 0.01)
    assert found.model["decay_all"] is True
    assert found.schedule == {"warmup_steps": 3000, "warmup_lr": 2e-4, "min_lr": 2e-4}
    assert found.all["ema_decay"] == pytest.approx(1 - 0.0005)
    assert found.data["multi_scale"] == [160, 192, 256, 288, 320]
    assert (found.data["image_size"], found.data["batch_size"]) == (256, 128)
    assert found.data["augmentation"] == {"policy": "none"}
    dropout = 0.05 if name == "mobilevit_xxs" else 0.1
    assert found.model["backbone_options"] == {"dropout": dropout, "classifier_dropout": 0.1}
    assert found.model["label_smoothing"] == 0.1
    assert not {"mixup", "cutmix", "random_erasing", "clip_adaptive"} & set(found.model)
    assert found.data.get("repeats", 1) == 1


def test_dynamicvit():
    found = recipe("dynamicvit_small")
    assert (found.optimizer["lr"], found.optimizer["weight_decay"]) == (1e-3, 0.05)
    assert found.schedule == {"warmup_epochs": 5, "warmup_lr": 0.0, "min_lr": 1e-6, "every": "step"}
    weights = ("ratio_weight", "token_weight", "kl_weight", "backbone_lr_scale", "frozen_epochs", "freeze")
    assert [found.model[key] for key in weights] == [2.0, 0.5, 0.5, 0.01, 5, ["cls_token", "pos_embed"]]
    assert found.model["backbone_options"] == {"keep_ratio": 0.7}
    assert (found.model["teacher"], found.model["teacher_options"]) == ("dynamicvit_small", {"keep_ratio": 1.0})
    assert found.model["pretrained"] is True
    assert found.data.get("repeats", 1) == 1
    assert "clip_adaptive" not in found.model


def test_every_recipe_is_in_the_table():
    small = {"digits", "digits_dynamicvit", "transfer"}
    found = {name.removeprefix("classification/") for name in CONFIGS if name.startswith("classification/")}
    assert found - small == set(NAMES)
