"""A run that takes a second: a tiny network with every kind of state that a resumed run must restore.

Also a script, ``python resume_helper.py FOLDER [CHECKPOINT]``, for the tests that kill a process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from effvit.callbacks import EMA, RunCheckpoint, RunReport

EPOCHS, BATCHES = 4, 7


class Epochs:
    """Stands in for a sampler, which is what Lightning tells the epoch."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Loader:
    """Batches that depend on epoch and position alone, and that can start in the middle of an epoch."""

    def __init__(self) -> None:
        self.sampler = Epochs()
        self.start = self.done = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        return self._batches()

    def _batches(self):
        start, self.start = self.start, 0
        for index in range(start, BATCHES):
            self.done = index + 1
            generator = torch.Generator().manual_seed(1000 * self.sampler.epoch + index)
            yield (torch.randn(8, 6, generator=generator), torch.full((8,), float(index)))

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]
        self.start = self.done % BATCHES


class Tiny(pl.LightningModule):
    """BatchNorm, dropout from the global generator, Adam, a schedule per step and one per epoch."""

    monitor = "val/AP"
    mode = "max"

    def __init__(self, log: Path | None = None, pause: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.events: list[tuple[Any, ...]] = []
        self.log_file = log
        self.pause = pause
        self._squares: list[float] = []

    def _note(self, *event: Any) -> None:
        self.events.append(event)
        if self.log_file is not None:
            with self.log_file.open("a") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
        time.sleep(self.pause)

    def training_step(self, batch, batch_idx):
        images, values = batch
        loss = (self.network(images).squeeze(1) - values).square().mean()
        self.log("train/loss", loss.detach())
        self._note("train", self.current_epoch, batch_idx, int(values[0]), self.global_step, loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        images, values = batch
        self._squares.append(float((self.network(images).squeeze(1) - values).square().mean()))

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self._note("val", self.global_step, len(self._squares), sum(self._squares))
            self.log("val/AP", 1 / (1 + sum(self._squares)))
        self._squares = []

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return [optimizer], [
            {"scheduler": warmup, "interval": "step"},
            {"scheduler": schedule, "interval": "epoch"},
        ]


def validation_loader() -> Any:
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randn(8, 6, generator=generator), torch.ones(8)) for _ in range(3)]
    return torch.utils.data.DataLoader(batches, batch_size=None)


def make_trainer(folder: Path, callbacks: list[pl.Callback] | None = None, **options: Any) -> pl.Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    callbacks = callbacks or [
        EMA(decay=0.9),
        RunReport(images=0, every_n_steps=2),
        RunCheckpoint(every_n_train_steps=3),
    ]
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **({"enable_progress_bar": False, "devices": 1} | options),
    )


def main() -> None:
    folder = Path(sys.argv[1])
    checkpoint = sys.argv[2] if len(sys.argv) > 2 else None
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    devices = int(os.environ.get("TINY_DEVICES", "1"))
    options = {"devices": devices, "strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    trainer = make_trainer(folder, **options)
    log = folder / f"events{trainer.global_rank}.jsonl"
    log.write_text("")
    model = Tiny(log, pause=float(os.environ.get("TINY_PAUSE", "0")))
    trainer.fit(model, Loader(), validation_loader(), ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
