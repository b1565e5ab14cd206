"""The pictures, tables and predictions of a segmenter's run."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from effvit.callbacks import ClassificationReport, Progress, RunReport, SegmentationReport, SegmentationWriter
from effvit.callbacks._confusion import draw_confusion
from effvit.callbacks._iou_bars import draw_iou_bars
from effvit.categories import Categories
from effvit.errors import CheckpointError, ConfigError

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)

NAMES = {2: "road", 7: "car [red]", 90: "cost $5$"}
METRICS = {"mIoU": 0.6, "mAcc": 0.75, "aAcc": 0.8}


def _result() -> SimpleNamespace:
    return SimpleNamespace(
        metrics=METRICS,
        per_class={0: 0.5, 1: 0.7, 2: math.nan},
        accuracy_per_class={0: 0.5, 1: 1.0, 2: math.nan},
        confusion=torch.tensor([[500, 500, 0], [0, 1000, 0], [0, 0, 0]]),
        pixels=torch.tensor([1000, 1000, 0]),
    )


class Segmenter(helper.Tiny):
    """A task as the report sees it; it finds label 1 everywhere."""

    monitor = "val/mIoU"

    def __init__(self, names: dict[int, str] | None = None) -> None:
        super().__init__()
        self.categories = Categories(names or NAMES)
        self.result: Any = None

    def validation_step(self, batch, batch_idx):
        return {"masks": [torch.ones_like(target["mask"]) for target in batch[1]]}

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return [{"mask": target["mask"]} for target in batch[1]]

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.result = _result()
            self.log_dict({f"val/{name}": value for name, value in METRICS.items()})

    def on_test_epoch_end(self) -> None:
        self.result = _result()
        self.log_dict({f"test/{name}": value for name, value in METRICS.items()})


def _loader(names: tuple[str, ...] = ("a.jpg", "b.jpg", "sub/a.jpg", "a.png")) -> Any:
    """Two batches of two images of 40 x 60 that are shown to the network at half size, padded."""
    batches = []
    for start in (0, 2):
        targets = []
        for number in (start, start + 1):
            mask = torch.zeros(40, 60, dtype=torch.int16)
            mask[:10] = 2
            targets.append(
                {"image_id": number, "file_name": names[number], "size": (20, 30), "original_size": (40, 60)}
                | {"mask": mask}
            )
        batches.append((torch.full((2, 3, 32, 32), 99, dtype=torch.uint8), targets))
    return torch.utils.data.DataLoader(batches, batch_size=None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Titles of the diagrams, which are not drawn, and names of the images that are."""
    titles: list[str] = []
    monkeypatch.setattr("effvit.callbacks.segmentation.draw_confusion", lambda path, *_: path.touch())
    monkeypatch.setattr("effvit.callbacks.segmentation.draw_iou_bars", lambda *words: titles.append(words[-1]))

    def pair(image, truth, prediction, names, *, title):
        assert image.shape == (3, 20, 30)
        assert (truth.shape, prediction.shape) == ((40, 60), (40, 60))
        titles.append(title)
        return Image.new("RGB", (30, 20), (1, 2, 3))

    monkeypatch.setattr("effvit.callbacks.segmentation.draw_segmentation_pair", pair)
    return titles


def _trainer(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return helper.make_trainer(folder, list(callbacks), enable_checkpointing=False, **options)


def test_a_run_leaves_pictures_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = RunReport(), ClassificationReport(), SegmentationReport(images=2), Progress()
    trainer = _trainer(tmp_path, *callbacks, enable_progress_bar=True)
    trainer.fit_loop.max_epochs = 1
    trainer.fit(Segmenter(), helper.Loader(), _loader())
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"predictions.png", "iou.png", "confusion.png", "per_class.csv", "curves.png"}
    with (tmp_path / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["label", "id", "name", "IoU", "accuracy", "pixels", "share"],
        ["0", "2", "road", "0.5000", "0.5000", "1000", "0.500000"],
        ["1", "7", "car [red]", "0.7000", "1.0000", "1000", "0.500000"],
        ["2", "90", "cost $5$", "", "", "0", "0.000000"],
    ]
    text = capsys.readouterr().out
    assert re.search(r"mIoU +mAcc +aAcc", text)
    assert re.search(r"0\.600 +0\.750 +0\.800", text)
    assert re.search(r"class +IoU +accuracy", text)
    assert re.search(r"car \[red\] +0\.700 +1\.000", text)
    assert re.search(r"cost \$5\$ +\N{EN DASH} +\N{EN DASH}", text)
    assert re.search(r"^validation  step 7  mIoU 0\.6000  mAcc 0\.7500  aAcc 0\.8000$", text, re.MULTILINE)


