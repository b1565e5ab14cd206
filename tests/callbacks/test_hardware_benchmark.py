"""The model in training is measured, and its training never notices."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from effvit.callbacks import EMA, HardwareBenchmark, RunCheckpoint, RunReport, _measuring, hardware_benchmark
from effvit.callbacks._tables import metrics_table
from effvit.callbacks._undisturbed import undisturbed
from effvit.deploy import timing
from effvit.deploy.records import Subject
from effvit.errors import ConfigError
from effvit.tasks import Classification, Detection

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(_measuring, "time_in_rounds", partial(timing.time_in_rounds, rounds=3, seconds=0.002))
    monkeypatch.setattr(_measuring, "warm_up", partial(timing.warm_up, window=0.0, tolerance=math.inf))
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)  # of all that the tests before have left


class Restless(helper.Tiny):
    """Draws numbers and counts its calls in a buffer, in eval mode too; a part of it stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 6)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.measured: list[tuple[Any, ...]] = []

    def on_fit_start(self) -> None:
        self.network[1].eval()

    def on_train_epoch_start(self) -> None:
        self.network[1].eval()

    def forward(self, images):
        self.calls += 1
        self.measured.append((images.shape[0], self.training, self.network[2].training))
        with torch.no_grad():
            self.network[0].bias.add_(1.0)
            self.network[1].running_mean += torch.rand(8) + random.random() + float(np.random.rand())  # noqa: NPY002
        return self.network(images)


def _fit(folder: Path, *callbacks: pl.Callback, **options: Any) -> tuple[pl.Trainer, Restless]:
    model = Restless()
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    trainer = helper.make_trainer(folder, [*callbacks, EMA(0.8)], **options)
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    model.events.append((random.random(), float(np.random.rand()), float(torch.rand(())), torch.get_num_threads()))  # noqa: NPY002
    return trainer, model


def test_a_training_ends_bit_for_bit_as_one_without(tmp_path):
    threads = torch.get_num_threads()
    plain, expected = _fit(tmp_path / "plain")
    benchmark = HardwareBenchmark(every_n_epochs=2, batch_sizes=[1, 3], threads=threads + 1)
    measured, found = _fit(tmp_path / "measured", benchmark)
    assert {batch for batch, *_ in found.measured} == {1, 3}
    assert not any(training or dropout for _, training, dropout in found.measured)
    assert found.events == expected.events  # losses, metrics, random numbers after it, threads
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    states = [trainer.optimizers[0].state_dict()["state"] for trainer in (plain, measured)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert all(torch.equal(states[1][index][name], value) for name, value in state.items())


CLASSES = {0: "ant", 1: "bee", 2: "cat"}


class Batches(pl.LightningDataModule):
    """The same two batches of 32 pixel images for training and validation, with boxes too."""

    batch_size = 4

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return torch.utils.data.DataLoader([self._batch(generator, first) for first in (0, 4)], batch_size=None)

    val_dataloader = train_dataloader

    def _batch(self, generator, first):
        raise NotImplementedError


class Photos(Batches):
    def _batch(self, generator, first):
        ids = torch.arange(first, first + 4)
        target = {"labels": ids % 3, "image_ids": ids, "file_names": [f"{number}.jpg" for number in ids]}
        return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator), target


class Scenes(Batches):
    def ground_truth(self, stage):
        entries = [
            {"id": number + 1, "image_id": number, "category_id": number % 3, "bbox": [4.0, 4.0, 24.0, 26.0]}
            | {"area": 624.0, "iscrowd": 0}
            for number in range(8)
        ]
        images = [{"id": number, "width": 32, "height": 32, "file_name": f"{number}.jpg"} for number in range(8)]
        categories = [{"id": key, "name": name} for key, name in CLASSES.items()]
        return {"images": images, "annotations": entries, "categories": categories}

    def _batch(self, generator, first):
        box, size = torch.tensor([[4.0, 4.0, 28.0, 30.0]]), (32, 32)
        targets = [
            {"image_id": number, "boxes": box, "labels": torch.tensor([number % 3]), "size": size}
            | {"original_size": size, "file_name": f"{number}.jpg"}
            for number in range(first, first + 4)
        ]
        return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator), targets


