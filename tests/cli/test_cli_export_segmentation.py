"""``effvit export`` of a segmenter, and ``effvit predict --model``: the same label maps as the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from effvit._cli.exported_inputs import canvas_of, files_for, network_inputs, preprocessing_of, samples_of
from effvit.deploy.exported import metadata_of
from effvit.deploy.formats import FORMATS
from effvit.errors import ConfigError

#: Twice as wide as high, as are the images below: they fill the canvas.
SIZE = (64, 128)
TINY = (
    "--trainer.max_steps 2 --trainer.limit_val_batches 0 --model.pyramid_channels 16 --model.head_channels 16 "
    "--data.batch_size 2 --data.num_workers 0 --data.image_size [128,64] --data.crop_size [64,64]"
).split()
#: Class ids with a gap, and colours.
CLASSES = {0: "ground", 3: "leaf", 4: "sky", 9: "stone"}


def train(cli, folder: Path, backbone: str) -> Path:
    """Checkpoint of two steps, whose classes are then spread: after so little training all pixels are of one."""
    random = np.random.default_rng(0)
    for split, number in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (folder / "data" / kind / split).mkdir(parents=True)
        for index in range(number):
            cv2.imwrite(str(folder / f"data/images/{split}/{index}.jpg"), picture(random, SIZE))
            cv2.imwrite(str(folder / f"data/masks/{split}/{index}.png"), random.choice([*CLASSES, 255], SIZE))
    (folder / "data/classes.json").write_text(json.dumps(CLASSES))
    words = ["--model.backbone", backbone, "--data.root", folder / "data", "--run_dir", folder / "run"]
    done = cli.run("fit", "-c", "segmentation/finetune", *TINY, *words)
    assert done.code == 0, done.err
    content = torch.load(folder / "run/last.ckpt", weights_only=True)
    weight = content["state_dict"]["segmenter.head.conv_seg.weight"]
    torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    torch.save(content, folder / "scenes.ckpt")
    return folder / "scenes.ckpt"


def picture(random, size):
    """Smooth colours."""
    small = random.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def checkpoint(cli, tmp_path_factory):
    return train(cli, tmp_path_factory.mktemp("efficientvit"), "efficientvit_m0")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three images that fill the canvas, of other sizes than it; and two that do not."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(1)
    for number, size in enumerate([SIZE, (100, 200), (48, 96), (90, 60), (64, 80)]):
        cv2.imwrite(str(folder / f"{number}.png"), picture(random, size))
    return folder


def export(cli, checkpoint, file, *words):
    done = cli.run("export", "--checkpoint", checkpoint, "--output", file, *words)
    assert done.code == 0, done.err
    return done.out


def masks(cli, folder, *words):
    done = cli.run("predict", *words, "--output", folder)
    assert done.code == 0, done.err
    return {path.stem: np.asarray(Image.open(path)) for path in sorted((folder / "masks").iterdir())}


@pytest.fixture(scope="module")
def expected(cli, checkpoint, pictures, tmp_path_factory):
    """What the checkpoint says of the pictures, in the batches of the tests below."""
    words = ["--checkpoint", checkpoint, "--images", pictures, "--batch_size", 3]
    return masks(cli, tmp_path_factory.mktemp("expected"), *words)


def assert_same_masks(found, expected, names):
    for name in names:
        assert found[name].shape == expected[name].shape
        assert (found[name] == expected[name]).mean() >= 0.999
    assert set(found) == set(expected)
    assert len({value for name in names for value in np.unique(expected[name])}) > 1


@pytest.mark.parametrize("name", ["torchscript", "onnx"])
def test_a_file_predicts_as_its_checkpoint(name, checkpoint, pictures, expected, cli, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    file = tmp_path / f"scenes{FORMATS[name].suffix}"
    out = export(cli, checkpoint, file, "--format", name, "--batch_size", 2, "--image_size", *SIZE)
    assert "Against the checkpoint on 2 images" in out
    assert re.search(r"labels +0 % of the pixels +- +0.1 %", out)
    assert re.search(r"logits +\S+ +\S+ +1e-04", out)
    assert "the same label for 100 % of the pixels" in out
    words = ["--images", pictures, "--batch_size", 3]  # passes of two images and of one, filled up
    found = masks(cli, tmp_path / "file", "--model", file, *words)
    assert {value for mask in found.values() for value in np.unique(mask)} <= CLASSES.keys()
    assert_same_masks(found, expected, "012")
    metadata = metadata_of(file)
    assert metadata["task"] == "segmentation"
    assert metadata["categories"] == {str(number): name for number, name in CLASSES.items()}
    assert metadata["preprocessing"] == {"image_size": [128, 64], "resize": "align", "pad_divisor": 32}
    assert metadata["parity"]["labels"] == 1.0
    assert [entry["name"] for entry in metadata["inputs"]] == ["images", "sizes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_a_file_for_any_number_of_images(name, checkpoint, pictures, expected, cli, tmp_path):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    file = tmp_path / f"scenes{FORMATS[name].suffix}"
    assert "any number of images, 64 x 128 pixels" in export(
        cli, checkpoint, file, "--format", name, "--image_size", *SIZE
    )
    words = ["--images", pictures, "--batch_size", 3]
    found = masks(cli, tmp_path / "file", "--model", file, *words)
    assert_same_masks(found, expected, "012")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2"])
def test_a_file_for_images_of_any_size(name, pictures, cli, tmp_path):
    """All masks are the checkpoint's: each batch has the padding that the checkpoint gives it."""
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    checkpoint = train(cli, tmp_path, "mobilevitv2_050")
    file = tmp_path / f"scenes{FORMATS[name].suffix}"
    out = export(cli, checkpoint, file, "--format", name, "--image_size", "any")
    assert "any number of images, heights and widths of 64 to 4096 pixels in steps of 32" in out
    words = ["--images", pictures, "--batch_size", 2]
    found = masks(cli, tmp_path / "file", "--model", file, *words)
    assert_same_masks(found, masks(cli, tmp_path / "run-masks", "--checkpoint", checkpoint, *words), "01234")


