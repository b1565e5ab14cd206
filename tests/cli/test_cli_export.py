"""``effvit export``, and ``effvit predict --model`` with what it wrote: the same results as the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from effvit._cli.exported_inputs import canvas_of, fitted, network_inputs, open_canvas, preprocessing_of, samples_of
from effvit.deploy.exported import metadata_of
from effvit.deploy.formats import FORMATS
from effvit.errors import ConfigError
from effvit.tasks import Classification, Detection

SIDE = 64


def save_run(path: Path, task: Any, data: dict[str, Any], inputs: dict[str, Any]) -> Path:
    """A checkpoint as a run would have written it, of a network that was never trained."""
    name = type(task).__name__
    settings = {key: value for key, value in task.hparams.items() if key != "categories"}
    config = {
        "trainer": {},
        "model": {"class_path": f"effvit.tasks.{name}", "init_args": {**settings, "pretrained": False}},
        "data": data,
    }
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "global_step": 0,
        "effvit": {"config": yaml.safe_dump(config), "inputs": inputs},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    task = Classification("efficientvit_m0", {number: str(number) for number in range(10)})
    for module in task.modules():
        if isinstance(module, torch.nn.Linear):  # else all classes of an untrained network are alike
            torch.nn.init.normal_(module.weight, std=5000)
    published = {"size": 224, "crop": 1.0, "interpolation": "bicubic"}
    data = {"class_path": "effvit.datamodules.DigitImages", "init_args": {"image_size": 32, "batch_size": 8}}
    path = tmp_path_factory.mktemp("classifier") / "best.ckpt"
    return save_run(path, task.eval(), data, {"image_size": 32, "published": published})


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    task = Detection(
        "efficientvit_m0", {number: str(number) for number in range(3)}, pyramid_channels=16, head_convs=1,
        score_threshold=0.0, detections_per_image=20,
    )  # fmt: skip
    data = {"class_path": "effvit.datamodules.HandwrittenDigits", "init_args": {"scene_size": SIDE, "num_val": 4}}
    inputs = {"image_size": (SIDE, SIDE), "resize": "keep_ratio", "pad_divisor": 32}
    return save_run(tmp_path_factory.mktemp("detector") / "best.ckpt", task.eval(), data, inputs)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Five images of several shapes, one in a folder below."""
    folder = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    (folder / "below").mkdir()
    for number, shape in enumerate([(64, 64), (80, 50), (40, 90), (64, 48), (100, 100)]):
        small = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        name = "below/e.png" if number == 4 else f"{number}.png"
        cv2.imwrite(str(folder / name), cv2.resize(small, shape[::-1], interpolation=cv2.INTER_CUBIC))
    return folder


def exported(cli, checkpoint: Path, name: str, *words: Any) -> SimpleNamespace:
    done = cli.run("export", "--checkpoint", checkpoint, "--format", name, *words)
    assert done.code == 0, done.err
    return done


def predictions(cli, folder: Path, *words: Any) -> list[dict[str, Any]]:
    done = cli.run("predict", *words, "--output", folder)
    assert done.code == 0, done.err
    return json.loads((folder / "predictions.json").read_text(encoding="utf-8"))


def assert_same_classes(found, expected):
    assert [entry["file_name"] for entry in found] == [entry["file_name"] for entry in expected]
    for own, other in zip(found, expected, strict=True):
        assert [line["name"] for line in own["classes"]] == [line["name"] for line in other["classes"]]
        for line, wanted in zip(own["classes"], other["classes"], strict=True):
            assert line["score"] == pytest.approx(wanted["score"], abs=2e-5)


def assert_same_detections(found, expected):
    assert len(found) == len(expected) > 0
    for own, other in zip(found, expected, strict=True):
        names = ("image_id", "file_name", "category_id")
        assert [own[name] for name in names] == [other[name] for name in names]
        assert own["bbox"] == pytest.approx(other["bbox"], abs=0.02)
        assert own["score"] == pytest.approx(other["score"], abs=2e-5)


def test_a_classifier_predicts_as_its_checkpoint(classifier, photographs, cli, tmp_path):
    done = exported(cli, classifier, "torchscript", "--batch_size", 2, "--parity_images", 3)
    assert "Against the checkpoint on 3 images" in done.out  # in batches of two, the last one filled up
    assert "probabilities" in done.out
    assert "first class for 100.0 %" in done.out
    file = classifier.with_suffix(".torchscript")
    words = ["--images", photographs, "--format", "json", "--batch_size", 3]  # a pass of two and one of one, filled up
    expected = predictions(cli, tmp_path / "one", "--checkpoint", classifier, *words)
    assert_same_classes(predictions(cli, tmp_path / "two", "--model", file, *words), expected)
    assert len({entry["classes"][0]["score"] for entry in expected}) == 5
    metadata = metadata_of(file)
    assert metadata["checkpoint"] == "best.ckpt"
    assert metadata["preprocessing"]["published"]["interpolation"] == "bicubic"
    assert list(metadata["categories"].values()) == [str(number) for number in range(10)]


