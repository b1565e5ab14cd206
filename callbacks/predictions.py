"""Writes what a network says about images: pictures and JSON of a detector, class names and scores of a classifier."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from effvit.callbacks._patches import drops_patches, kept_patches
from effvit.callbacks.drawing import draw_detections, draw_kept_patches
from effvit.deploy._files import whole_file
from effvit.errors import CheckpointError, ConfigError, close_matches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from effvit.categories import Categories

_FORMATS = {"table": "predictions.txt", "csv": "predictions.csv", "json": "predictions.json"}
_MOST_ROWS = 50


class PredictionWriter(Callback):
    """Writes ``<name>.png`` for every image and ``predictions.json`` for all of them.

    The JSON is a COCO results file: ``image_id``, ``category_id``, ``bbox`` as (x, y, width, height) in pixels of the
    original image, ``score``, and ``segmentation`` (a compressed RLE, its ``counts`` as text) of a detector that finds
    masks; and ``file_name``, since the ids of a folder's images are only their numbers.

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
        outputs: Sequence[dict[str, Any]],
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

    def summary(self) -> str:
        """One line about what was done."""
        return f"{self.images} images, {self.drawn} objects with a score of at least {self.score_threshold:g}"

    def _note(self, target: dict[str, Any], found: dict[str, Any], categories: Categories) -> None:
        boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)
        masks = [_segmentation(rle) for rle in found["rles"]] if "rles" in found else [{}] * len(boxes)
        rows = zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), masks, strict=True)
        for box, score, label, mask in rows:
            self._entries.append(
                {
                    "image_id": target["image_id"],
                    "file_name": target["file_name"],
                    "category_id": categories.id_of(label),
                    "bbox": [round(value, 2) for value in box],
                    "score": round(score, 5),
                    **mask,
                }
            )

    def _draw(self, image: Tensor, target: dict[str, Any], found: dict[str, Any], categories: Categories) -> None:
        height, width = target["size"]
        original = F.resize(image[:, :height, :width], list(target["original_size"]), antialias=True)
        picture = draw_detections(
            original,
            found["boxes"],
            found["labels"],
            found["scores"],
            names=categories.names,
            masks=found.get("rles"),
            score_threshold=self.score_threshold,
        )
        self.drawn += int((found["scores"] >= self.score_threshold).sum())
        _save(picture, self.output, target["file_name"])


class ClassificationWriter(Callback):
    """Writes the best classes of every image with their scores to one file, and shows them in the terminal.

    Needs a task whose ``predict_step`` returns probabilities ``(B, K)`` for a batch ``(images, targets)`` with
    ``targets["file_names"]``, and which has ``categories``.

    Args:
        output: Folder to write to.
        top: Number of classes for each image; all of them where there are fewer.
        file_format: "table" writes ``predictions.txt``, a table to read; "csv" ``predictions.csv``, one row an image
            with the columns ``file_name``, ``class_1``, ``score_1``, ``class_2``, ...; "json" ``predictions.json``, a
            list of ``{"file_name", "classes": [{"label", "name", "score"}, ...]}``, best first.
        patches: Also write ``patches/<name>.png``, the patches that the network keeps at each stage.

    Raises:
        ConfigError: An option is out of its range; at the start, ``patches`` of a network that drops none.
        CheckpointError: The scores of an image are NaN.
    """

    def __init__(
        self,
        output: str | Path,
        top: int = 5,
        file_format: Literal["table", "csv", "json"] = "table",
        *,
        patches: bool = False,
    ) -> None:
        super().__init__()
        if top < 1:
            raise ConfigError(f"top must be 1 or more, not {top}")
        if file_format not in _FORMATS:
            raise ConfigError(f"there is no format {file_format!r}. {close_matches(file_format, _FORMATS)}")
        self.output = Path(output)
        self.top = top
        self.file_format = file_format
        self.patches = patches
        self._found: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Makes the folder, so that a path that cannot be written fails before the work."""
        if self.patches and not drops_patches(pl_module):
            raise ConfigError(
                "there are no pictures of kept patches of this network: it keeps all of them. Only DynamicViT with a "
                "keep_ratio below 1 drops patches"
            )
        self.output.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,
        outputs: Tensor,
        batch: tuple[Tensor, dict[str, Any]],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Notes the best classes of one batch."""
        names = cast("Categories", pl_module.categories).names
        files = batch[1]["file_names"]
        scores, labels = outputs.detach().float().cpu().topk(min(self.top, outputs.shape[1]), dim=1)
        for file, image_scores, image_labels in zip(files, scores.tolist(), labels.tolist(), strict=True):
            if math.isnan(image_scores[0]):
                raise CheckpointError(
                    f"the scores of {file} are NaN: the weights of this checkpoint have diverged, or half precision is "
                    "too coarse for them. Take an earlier checkpoint, or --trainer.precision 32-true"
                )
            pairs = zip(image_labels, image_scores, strict=True)
            classes = [{"label": label, "name": names[label], "score": round(score, 5)} for label, score in pairs]
            self._found.append({"file_name": file, "classes": classes})
        if self.patches:
            self._draw(pl_module, batch[0], files)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Writes the file and shows the beginning of the table."""
        with whole_file(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            if self.file_format == "json":
                json.dump(self._found, file, indent=1, ensure_ascii=False)
            elif self.file_format == "csv":
                self._write_rows(csv.writer(file))
            else:
                # Wide enough that nothing is broken into lines: the table takes only what it needs.
                Console(file=file, width=10_000).print(_table(self._found))
        get_console().print(_table(self._found[:_MOST_ROWS]))
        if len(self._found) > _MOST_ROWS:
            get_console().print(f"and {len(self._found) - _MOST_ROWS} more")

    @property
    def path(self) -> Path:
        """The file with all predictions."""
        return self.output / _FORMATS[self.file_format]

    def summary(self) -> str:
        """One line about what was done."""
        return f"{len(self._found)} images in {self.path.name}"

    def _write_rows(self, writer: Any) -> None:
        count = max((len(found["classes"]) for found in self._found), default=0)
        numbers = range(1, count + 1)
        writer.writerow(["file_name", *(f"{column}_{n}" for n in numbers for column in ("class", "score"))])
        for found in self._found:
            cells = [cell for entry in found["classes"] for cell in (entry["name"], f"{entry['score']:.5f}")]
            writer.writerow([found["file_name"], *cells])

    def _draw(self, pl_module: LightningModule, images: Tensor, files: Sequence[str]) -> None:
        images, decisions, grid = kept_patches(pl_module, images)
        for number, file in enumerate(files):
            chosen = slice(number, number + 1)
            picture = draw_kept_patches(images[chosen], [kept[chosen] for kept in decisions], grid)
            _save(picture, self.output / "patches", file)


def _segmentation(rle: dict[str, Any]) -> dict[str, Any]:
    return {"segmentation": {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}}


def _table(predictions: Sequence[dict[str, Any]]) -> Table:
    """One row an image; its classes share a cell, since that can be broken into lines in a narrow terminal."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("image", overflow="fold")
    table.add_column("class (score)", overflow="fold")
    for found in predictions:
        classes = ", ".join(f"{entry['name']} ({entry['score']:.3f})" for entry in found["classes"])
        table.add_row(escape(found["file_name"]), escape(classes))
    return table


def _save(picture: Image.Image, folder: Path, name: str) -> None:
    # The name keeps its suffix: a.jpg and a.png of one folder are two pictures.
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
