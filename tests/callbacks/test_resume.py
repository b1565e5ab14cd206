"""A run that is stopped at any moment and resumed does what a run that was never stopped does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from effvit.callbacks import EMA, RunCheckpoint, RunReport
from effvit.callbacks import report as report_module

if TYPE_CHECKING:
    import lightning.pytorch as pl

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)

#: Ways in which validations, epochs and optimizer steps can lie.
SCHEDULES: dict[str, dict[str, Any]] = {
    "every epoch": {},
    "in mid-epoch": {"val_check_interval": 3},
    "every second epoch": {"check_val_every_n_epoch": 2},
    "by steps": {"val_check_interval": 5, "check_val_every_n_epoch": None},
    "accumulating": {"accumulate_grad_batches": 2},
    "never": {"limit_val_batches": 0},
}


class Snapshots(RunCheckpoint):
    """Keeps a copy of each ``last.ckpt``, with the number of events that had happened when it was written."""

    def _save_last(self, trainer: pl.Trainer) -> None:
        super()._save_last(trainer)
        if not hasattr(self, "kept"):
            self.kept = []
        copy = Path(self.dirpath) / f"copy{len(self.kept)}"
        shutil.copy(self.last_model_path, copy)
        self.kept.append((copy, len(trainer.lightning_module.events)))

    @property
    def state_key(self) -> str:
        return "RunCheckpoint"


def _callbacks(checkpoint: RunCheckpoint) -> list[pl.Callback]:
    return [EMA(decay=0.9), RunReport(images=0, every_n_steps=2), checkpoint]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_last_checkpoint_continues_exactly(
    tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "draw_curves", lambda *_: None)  # slow, and tested elsewhere
    options = SCHEDULES[schedule]
    whole = helper.Tiny()
    snapshots = Snapshots(every_n_train_steps=3)
    trainer = helper.make_trainer(tmp_path / "whole", _callbacks(snapshots), **options)
    trainer.fit(whole, helper.Loader(), helper.validation_loader())
    report = next(c for c in trainer.callbacks if isinstance(c, RunReport)).state_dict()
    assert len(snapshots.kept) > 6
    for number, (path, seen) in enumerate(snapshots.kept):
        resumed = helper.Tiny()
        again = helper.make_trainer(tmp_path / f"resumed{number}", **options)
        torch.manual_seed(number)  # whatever the generators did before must not matter
        again.fit(resumed, helper.Loader(), helper.validation_loader(), ckpt_path=str(path))
        assert resumed.events == whole.events[seen:], f"checkpoint {number} of {len(snapshots.kept)}, event {seen}"
        assert again.global_step == trainer.global_step
        assert again.current_epoch == trainer.current_epoch
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)
        history = next(c for c in again.callbacks if isinstance(c, RunReport)).state_dict()
        for key in ("steps", "losses", "rates", "evaluations"):
            assert history[key] == report[key], key


def _start(folder: Path, pause: float, checkpoint: Path | None = None, devices: int = 1) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("resume_helper.py")
    command = [sys.executable, str(script), str(folder), *([str(checkpoint)] if checkpoint else [])]
    environment = {**os.environ, "TINY_PAUSE": str(pause), "TINY_DEVICES": str(devices)}
    log = (folder.parent / f"{folder.name}.log").open("wb")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _events(folder: Path, rank: int = 0) -> list[tuple[Any, ...]]:
    file = folder / f"events{rank}.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [tuple(json.loads(line)) for line in lines]


@pytest.mark.parametrize("sent", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_process_resumes_with_the_same_losses(
    tmp_path: Path, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "draw_curves", lambda *_: None)
    process = _start(tmp_path / "killed", pause=0.05)
    deadline = time.monotonic() + 120
    while len(_events(tmp_path / "killed")) < 12:  # in the middle of the second epoch
        assert process.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    process.wait(timeout=60)
    before = _events(tmp_path / "killed")
    assert len(before) < 32
    last = tmp_path / "killed" / "last.ckpt"
    step = torch.load(last, weights_only=True)["global_step"]

    whole = helper.Tiny()
    helper.make_trainer(tmp_path / "whole").fit(whole, helper.Loader(), helper.validation_loader())
    resumed = helper.Tiny()
    trainer = helper.make_trainer(tmp_path / "resumed")
    trainer.fit(resumed, helper.Loader(), helper.validation_loader(), ckpt_path=str(last))
    done = whole.events[: len(whole.events) - len(resumed.events)]
    assert before[: len(done)] == done
    assert resumed.events == whole.events[len(done) :]
    trained = [event for event in before if event[0] == "train"]
    if sent is signal.SIGTERM:
        assert step == len(trained)  # saved at the very step, nothing is repeated
    else:
        assert step in (9, 12, 15, 18)  # every_n_train_steps=3, epochs end at 7, 14, 21
        assert step < 21


@pytest.mark.slow
def test_sigterm_under_ddp_resumes_with_the_same_losses_on_every_rank(tmp_path: Path) -> None:
    assert _start(tmp_path / "whole", pause=0, devices=2).wait(timeout=180) == 0
    process = _start(tmp_path / "stopped", pause=0.1, devices=2)
    deadline = time.monotonic() + 120
    while len(_events(tmp_path / "stopped")) < 12:
        assert process.poll() is None, (tmp_path / "stopped.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    last = tmp_path / "stopped" / "last.ckpt"
    assert _start(tmp_path / "resumed", pause=0, checkpoint=last, devices=2).wait(timeout=180) == 0
    for rank in range(2):
        stopped, resumed = _events(tmp_path / "stopped", rank), _events(tmp_path / "resumed", rank)
        assert 12 <= len(stopped) < 32
        assert stopped + resumed == _events(tmp_path / "whole", rank)


class Terminated(helper.Tiny):
    """Is told to stop during one batch, as SLURM does it."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def training_step(self, batch, batch_idx):
        if self.current_epoch * helper.BATCHES + batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("batch", "options"), [(2, {}), (6, {}), (8, {"val_check_interval": 3}), (9, {})])
