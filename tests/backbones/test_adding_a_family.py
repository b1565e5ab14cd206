"""The example of docs/backbones.md, taken through the five steps that stand beside it, and the figures of that page."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from effvit.backbones import (
    FeaturePyramid,
    _registry,
    backbone_info,
    create_backbone,
    create_classifier,
    list_backbones,
    load_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")


@pytest.fixture
def module(tmp_path):
    """The page's example as a file of its own."""
    (source,) = re.findall(r"^```py\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "plain.py"
    path.write_text(source, encoding="utf-8")
    return path


@pytest.fixture
def plain(module, monkeypatch):
    """Its variant's name, registered for one test."""
    monkeypatch.setattr(_registry, "_VARIANTS", dict(_registry._VARIANTS))
    spec = importlib.util.spec_from_file_location("plain", module)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plain", loaded)  # where dataclasses look up the annotations
    spec.loader.exec_module(loaded)
    return "plain_xs"


def test_it_is_listed(plain, cli):
    assert plain in list_backbones()
    done = cli.run("backbones", "plain")
    assert done.code == 0, done.err
    assert re.search(rf"{plain} +0\.11 M +0\.014 G +224 +- +16, 32, 48, 64 at 4, 8, 16, 32", done.out)


def test_it_is_gone_after_the_test():
    assert "plain_xs" not in list_backbones()


def test_the_contract_test_takes_it(module):
    words = ["-m", "pytest", "-q", "-n", "0", "-p", "plain", "-p", "no:cacheprovider", "-k", "plain"]
    path = os.pathsep.join([str(module.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, *words, str(ROOT / "tests" / "backbones" / "test_backbone_contract.py")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 15


def test_its_weights_are_saved_and_loaded_under_both_names(plain, randomise, tmp_path):
    ours = randomise(create_classifier(plain, num_classes=7))
    state = {**ours.backbone.state_dict(), **{f"head.{key}": value for key, value in ours.head.state_dict().items()}}
    torch.save({"model": state}, tmp_path / "ours.pth")
    theirs = {}
    for key, value in state.items():
        stage = re.match(r"stages\.(\d)\.conv\.", key)
        name = re.sub(r"^stem\.conv\.", "features.0.", key) if stage is None else f"features.{int(stage[1]) + 1}."
        theirs[(name if stage is None else name + key[stage.end() :]).replace("head.", "fc.")] = value
    torch.save({"state_dict": theirs}, tmp_path / "theirs.pth")
    images = torch.randn(2, 3, 50, 70)
    for file in ("ours.pth", "theirs.pth"):
        loaded = create_classifier(plain, num_classes=7).eval()
        report = load_checkpoint(loaded, tmp_path / file)
        assert (report.missing, report.unexpected) == ((), ())
        assert torch.equal(loaded(images), ours(images))
        backbone = create_backbone(plain, pretrained=tmp_path / file).eval()
        assert torch.equal(backbone(images)["c5"], ours.backbone(images)["c5"])


def test_it_fuses_and_carries_a_pyramid(plain, randomise, relative_error):
    pyramid = randomise(FeaturePyramid(create_backbone(plain), out_channels=8))
    images = torch.randn(1, 3, 97, 130)
    fused = copy.deepcopy(pyramid).fuse()
    assert not any(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    with torch.no_grad():
        for level, feature in pyramid(images).items():
            assert relative_error(fused(images)[level], feature) < 1e-5


def test_it_trains_in_a_detector(plain, cli, tmp_path):
    done = cli.run(
        "fit", "-c", "detection/digits", *cli.tiny, "--model.backbone", plain, "--trainer.max_steps", 1,
        "--trainer.log_every_n_steps", 1, "--run_dir", tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(cli.losses(tmp_path / "run")) == 1


def table():
    """The cells of each row of the page's tables, by name."""
    rows = re.findall(r"^\| `([\w]+)` \| (.*) \|$", PAGE, re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_the_page_has_a_row_for_every_backbone():
    assert sorted(table()) == list_backbones()


@pytest.mark.parametrize("name", list_backbones())
def test_the_page_has_the_figures_of_the_code(name):
    info, network = backbone_info(name), _registry.outline(name)
    assert table()[name] == [
        f"{info.params:,}",
        f"{info.macs / 1e6:,.0f} M at {network.input_spec.size[0]}",
        "-" if info.top1 is None else str(info.top1),
        ", ".join(str(spec.channels) for spec in network.feature_maps),
        ", ".join(str(spec.stride) for spec in network.feature_maps),
    ]
