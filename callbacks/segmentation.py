"""What a segmenter's run leaves to look at: predictions beside the truth, IoU by class, confusion."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from effvit.callbacks._canvas import PAPER
from effvit.callbacks._confusion import draw_confusion
from effvit.callbacks._iou_bars import draw_iou_bars
from effvit.callbacks._run_folder import SECONDS_BETWEEN_PICTURES, run_folder, spread
from effvit.callbacks.overlays import draw_segmentation_pair
from effvit.categories import Categories
from effvit.deploy._files import whole_file
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_MARGIN = 16


class SegmentationReport(Callback):
    """Writes ``predictions.png``, ``iou.png``, ``confusion.png`` and ``per_class.csv`` into the run folder.

    * ``predictions.png``: image, ground truth and prediction side by side with a legend, of images that are spread
      evenly over the data, the same ones after every validation.
    * ``iou.png``: the IoU of each class, sorted, and their mean.
    * ``confusion.png``: the confusion matrix of pixels, or the most confused pairs of more than 150 classes.
    * ``per_class.csv``: for each class its label, category id, name, IoU, accuracy, labelled pixels and their share.

    ``predictions.png`` is written after every validation, the others at most every 20 s, and at the end of the run;
    also by ``validate`` and ``test``. The callback needs a task whose ``validation_step`` and ``test_step`` return
    ``{"masks": [...]}`` (label maps ``(h, w)`` of the size of the targets' ``mask``) for a batch ``(images uint8 (B, 3,
    H, W), targets)``, whose ``result`` has ``confusion``, ``pixels``, ``per_class`` and ``accuracy_per_class``, and
    which has ``categories``; it does nothing for any other task.

    Args:
        images: Images in ``predictions.png``; 0 for no picture.

    Raises:
        ConfigError: ``images`` is negative.
    """

    def __init__(self, images: int = 4) -> None:
        super().__init__()
        if images < 0:
            raise ConfigError(f"SegmentationReport needs images >= 0, not {images}")
        self.images = images
        self._rows: list[Image.Image] = []
        self._drawn = -math.inf
        self._reported: Any = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Forgets the pictures of the validation before."""
        self._rows = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same as for validation."""
        self.on_validation_start(trainer, pl_module)

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
        if not dataloader_idx and not trainer.sanity_checking and trainer.is_global_zero:
            self._draw(pl_module, outputs, batch, batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same as for validation."""
        if not dataloader_idx and trainer.is_global_zero:
            self._draw(pl_module, outputs, batch, batch_idx, trainer.num_test_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the predictions, and the rest unless it was written a moment ago."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._write_predictions(run_folder(trainer))
        recent = time.perf_counter() - self._drawn < SECONDS_BETWEEN_PICTURES
        if not (recent and trainer.state.fn == "fit"):
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything."""
        if trainer.is_global_zero:
            self._write_predictions(run_folder(trainer))
            self._report(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what the last validation found, unless it is written already."""
        if trainer.is_global_zero:
            self._report(trainer, pl_module, "val")

    def _draw(
        self, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, batches: Sequence[float]
    ) -> None:
        found = outputs.get("masks") if isinstance(outputs, Mapping) else None
        categories = getattr(pl_module, "categories", None)
        if found is None or not isinstance(categories, Categories):
            return
        per_batch, chosen = spread(self.images, int(batches[0]))
        if batch_idx not in chosen:
            return
        images, targets = batch
        for index in range(min(per_batch, len(images), self.images - len(self._rows))):
            target = targets[index]
            height, width = target["size"]
            self._rows.append(
                draw_segmentation_pair(
                    images[index][:, :height, :width],
                    target["mask"],
                    found[index],
                    categories.names,
                    title=str(target["file_name"]),
                )
            )

    def _write_predictions(self, folder: Path) -> None:
        if not self._rows:
            return
        width = max(row.width for row in self._rows) + 2 * _MARGIN
        height = sum(row.height + _MARGIN for row in self._rows) + _MARGIN
        sheet, top = Image.new("RGB", (width, height), PAPER), _MARGIN
        for row in self._rows:
            sheet.paste(row, (_MARGIN, top))
            top += row.height + _MARGIN
        self._rows = []
        with whole_file(folder / "predictions.png") as temporary:
            sheet.save(temporary, format="png")

    def _report(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        result: Any = getattr(pl_module, "result", None)
        if not hasattr(result, "accuracy_per_class") or result is self._reported:
            return
        folder, categories = run_folder(trainer), cast("Categories", pl_module.categories)
        title = f"{split}, step {trainer.global_step}" if trainer.global_step else split
        draw_iou_bars(folder / "iou.png", result.per_class, categories.names, title)
        draw_confusion(folder / "confusion.png", result.confusion, categories.names, None, title)
        _write_classes(folder / "per_class.csv", result, categories)
        self._drawn, self._reported = time.perf_counter(), result


def _write_classes(path: Path, result: Any, categories: Categories) -> None:
    pixels = result.pixels.tolist()
    total = max(sum(pixels), 1)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "id", "name", "IoU", "accuracy", "pixels", "share"])
        for label, (category_id, name) in enumerate(categories.to_dict().items()):
            values = (result.per_class[label], result.accuracy_per_class[label])
            numbers = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
            writer.writerow([label, category_id, name, *numbers, pixels[label], f"{pixels[label] / total:.6f}"])