@pytest.mark.slow
@pytest.mark.realdata
def test_photographs(checkpoint, real_data, cli, tmp_path):
    """Made to fill the canvas, as the file's user would who wants the very labels of the checkpoint."""
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for path in sorted((real_data / "coco_semantic" / "images").rglob("*.jpg"))[:6]:
        cv2.imwrite(str(photographs / f"{path.stem}.png"), cv2.resize(cv2.imread(str(path)), (400, 200)))
    file = tmp_path / "scenes.torchscript"
    export(cli, checkpoint, file, "--format", "torchscript", "--image_size", *SIZE, "--images", photographs)
    words = ["--images", photographs]
    found = masks(cli, tmp_path / "file", "--model", file, *words)
    assert len(found) == 6
    assert_same_masks(found, masks(cli, tmp_path / "run", "--checkpoint", checkpoint, *words), found)


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("torchscript", ["any"], "torchscript for segmentation takes images of one size; onnx and openvino and pt2"),
        ("onnx", ["any"], "semantic_fpn on efficientvit_m0 can only be exported for images of one size"),
        ("torchscript", ["64", "100"], "multiples of 32, as in the run, not 64 100"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(checkpoint, cli, tmp_path, name, size, match):
    for package in FORMATS[name].modules:
        pytest.importorskip(package)
    words = ["--format", name, "--output", tmp_path / f"a{FORMATS[name].suffix}"]
    done = cli.run("export", "--checkpoint", checkpoint, *words, "--image_size", *size)
    assert done.code != 0
    assert match in done.err
    assert not list(tmp_path.iterdir())


ALIGN = {"image_size": (128, 64), "resize": "align", "pad_divisor": 32}


@pytest.mark.parametrize(
    ("inputs", "asked", "canvas", "size"),
    [
        (ALIGN, None, (128, 128), [128, 64]),
        (ALIGN | {"image_size": (2048, 512)}, None, (1024, 1024), [2048, 512]),
        (ALIGN | {"image_size": (512, 2048)}, (512, 704), (512, 704), [512, 2048]),
        (ALIGN | {"image_size": (320, 300), "resize": "squash"}, None, (320, 320), [320, 300]),
        (ALIGN | {"image_size": (320, 300), "resize": "squash"}, (64, 96), (64, 96), [96, 64]),
    ],
)
def test_canvas_and_preprocessing_follow_from_the_data(inputs, asked, canvas, size):
    assert canvas_of("segmentation", inputs, asked) == canvas
    assert preprocessing_of("segmentation", inputs, canvas)["image_size"] == size
    with pytest.raises(ConfigError, match="multiples of 32"):
        canvas_of("segmentation", inputs, (64, 100))


@pytest.mark.parametrize("resize", ["align", "keep_ratio"])
def test_images_are_made_to_fit_the_canvas(resize, pictures):
    """A long one that the run would see in 64 x 200 pixels has its ratio kept, and its sides aligned where they are."""
    preprocessing = {"image_size": [256, 64], "resize": resize, "pad_divisor": 32}
    data = files_for("segmentation", preprocessing, (64, 96), str(pictures))
    data.setup("predict")
    sizes = [(tuple(images.shape[2:]), tuple(targets[0]["size"])) for images, targets in data.predict_dataloader()]
    aligned = resize == "align"
    assert sizes[0] == ((64, 96), (64, 96) if aligned else (48, 96))
    assert sizes[3] == ((64, 64), (64, 64) if aligned else (64, 43))


def test_what_a_network_takes_beside_images():
    target = {"size": (40, 60), "original_size": (80, 120)}
    images, sizes = network_inputs("segmentation", (torch.ones(1, 3, 64, 64), [target]), (64, 128))
    assert images.shape == (1, 3, 64, 128)
    assert sizes.tolist() == [[40, 60]]
    ((images, sizes),) = samples_of("segmentation", [(torch.ones(1, 3, 64, 64), [target])], (32, 32), 4)
    assert images.shape == (1, 3, 32, 32)
    assert (sizes.tolist(), float(images.sum())) == ([[21, 32]], 3 * 21 * 32)
