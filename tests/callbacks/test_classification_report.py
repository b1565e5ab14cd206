"""The pictures and tables of a classifier's run."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from effvit.callbacks import ClassificationReport, ClassificationWriter, Progress, RunReport, draw_kept_patches
from effvit.callbacks._confusion import draw_confusion
from effvit.callbacks._tables import class_table, format_count
from effvit.callbacks._throughput import Throughput
from effvit.callbacks.drawing import captioned
from effvit.categories import Categories
from effvit.errors import CheckpointError, ConfigError, DatasetError

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)

NAMES = {0: "ant", 1: "bee [red]", 2: "cost $5$", 3: "never seen"}
RED = torch.tensor([200, 0, 0], dtype=torch.uint8)[:, None, None]
BLUE = torch.tensor([0, 0, 200], dtype=torch.uint8)[:, None, None]


def _result(top1: float = 0.75) -> SimpleNamespace:
    """Six images: an ant taken for a bee with confidence 0.9, another with 0.6."""
    mistakes = (
        SimpleNamespace(image_id=4, label=0, predicted=1, confidence=0.9),
        SimpleNamespace(image_id=1, label=0, predicted=1, confidence=0.6),
    )
    confusion = torch.tensor([[1, 2, 0, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    calibration = torch.full((15, 3), math.nan, dtype=torch.float64)
    calibration[:, 0] = 0
    calibration[13] = torch.tensor([6, 0.9, 0.7])
    return SimpleNamespace(
        metrics={"top1": top1, "loss": 0.5, "ece": 0.2},
        per_class={0: 1 / 3, 1: 1.0, 2: 1.0, 3: math.nan},
        confusion=confusion,
        calibration=calibration,
        mistakes=mistakes,
    )


class Trunk(nn.Module):
    """Keeps the brighter half of four patches, then the brightest."""

    keep_ratio = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward_tokens(self, images):
        self.modes.append(self.training)
        bright = nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).flatten(1)
        order = bright.argsort(1, descending=True).argsort(1)
        return SimpleNamespace(decisions=((order < 2).float(), (order < 1).float()), grid=(2, 2))


class Classifier(helper.Tiny):
    """A task as the report sees it; its validation finds the same each time."""

    monitor = "val/top1"

    def __init__(self, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.network = self.network, nn.ModuleDict()
        self.network.backbone = backbone or nn.Identity()
        self.categories = Categories(NAMES)
        self.result: Any = None

    def training_step(self, batch, batch_idx):
        images, values = batch
        loss = (self.body(images).squeeze(1) - values).square().mean()
        self.log("train/loss", loss.detach())
        return loss

    def prepare(self, batch):
        return batch[0].float() / 255

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch[1]["scores"]

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.result = _result()
            self.log_dict({f"val/{name}": value for name, value in self.result.metrics.items()})

    def on_test_epoch_end(self) -> None:
        self.result = _result(top1=0.5)
        self.log_dict({f"test/{name}": value for name, value in self.result.metrics.items()})


def _batches() -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Four batches of two images of 32 x 32, one quarter of each image white, another one in each batch."""
    batches = []
    for number in range(4):
        images = torch.full((2, 3, 32, 32), 40, dtype=torch.uint8)
        row, column = 16 * (number // 2), 16 * (number % 2)
        images[:, :, row : row + 16, column : column + 16] = 255
        names = [f"sub/{2 * number + k}.jpg" for k in range(2)]
        scores = torch.tensor([[0.1, 0.6, 0.2, 0.1], [0.0, 0.25, 0.75, 0.0]])
        batches.append((images, {"file_names": names, "scores": scores}))
    return batches


class Data(pl.LightningDataModule):
    """Training data of the helper, and originals: red ones, and blue ones in the test split."""

    broken = ()

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, int]] = []

    def train_dataloader(self):
        return helper.Loader()

    def val_dataloader(self):
        return torch.utils.data.DataLoader(_batches(), batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader

    def read_original(self, split, image_id):
        self.asked.append((split, image_id))
        if image_id in self.broken:
            raise DatasetError(f"cannot read image {image_id}")
        return (BLUE if split == "test" else RED).expand(3, 120, 80)


def _fit(folder: Path, model: Any = None, data: Any = None, callbacks: Any = None, **options: Any):
    callbacks = callbacks or [ClassificationReport()]
    options = {"enable_checkpointing": False, "max_epochs": 1} | options
    trainer = helper.make_trainer(folder, callbacks, **{k: v for k, v in options.items() if k != "max_epochs"})
    trainer.fit_loop.max_epochs = options["max_epochs"]
    trainer.fit(model or Classifier(), datamodule=data or Data())
    return trainer


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No confusion picture, which takes longer than the rest of a run, for the tests of other files."""
    monkeypatch.setattr("effvit.callbacks.classification.draw_confusion", lambda path, *_: path.touch())


def test_run_leaves_pictures_and_classes(tmp_path: Path) -> None:
    data = Data()
    _fit(tmp_path, data=data)
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "mistakes.png", "per_class.csv"}
    assert data.asked == [("val", 4), ("val", 1)]
    with (tmp_path / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == list(NAMES.values())
    assert rows[0] == {
        "label": "0", "name": "ant", "images": "3", "accuracy": "0.3333", "precision": "1.0000",
        "taken_for": "bee [red]", "taken_for_images": "2",
    }  # fmt: skip
    assert (rows[1]["accuracy"], rows[1]["precision"], rows[1]["taken_for"]) == ("1.0000", "0.5000", "")
    assert (rows[3]["images"], rows[3]["accuracy"], rows[3]["precision"]) == ("0", "", "")


@pytest.mark.usefixtures("quick")
def test_mistakes_show_the_originals(tmp_path: Path) -> None:
    _fit(tmp_path)
    red = (_pixels(tmp_path / "mistakes.png") == (200, 0, 0)).all(-1)
    assert red.sum() == 2 * 240 * 160  # two images of 120 x 80, twice as large


def test_end_of_run_prints_metrics_and_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _fit(tmp_path, callbacks=[RunReport(), ClassificationReport(), Progress()], enable_progress_bar=True)
    text = capsys.readouterr().out
    assert re.search(r"top1 +loss +ece", text)
    assert re.search(r"0\.750 +0\.500 +0\.200", text)
    assert re.search(r"class +accuracy", text)
    assert re.search(r"ant +0\.333", text)
    assert re.search(r"bee \[red\] +1\.000", text)
    assert re.search(r"never seen +\N{EN DASH}", text)
    assert re.search(r"^validation  step 7  top1 0\.7500$", text, re.MULTILINE)
    assert re.search(r"images seen +56", text)
    assert (tmp_path / "curves.png").is_file()


@pytest.mark.usefixtures("quick")
def test_validation_and_test_write_into_their_folder(tmp_path: Path) -> None:
    data = Data()
    for verb in ("validate", "test"):
        trainer = helper.make_trainer(tmp_path / verb, [ClassificationReport()], enable_checkpointing=False)
        getattr(trainer, verb)(Classifier(Trunk()), datamodule=data, verbose=False)
        names = {path.name for path in (tmp_path / verb).iterdir()}
        assert names == {"confusion.png", "mistakes.png", "per_class.csv", "patches.png"}
    assert data.asked == [("val", 4), ("val", 1), ("test", 4), ("test", 1)]
    assert (_pixels(tmp_path / "test" / "mistakes.png") == (0, 0, 200)).all(-1).any()


def test_pictures_are_rare_and_the_last_ones_are_of_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr(
        "effvit.callbacks.classification.draw_confusion", lambda *arguments: titles.append(arguments[-1])
    )
    _fit(tmp_path, max_epochs=4)
    assert titles == ["val, step 7   top1 0.750   ece 0.200", "val, step 28   top1 0.750   ece 0.200"]
    titles.clear()
    _fit(tmp_path, max_epochs=1)
    assert len(titles) == 1  # not once more at the end


@pytest.mark.usefixtures("quick")
def test_an_old_picture_does_not_stay(tmp_path: Path) -> None:
    class Perfect(Classifier):
        def on_validation_epoch_end(self) -> None:
            self.result = _result()
            self.result.mistakes = ()

    (tmp_path / "mistakes.png").write_bytes(b"of an earlier validation")
    _fit(tmp_path, Perfect())
    assert not (tmp_path / "mistakes.png").exists()


@pytest.mark.usefixtures("quick")
def test_an_image_that_is_gone_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Data()
    data.broken = (4,)
    with caplog.at_level(logging.WARNING, "effvit"):
        _fit(tmp_path, data=data)
    assert "cannot read image 4" in caplog.text
    assert (_pixels(tmp_path / "mistakes.png") == (200, 0, 0)).all(-1).sum() == 240 * 160


@pytest.mark.usefixtures("quick")
def test_inert_for_other_tasks_and_without_originals(tmp_path: Path) -> None:
    trainer = helper.make_trainer(tmp_path / "a", [ClassificationReport()], enable_checkpointing=False)
    trainer.fit(helper.Tiny(), helper.Loader(), helper.validation_loader())
    assert not list((tmp_path / "a").iterdir())
    trainer = helper.make_trainer(tmp_path / "b", [ClassificationReport()], enable_checkpointing=False)
    trainer.validate(Classifier(), Data().val_dataloader(), verbose=False)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"confusion.png", "per_class.csv"}


@pytest.mark.usefixtures("quick")
def test_patches_are_of_the_validated_weights_and_spread_over_the_data(tmp_path: Path) -> None:
    trunk = Trunk()
    _fit(tmp_path, Classifier(trunk), callbacks=[ClassificationReport(patches=2)])
    assert trunk.modes == [False, False]
    sheet = _pixels(tmp_path / "patches.png")
    assert sheet.shape[:2] == (34 + 2 * 128 + 6 + 16, 2 * 16 + 3 * 128 + 2 * 6)  # two images, enlarged by four
    dark = (sheet == 40).all(-1)
    panels = [[dark[34 + 134 * row :, 16 + 134 * column :][:128, :128] for column in range(3)] for row in range(2)]
    # Of the image three quarters are dark, of the first stage one, of the second none. Edges are smooth.
    shares = [[panel.mean() for panel in row] for row in panels]
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0]] * 2, atol=0.08)
    assert panels[0][0][100, 20]  # batch 0 has its white quarter at the upper left, batch 2 at the lower left
    assert not panels[1][0][100, 20]


def test_kept_patches_fit_odd_sizes() -> None:
    image = torch.full((1, 3, 40, 33), 40, dtype=torch.uint8)
    kept = torch.ones(1, 9)
    kept[0, 8] = 0  # the corner that stands over both edges
    sheet = np.asarray(draw_kept_patches(image, [kept], (3, 3)))
    stage = sheet[34:194, 16 + 132 + 6 :][:, :132]
    assert (stage[:120, :120] == 40).all()
    assert (stage[134:, 131] > 200).all()
    with pytest.raises(ValueError, match=r"grid \(3, 3\)"):
        draw_kept_patches(image, [torch.ones(1, 4)], (3, 3))


@pytest.mark.usefixtures("quick")
def test_no_patches_where_none_are_dropped(tmp_path: Path) -> None:
    trunk = Trunk()
    trunk.keep_ratio = 1.0
    _fit(tmp_path, Classifier(trunk))
    assert trunk.modes == []
    _fit(tmp_path, Classifier(Trunk()), callbacks=[ClassificationReport(patches=0, mistakes=0)])
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "per_class.csv"}


@pytest.mark.parametrize(("classes", "numbers", "cells"), [(2, 25, 150), (5, 4, 150), (5, 4, 4)])
def test_confusion_is_drawn_with_numbers_without_and_as_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, numbers: int, cells: int
) -> None:
    monkeypatch.setattr("effvit.callbacks._confusion._MOST_NUMBERS", numbers)
    monkeypatch.setattr("effvit.callbacks._confusion._MOST_CELLS", cells)
    confusion = 8 * torch.eye(classes, dtype=torch.int64)
    calibration = torch.zeros(15, 3, dtype=torch.float64)
    names = [f"a rather long name of class {number}" for number in range(classes)]

    def ink() -> np.ndarray:
        draw_confusion(tmp_path / "c.png", confusion, names, calibration, "title")
        return _pixels(tmp_path / "c.png")

    before = ink()
    confusion[0, 1] = 8
    after = ink()
    assert (before.shape == after.shape) == (classes <= cells)
    assert before.shape != after.shape or (before != after).any()
    margin = np.concatenate([after[:4].reshape(-1, 3), after[-4:].reshape(-1, 3), after[:, :4].reshape(-1, 3)])
    assert (margin == 255).all()  # nothing runs over the edge
    assert (after[:, -4:] == 255).all()


def test_confused_pairs_of_many_classes_are_ranked(tmp_path: Path) -> None:
    from effvit.callbacks._confusion import _most_confused

    confusion = torch.eye(200, dtype=torch.int64)
    confusion[7, 9], confusion[3, 4] = 3, 2
    assert _most_confused(confusion) == [(7, 9, 3, 0.75), (3, 4, 2, pytest.approx(2 / 3))]
    assert _most_confused(torch.eye(200, dtype=torch.int64)) == []


def test_captions_are_cut_to_fit() -> None:
    image = torch.zeros(3, 30, 60, dtype=torch.uint8)
    short, long = captioned(image, ["ant"]), captioned(image, ["a very long name " * 10])
    assert short.size == long.size == (240, 266)
    assert (np.asarray(short)[60:180] == 0).all()  # 30 x 60, enlarged by four, in the middle
    assert (np.asarray(short)[185:240] == 255).all()
    assert (np.asarray(long)[242:] < 128).any(axis=(0, 2)).nonzero()[0].max() > 200


def test_very_many_classes_are_cut_to_the_worst_and_best(capsys: pytest.CaptureFixture[str]) -> None:
    from rich import get_console

    get_console().print(
        class_table([(f"c{n}", [n / 1000]) for n in range(1000)] + [("none", [math.nan])], ["accuracy"])
    )
    text = capsys.readouterr().out
    assert re.search(r"worst classes +accuracy +best classes +accuracy", text)
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("c")]
    assert rows[0] == ["c0", "0.000", "c999", "0.999"]
    assert len(rows) == 10
    assert "none" not in text


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (12_345, "12.3k"), (1_281_167, "1.28M"), (384_350_100, "384M")]
)
def test_counts_format(number: int, text: str) -> None:
    assert format_count(number) == text


def test_images_seen_go_on_after_a_resume() -> None:
    first, second = Progress(), Progress()
    first._throughput.add(64)
    first._throughput.add(64)
    second.load_state_dict(first.state_dict())
    second._throughput.add(8)
    assert second.state_dict() == {"images_seen": 136}
    report = RunReport()
    state = report.state_dict()
    assert state["images_seen"] == 0
    del state["images_seen"]
    report.load_state_dict(state)  # a checkpoint of an earlier release
    clock = Throughput()
    clock.add(5)
    assert (clock.images, clock.images_seen) == (0, 5)  # a batch of unknown duration has no rate


@pytest.mark.parametrize("options", [{"mistakes": -1}, {"patches": -1}])
def test_report_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        ClassificationReport(**options)


def _predict(folder: Path, model: Any = None, **options: Any) -> ClassificationWriter:
    writer = ClassificationWriter(folder, **options)
    trainer = helper.make_trainer(folder, [writer], enable_checkpointing=False)
    trainer.predict(model or Classifier(), datamodule=Data(), return_predictions=False)
    return writer


def test_predictions_as_json(tmp_path: Path) -> None:
    writer = _predict(tmp_path, top=2, file_format="json")
    found = json.loads((tmp_path / "predictions.json").read_text(encoding="utf-8"))
    assert [entry["file_name"] for entry in found] == [f"sub/{n}.jpg" for n in range(8)]
    assert found[0]["classes"] == [
        {"label": 1, "name": "bee [red]", "score": 0.6},
        {"label": 2, "name": "cost $5$", "score": 0.2},
    ]
    assert writer.summary() == "8 images in predictions.json"


def test_predictions_as_csv(tmp_path: Path) -> None:
    _predict(tmp_path, top=9, file_format="csv")
    with (tmp_path / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["file_name", *(f"{part}_{n}" for n in range(1, 5) for part in ("class", "score"))]
    assert rows[2][:5] == ["sub/1.jpg", "cost $5$", "0.75000", "bee [red]", "0.25000"]
    assert len(rows) == 9


def test_predictions_as_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effvit.callbacks.predictions._MOST_ROWS", 3)
    _predict(tmp_path, top=1)
    shown = capsys.readouterr().out
    assert re.search(r"sub/0\.jpg +bee \[red\] \(0\.600\)", shown)
    assert "sub/2.jpg" in shown
    assert "sub/3.jpg" not in shown
    assert "and 5 more" in shown
    written = (tmp_path / "predictions.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"sub/\d\.jpg +\S.*\(0\.\d{3}\)", written)) == 8
    assert max(map(len, written.splitlines())) < 60


def test_predicted_patches(tmp_path: Path) -> None:
    _predict(tmp_path, Classifier(Trunk()), patches=True)
    pictures = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert pictures == [f"patches/sub/{n}.jpg.png" for n in range(8)]
    with pytest.raises(ConfigError, match="keeps all of them"):
        _predict(tmp_path, patches=True)


def test_scores_that_are_nan_are_refused(tmp_path: Path) -> None:
    class Diverged(Classifier):
        def predict_step(self, batch, batch_idx):
            return batch[1]["scores"] * math.nan

    with pytest.raises(CheckpointError, match=r"sub/0\.jpg are NaN"):
        _predict(tmp_path, Diverged())


@pytest.mark.parametrize(("options", "match"), [({"top": 0}, "top"), ({"file_format": "jsn"}, "'json'")])
def test_writer_options_out_of_range(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ClassificationWriter(tmp_path, **options)