def test_sigterm_saves_the_step_it_came_in(tmp_path: Path, batch: int, options: dict[str, Any]) -> None:
    """Also in the last batch of an epoch, and in one that a validation follows."""
    callbacks = [EMA(decay=0.9), RunCheckpoint(every_n_train_steps=100)]
    whole = helper.Tiny()
    helper.make_trainer(tmp_path / "whole", callbacks, **options).fit(
        whole, helper.Loader(), helper.validation_loader()
    )
    stopped = Terminated(batch)
    callbacks = [EMA(decay=0.9), RunCheckpoint(every_n_train_steps=100)]
    trainer = helper.make_trainer(tmp_path, callbacks, **options)
    with pytest.raises(SystemExit):
        trainer.fit(stopped, helper.Loader(), helper.validation_loader())
    assert trainer.global_step == batch + 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == batch + 1
    resumed = helper.Tiny()
    callbacks = [EMA(decay=0.9), RunCheckpoint(every_n_train_steps=100)]
    again = helper.make_trainer(tmp_path, callbacks, **options)
    again.fit(resumed, helper.Loader(), helper.validation_loader(), ckpt_path=str(tmp_path / "last.ckpt"))
    assert stopped.events + resumed.events == whole.events


def test_sigterm_while_gradients_accumulate_leaves_the_last_exact_checkpoint(tmp_path: Path) -> None:
    """Accumulated gradients are in no checkpoint, so the batches behind them are repeated."""
    trainer = helper.make_trainer(tmp_path, [RunCheckpoint(every_n_train_steps=1)], accumulate_grad_batches=3)
    with pytest.raises(SystemExit):
        trainer.fit(Terminated(4), helper.Loader(), helper.validation_loader())
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 3


def test_an_error_inside_a_step_leaves_the_last_exact_checkpoint(tmp_path: Path) -> None:
    class Failing(helper.Tiny):
        def training_step(self, batch, batch_idx):
            if self.global_step == 11:
                raise ValueError("step fails")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="step fails"):
        helper.make_trainer(tmp_path).fit(Failing(), helper.Loader(), helper.validation_loader())
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 9


def test_an_interrupted_validation_is_repeated_from_its_start(tmp_path: Path) -> None:
    class Failing(helper.Tiny):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 14 and batch_idx == 1:
                raise ValueError("validation fails")
            return super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match="validation fails"):
        helper.make_trainer(tmp_path).fit(Failing(), helper.Loader(), helper.validation_loader())
    whole, resumed = helper.Tiny(), helper.Tiny()
    helper.make_trainer(tmp_path / "whole").fit(whole, helper.Loader(), helper.validation_loader())
    helper.make_trainer(tmp_path).fit(
        resumed, helper.Loader(), helper.validation_loader(), ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert resumed.events == whole.events[15:]  # 14 steps and one validation; the second validation comes first
    assert resumed.events[0][:3] == ("val", 14, 3)