def test_images_are_spread_over_the_data_and_the_same_each_time(tmp_path: Path, drawn: list[str]) -> None:
    trainer = _trainer(tmp_path, SegmentationReport(images=2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Segmenter(), helper.Loader(), _loader())
    diagrams = ["val, step 7", "val, step 14"]  # at once, then not for 20 s, and at the end
    assert drawn == ["a.jpg", "sub/a.jpg", diagrams[0], "a.jpg", "sub/a.jpg", diagrams[1]]
    sheet = np.asarray(Image.open(tmp_path / "predictions.png"))
    assert sheet.shape == (2 * 20 + 3 * 16, 30 + 2 * 16, 3)
    assert (sheet == (1, 2, 3)).all(-1).sum() == 2 * 20 * 30


def test_validation_and_test_write_into_their_folder(tmp_path: Path, drawn: list[str]) -> None:
    for verb in ("validate", "test"):
        trainer = _trainer(tmp_path / verb, SegmentationReport(images=3))
        getattr(trainer, verb)(Segmenter(), _loader(), verbose=False)
        assert {path.name for path in (tmp_path / verb).iterdir()} == {
            "predictions.png",
            "confusion.png",
            "per_class.csv",
        }
    assert drawn == ["a.jpg", "b.jpg", "sub/a.jpg", "val", "a.jpg", "b.jpg", "sub/a.jpg", "test"]


def test_no_picture_where_none_is_wanted_and_nothing_for_other_tasks(tmp_path: Path, drawn: list[str]) -> None:
    _trainer(tmp_path / "a", SegmentationReport(images=0)).validate(Segmenter(), _loader(), verbose=False)
    assert not (tmp_path / "a" / "predictions.png").exists()
    trainer = _trainer(tmp_path / "b", SegmentationReport())
    trainer.validate(helper.Tiny(), helper.validation_loader(), verbose=False)
    assert not list((tmp_path / "b").iterdir())
    assert drawn == ["val"]
    with pytest.raises(ConfigError, match="images >= 0"):
        SegmentationReport(images=-1)


@pytest.mark.parametrize("classes", [1, 3, 120, 170])
def test_bars_are_sorted_and_stay_inside(tmp_path: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[float] = []
    monkeypatch.setattr(
        "effvit.callbacks._iou_bars._bars", lambda axes, part, rows, mean: shown.extend(value for value, _ in part)
    )
    values = {label: (label * 7 % classes) / classes for label in range(classes)} | {classes: math.nan}
    draw_iou_bars(tmp_path / "iou.png", values, [f"class {label}" for label in range(classes + 1)], "val")
    expected = sorted((value for value in values.values() if not math.isnan(value)), reverse=True)
    assert shown == (expected if classes <= 150 else expected[:75] + expected[-75:])


def test_bars_have_room_for_names_and_values(tmp_path: Path) -> None:
    values = {label: label / 4 for label in range(5)}
    draw_iou_bars(tmp_path / "iou.png", values, ["a rather long name of a class"] * 5, "val")
    pixels = np.asarray(Image.open(tmp_path / "iou.png").convert("RGB"))
    margin = np.concatenate([pixels[:4].reshape(-1, 3), pixels[-4:].reshape(-1, 3), pixels[:, :4].reshape(-1, 3)])
    assert (margin == 255).all()
    assert (np.abs(pixels.astype(int) - (29, 122, 214)) < 6).all(-1).sum() > 1000  # bars
    assert (np.abs(pixels.astype(int) - (245, 130, 32)) < 6).all(-1).sum() > 50  # the mean
    draw_iou_bars(tmp_path / "none.png", {0: math.nan}, ["nowhere"], "val")
    assert (tmp_path / "none.png").is_file()


def test_confusion_of_pixels_is_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    texts: list[str] = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **_: texts.append(text))
    confusion = torch.tensor([[999_000, 1000], [300_000, 700_000]])
    draw_confusion(tmp_path / "c.png", confusion, ["a", "b"], None, "val")
    assert texts == ["100", "30", "70"]  # a thousandth is left out
    narrow = Image.open(tmp_path / "c.png").width
    draw_confusion(tmp_path / "c.png", confusion, ["a", "b"], torch.zeros(15, 3), "val")
    assert texts[3:] == ["999000", "1000", "300000", "700000"]
    assert Image.open(tmp_path / "c.png").width > narrow + 200  # the reliability diagram


def _predict(folder: Path, model: Segmenter) -> SegmentationWriter:
    writer = SegmentationWriter(folder)
    _trainer(folder, writer).predict(model, _loader(), return_predictions=False)
    return writer


def test_predictions_are_pictures_masks_and_shares(tmp_path: Path) -> None:
    writer = _predict(tmp_path, Segmenter())
    assert writer.summary() == "4 images, 2 classes found"
    pictures = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert pictures == [
        "a.jpg.png", "a.png.png", "b.jpg.png", "masks/a.png", "masks/a.png.png", "masks/b.png", "masks/sub/a.png",
        "sub/a.jpg.png",
    ]  # fmt: skip
    assert json.loads((tmp_path / "classes.json").read_text()) == {str(key): name for key, name in NAMES.items()}
    found = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["mask"] for entry in found] == ["masks/a.png", "masks/b.png", "masks/sub/a.png", "masks/a.png.png"]
    assert found[2]["file_name"] == "sub/a.jpg"
    assert found[2]["classes"] == [
        {"category_id": 2, "name": "road", "share": 0.75},
        {"category_id": 90, "name": "cost $5$", "share": 0.25},
    ]
    mask = Image.open(tmp_path / "masks" / "sub" / "a.png")
    assert mask.mode == "L"
    values = np.asarray(mask)
    assert values.shape == (40, 60)
    assert (values[:10] == 90).all()
    assert (values[10:] == 2).all()
    assert Image.open(tmp_path / "a.jpg.png").width == 240  # 60, enlarged by four


def test_ids_above_255_take_16_bits(tmp_path: Path) -> None:
    _predict(tmp_path, Segmenter({1: "a", 2: "b", 300: "c"}))
    values = np.asarray(Image.open(tmp_path / "masks" / "a.png"))
    assert set(np.unique(values)) == {1, 300}
    for odd in (-1, 70_000):
        with pytest.raises(ConfigError, match=f"has {odd}"):
            _predict(tmp_path, Segmenter({1: "a", odd: "b"}))


def test_pixels_without_a_finite_number_are_refused(tmp_path: Path) -> None:
    class Diverged(Segmenter):
        def predict_step(self, batch, batch_idx):
            return [{"mask": torch.full_like(target["mask"], -1)} for target in batch[1]]

    with pytest.raises(CheckpointError, match=r"2400 pixels of a\.jpg"):
        _predict(tmp_path, Diverged())
