"""The averaged weights are right, evaluated, saved beside the raw ones, and never in the way of training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from effvit.callbacks import EMA, RunCheckpoint, select_weights
from effvit.errors import CheckpointError, ConfigError

_SPEC = importlib.util.spec_from_file_location("resume_helper", Path(__file__).with_name("resume_helper.py"))
helper = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(helper)


class Watch(pl.Callback):
    """Keeps the raw weights after every step and those that each validation sees."""

    def __init__(self) -> None:
        self.raw: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
        self.raw.append(_copy(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            self.seen.append(_copy(pl_module))


def _copy(module) -> dict[str, Any]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _expected(raw: list[dict[str, Any]], decay: float) -> dict[str, Any]:
    """The definition, in float64."""
    average = {name: value.double() for name, value in raw[0].items()}
    for n, weights in enumerate(raw[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * weights[name].double() for name in average}
    return {**average, "network.1.num_batches_tracked": raw[-1]["network.1.num_batches_tracked"].double()}


def _assert_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance)


def _run(folder: Path, decay: float = 0.8, **options: Any):
    watch, ema, model = Watch(), EMA(decay), helper.Tiny()
    trainer = helper.make_trainer(folder, [watch, ema, RunCheckpoint(every_n_train_steps=3)], **options)
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    return trainer, model, ema, watch


def test_average_follows_its_definition_and_is_what_validation_sees(tmp_path: Path) -> None:
    _, model, ema, watch = _run(tmp_path)
    assert ema.updates == len(watch.raw) == 28
    sanity, *seen = watch.seen
    _assert_equal(sanity, helper.Tiny().state_dict())  # before the first update: the raw weights
    for number, weights in enumerate(seen, start=1):
        _assert_equal(weights, _expected(watch.raw[: 7 * number], 0.8), 1e-5)
    _assert_equal(model.state_dict(), _expected(watch.raw, 0.8), 1e-5)


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    _, with_ema, *_ = _run(tmp_path / "with")
    without = helper.Tiny()
    helper.make_trainer(tmp_path / "without", [pl.Callback()], enable_checkpointing=False).fit(
        without, helper.Loader(), helper.validation_loader()
    )
    trained = [event for event in with_ema.events if event[0] == "train"]
    assert trained == [event for event in without.events if event[0] == "train"]


def test_checkpoint_holds_both_sets(tmp_path: Path) -> None:
    *_, watch = _run(tmp_path)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    _assert_equal(select_weights(checkpoint, "raw"), watch.raw[-1])
    _assert_equal(select_weights(checkpoint, "ema"), _expected(watch.raw, 0.8), 1e-5)
    assert select_weights(checkpoint) is checkpoint["state_dict"]
    assert checkpoint["averaging_state"] == {"n_averaged": 28}


def test_checkpoint_saved_after_the_fit_or_inside_a_validation_holds_both_sets_the_right_way_round(
    tmp_path: Path,
) -> None:
    class Saves(pl.Callback):
        def on_validation_batch_end(self, trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    watch, model = Watch(), helper.Tiny()
    trainer = helper.make_trainer(tmp_path, [watch, EMA(0.8), Saves()], enable_checkpointing=False)
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    for name in ("inside", "after"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        _assert_equal(select_weights(checkpoint, "raw"), watch.raw[-1])
        _assert_equal(select_weights(checkpoint, "ema"), _expected(watch.raw, 0.8), 1e-5)


def test_other_verbs_evaluate_the_average_in_the_same_and_in_a_new_process(tmp_path: Path) -> None:
    trainer, model, _, watch = _run(tmp_path)
    average = _expected(watch.raw, 0.8)
    for runner, fresh in ((trainer, model), (helper.make_trainer(tmp_path, [watch, EMA(0.8)]), helper.Tiny())):
        watch.seen.clear()
        runner.validate(fresh, helper.validation_loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
        _assert_equal(watch.seen[0], average, 1e-5)


def test_no_swap_before_the_first_update(tmp_path: Path) -> None:
    """Lightning #21724: a validation before any update must see the weights that are trained."""
    ema, watch, model = EMA(), Watch(), helper.Tiny()
    trainer = helper.make_trainer(
        tmp_path, [ema, watch], enable_checkpointing=False, num_sanity_val_steps=0, accumulate_grad_batches=4,
        val_check_interval=3, max_steps=2,
    )  # fmt: skip
    trainer.fit(model, helper.Loader(), helper.validation_loader())
    _assert_equal(watch.seen[0], watch.raw[2])  # three batches, no optimizer step yet: BatchNorm has moved on
    _assert_equal(watch.seen[1], watch.raw[3])  # the first update copies
    assert ema.evaluated == "ema"


def test_a_network_that_caches_what_it_derives_from_its_weights_can_notice_the_swap(tmp_path: Path) -> None:
    """Backbones keep expanded attention biases for as long as autograd's version counter stands still."""
    versions: list[int] = []

    class Counts(helper.Tiny):
        def on_train_epoch_end(self) -> None:
            versions.append(self.network[0].weight._version)

        def validation_step(self, batch, batch_idx):
            versions.append(self.network[0].weight._version)
            super().validation_step(batch, batch_idx)

        def training_step(self, batch, batch_idx):
            versions.append(self.network[0].weight._version)
            return super().training_step(batch, batch_idx)

    trainer = helper.make_trainer(tmp_path, [EMA()], enable_checkpointing=False, num_sanity_val_steps=0, max_steps=8)
    trainer.fit(Counts(), helper.Loader(), helper.validation_loader())
    last_step, first_validation, *_, after = versions[6], versions[7], versions[9], versions[10]
    assert last_step + 1 < first_validation  # one from the optimizer, at least one from the swap
    assert first_validation < after


def test_the_log_says_which_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer, *_ = _run(tmp_path)
    assert "validation sees the averaged weights (EMA, 7 updates)" in caplog.text
    assert float(trainer.callback_metrics["val/ema_updates"]) == 28


def test_raw_checkpoint_has_no_average(tmp_path: Path) -> None:
    helper.make_trainer(tmp_path, [RunCheckpoint()], max_steps=7).fit(
        helper.Tiny(), helper.Loader(), helper.validation_loader()
    )
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert select_weights(checkpoint, "raw") is select_weights(checkpoint, "auto")
    with pytest.raises(CheckpointError, match="raw weights only"):
        select_weights(checkpoint, "ema")
    with pytest.raises(ConfigError, match="not 'best'"):
        select_weights(checkpoint, "best")


def test_narrow_weights_are_averaged_in_float32(tmp_path: Path) -> None:
    """With a decay of 0.999, bfloat16 would swallow every update."""
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    ema = EMA(0.999)
    ema.updates = 1_000_000
    ema._average = {"weight": torch.full((1, 1), 1.0)}
    module.weight.data.fill_(2.0)
    ema._update({"weight": module.weight.data})
    assert float(ema._average["weight"]) == pytest.approx(1.001, abs=1e-6)


def test_decay_out_of_range() -> None:
    with pytest.raises(ConfigError, match="decay"):
        EMA(1.0)
