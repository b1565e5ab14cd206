"""What a run leaves to look at: pictures of predictions, curves, and a table at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.markup import escape
from torch import Tensor

from effvit.callbacks._curves import draw_curves
from effvit.callbacks._run_folder import SECONDS_BETWEEN_PICTURES, run_folder, spread
from effvit.callbacks._tables import class_table, format_count, format_metric, format_seconds, metrics_table
from effvit.callbacks._throughput import Throughput, images_in_step, learning_rate
from effvit.callbacks.drawing import draw_detections, panel_grid
from effvit.categories import Categories
from effvit.deploy._files import whole_file
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

_CURVES = ("AP", "AP50", "mask_AP", "mask_AP50", "top1", "top5", "mIoU", "mAcc", "aAcc")


class RunReport(Callback):
    """Writes ``predictions.png`` and ``curves.png`` into the run folder and prints a table when a run ends.

    ``predictions.png`` shows ground truth beside prediction on a few validation images, the same ones after every
    validation: they are spread evenly over the validation data. ``curves.png``, written at most every 20 s and at the
    end, shows loss, AP or accuracy, and learning rate over steps; the history behind it is part of the checkpoint, so a
    resumed run goes on with the same curves. The table has AP, AP50, AP75, APs, APm and APl of boxes and of masks (a
    dash where COCO has nothing to find), and the AP of each class where the task computes it; for a classifier top-1,
    top-5, loss and calibration error, and the accuracy of each class, or of the worst and the best ten of more than a
    hundred; for a segmenter mIoU, mean and pixel accuracy, and IoU and accuracy of each class likewise. Where
    `HardwareBenchmark` runs too, latency and memory stand beside them.

    Pictures need a task whose ``validation_step`` returns ``{"detections": [...]}`` (``boxes`` as (x1, y1, x2, y2) in
    pixels of the original image, ``scores``, ``labels``, and for masks ``rles``, compressed COCO masks at the original
    size) for a batch ``(images uint8 (B, 3, H, W), targets)``, and which has ``categories``. Masks of the ground truth
    are drawn where the targets have ``masks``. Any other task gets curves and a table; `SegmentationReport` draws the
    predictions of a segmenter.

    Args:
        images: Validation images in ``predictions.png``; 0 for no picture.
        score_threshold: Detections below this score are not drawn, in ``[0, 1]``.
        every_n_steps: Optimizer steps that one point of the loss curve is the mean of.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(self, images: int = 4, score_threshold: float = 0.4, every_n_steps: int = 10) -> None:
        super().__init__()
        if images < 0 or every_n_steps < 1 or not 0 <= score_threshold <= 1:
            raise ConfigError(
                "RunReport needs images >= 0, every_n_steps >= 1 and score_threshold in [0, 1], not "
                f"{images}, {every_n_steps} and {score_threshold}"
            )
        self.images = images
        self.score_threshold = score_threshold
        self.every_n_steps = every_n_steps
        self._steps: list[int] = []
        self._losses: list[float] = []
        self._rates: list[float] = []
        self._evaluations: list[tuple[int, dict[str, float]]] = []
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        self._rows: list[tuple[Image.Image, Image.Image]] = []
        self._throughput = Throughput()
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._drawn = -math.inf

    def state_dict(self) -> dict[str, Any]:
        """History of the run in plain numbers."""
        return {
            "steps": list(self._steps),
            "losses": list(self._losses),
            "rates": list(self._rates),
            "evaluations": [[step, dict(row)] for step, row in self._evaluations],
            "loss_sum": float(self._loss_sum),
            "loss_count": self._loss_count,
            "seconds": self._seconds(),
            "images_seen": self._throughput.images_seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the history of the run that is resumed."""
        self._steps = list(state_dict["steps"])
        self._losses = list(state_dict["losses"])
        self._rates = list(state_dict["rates"])
        self._evaluations = [(int(step), dict(row)) for step, row in state_dict["evaluations"]]
        self._loss_sum = float(state_dict["loss_sum"])
        self._loss_count = int(state_dict["loss_count"])
        self._seconds_before = float(state_dict["seconds"])
        self._throughput.images_seen = int(state_dict.get("images_seen", 0))  # runs of the first release have none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Starts the clock."""
        self._started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Restarts the clock of the throughput: work between epochs does not count."""
        self._throughput.resume()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002 - Lightning's signature
        outputs: Any,
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Adds the loss of the batch to the curve."""
        self._throughput.add(images_in_step(batch, trainer))
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is None:
            return
        # Summed on the device: reading each loss would make the GPU wait for the CPU at every step.
        self._loss_sum = self._loss_sum + loss.detach()
        self._loss_count += 1
        if trainer.global_step % self.every_n_steps == 0 and (not self._steps or trainer.global_step > self._steps[-1]):
            self._steps.append(trainer.global_step)
            self._losses.append(float(self._loss_sum) / self._loss_count)
            self._rates.append(learning_rate(trainer))
            self._loss_sum, self._loss_count = 0.0, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forgets the pictures of the validation before."""
        self._rows = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws the chosen images of this batch."""
        if trainer.sanity_checking or dataloader_idx or not trainer.is_global_zero:
            return
        found = outputs.get("detections") if isinstance(outputs, Mapping) else None
        categories = getattr(pl_module, "categories", None)
        if found is None or not isinstance(categories, Categories) or len(self._rows) >= self.images:
            return
        per_batch, batches = spread(self.images, int(trainer.num_val_batches[0]))
        if batch_idx not in batches:
            return
        images, targets = batch
        for index in range(min(per_batch, len(images), self.images - len(self._rows))):
            self._rows.append(self._pair(images[index], targets[index], found[index], categories.names))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Writes both pictures."""
        self._throughput.resume()
        if trainer.sanity_checking:
            return
        row = _metrics(trainer, "val/")
        # A checkpoint may have been written before this validation: the same step replaces its entry.
        self._evaluations = [entry for entry in self._evaluations if entry[0] != trainer.global_step]
        self._evaluations.append((trainer.global_step, row))
        if trainer.is_global_zero:
            self._write_predictions(run_folder(trainer))
            if self._has_to_draw(trainer):
                self.write_curves(run_folder(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what the run achieved and where everything is."""
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        self.write_curves(folder)
        if self._evaluations:
            step, row = self._evaluations[-1]
            self._print_metrics(trainer, pl_module, row, f"Validation at step {step}")
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        lines = {
            "run folder": str(folder.resolve()),
            "best checkpoint": _best(trainer) if best else "none",
            "training time": format_seconds(self._seconds()),
            "throughput": f"{self._throughput.mean():.1f} images/s",
            "images seen": format_count(self._throughput.images_seen),
        }
        _print_lines(lines)
        self._seconds_before, self._started = self._seconds(), time.perf_counter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the table of a ``validate`` or ``test`` run."""
        prefix = {"validate": "val/", "test": "test/"}.get(stage)
        row = _metrics(trainer, prefix) if prefix else {}
        if row and trainer.is_global_zero:
            self._print_metrics(trainer, pl_module, row, "Validation" if stage == "validate" else "Test")
            _print_lines({"run folder": str(run_folder(trainer).resolve())})

    def _has_to_draw(self, trainer: Trainer) -> bool:
        """Whether this validation belongs into the curves now."""
        if trainer.state.fn == "fit":
            return time.perf_counter() - self._drawn > SECONDS_BETWEEN_PICTURES
        # One that follows a training in its own process: the training ended between two validations.
        return bool(self._steps)

    def write_curves(self, folder: Path) -> None:
        """Writes ``curves.png`` from the history so far, if there is any.

        Args:
            folder: The run folder.
        """
        if not self._steps and not self._evaluations:
            return
        names = [name for name in _CURVES if any(name in row for _, row in self._evaluations)]
        if not names and self._evaluations:
            names = [name for name in self._evaluations[-1][1] if not name.startswith("ema_")][:4]
        self._drawn = time.perf_counter()
        draw_curves(folder / "curves.png", self._steps, self._losses, self._rates, self._evaluations, names)

    def _pair(
        self, image: Tensor, target: Mapping[str, Any], found: Mapping[str, Any], names: Sequence[str]
    ) -> tuple[Image.Image, Image.Image]:
        height, width = target["size"]
        original_height, original_width = target["original_size"]
        image = image[:, :height, :width].cpu()
        scale = torch.tensor([width / original_width, height / original_height] * 2)
        truth = draw_detections(
            image, target["boxes"], target["labels"], names=names, masks=target.get("masks"), max_side=640
        )
        prediction = draw_detections(
            image,
            found["boxes"].cpu().float() * scale,
            found["labels"],
            found["scores"],
            names=names,
            masks=found.get("rles"),
            score_threshold=self.score_threshold,
            max_side=640,
        )
        return truth, prediction

    def _write_predictions(self, folder: Path) -> None:
        if not self._rows:
            return
        portrait = all(pair[0].height >= pair[0].width for pair in self._rows)
        pairs_per_row = 2 if portrait and len(self._rows) > 2 else 1
        titles = ("ground truth", f"prediction, score {self.score_threshold:g} and above")
        sheet = panel_grid(self._rows, titles, pairs_per_row=pairs_per_row)
        self._rows = []
        with whole_file(folder / "predictions.png") as temporary:
            sheet.save(temporary, format="png")

    def _print_metrics(
        self, trainer: Trainer, pl_module: LightningModule, row: Mapping[str, float], title: str
    ) -> None:
        console = get_console()
        shown = {name: value for name, value in row.items() if not name.startswith("ema_")}
        updates = row.get("ema_updates")
        weights = "" if updates is None else f" ({'averaged' if updates else 'raw'} weights)"
        console.print()
        console.print(metrics_table(shown, title + weights, _metrics(trainer, "hardware/")))
        per_class, measures = _per_class(pl_module)
        if per_class:
            console.print(class_table(per_class, measures))

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started


def _metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    found = trainer.callback_metrics.items()
    return {name[len(prefix) :]: float(value) for name, value in found if name.startswith(prefix)}


def _per_class(pl_module: LightningModule) -> tuple[list[tuple[str, list[float]]], list[str]]:
    """Class names with their values, and the names of the values.

    They come from ``result.per_class`` of the task: ``{"bbox": AP by category id}`` of a detector, and the same as
    ``"segm"`` where it finds masks; accuracy by label of a classifier; IoU by label of a segmenter, which has
    ``result.accuracy_per_class`` too.
    """
    found = getattr(getattr(pl_module, "result", None), "per_class", None)
    categories = getattr(pl_module, "categories", None)
    if not isinstance(found, Mapping) or not isinstance(categories, Categories):
        return [], []
    accuracies = getattr(pl_module.result, "accuracy_per_class", None)
    if accuracies is not None:
        return [(categories.names[k], [float(iou), accuracies[k]]) for k, iou in found.items()], ["IoU", "accuracy"]
    if hasattr(pl_module.result, "confusion"):
        return [(categories.names[label], [float(value)]) for label, value in found.items()], ["accuracy"]
    kinds = [name for name in ("bbox", "segm") if name in found]
    names = categories.to_dict()
    rows = [(names[key], [float(found[kind][key]) for kind in kinds]) for key in (found[kinds[0]] if kinds else ())]
    return rows, ["AP"] if kinds == ["bbox"] else [{"bbox": "box AP", "segm": "mask AP"}[kind] for kind in kinds]


def _best(trainer: Trainer) -> str:
    callback = trainer.checkpoint_callback
    path = str(getattr(callback, "best_model_path", ""))
    score = getattr(callback, "best_model_score", None)
    monitor = getattr(callback, "monitor", None)
    return path if score is None else f"{path}  ({monitor} {format_metric(float(score))})"


def _print_lines(lines: Mapping[str, str]) -> None:
    console = get_console()
    width = max(len(name) for name in lines)
    for name, value in lines.items():
        console.print(f"[dim]{name:<{width}}[/dim]  {escape(value)}", highlight=False, soft_wrap=True)