def test_a_detector_predicts_as_its_checkpoint(detector, photographs, cli, tmp_path):
    file = tmp_path / "detector.torchscript"
    done = exported(cli, detector, "torchscript", "--output", file, "--images", photographs, "--parity_images", 2)
    assert "Against the checkpoint on 2 images" in done.out
    assert "40 detections, 0 of either side without a partner" in done.out
    assert f"{file}: torchscript" in done.out
    words = ["--images", photographs, "--batch_size", 2]
    expected = predictions(cli, tmp_path / "one", "--checkpoint", detector, *words)
    found = predictions(cli, tmp_path / "two", "--model", file, *words)
    square = [entry for entry in expected if entry["image_id"] in (1, 4, 5)]  # others have more padding on the canvas
    assert_same_detections([entry for entry in found if entry["image_id"] in (1, 4, 5)], square)
    pictures = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.png"))
        for name in ("one", "two")
    ]
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_a_trained_detector_in_other_formats(tiny_run, photographs, cli, tmp_path, name):
    for module in {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",), "pt2": ()}[name]:
        pytest.importorskip(module)
    content = torch.load(tiny_run / "best.ckpt", weights_only=True)
    config = yaml.safe_load(content["effvit"]["config"])
    config["model"]["init_args"]["score_threshold"] = content["hyper_parameters"]["score_threshold"] = 0.0
    content["effvit"]["config"] = yaml.safe_dump(config)
    torch.save(content, tmp_path / "best.ckpt")
    done = exported(cli, tmp_path / "best.ckpt", name)
    assert "Against the checkpoint on 8 images" in done.out  # six scenes, and the first ones again
    file = (tmp_path / "best").with_suffix({"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}[name])
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for path in photographs.glob("*.png"):
        cv2.imwrite(str(scenes / path.name), cv2.resize(cv2.imread(str(path)), (SIDE, SIDE)))
    expected = predictions(cli, tmp_path / "one", "--checkpoint", tmp_path / "best.ckpt", "--images", scenes)
    assert_same_detections(predictions(cli, tmp_path / "two", "--model", file, "--images", scenes), expected)


def test_the_formats_are_listed(cli):
    done = cli.run("export", "--list")
    assert done.code == 0
    for name in ("onnx", "openvino", "torchscript", "pt2", "coreml", "executorch"):
        assert name in done.out


def test_the_page_says_what_the_table_of_formats_does():
    page = (Path(__file__).resolve().parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| `\w+` \| `\.", line)
    ]
    assert [row[0].strip("`") for row in rows] == list(FORMATS)
    for row, entry in zip(rows, FORMATS.values(), strict=True):
        assert row[1].split(" + ")[0] == f"`{entry.suffix}`"
        assert row[3] == (f"`effvit[{entry.extra}]`" if entry.extra else "-")
        assert row[4] == ", ".join(entry.tasks)
        assert row[5] == (", ".join(entry.dynamic_batch) or "no")
        assert row[6] == (", ".join(entry.dynamic_size) or "no")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--checkpoint", "x.ckpt", "--format", "onx"], "no export format is called 'onx'. Did you mean 'onnx'"),
        ([], "needs --checkpoint FILE"),
        (["--checkpoint", "absent.ckpt", "--format", "torchscript"], "absent.ckpt"),
    ],
)
def test_what_is_refused_before_any_work(cli, words, match):
    done = cli.run("export", *words)
    assert done.code != 0
    assert match in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [[], ["--checkpoint", "a.ckpt", "--model", "b.onnx"]])
def test_prediction_takes_a_checkpoint_or_a_model(cli, words):
    done = cli.run("predict", "--images", "folder", *words)
    assert done.code == 2
    assert "either --checkpoint FILE" in done.err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--score_threshold", "0.5"], "is of classification, and --score_threshold is an option of detection"),
        (["--patches"], "pass --checkpoint"),
        (["--trainer.accelerator", "gpu"], "--trainer.accelerator is not understood with --model"),
    ],
)
def test_options_that_an_exported_file_does_not_take(classifier, photographs, cli, words, match):
    if not classifier.with_suffix(".torchscript").exists():
        exported(cli, classifier, "torchscript", "--batch_size", 2, "--parity_images", 1)
    file = classifier.with_suffix(".torchscript")
    done = cli.run("predict", "--model", file, "--images", photographs, *words)
    assert done.code == 2
    assert match in done.err