class Losses(pl.Callback):
    """Notes every loss, and a random number after it."""

    def __init__(self) -> None:
        self.found: list[tuple[float, ...]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append((outputs["loss"].item(), float(torch.rand(()))))


def _fit_task(make: Any, data: Batches, folder: Path, *callbacks: pl.Callback) -> tuple[Any, Any, Any]:
    pl.seed_everything(4, verbose=False)
    task, losses = make(), Losses()
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[losses, *callbacks, EMA(0.8)], max_epochs=2,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    after = (random.random(), float(np.random.rand()), float(torch.rand(())))  # noqa: NPY002
    return task, trainer, (losses.found, after)


def _assert_undisturbed(make: Any, data: Batches, folder: Path) -> None:
    """Two epochs with a measurement after each, against two without: weights, statistics, losses, numbers, metrics."""
    plain, plain_trainer, expected = _fit_task(make, data, folder / "plain")
    benchmark = HardwareBenchmark(every_n_epochs=1, batch_sizes=[2])
    task, trainer, found = _fit_task(make, data, folder / "measured", benchmark)
    measurements = json.loads((folder / "measured" / "hardware.json").read_text())["measurements"]
    assert [entry["step"] for entry in measurements] == [2, 4]
    assert all(record["latency"] for entry in measurements for record in entry["records"])
    assert found == expected
    assert task.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(task.state_dict()[name], value), name
    for name, value in plain_trainer.callback_metrics.items():
        assert torch.equal(trainer.callback_metrics[name], value), name
    assert [module.training for module in task.modules()] == [module.training for module in plain.modules()]


def _classifier():
    return Classification("efficientvit_m0", CLASSES)


def test_a_classifier_trains_bit_for_bit_as_without(tmp_path):
    _assert_undisturbed(_classifier, Photos(), tmp_path)


class Snapshot(pl.Callback):
    """What a validation leaves where this callback stands."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.modes = [module.training for module in pl_module.modules()]
        self.random = torch.get_rng_state()


def test_a_measurement_in_bf16_leaves_all_as_it_was(tmp_path):
    """Two trainings cannot be compared: gradients of torch's convolutions in bf16 differ from run to run on a CPU."""
    before, after = Snapshot(), Snapshot()
    benchmark = HardwareBenchmark()
    trainer = helper.make_trainer(tmp_path, [before, benchmark, after], precision="bf16-true")
    trainer.validate(_classifier(), datamodule=Photos(), verbose=False)
    ((record,),) = (entry["records"] for entry in json.loads((tmp_path / "hardware.json").read_text())["measurements"])
    assert record["precision"] == "bf16"
    assert record["latency"] is not None
    assert after.weights.keys() == before.weights.keys()
    assert all(torch.equal(value, before.weights[name]) for name, value in after.weights.items())
    assert after.modes == before.modes
    assert torch.equal(after.random, before.random)


@pytest.mark.slow
def test_a_detector_trains_bit_for_bit_as_without(tmp_path):
    def make():
        return Detection("efficientvit_m0", CLASSES, pyramid_channels=16, head_convs=1)

    _assert_undisturbed(make, Scenes(), tmp_path)


def test_all_is_put_back_after_an_error_too():
    model = Restless().train()
    model.network[1].eval()
    model.network[3].weight.requires_grad_(False)
    model.network[0].weight.grad = gradient = torch.ones_like(model.network[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state, threads, benchmark = torch.get_rng_state(), torch.get_num_threads(), torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="halfway"), undisturbed(model, torch.device("cpu")):  # noqa: PT012
        model.eval().requires_grad_(True)
        model(torch.rand(2, 6))
        model.zero_grad()
        model.network[1].register_buffer("cache", torch.zeros(1), persistent=False)
        torch.set_num_threads(threads + 1)
        torch.backends.cudnn.benchmark = not benchmark
        raise RuntimeError("halfway")
    assert [module.training for module in model.modules()] == modes
    assert not model.network[3].weight.requires_grad
    assert model.network[0].weight.grad is gradient
    assert "cache" not in dict(model.network[1].named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark) == (threads, benchmark)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_has_not_changed_is_not_written():
    model = nn.Linear(2, 2)
    version = model.weight._version
    with undisturbed(model, torch.device("cpu")), torch.no_grad():
        model(torch.ones(1, 2))
    assert model.weight._version == version


@pytest.mark.parametrize(
    ("every", "options", "steps"),
    [
        (0, {}, [28]),
        (1, {}, [7, 14, 21, 28]),
        (2, {"val_check_interval": 3}, [10, 24, 28]),
        (3, {"check_val_every_n_epoch": 2}, [28]),
        (1, {"limit_val_batches": 0}, [28]),
    ],
)
def test_when_it_measures(tmp_path, monkeypatch, every, options, steps):
    monkeypatch.setattr(hardware_benchmark, "measure", lambda *_: [])
    _fit(tmp_path, HardwareBenchmark(every), **options)
    measurements = json.loads((tmp_path / "hardware.json").read_text())["measurements"]
    assert [entry["step"] for entry in measurements] == steps


def test_what_it_leaves(tmp_path, capsys):
    logger, model = pl.loggers.CSVLogger(tmp_path, "logs"), Restless()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=4,
        logger=logger,
        callbacks=[HardwareBenchmark(3, [1, 3]), RunReport(images=0)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    entry = json.loads((tmp_path / "hardware.json").read_text())["measurements"][-1]
    one, three = entry["records"]
    assert (entry["stage"], entry["step"]) == ("fit", 28)
    assert (one["batch"], three["batch"], one["precision"], one["device"]) == (1, 3, "fp32", "cpu")
    assert one["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert one["macs"] == 6 * 8 + 8
    assert three["peak_memory"] > one["peak_memory"] > 0
    assert len(one["latency"]["rounds"]) == 3
    assert entry["environment"]["torch"] == torch.__version__
    assert entry["peak_memory"].startswith("tensors alive at once")
    assert (one["note"], three["note"]) == ("", "")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("hardware/")}
    assert metrics["hardware/latency_ms_b1"] == pytest.approx(1000 * one["latency"]["median"])
    assert metrics["hardware/throughput_b3"] == pytest.approx(3 / three["latency"]["median"])
    assert metrics["hardware/peak_memory_mb_b3"] == pytest.approx(three["peak_memory"] / 1e6)
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["hardware/latency_ms_b1"]]
    assert [(row["step"], bool(row["val/AP"])) for row in rows] == [("20", True), ("27", True)]
    assert "ms b3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "averaged"),
    [({}, True), ({"max_steps": 7}, True), ({"val_check_interval": 3}, False)],
)
def test_whose_weights_the_end_of_a_training_measures(tmp_path, monkeypatch, options, averaged):
    """Those that the table of the end speaks of, where the training ends with a validation."""
    seen = []
    monkeypatch.setattr(
        hardware_benchmark, "measure", lambda subject, *_: seen.append(subject.module.network[3].weight.tolist()) or []
    )
    ema = EMA(0.8)
    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark(), ema], **options)
    trainer.fit(model := Restless(), helper.Loader(), helper.validation_loader())
    assert len(seen) == 1
    mean, raw = model.network[3].weight.tolist(), ema._raw["network.3.weight"].tolist()
    assert mean != raw
    assert seen[0] == (mean if averaged else raw)


