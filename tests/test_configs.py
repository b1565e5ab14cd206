"""Every shipped configuration is parsed and built, and says what it is."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest

from effvit._cli.shipped import merged_config, shipped_configs, summary, with_bases

CONFIGS = shipped_configs()


#: Those that stand for their family in each run of the tests; the rest differs in name and size only.
QUICK = {"efficientvit_m0", "efficientvit_m5_cifar10", "efficientformer_l1", "mobilevit_xxs", "dynamicvit_small"}
RECIPES = ("efficientvit", "efficientformer", "mobilevit", "dynamicvit")


def configs():
    for name in sorted(CONFIGS):
        recipe = name.removeprefix("classification/")
        rare = recipe.startswith(RECIPES) and recipe not in QUICK
        yield pytest.param(name, marks=[pytest.mark.slow] if rare else [])


@pytest.fixture
def class_folders(tmp_path):
    """A folder per class, as ImageNet and any image folder have it."""
    for split in ("train", "val"):
        for kind in ("n01440764", "n01443537"):
            (tmp_path / "classes" / split / kind).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "classes" / split / kind / "0.jpg"), np.zeros((40, 40, 3), np.uint8))
    return tmp_path / "classes"


@pytest.mark.parametrize("name", list(configs()))
def test_a_config_builds_data_network_and_trainer(name, coco_root, class_folders, tmp_path, monkeypatch):
    from lightning.pytorch import Trainer

    from effvit._cli.launch import Run
    from effvit._cli.lightning import EffvitCLI
    from effvit.datamodules import Transfer

    class BuildOnly(EffvitCLI):
        def _run_subcommand(self, subcommand):
            self.ran = subcommand

    arguments = [word for path in with_bases(CONFIGS[name]) for word in ("--config", str(path))]
    data = merged_config(CONFIGS[name])["data"]["class_path"]
    if data == "CocoDetection":
        arguments += ["--data.root", str(coco_root)]
    if data in {"ImageNet", "ImageFolder"}:
        arguments += ["--data.root", str(class_folders)]
    if name.startswith("classification/"):
        arguments += ["--model.pretrained", "false"]  # nothing is downloaded here
        monkeypatch.setattr(Transfer, "categories", {0: "aeroplane", 1: "bird"})
    built = BuildOnly(Run("fit", arguments, tmp_path / "run", "default"))
    assert built.ran == "fit"
    assert isinstance(built.trainer, Trainer)
    assert len(built.model.categories) == len(built.datamodule.categories)
    assert built.model.configure_optimizers()[0]


def test_every_config_says_in_its_first_line_what_it_is():
    assert CONFIGS
    for name, path in CONFIGS.items():
        assert len(summary(path)) > 20, name


def test_the_recipe_of_the_published_table_is_as_published():
    """Figures of the official downstream configs, see the header of the file."""
    import yaml

    config = yaml.safe_load(CONFIGS["detection/retinanet_1x"].read_text())
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert config["trainer"]["max_epochs"] == 12
    assert model["optimizer"] == {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4, "weight_decay": 0.05}}
    assert model["lr_scheduler"]["init_args"] == {"milestones": [8, 11]}
    assert (model["warmup_steps"], model["warmup_factor"]) == (500, 0.001)
    assert (data["image_size"], data["flip"], data["batch_size"]) == ([1333, 800], 0.5, 2)
    assert "ema_decay" not in config
    assert "gradient_clip_val" not in config["trainer"]


def test_listing_configs_is_fast():
    """Well under the second that a user waits for, interpreter included; generous for a busy machine."""
    command = [sys.executable, "-X", "importtime", "-m", "effvit", "configs"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    imported = [line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "detection/digits" in done.stdout
    assert not {"torch", "numpy", "lightning", "yaml"} & set(imported)