@pytest.mark.parametrize(("name", "content"), [("absent.onnx", None), ("weights.pt", b"no model"), ("a.onnx", b"\0")])
def test_what_is_no_exported_file(cli, photographs, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = cli.run("predict", "--model", tmp_path / name, "--images", photographs)
    assert done.code != 0
    assert name in done.err
    assert "Traceback" not in done.err


def test_without_images_of_the_run_others_are_asked_for(classifier, cli, tmp_path):
    content = torch.load(classifier, weights_only=True)
    config = yaml.safe_load(content["effvit"]["config"])
    config["data"] = {"class_path": "effvit.datamodules.ImageFolder", "init_args": {"root": str(tmp_path / "gone")}}
    content["effvit"]["config"] = yaml.safe_dump(config)
    torch.save(content, tmp_path / "moved.ckpt")
    done = cli.run("export", "--checkpoint", tmp_path / "moved.ckpt", "--format", "torchscript")
    assert done.code == 2
    assert "name a folder of other images with --images" in done.err
    assert str(tmp_path / "gone") in done.err
    assert not list(tmp_path.glob("*.torchscript"))


KEEP = {"image_size": (1333, 800), "resize": "keep_ratio", "pad_divisor": 32}
SQUASH = {"image_size": (320, 300), "resize": "squash", "pad_divisor": 1}


@pytest.mark.parametrize(
    ("task", "inputs", "asked", "canvas", "size"),
    [
        ("detection", KEEP, None, (1344, 1344), [1333, 800]),
        ("detection", KEEP, (800, 1344), (800, 1344), [1333, 800]),
        ("detection", SQUASH, None, (300, 320), [320, 300]),
        ("detection", SQUASH, (256, 224), (256, 224), [224, 256]),
        ("detection", SQUASH | {"pad_divisor": 32}, None, (320, 320), [320, 300]),
        ("classification", {"image_size": None, "published": {"size": 256}}, None, (256, 256), 256),
        ("classification", {"image_size": 64, "published": {"size": 256}}, (96, 96), (96, 96), 96),
    ],
)
def test_canvas_and_preprocessing_follow_from_the_data(task, inputs, asked, canvas, size):
    assert canvas_of(task, inputs, asked) == canvas
    assert preprocessing_of(task, inputs, canvas)["image_size"] == size


@pytest.mark.parametrize(
    ("task", "inputs", "asked", "match"),
    [
        ("detection", KEEP, (800, 1333), "multiples of 32, as in the run, not 800 1333"),
        ("detection", SQUASH, (16, 64), "at least 32, not 16 64"),
        ("classification", {"image_size": 64}, (64, 96), "square images: --image_size 64 64"),
    ],
)
def test_a_canvas_that_cannot_be(task, inputs, asked, match):
    with pytest.raises(ConfigError, match=match):
        canvas_of(task, inputs, asked)


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(800, 1333, (800, 1333)), (1333, 800, (800, 480)), (1000, 1344, (800, 1075)), (9, 9, (9, 9))],
)
def test_images_are_made_to_fit_the_canvas(height, width, size):
    assert fitted(height, width, (800, 1344)) == size


SIDES = range(64, 257, 32)


def test_images_of_any_size_are_padded_to_the_next_one():
    images, target = torch.ones(1, 3, 70, 130), {"size": (70, 130), "original_size": (700, 1300)}
    found, sizes, originals = network_inputs("detection", (images, [target]), SIDES)
    assert found.shape == (1, 3, 96, 160)
    assert found.sum() == 3 * 70 * 130
    assert (sizes.tolist(), originals.tolist()) == ([[70, 130]], [[700, 1300]])
    assert network_inputs("detection", (images[..., :32], [target]), SIDES)[0].shape == (1, 3, 96, 64)


def test_samples_of_any_size_are_no_larger_than_the_largest():
    target = {"size": (300, 600), "original_size": (300, 600)}
    ((images, sizes, _),) = samples_of("detection", [(torch.ones(1, 3, 320, 608), [target])], SIDES, 1)
    assert images.shape == (1, 3, 128, 256)
    assert sizes.tolist() == [[128, 256]]


def test_images_of_any_size_are_made_as_in_the_run():
    assert open_canvas("detection", KEEP, SIDES) == SIDES
    assert preprocessing_of("detection", KEEP, SIDES) == {**KEEP, "image_size": [1333, 800]}
    inputs = {"image_size": None, "published": {"size": 256}}
    assert preprocessing_of("classification", inputs, open_canvas("classification", inputs, SIDES))["image_size"] == 256
    with pytest.raises(ConfigError, match=r"images of 72 pixels, and a file .* takes multiples of 32 from 64 to 256"):
        open_canvas("classification", {"image_size": 72}, SIDES)


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        (
            "torchscript",
            ["any"],
            "torchscript for classification takes images of one size; onnx and openvino and pt2 can",
        ),
        ("onnx", ["any"], "efficientvit_m0 can only be exported for images of one size"),
        ("torchscript", ["large"], "--image_size needs a side, or height and width, in pixels, or any, not large"),
    ],
)
def test_a_size_that_cannot_be_is_refused_before_any_work(classifier, cli, tmp_path, name, size, match):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    words = ["--format", name, "--output", tmp_path / f"a{FORMATS[name].suffix}", "--image_size", *size]
    done = cli.run("export", "--checkpoint", classifier, *words)
    assert done.code != 0
    assert match in done.err
    assert not list(tmp_path.iterdir())