class Keeping(nn.Module):
    """Keeps a table of its first pass, as attention with a bias for each shape does, until its mode is set."""

    table = None

    def forward(self, x):
        self.table = torch.ones(1000) if self.table is None else self.table
        return x + 1

    def train(self, mode=True):
        self.table = None
        return super().train(mode)


def test_memory_counts_what_the_network_keeps_of_a_pass_at_each_batch_size():
    subject = Subject("keeping", Keeping().eval(), (1, 1), lambda batch: (torch.zeros(batch, 10),))
    records = _measuring.measure(subject, [1, 2], torch.device("cpu"), "fp32", tuple)
    assert [record.peak_memory for record in records] == [4000 + 40, 4000 + 80]


def test_it_goes_on_in_a_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware_benchmark, "measure", lambda *_: [])
    _fit(tmp_path, HardwareBenchmark(2), RunCheckpoint(3), max_steps=21)
    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark(2), EMA(0.8), RunCheckpoint(3)])
    trainer.fit(Restless(), helper.Loader(), helper.validation_loader(), ckpt_path=tmp_path / "last.ckpt")
    measurements = json.loads((tmp_path / "hardware.json").read_text())["measurements"]
    assert [entry["step"] for entry in measurements] == [14, 21, 28]


def test_a_time_that_has_not_settled_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(_measuring, "warm_up", partial(timing.warm_up, window=0.0, most=0.0))
    _fit(tmp_path, HardwareBenchmark())
    (record,) = json.loads((tmp_path / "hardware.json").read_text())["measurements"][-1]["records"]
    assert record["note"] == "its time had not settled after 0 s of warming up"
    assert record["latency"] is not None


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_measures_and_its_metrics_say_so(tmp_path, verb):
    model = Restless()
    model.test_step = model.validation_step
    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark(batch_sizes=[2])])
    getattr(trainer, verb)(model, helper.validation_loader(), verbose=False)
    assert float(trainer.callback_metrics["hardware/latency_ms_b2"]) > 0
    assert model.calls == 0


