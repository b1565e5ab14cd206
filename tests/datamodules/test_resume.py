"""A run that is stopped within an epoch and resumed sees the batches that it would have seen."""

from __future__ import annotations

import hashlib
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from effvit.datamodules.coco import CocoDetection

if TYPE_CHECKING:
    from pathlib import Path


class Recorder(LightningModule):
    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[tuple[int, list[int], str]] = []
        self.stop_at = stop_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        images, targets = batch
        if self.stop_at is not None and self.trainer.global_step == self.stop_at:
            raise KeyboardInterrupt
        content = images.numpy().tobytes() + b"".join(t["boxes"].numpy().tobytes() for t in targets)
        digest = hashlib.sha256(content).hexdigest()
        self.seen.append((self.current_epoch, [target["image_id"] for target in targets], digest))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(Callback):
    """Saves as a preempted job would: within the epoch, after each batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


def make_data(root: Path, num_workers: int) -> CocoDetection:
    return CocoDetection(
        str(root), batch_size=2, num_workers=num_workers, image_size=(64, 48), scale_jitter=(0.6, 1.0), seed=3
    )


def train(root: Path, out: Path, workers: int, ckpt: Path | None = None, stop_at: int | None = None, **limits: int):
    model = Recorder(stop_at)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[SaveEveryStep(out), ModelCheckpoint(dirpath=out / "epochs", save_last=True)],
        **(limits or {"max_epochs": 3}),
    )
    if stop_at is None:
        trainer.fit(model, make_data(root, workers), ckpt_path=ckpt)
    else:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            trainer.fit(model, make_data(root, workers))
    return model.seen


@pytest.fixture
def whole(coco_root: Path, tmp_path: Path) -> list[Any]:
    return train(coco_root, tmp_path / "whole", workers=0)


@pytest.mark.parametrize(
    ("step", "workers"),
    [(2, 0), (7, 2), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(7, 0, marks=pytest.mark.slow)],
)
def test_resumed_within_epoch(coco_root, tmp_path, whole, workers, step):
    assert len(whole) == 15  # 10 images with objects in batches of 2, three times
    train(coco_root, tmp_path / "stopped", workers, stop_at=step)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*resumable.*")
        rest = train(coco_root, tmp_path / "resumed", workers, ckpt=tmp_path / "stopped" / f"step{step}.ckpt")
    assert rest == whole[step:]


def test_resumed_at_the_last_batch_of_an_epoch(coco_root, tmp_path, whole):
    rest = train(coco_root, tmp_path / "resumed", 0, ckpt=tmp_path / "whole" / "step5.ckpt")
    assert rest == whole[5:]


def test_resumed_after_an_epoch_with_step_limit(coco_root, tmp_path, whole):
    train(coco_root, tmp_path / "first", 0, max_steps=12)
    rest = train(coco_root, tmp_path / "second", 0, ckpt=tmp_path / "first" / "step12.ckpt", max_steps=15)
    assert rest == whole[12:]


def test_resumed_from_end_of_epoch_checkpoint(coco_root, tmp_path, whole):
    train(coco_root, tmp_path / "first", 0, max_epochs=2)
    rest = train(coco_root, tmp_path / "second", 0, ckpt=tmp_path / "first" / "epochs" / "last.ckpt")
    assert rest == whole[10:]


def test_epochs_differ_and_repeat(whole, coco_root, tmp_path):
    first, second = whole[:5], whole[5:10]
    assert sorted(i for _, ids, _ in first for i in ids) == sorted(i for _, ids, _ in second for i in ids)
    assert [ids for _, ids, _ in first] != [ids for _, ids, _ in second]
    assert {digest for *_, digest in first}.isdisjoint(digest for *_, digest in second)
    assert train(coco_root, tmp_path / "again", workers=2) == whole


def test_changed_batch_size_is_said(coco_root, tmp_path, caplog):
    data = make_data(coco_root, 0)
    data.setup("fit")
    state = data.train_dataloader().state_dict()
    other = CocoDetection(str(coco_root), batch_size=5, num_workers=0, seed=3)
    other.setup("fit")
    other.train_dataloader().load_state_dict(state)
    assert "batch_size 2 -> 5" in caplog.text
