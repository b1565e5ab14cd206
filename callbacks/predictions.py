"""Writes what a detector finds: one annotated picture an image, and one COCO results JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from effvit.callbacks.drawing import draw_detections
from effvit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effvit.categories import Categories


class PredictionWriter(Callback):
    """Writes ``<name>.png`` for every image and ``predictions.json`` for all of them.

    The JSON is a COCO results file: ``image_id``, ``category_id``, ``bbox`` as (x, y, width, height) in pixels of the
    original image, ``score``; and ``file_name``, since the ids of a folder's images are only their numbers.

    Args:
        output: Folder to write to.
        score_threshold: Detections below this score are not drawn, in ``[0, 1]``; the JSON has all of them.

    Raises:
        ConfigError: The threshold is out of its range.
    """

    def __init__(self, output: str | Path, score_threshold: float = 0.4) -> None:
        super().__init__()
        if not 0 <= score_threshold <= 1:
            raise ConfigError(f"score_threshold must be in [0, 1], not {score_threshold}")
        self.output = Path(output)
        self.score_threshold = score_threshold
        self.drawn = 0
        self.images = 0
        self._entries: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Makes the folder, so that a path that cannot be written fails before the work."""
        self.output.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,
        outputs: Sequence[dict[str, Tensor]],
        batch: tuple[Tensor, list[dict[str, Any]]],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Draws and notes the detections of one batch."""
        categories = cast("Categories", pl_module.categories)
        for image, target, found in zip(batch[0].cpu(), batch[1], outputs, strict=True):
            self._note(target, found, categories)
            self._draw(image, target, found, categories)
            self.images += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Writes the JSON."""
        text = json.dumps(self._entries, indent=1)
        (self.output / "predictions.json").write_text(text, encoding="utf-8")

    def _note(self, target: dict[str, Any], found: dict[str, Tensor], categories: Categories) -> None:
        boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)
        for box, score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True):
            self._entries.append(
                {
                    "image_id": target["image_id"],
                    "file_name": target["file_name"],
                    "category_id": categories.id_of(label),
                    "bbox": [round(value, 2) for value in box],
                    "score": round(score, 5),
                }
            )

    def _draw(self, image: Tensor, target: dict[str, Any], found: dict[str, Tensor], categories: Categories) -> None:
        height, width = target["size"]
        original = F.resize(image[:, :height, :width], list(target["original_size"]), antialias=True)
        picture = draw_detections(
            original,
            found["boxes"],
            found["labels"],
            found["scores"],
            names=categories.names,
            score_threshold=self.score_threshold,
        )
        self.drawn += int((found["scores"] >= self.score_threshold).sum())
        # The name keeps its suffix: a.jpg and a.png of one folder are two pictures.
        path = self.output / f"{target['file_name']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
