"""Every shipped configuration is parsed and built, and says what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from effvit._cli.shipped import merged_config, shipped_configs, summary, with_bases

CONFIGS = shipped_configs()


#: One for each detector and for each family of classifiers; the rest differs in name and size, or is trained by other
#: tests, and tests/test_recipes.py, test_coco_recipes.py and test_segmentation_recipes.py check the figures of all.
QUICK = {
    "classification/efficientvit_m0",
    "classification/efficientformer_l1",
    "classification/mobilevit_xxs",
    "classification/digits_dynamicvit",
    "detection/retinanet_1x",
    "detection/faster_rcnn_1x",
    "detection/coco/mask_rcnn_efficientformerv2_s0",
    "detection/coco/ssdlite_mobilevitv2_050",
    "detection/mmdet",
    "segmentation/ade20k/semantic_fpn_efficientformerv2_s0",
    "segmentation/voc/deeplabv3_mobilevit_xxs",
}


def configs():
    assert set(CONFIGS) >= QUICK
    for name in sorted(CONFIGS):
        yield pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


@pytest.fixture
def class_folders(tmp_path):
    """A folder per class, as ImageNet and any image folder have it."""
    for split in ("train", "val"):
        for kind in ("n01440764", "n01443537"):
            (tmp_path / "classes" / split / kind).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / "classes" / split / kind / "0.jpg"), np.zeros((40, 40, 3), np.uint8))
    return tmp_path / "classes"


@pytest.fixture
def masked_images(tmp_path):
    """A folder that is a folder of images and masks, ADE20K and PASCAL VOC at once, with one image in each split."""
    root = tmp_path / "scenes"
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    folders = [("images/train", "masks/train"), ("images/val", "masks/val")]
    folders += [("images/training", "annotations/training"), ("images/validation", "annotations/validation")]
    folders += [("JPEGImages", "SegmentationClass"), ("JPEGImages", "SegmentationClassAug")]
    for images, masks in folders:
        for folder, ending in ((images, "jpg"), (masks, "png")):
            (root / folder).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / folder / f"0.{ending}"), np.ones((40, 40), np.uint8))
    for name in ("train", "trainaug", "val"):
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("0\n")
    (root / "classes.json").write_text('{"1": "road", "7": "car"}')
    return root


def mmdet_config(name):
    """A configuration that MMDetection brings."""
    import mmdet

    return Path(mmdet.__file__).parent / ".mim" / "configs" / name


@pytest.mark.parametrize("name", list(configs()))
def test_a_config_builds_data_network_and_trainer(name, coco_root, class_folders, masked_images, tmp_path, monkeypatch):
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
    if name == "detection/mmdet":
        pytest.importorskip("mmdet", reason="needs the extra: pip install effvit[mmdet]")
        arguments += ["--model.mmdet_config", str(mmdet_config("retinanet/retinanet_r50_fpn_1x_coco.py"))]
    if data in {"ImageNet", "ImageFolder"}:
        arguments += ["--data.root", str(class_folders)]
    if data in {"ADE20K", "PascalVOC", "SegmentationFolder"}:
        arguments += ["--data.root", str(masked_images)]
    if name.startswith("classification/"):
        arguments += ["--model.pretrained", "false"]  # nothing is downloaded here
        monkeypatch.setattr(Transfer, "categories", {0: "aeroplane", 1: "bird"})
    built = BuildOnly(Run("fit", arguments, tmp_path / "run", "default"))
    assert built.ran == "fit"
    assert isinstance(built.trainer, Trainer)
    assert len(built.model.categories) == len(built.datamodule.categories)
    if data in {"ADE20K", "PascalVOC", "SegmentationFolder"}:
        built.datamodule.setup("fit")
        assert built.datamodule.num_train_images == 1
    assert built.model.configure_optimizers()[0]


def test_every_config_says_in_its_first_line_what_it_is():
    assert CONFIGS
    for name, path in CONFIGS.items():
        assert len(summary(path)) > 20, name


def test_listing_configs_is_fast():
    """Well under the second that a user waits for, interpreter included; generous for a busy machine."""
    command = [sys.executable, "-X", "importtime", "-m", "effvit", "configs"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    imported = [line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert "detection/digits" in done.stdout
    assert not {"torch", "numpy", "lightning", "yaml"} & set(imported)
