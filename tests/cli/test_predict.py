"""``effvit predict`` of a classifier, and the options of each task."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from effvit._cli import predict as module
from effvit.errors import ConfigError


@pytest.fixture(scope="module")
def classifier(cli, tmp_path_factory):
    """Checkpoint of a DynamicViT after one step on digits."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    done = cli.run(
        "fit", "-c", "classification/digits", "--model.backbone", "dynamicvit_tiny", "--data.image_size", 64,
        "--data.batch_size", 4, "--data.num_workers", 0, "--trainer.max_steps", 1, "--trainer.limit_val_batches", 0,
        "--ema_decay", "null", "--run_dir", folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "last.ckpt"


@pytest.fixture
def photographs(coco_root):
    """Two images in a folder, one more below, and one that is cut off."""
    first, second, third, *rest = sorted((coco_root / "val").iterdir())
    for path in rest:
        path.unlink()
    (coco_root / "val" / "below").mkdir()
    shutil.move(third, coco_root / "val" / "below" / "c.jpg")
    second.write_bytes(second.read_bytes()[:300])
    return SimpleNamespace(folder=coco_root / "val", sound=first.name, broken=second.name)


def test_classes_scores_and_patches_of_a_folder(classifier, photographs, cli, tmp_path):
    words = ["predict", "--checkpoint", classifier, "--images", photographs.folder]
    done = cli.run(*words, "--output", tmp_path, "--format", "json", "--top", 3, "--unreadable", "skip", "--patches")
    assert done.code == 0, done.err
    assert photographs.broken in done.err
    assert "2 images in predictions.json" in done.out
    found = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert [entry["file_name"] for entry in found] == [photographs.sound, "below/c.jpg"]
    for entry in found:
        scores = [line["score"] for line in entry["classes"]]
        assert len(scores) == 3
        assert scores == sorted(scores, reverse=True)
        assert 0 < sum(scores) <= 1
        assert all(line["name"] == str(line["label"]) for line in entry["classes"])
        assert (tmp_path / "patches" / f"{entry['file_name']}.png").is_file()


def test_one_image_as_csv_in_the_default_folder(classifier, photographs, cli):
    image = photographs.folder / photographs.sound
    done = cli.run("predict", "--checkpoint", classifier, "--images", image, "--format", "csv")
    assert done.code == 0, done.err
    assert photographs.sound in done.out
    with (classifier.parent / "predictions" / "predictions.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["file_name"] == photographs.sound
    assert {row[f"class_{n}"] for n in range(1, 6)} <= set("0123456789")


def test_a_file_that_cannot_be_read_stops_by_name(classifier, photographs, cli, tmp_path):
    done = cli.run("predict", "--checkpoint", classifier, "--images", photographs.folder, "--output", tmp_path)
    assert done.code == 1
    assert photographs.broken in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("task", "words", "match"),
    [
        ("Detection", ["--top", "3"], "--top is an option of classification"),
        ("Detection", ["--format", "csv"], "--format is an option of classification"),
        ("Detection", ["--patches"], "--patches is an option of classification"),
        ("Classification", ["--score_threshold", "0"], "--score_threshold is an option of detection"),
        ("Classification", ["--top", "0"], "top must be 1 or more"),
    ],
)
def test_options_of_another_task_are_refused(monkeypatch, tmp_path, task, words, match):
    config = {"model": {"class_path": f"effvit.tasks.{task}", "init_args": {}}, "trainer": {}}
    content = {"effvit": {"config": yaml.safe_dump(config), "inputs": {}}}
    monkeypatch.setattr(module, "open_run", lambda *_: (tmp_path / "best.ckpt", content))
    monkeypatch.setattr(module, "start", lambda *_: pytest.fail("the run was started"))
    with pytest.raises(ConfigError, match=match):
        module.predict(["--checkpoint", "x", "--images", "y", *words])


@pytest.mark.parametrize(
    ("task", "data", "inputs"),
    [
        ("Detection", "ImageFiles", {"image_size": (64, 32), "pad_divisor": 16}),
        ("Classification", "ClassifiedFiles", {"image_size": None, "published": {"size": 256}}),
    ],
)
def test_each_task_gets_its_data_as_it_was_validated(monkeypatch, tmp_path, capsys, task, data, inputs):
    def start(run):
        seen.update(yaml.safe_load(Path(run.arguments[1]).read_text()))
        return 0

    seen = {}
    config = {"model": {"class_path": f"effvit.tasks.{task}", "init_args": {}}, "trainer": {"devices": 8}}
    content = {"effvit": {"config": yaml.safe_dump(config), "inputs": inputs}}
    torch.save(content | {"state_dict": {}, "hyper_parameters": {}}, tmp_path / "best.ckpt")
    monkeypatch.setattr(module, "start", start)
    assert module.predict(["--checkpoint", str(tmp_path), "--images", "folder", "--unreadable", "skip"]) == 0
    assert seen["data"]["class_path"] == f"effvit.datamodules.{data}"
    given = seen["data"]["init_args"]
    assert (given["images"], given["unreadable"]) == ("folder", "skip")
    assert given["image_size"] == (list(inputs["image_size"]) if inputs["image_size"] else None)
    assert seen["trainer"]["devices"] == 1
    assert "0 images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["best.onnx", "best.xml", "best.pte"])
def test_an_exported_file_given_as_a_checkpoint(cli, tmp_path, name):
    done = cli.run("predict", "--checkpoint", tmp_path / name, "--images", tmp_path)
    assert done.code == 2
    assert f"pass --model {tmp_path / name}" in done.err


def test_a_checkpoint_given_as_an_exported_file(cli, tmp_path):
    done = cli.run("predict", "--model", tmp_path / "best.ckpt", "--images", tmp_path)
    assert done.code == 2
    assert f"pass --checkpoint {tmp_path / 'best.ckpt'}" in done.err