def test_memory_that_runs_out_is_reported_and_the_training_goes_on(tmp_path, caplog):
    class Large(Restless):
        def forward(self, images):
            if images.shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(images)

    model = Large()
    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark(batch_sizes=[1, 64])])
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    assert trainer.global_step == 28
    assert "skips batches of 64 images" in caplog.text
    small, large = json.loads((tmp_path / "hardware.json").read_text())["measurements"][-1]["records"]
    assert small["latency"] is not None
    assert (large["latency"], large["note"]) == (None, "memory ran out")
    assert "hardware/latency_ms_b64" not in trainer.callback_metrics


def test_another_error_is_not_hidden(tmp_path):
    class Broken(Restless):
        def forward(self, images):
            raise RuntimeError("a bug")

    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark()])
    with pytest.raises(RuntimeError, match="a bug"):
        trainer.fit(Broken(), helper.Loader(), helper.validation_loader())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every_n_epochs": -1}, "every_n_epochs of 0 or more"),
        ({"batch_sizes": []}, r"batch_sizes.* not 0, \[\]"),
        ({"batch_sizes": [0]}, "batch_sizes"),
        ({"image_size": (64, 0)}, "image_size"),
        ({"threads": 0}, "threads"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        HardwareBenchmark(**options)


def test_a_module_that_says_nothing_of_its_input_is_refused_at_the_start(tmp_path):
    trainer = helper.make_trainer(tmp_path, [HardwareBenchmark()])
    model = helper.Tiny()
    with pytest.raises(ConfigError, match=r"cannot measure a Tiny.*example_input_array"):
        trainer.fit(model, helper.Loader(), helper.validation_loader())
    assert trainer.global_step == 0
    with pytest.raises(ConfigError, match="leave image_size out"):
        helper.make_trainer(tmp_path, [HardwareBenchmark(image_size=(32, 32))]).fit(Restless(), helper.Loader())


def test_columns_beside_the_accuracy():
    hardware = {"latency_ms_b1": 4.3129, "throughput_b1": 231.0, "peak_memory_mb_b1": 0.07219, "latency_ms_b16": 1234.5}
    table = metrics_table({"top1": 0.5}, "Validation", hardware)
    assert [column.header for column in table.columns] == ["top1", "ms b1", "ms b16", "tensor MB b1"]
    assert [next(iter(column.cells)) for column in table.columns] == ["0.500", "4.31", "1234", "0.072"]
    table = metrics_table({"AP": 0.5, "mask_AP": 0.4}, "Validation", hardware)
    assert list(table.columns[-1].cells) == ["0.072", ""]
    table = metrics_table({"loss": 0.5}, "Validation", hardware)
    assert list(table.columns[0].cells) == ["loss", "ms b1", "ms b16", "tensor MB b1"]


@pytest.mark.slow
def test_two_processes_measure_once_and_both_go_on(cli, tmp_path):
    process = cli.start(
        "fit", "-c", "classification/digits", "--data.image_size", 32, "--trainer.max_epochs", 2,
        "--trainer.limit_train_batches", 2, "--trainer.limit_val_batches", 1, "--run_dir", tmp_path / "run",
        "--trainer.callbacks+=HardwareBenchmark", "--trainer.callbacks.every_n_epochs=1",
        "--trainer.devices", 2, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", cwd=tmp_path,
    )  # fmt: skip
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    measurements = json.loads((tmp_path / "run" / "hardware.json").read_text())["measurements"]
    assert [entry["step"] for entry in measurements] == [2, 4]
    assert "ms b1" in said
