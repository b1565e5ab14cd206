"""The pictures, the history and the table that a run leaves."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from effvit.callbacks import Progress, RunReport, class_colour
from effvit.callbacks._curves import draw_curves, smooth
from effvit.callbacks._run_folder import spread
from effvit.callbacks._tables import format_metric, format_seconds
from effvit.categories import Categories
from effvit.errors import ConfigError

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)

SCORES = {"AP": 0.1234, "AP50": 0.4567, "AP75": 0.05, "APs": -1.0, "APm": 0.2, "APl": 0.3}


class Detector(helper.Tiny):
    """Finds every object of an image of half the original's size, with score 0.9."""

    def __init__(self) -> None:
        super().__init__()
        self.categories = Categories({3: "disc", 7: "bar"})
        self.result = SimpleNamespace(per_class={"bbox": {3: 0.7, 7: -1.0}})

    def validation_step(self, batch, batch_idx):
        found = [
            {"boxes": 2 * t["boxes"], "labels": t["labels"], "scores": torch.full((len(t["boxes"]),), 0.9)}
            for t in batch[1]
        ]
        return {"detections": found}

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in SCORES.items()})

    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": value for name, value in SCORES.items()})


def _images() -> Any:
    def batch(number: int):
        targets = [
            {
                "image_id": 2 * number + k,
                "boxes": torch.tensor([[20.0, 30, 60, 70]]),
                "labels": torch.tensor([k]),
                "size": (80, 100),
                "original_size": (160, 200),
            }
            for k in range(2)
        ]
        return torch.full((2, 3, 96, 128), 40 * number, dtype=torch.uint8), targets

    return torch.utils.data.DataLoader([batch(k) for k in range(4)], batch_size=None)


def _fit(folder: Path, report: RunReport, model: Any = None, ckpt_path: str | None = None, **options: Any):
    options = {"max_epochs": 2, "enable_checkpointing": False} | options
    trainer = helper.make_trainer(folder, [report], **{k: v for k, v in options.items() if k != "max_epochs"})
    trainer.fit_loop.max_epochs = options["max_epochs"]
    trainer.fit(model or Detector(), helper.Loader(), _images(), ckpt_path=ckpt_path)
    return trainer


def test_run_leaves_pictures_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _fit(tmp_path, RunReport(images=2))
    assert {"predictions.png", "curves.png"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob("*.tmp"))
    text = capsys.readouterr().out
    assert re.search(r"AP +AP50 +AP75 +APs +APm +APl", text)
    assert re.search(r"0\.123 +0\.457 +0\.050 +\N{EN DASH} +0\.200 +0\.300", text)
    assert re.search(r"disc +0\.700", text)
    assert re.search(r"bar +\N{EN DASH}", text)
    assert str(tmp_path) in text.replace("\n", "")
    assert "images/s" in text
    assert trainer.global_step == 14


def test_prediction_is_drawn_over_the_ground_truth(tmp_path: Path) -> None:
    """Detections come in pixels of the original, which is twice as large: both panels must frame the same place."""
    _fit(tmp_path, RunReport(images=1))
    sheet = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB")).astype(int)
    dark = (sheet == 0).all(-1)
    columns = np.nonzero(dark.any(0))[0]
    left, right = columns[0], columns[np.nonzero(np.diff(columns) > 3)[0][0] + 1]
    width = 400  # an image of 100 x 80 without its padding, enlarged by 4
    top = np.nonzero(dark.any(1))[0][0]
    truth, prediction = sheet[top : top + 320, left : left + width], sheet[top : top + 320, right : right + width]
    below_captions = slice(160, 320)
    np.testing.assert_array_equal(truth[below_captions], prediction[below_captions])
    assert (truth[200, 78:82] != 0).any()  # the left edge, at 4 * 20
    assert (truth[200, 238:242] != 0).any()  # the right edge, at 4 * 60


class MaskDetector(Detector):
    """The same with masks: the upper half of every box, at the size of the original."""

    def __init__(self) -> None:
        super().__init__()
        self.result = SimpleNamespace(
            per_class={"bbox": {3: 0.7, 7: -1.0}, "segm": {3: 0.65, 7: -1.0}}, metrics={"bbox": {}, "segm": {}}
        )

    def validation_step(self, batch, batch_idx):
        outputs = super().validation_step(batch, batch_idx)
        for found in outputs["detections"]:
            found["rles"] = [_half(box) for box in found["boxes"].int().tolist()]
        return outputs

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log_dict({"val/mask_AP": 0.111, "val/mask_AP50": 0.444, "val/mask_APs": -1.0})


