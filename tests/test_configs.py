"""Every shipped configuration is parsed and built, and says what it is."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from effvit._cli.shipped import shipped_configs, summary

CONFIGS = shipped_configs()


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_config_builds_data_network_and_trainer(name, coco_root, tmp_path):
    from lightning.pytorch import Trainer

    from effvit._cli.launch import Run
    from effvit._cli.lightning import EffvitCLI

    class BuildOnly(EffvitCLI):
        def _run_subcommand(self, subcommand):
            self.ran = subcommand

    arguments = ["--config", str(CONFIGS[name])]
    if "CocoDetection" in CONFIGS[name].read_text():
        arguments += ["--data.root", str(coco_root)]
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
