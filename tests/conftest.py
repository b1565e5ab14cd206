"""What the tests of every room share: small COCO-format data sets, real data, a private cache, one thread."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

# Before torch is imported anywhere: tests share few cores, and one thread each is the fastest for small tensors.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import cv2
import numpy as np
import pytest
import torch

from effvit.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Box = tuple[float, float, float, float]


@pytest.fixture(scope="session", autouse=True)
def _single_thread() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


@pytest.fixture(scope="session", autouse=True)
def effvit_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache folder of this test session (made data sets, downloads), never the user's own."""
    folder = tmp_path_factory.mktemp("effvit_cache")
    before = os.environ.get("EFFVIT_CACHE")
    os.environ["EFFVIT_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EFFVIT_CACHE"]
    else:
        os.environ["EFFVIT_CACHE"] = before


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images: ``EFFVIT_TEST_DATA``, or ``shared/data`` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EFFVIT_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set EFFVIT_TEST_DATA)")
    return folder


def coco_dict(
    images: list[tuple[int, int, int]],
    boxes: list[tuple[int, int, Box]],
    categories: dict[int, str] | None = None,
) -> dict[str, Any]:
    """A COCO dictionary.

    Args:
        images: ``(image id, width, height)`` each.
        boxes: ``(image id, category id, (x, y, w, h))`` each.
        categories: Names by id.
    """
    categories = categories or {1: "disc", 3: "bar", 90: "ring"}
    return {
        "images": [{"id": i, "file_name": f"{i:06d}.jpg", "width": w, "height": h} for i, w, h in images],
        "annotations": [
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [
                    [box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3], box[0], box[1] + box[3]]
                ],
            }
            for number, (image_id, category_id, box) in enumerate(boxes, start=1)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories.items()],
    }


def write_images(data: dict[str, Any], folder: Path) -> None:
    """Writes one smooth JPEG with its boxes painted for each image of a COCO dictionary."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in data["images"]:
        h, w = entry["height"], entry["width"]
        rows, columns = np.mgrid[0:h, 0:w]
        pixels = np.stack([rows * 255 // h, columns * 255 // w, np.full((h, w), entry["id"] % 256)], -1).astype(
            np.uint8
        )
        for annotation in data["annotations"]:
            if annotation["image_id"] == entry["id"]:
                x, y, bw, bh = (int(value) for value in annotation["bbox"])
                cv2.rectangle(pixels, (x, y), (x + bw, y + bh), (255, 40 * (annotation["category_id"] % 7), 0), -1)
        cv2.imwrite(str(folder / entry["file_name"]), pixels)


def write_coco(root: Path, data: dict[str, Any], split: str) -> None:
    """Writes images and annotations of one split in the COCO layout (``annotations/instances_<split>.json``)."""
    write_images(data, root / split)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))


def random_coco(number: int, seed: int, first_id: int = 1, size: tuple[int, int] = (96, 64)) -> dict[str, Any]:
    """A random COCO dictionary of ``number`` images; every fifth has no object."""
    random = np.random.default_rng(seed)
    images, boxes = [], []
    for image_id in range(first_id, first_id + number):
        w, h = size if image_id % 2 else size[::-1]
        images.append((image_id, w, h))
        for _ in range(0 if image_id % 5 == 0 else int(random.integers(1, 4))):
            bw, bh = random.integers(8, 30, 2)
            x, y = random.integers(0, w - bw), random.integers(0, h - bh)
            boxes.append((image_id, int(random.choice([1, 3, 90])), (float(x), float(y), float(bw), float(bh))))
    return coco_dict(images, boxes)


@pytest.fixture
def make_coco() -> Callable[..., dict[str, Any]]:
    """``make_coco(images, boxes, categories)``: a COCO dictionary from short tuples, see ``coco_dict``."""
    return coco_dict


@pytest.fixture
def save_coco() -> Callable[[Path, dict[str, Any], str], None]:
    """``save_coco(root, data, split)``: writes a split with its images."""
    return write_coco


@pytest.fixture
def coco_root(tmp_path: Path) -> Path:
    """A COCO folder with 12 training and 6 validation images of two shapes, sparse category ids, empty images."""
    write_coco(tmp_path, random_coco(12, seed=0), "train")
    write_coco(tmp_path, random_coco(6, seed=1, first_id=101), "val")
    return tmp_path


#: A detector and scenes small enough to train in seconds; what it learns is not the point here.
TINY = (
    "--model.pyramid_channels 16 --model.head_convs 1 --data.num_train 24 --data.num_val 6 --data.scene_size 64 "
    "--data.batch_size 4 --data.num_workers 0"
).split()


def run(*words: str) -> SimpleNamespace:
    """One command in this process: ``code``, ``out`` and ``err``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return SimpleNamespace(code=ended.value.code, out=out.getvalue(), err=err.getvalue())


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """One command in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "effvit", *map(str, words)]
    return subprocess.Popen(
        command, cwd=cwd, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished two-epoch run with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = run("fit", "-c", "detection/digits", *TINY, "--trainer.max_epochs", "2", "--run_dir", folder)
    assert done.code == 0, done.err
    return folder


def metrics_on_one_and_on_two(run: Path, cwd: Path) -> list[dict[str, float]]:
    """What validating a run on seven scenes gives in one process, and in two."""
    metrics = []
    two = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp"]
    for name, extra in (("one", []), ("two", two)):
        process = start(
            "validate",
            "--checkpoint",
            run / "last.ckpt",
            "--run_dir",
            cwd / name,
            "--data.num_val",
            "7",
            *extra,
            cwd=cwd,
        )
        said = process.communicate()[0]
        assert process.returncode == 0, said
        metrics.append(json.loads((cwd / name / "metrics.json").read_text()))
    return metrics


def losses(folder: Path) -> dict[int, float]:
    """Training loss at each step, from the CSV logs of a run and of its continuations, oldest first."""
    found: dict[int, float] = {}
    for path in [folder / "logs" / "metrics.csv", *sorted((folder / "logs").glob("*/metrics.csv"))]:
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("train/loss"):
                    found[int(row["step"])] = float(row["train/loss"])
    return found


@pytest.fixture(scope="session")
def tiny_coco_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small COCO data set, and the folder of a run on it."""
    folder = tmp_path_factory.mktemp("coco_run")
    write_coco(folder / "data", random_coco(6, seed=0), "train")
    write_coco(folder / "data", random_coco(4, seed=1, first_id=101), "val")
    words = "--data.image_size [96,64] --model.pyramid_channels 16 --model.head_convs 1 --data.num_workers 0".split()
    done = run(
        "fit", "-c", "detection/finetune", "--data.root", folder / "data", *words, "--trainer.max_epochs", 1,
        "--run_dir", folder / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    return folder / "data", folder / "run"


@pytest.fixture(scope="session")
def cli() -> SimpleNamespace:
    """``run``, ``start``, ``losses``, ``metrics_on_one_and_on_two`` and the options ``tiny``."""
    return SimpleNamespace(
        run=run, start=start, losses=losses, metrics_on_one_and_on_two=metrics_on_one_and_on_two, tiny=TINY
    )
