"""Progress of a run: a bar in a terminal, plain lines everywhere else."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from effvit.callbacks._tables import format_count
from effvit.callbacks._throughput import Throughput, images_in_step, learning_rate
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_HEADLINES = ("AP", "AP50", "AP75", "mask_AP", "mask_AP50", "top1", "top5", "mIoU", "mAcc", "aAcc")


class Progress(RichProgressBar):
    """Rich progress bar with loss, images/s, images seen and GPU memory; plain lines where there is no terminal.

    A log file or a CI page gets one line at the end of each epoch, one every ``seconds`` in between, and one after each
    validation, without control codes. ``images/s`` is over the last 50 batches of all processes together; waiting for
    data counts, validation does not. Images seen are those of the whole run, resumed or not, each epoch's counted anew.

    Args:
        seconds: Longest silence of the plain lines during an epoch, in s.
        refresh_rate: Updates of the bar per second.

    Raises:
        ConfigError: ``seconds`` or ``refresh_rate`` is not positive.
    """

    def __init__(self, seconds: float = 30.0, refresh_rate: int = 4) -> None:
        if seconds <= 0 or refresh_rate <= 0:
            raise ConfigError(f"seconds and refresh_rate must be positive, not {seconds} and {refresh_rate}")
        super().__init__(refresh_rate=refresh_rate)
        self.seconds = seconds
        self._plain = False
        self._throughput = Throughput()
        self._said = 0.0
        self._items: dict[str, Any] = {}
        self._items_until = -math.inf

    def state_dict(self) -> dict[str, Any]:
        """Images seen so far."""
        return {"images_seen": self._throughput.images_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting."""
        self._throughput.images_seen = int(state_dict["images_seen"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decides between bar and lines."""
        super().setup(trainer, pl_module, stage)
        console = get_console()
        lively = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)
        self._plain = trainer.is_global_zero and not lively
        if self._plain:
            self.disable()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks of the epoch."""
        super().on_train_epoch_start(trainer, pl_module)
        self._throughput.resume()
        self._said = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the images of the batch and shows where training stands."""
        self._throughput.add(images_in_step(batch, trainer))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        last = batch_idx + 1 == trainer.num_training_batches
        if self._plain and (last or time.perf_counter() - self._said >= self.seconds):
            self._say(self._training_line(trainer, outputs, batch_idx))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the last values of the epoch, however fresh the ones before are."""
        self._items_until = -math.inf
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the metrics of the validation and restarts the clock of training."""
        self._items_until = -math.inf
        super().on_validation_end(trainer, pl_module)
        self._throughput.resume()
        if self._plain and not trainer.sanity_checking:
            self._say(_metrics_line(trainer, "val/", "validation"))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the metrics of the test."""
        super().on_test_end(trainer, pl_module)
        if self._plain:
            self._say(_metrics_line(trainer, "test/", "test"))

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands at the right of the bar: loss and other logged values, images/s, GPU memory.

        Read anew only as often as the bar is drawn: reading a loss makes the CPU wait for the GPU.
        """
        now = time.perf_counter()
        if now >= self._items_until:
            self._items = self._read_items(trainer, pl_module)
            self._items_until = now + 1 / self.refresh_rate
        return dict(self._items)

    def _read_items(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and trainer.training:
            items = {"loss": f"{float(loss):.3f}"} | items
        items["images/s"] = f"{self._throughput.rate():.1f}"
        items["images"] = format_count(self._throughput.images_seen)
        return items | _gpu_memory(trainer)

    def _training_line(self, trainer: Trainer, outputs: Any, batch_idx: int) -> str:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        batches = trainer.num_training_batches
        parts = [
            f"epoch {trainer.current_epoch + 1}{epochs}",
            f"batch {batch_idx + 1}" + (f"/{int(batches)}" if batches != float("inf") else ""),
            f"step {trainer.global_step}",
            f"loss {float(loss):.4f}" if loss is not None else "",
            f"lr {learning_rate(trainer):.2e}" if trainer.optimizers else "",
            f"{self._throughput.rate():.1f} images/s",
            f"{format_count(self._throughput.images_seen)} images",
            *(f"{name} {value}" for name, value in _gpu_memory(trainer).items()),
        ]
        return "  ".join(part for part in parts if part)

    def _say(self, line: str) -> None:
        self._said = time.perf_counter()
        print(line, flush=True)  # noqa: T201 - this is the progress display


def _metrics_line(trainer: Trainer, prefix: str, title: str) -> str:
    found = {name[len(prefix) :]: value for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    shown = {name: found[name] for name in _HEADLINES if name in found} or found
    step = f"  step {trainer.global_step}" if trainer.global_step else ""
    return f"{title}{step}  " + "  ".join(f"{name} {float(value):.4f}" for name, value in shown.items())


def _gpu_memory(trainer: Trainer) -> dict[str, int | str | float | dict[str, float]]:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return {}
    return {"GPU": f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"}