def _half(box: list[int]) -> dict[str, Any]:
    mask = np.zeros((160, 200), dtype=np.uint8, order="F")
    mask[box[1] : (box[1] + box[3]) // 2, box[0] : box[2]] = 1
    return mask_api.encode(mask)


def test_masks_are_drawn_and_have_their_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = _images()
    for _, targets in data.dataset:
        for target in targets:
            target["masks"] = torch.from_numpy(mask_api.decode([_half([40, 60, 120, 140])])).permute(2, 0, 1)
    options = {"enable_checkpointing": False, "enable_progress_bar": True}
    trainer = helper.make_trainer(tmp_path, [RunReport(images=1), Progress()], **options)
    trainer.fit(MaskDetector(), helper.Loader(), data)
    sheet = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB")).astype(int)
    tint = (0.45 * np.array(class_colour(0))).round()  # over the black image
    for columns in (slice(0, sheet.shape[1] // 2), slice(sheet.shape[1] // 2, None)):
        tinted = (abs(sheet[:, columns] - tint) <= 1).all(-1)
        assert 0.6 < tinted.sum() / (160 * 80) < 1  # half of a box of 160 x 160, less its frame and soft edges
    text = capsys.readouterr().out
    assert re.search(r"boxes +0\.123 +0\.457 +0\.050", text)
    assert re.search(r"masks +0\.111 +0\.444 +\N{EN DASH} +\N{EN DASH}", text)
    assert re.search(r"class +box AP +mask AP", text)
    assert re.search(r"disc +0\.700 +0\.650", text)
    assert "AP75 0.0500  mask_AP 0.1110  mask_AP50 0.4440" in text


def test_same_images_after_every_validation(tmp_path: Path) -> None:
    _fit(tmp_path, RunReport(images=3), max_epochs=1)
    first = (tmp_path / "predictions.png").read_bytes()
    _fit(tmp_path, RunReport(images=3), max_epochs=3)
    assert (tmp_path / "predictions.png").read_bytes() == first


@pytest.mark.parametrize(
    ("wanted", "batches", "expected"),
    [(4, 8, (1, {0, 2, 4, 6})), (4, 2, (2, {0, 1})), (3, 2, (2, {0, 1})), (1, 5, (1, {0})), (0, 5, (0, set()))],
)
def test_images_are_spread_over_the_validation_data(wanted: int, batches: int, expected: tuple[int, set[int]]) -> None:
    assert spread(wanted, batches) == expected


def test_history_is_the_mean_loss_between_points(tmp_path: Path) -> None:
    report, model = RunReport(images=0, every_n_steps=5), helper.Tiny()
    trainer = helper.make_trainer(tmp_path, [report], enable_checkpointing=False)
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    losses = [event[-1] for event in model.events if event[0] == "train"]
    state = report.state_dict()
    assert state["steps"] == [5, 10, 15, 20, 25]
    assert state["losses"] == pytest.approx([float(np.mean(losses[k : k + 5])) for k in range(0, 25, 5)], rel=1e-5)
    assert [step for step, _ in state["evaluations"]] == [7, 14, 21, 28]


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_other_verbs_print_the_table_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    trainer = helper.make_trainer(tmp_path, [RunReport(images=1)], enable_checkpointing=False)
    getattr(trainer, verb)(Detector(), _images(), verbose=False)
    text = capsys.readouterr().out
    assert len(re.findall(r"0\.123 +0\.457", text)) == 1
    assert ("Validation" if verb == "validate" else "Test") in text


def test_any_other_task_gets_curves_and_its_own_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Classifier(helper.Tiny):
        monitor = "val/accuracy"

        def on_validation_epoch_end(self) -> None:
            self.log("val/accuracy", 0.75)

    report = RunReport(every_n_steps=2)
    helper.make_trainer(tmp_path, [report], enable_checkpointing=False).fit(
        Classifier(), helper.Loader(), helper.validation_loader()
    )
    assert (tmp_path / "curves.png").is_file()
    assert not (tmp_path / "predictions.png").exists()
    assert re.search(r"accuracy +0\.750", capsys.readouterr().out)


def test_curves_show_what_they_are_given(tmp_path: Path) -> None:
    def ink(losses: list[float], evaluations: list[tuple[int, dict[str, float]]]) -> np.ndarray:
        steps = list(range(10, 10 * len(losses) + 1, 10))
        draw_curves(tmp_path / "c.png", steps, losses, [0.1] * len(losses), evaluations, ["AP"])
        return np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))

    falling = ink([5.0, 3.0, 2.0, 1.0], [(20, {"AP": 0.1}), (40, {"AP": 0.3})])
    other = ink([5.0, 3.0, 2.0, 4.0], [(20, {"AP": 0.1}), (40, {"AP": 0.3})])
    width = falling.shape[1]
    assert (falling[:, : width // 3] != other[:, : width // 3]).any()
    assert (falling[:, width // 2 :] == other[:, width // 2 :]).all()
    assert ink([], []).size  # a run that was stopped at once
    assert (ink([2.0, math.inf, math.nan], [(20, {"AP": math.nan})]) != ink([], [])).any()  # one that diverged


def test_smoothing_starts_at_the_first_value_and_keeps_constants() -> None:
    assert smooth([3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]  # too few to smooth
    assert smooth([2.0] * 300) == pytest.approx([2.0] * 300)
    assert smooth([7.0] + [1.0] * 299)[0] == pytest.approx(7.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (-1.0, "\N{EN DASH}"), (None, "\N{EN DASH}"), (float("nan"), "\N{EN DASH}")]
)
def test_metrics_format(value: float | None, text: str) -> None:
    assert format_metric(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(41.4, "41 s"), (247, "4 min 07 s"), (12300, "3 h 25 min")])
def test_durations_format(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize("options", [{"images": -1}, {"score_threshold": 2.0}, {"every_n_steps": 0}])
def test_report_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RunReport(**options)


def test_plain_lines_where_the_output_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = helper.make_trainer(tmp_path, [Progress()], enable_checkpointing=False, enable_progress_bar=True)
    trainer.fit(helper.Tiny(), helper.Loader(), helper.validation_loader())
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\r" not in text
    lines = [line for line in text.splitlines() if line.startswith("epoch")]
    assert len(lines) == 4
    assert re.fullmatch(
        r"epoch 2/4  batch 7/7  step 14  loss \d+\.\d{4}  lr \S+  \d+\.\d images/s  112 images", lines[1]
    )
    assert len(re.findall(r"^validation  step \d+  AP 0\.\d{4}", text, re.MULTILINE)) == 4


def test_plain_lines_break_long_silences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = helper.make_trainer(
        tmp_path, [Progress(seconds=1e-9)], enable_checkpointing=False, enable_progress_bar=True
    )
    trainer.fit(helper.Tiny(), helper.Loader(), helper.validation_loader())
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]) == 28


def test_bar_in_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("rich._console", None)  # the global console, made here, would colour what other tests read
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    bar = Progress()
    trainer = helper.make_trainer(tmp_path, [bar], enable_checkpointing=False, enable_progress_bar=True)
    trainer.fit(helper.Tiny(), helper.Loader(), helper.validation_loader())
    text = capsys.readouterr().out
    assert "\x1b" in text
    assert re.search(r"loss: \d", text)
    assert re.search(r"images/s: \d", text)
    assert re.search(r"images: \d+", text)
    assert "v_num" not in text
    assert not re.search(r"^epoch 1/4", text, re.MULTILINE)


def test_the_loss_is_read_as_often_as_the_bar_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loss:
        read = 0

        def __float__(self) -> float:
            Loss.read += 1
            return float(Loss.read)

    now = 100.0
    monkeypatch.setattr("effvit.callbacks.progress.time", SimpleNamespace(perf_counter=lambda: now))
    trainer = SimpleNamespace(
        loggers=[],
        progress_bar_metrics={},
        callback_metrics={"train/loss": Loss()},
        training=True,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    bar, model = Progress(refresh_rate=4), helper.Tiny()
    shown = []
    for _ in range(10):
        shown.append(bar.get_metrics(trainer, model)["loss"])
        now += 0.125
    assert shown == ["1.000", "1.000", "2.000", "2.000", "3.000", "3.000", "4.000", "4.000", "5.000", "5.000"]
    now -= 0.125
    bar.on_train_epoch_end(trainer, model)
    assert bar.get_metrics(trainer, model)["loss"] == "6.000"


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"refresh_rate": 0}])
def test_progress_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Progress(**options)
