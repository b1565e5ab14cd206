"""What a run leaves in its folder, and how safely."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from effvit.callbacks import RunCheckpoint
from effvit.callbacks._checkpoint_io import AtomicCheckpointIO
from effvit.errors import CheckpointError, ConfigError

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)


class Scripted(helper.Tiny):
    """Reports given APs, one for each validation."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = list(scores)

    def on_validation_epoch_end(self) -> None:
        self.log("val/AP", self.scores.pop(0))


def _fit(folder: Path, model, checkpoint: RunCheckpoint, ckpt_path: Path | None = None, **options):
    trainer = helper.make_trainer(folder, [checkpoint], num_sanity_val_steps=0, **options)
    trainer.fit(model, helper.Loader(), helper.validation_loader(), ckpt_path=ckpt_path and str(ckpt_path))
    return trainer


def test_folder_holds_best_and_last_and_nothing_else(tmp_path: Path) -> None:
    trainer = _fit(tmp_path, Scripted([0.1, 0.4, 0.3, 0.2]), RunCheckpoint())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 14
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 28
    callback = trainer.checkpoint_callback
    assert callback.best_model_path == str(tmp_path / "best.ckpt")
    assert float(callback.best_model_score) == pytest.approx(0.4)


def test_the_task_says_that_less_is_better(tmp_path: Path) -> None:
    model = Scripted([0.3, 0.4, 0.1, 0.2])
    model.mode = "min"
    _fit(tmp_path, model, RunCheckpoint())
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 21


def test_resumed_run_remembers_the_best_score(tmp_path: Path) -> None:
    _fit(tmp_path, Scripted([0.1, 0.4]), RunCheckpoint(), max_steps=14)
    _fit(tmp_path, Scripted([0.3, 0.2]), RunCheckpoint(every_n_train_steps=7), tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 14
    # In another folder there is no best.ckpt, so the next validation has to leave one.
    other = tmp_path / "other"
    _fit(tmp_path, Scripted([0.1, 0.4]), RunCheckpoint(), max_steps=14)
    _fit(other, Scripted([0.3, 0.2]), RunCheckpoint(), tmp_path / "last.ckpt")
    assert torch.load(other / "best.ckpt", weights_only=True)["global_step"] == 21


def test_no_validation_no_best(tmp_path: Path) -> None:
    _fit(tmp_path, helper.Tiny(), RunCheckpoint(), limit_val_batches=0, max_steps=7)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_absent_metric_names_what_was_logged(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'val/APP'.*Did you mean 'val/AP'"):
        _fit(tmp_path, Scripted([0.1]), RunCheckpoint(monitor="val/APP", mode="max"))


def test_the_newest_metric_decides_not_a_stale_one(tmp_path: Path) -> None:
    """Lightning's ModelCheckpoint with every_n_train_steps saves by the AP of the validation before."""
    _fit(tmp_path, Scripted([0.1, 0.4, 0.3, 0.2]), RunCheckpoint(every_n_train_steps=1))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 14


@pytest.mark.parametrize("options", [{"every_n_train_steps": 0}, {"mode": "best"}])
def test_options_out_of_range(options) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RunCheckpoint(**options)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"a": torch.ones(2)}}, tmp_path / "last.ckpt")
    real = torch.save

    def full_disk(content, file) -> None:
        real(content, file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"state_dict": {}}, tmp_path / "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert "a" in torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"state_dict": {}, "x": Payload()}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"bad\.ckpt"):
        _fit(tmp_path, helper.Tiny(), RunCheckpoint(), tmp_path / "bad.ckpt")
    assert not (tmp_path / "ran").exists()


def test_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    _fit(tmp_path, helper.Tiny(), RunCheckpoint(), max_steps=7)
    whole = (tmp_path / "last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"half\.ckpt"):
        _fit(tmp_path, helper.Tiny(), RunCheckpoint(), tmp_path / "half.ckpt")
