"""What a classifier's run leaves to look at: confusion, worst mistakes, accuracy by class, kept patches."""

from __future__ import annotations

import csv
import logging
import math
import time
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from effvit.callbacks._confusion import draw_confusion
from effvit.callbacks._patches import drops_patches, kept_patches
from effvit.callbacks._run_folder import SECONDS_BETWEEN_PICTURES, run_folder, spread
from effvit.callbacks.drawing import captioned, draw_kept_patches, panel_grid
from effvit.deploy._files import whole_file
from effvit.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from effvit.categories import Categories

_log = logging.getLogger(__name__)


class ClassificationReport(Callback):
    """Writes ``confusion.png``, ``mistakes.png``, ``per_class.csv`` and ``patches.png`` into the run folder.

    * ``confusion.png``: the confusion matrix, or the most confused pairs of more than 150 classes; beside it the
      reliability diagram, the accuracy in each bin of confidence.
    * ``mistakes.png``: the images that the network was most sure about and wrong.
    * ``per_class.csv``: for each class its validation images, accuracy, precision, and what it is most often taken for.
    * ``patches.png``: for a network that drops patches (DynamicViT) those that are left after each predictor, on
      validation images spread evenly over the data, the same ones after every validation.

    Written after a validation, at most every 20 s, and at the end of the run; also by ``validate`` and ``test``. The
    callback needs a task whose ``result`` has ``confusion``, ``calibration``, ``per_class`` and ``mistakes``, and which
    has ``categories``; it does nothing for any other task.

    Args:
        mistakes: Images in ``mistakes.png``; 0 for no picture.
        patches: Images in ``patches.png``; 0 for no picture.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(self, mistakes: int = 16, patches: int = 4) -> None:
        super().__init__()
        if mistakes < 0 or patches < 0:
            raise ConfigError(f"ClassificationReport needs mistakes >= 0 and patches >= 0, not {mistakes}, {patches}")
        self.mistakes = mistakes
        self.patches = patches
        self._drawn = -math.inf
        self._reported: Any = None
        self._seen: list[tuple[Tensor, Sequence[Tensor]]] = []
        self._grid = (0, 0)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Forgets the patches of the validation before."""
        self._seen = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same as for validation."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002 - Lightning's signature
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Looks which patches of the chosen images are kept, with the weights that are being validated."""
        if not dataloader_idx and not trainer.sanity_checking and trainer.is_global_zero:
            self._look(trainer, pl_module, batch, batch_idx, trainer.num_val_batches)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002 - Lightning's signature
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same as for validation."""
        if not dataloader_idx and trainer.is_global_zero:
            self._look(trainer, pl_module, batch, batch_idx, trainer.num_test_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything, unless it was written a moment ago."""
        recent = time.perf_counter() - self._drawn < SECONDS_BETWEEN_PICTURES
        if not trainer.sanity_checking and not (recent and trainer.state.fn == "fit"):
            self._report(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything."""
        self._report(trainer, pl_module, "test")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes what the last validation found, unless it is written already."""
        self._report(trainer, pl_module, "val")

    def _look(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, batches: Sequence[float]
    ) -> None:
        # Where no process has the whole network (FSDP), the first one cannot run it alone.
        spread_out = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy))
        if self.patches == 0 or spread_out or not drops_patches(pl_module):
            return
        per_batch, chosen = spread(self.patches, int(batches[0]))
        count = min(per_batch, len(batch[0]), self.patches - len(self._seen))
        if batch_idx in chosen and count > 0:
            images, decisions, self._grid = kept_patches(pl_module, batch[0][:count])
            self._seen += [(image, [kept[n] for kept in decisions]) for n, image in enumerate(images)]

    def _report(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        result: Any = getattr(pl_module, "result", None)
        if not trainer.is_global_zero or not hasattr(result, "calibration") or result is self._reported:
            return
        folder, names = run_folder(trainer), cast("Categories", pl_module.categories).names
        title = f"{split}, step {trainer.global_step}" if trainer.global_step else split
        for name in ("top1", "top5", "ece"):
            title += f"   {name} {result.metrics[name]:.3f}" if name in result.metrics else ""
        draw_confusion(folder / "confusion.png", result.confusion, names, result.calibration, title)
        _write_classes(folder / "per_class.csv", result.confusion, result.per_class, names)
        self._write(folder / "mistakes.png", self._draw_mistakes(trainer, result.mistakes, names, split))
        self._write(folder / "patches.png", self._draw_patches())
        self._drawn, self._reported = time.perf_counter(), result

    def _write(self, path: Path, picture: Image.Image | None) -> None:
        if picture is None:
            path.unlink(missing_ok=True)  # one of an earlier validation would mislead
            return
        with whole_file(path) as temporary:
            picture.save(temporary, format="png")

    def _draw_mistakes(
        self, trainer: Trainer, mistakes: Sequence[Any], names: Sequence[str], split: str
    ) -> Image.Image | None:
        read = getattr(trainer.datamodule, "read_original", None)  # type: ignore[attr-defined]
        rows = []
        for mistake in mistakes[: self.mistakes if read else 0]:
            try:
                image = read(split, mistake.image_id)  # type: ignore[misc]
            except (DatasetError, OSError) as error:  # a picture is not worth the end of a run
                _log.warning("mistakes.png lacks an image: %s", error)
                continue
            # The name last: what is too long is cut.
            chosen = f"predicted ({mistake.confidence:.2f}): {names[mistake.predicted]}"
            lines = (f"true: {names[mistake.label]}", chosen)
            rows.append((captioned(image, lines),))
        return panel_grid(rows, ("",), pairs_per_row=min(4, len(rows))) if rows else None

    def _draw_patches(self) -> Image.Image | None:
        if not self._seen:
            return None
        images = torch.stack([image for image, _ in self._seen])
        stages = zip(*(decisions for _, decisions in self._seen), strict=True)
        return draw_kept_patches(images, [torch.stack(kept) for kept in stages], self._grid)


def _write_classes(path: Path, confusion: Tensor, accuracies: dict[int, float], names: Sequence[str]) -> None:
    totals, chosen = confusion.sum(1), confusion.sum(0)
    wrong, other = confusion.clone().fill_diagonal_(0).max(1)
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "name", "images", "accuracy", "precision", "taken_for", "taken_for_images"])
        for label, name in enumerate(names):
            right = int(confusion[label, label])
            precision = right / int(chosen[label]) if chosen[label] else math.nan
            mistaken = names[int(other[label])] if wrong[label] else ""
            row = [int(totals[label]), _number(accuracies[label]), _number(precision), mistaken, int(wrong[label])]
            writer.writerow([label, name, *row])


def _number(value: float) -> str:
    """A share, or nothing where it is not defined."""
    return "" if math.isnan(value) else f"{value:.4f}"
