"""Writes what a segmenter says about images: overlays, masks of category ids, and the share of each class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor

from effvit.callbacks.overlays import draw_segmentation
from effvit.deploy._files import whole_file
from effvit.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effvit.categories import Categories

_LARGEST_PICTURE = 1600
_HIGHEST_8_BIT, _HIGHEST_16_BIT = 255, 65_535


class SegmentationWriter(Callback):
    """Writes a picture and a mask for every image, ``predictions.json`` and ``classes.json`` for all of them.

    * ``<name>.png``: the image with its classes in colour and a legend, at most 1600 pixels wide or high.
    * ``masks/<stem>.png``: at the size of the image, a category id as the value of each pixel. 8 bits, or 16 where an
      id exceeds 255. Of two images of one stem, ``a.jpg`` and ``a.png``, the second keeps its ending: ``a.png.png``.
    * ``predictions.json``: a list of ``{"file_name", "mask", "classes": [{"category_id", "name", "share"}, ...]}``, the
      share of the pixels in ``[0, 1]``, largest first.
    * ``classes.json``: class name by category id. With the images beside it as ``images/``, the folder is a data set
      for ``SegmentationFolder``.

    Needs a task whose ``predict_step`` returns a list of ``{"mask": label map (h, w)}`` for a batch ``(images uint8
    (B, 3, H, W), targets)``, and which has ``categories``.

    Args:
        output: Folder to write to.

    Raises:
        ConfigError: At the start, a category id that no pixel can have.
        CheckpointError: The network gave no finite number for pixels of an image.
    """

    def __init__(self, output: str | Path) -> None:
        super().__init__()
        self.output = Path(output)
        self._entries: list[dict[str, Any]] = []
        self._masks: set[str] = set()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Makes the folder, so that a path that cannot be written fails before the work."""
        ids = cast("Categories", pl_module.categories).ids
        odd = [category_id for category_id in ids if not 0 <= category_id <= _HIGHEST_16_BIT]
        if odd:
            raise ConfigError(f"masks hold category ids from 0 to {_HIGHEST_16_BIT}, and this network has {odd[0]}")
        (self.output / "masks").mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,
        outputs: Sequence[dict[str, Any]],
        batch: tuple[Tensor, list[dict[str, Any]]],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Writes picture and mask of each image of one batch."""
        categories = cast("Categories", pl_module.categories)
        for image, target, found in zip(batch[0].cpu(), batch[1], outputs, strict=True):
            name, mask = str(target["file_name"]), found["mask"].cpu()
            if int(mask.min()) < 0:
                raise CheckpointError(
                    f"the network gave no finite number for {int((mask < 0).sum())} pixels of {name}: the weights of "
                    "this checkpoint have diverged, or half precision is too coarse for them. Take an earlier "
                    "checkpoint, or --trainer.precision 32-true"
                )
            height, width = target["size"]
            picture = draw_segmentation(image[:, :height, :width], mask, categories.names, max_side=_LARGEST_PICTURE)
            _save(picture, self.output / f"{name}.png")
            where = self._mask_file(name)
            _save(_id_mask(mask, categories), self.output / where)
            self._entries.append({"file_name": name, "mask": where, "classes": _shares(mask, categories)})

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 - Lightning's signature
        """Writes what is of all images."""
        names = cast("Categories", pl_module.categories).to_dict()
        for file, content in (("predictions.json", self._entries), ("classes.json", names)):
            with whole_file(self.output / file) as temporary:
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")

    def summary(self) -> str:
        """One line about what was done."""
        found = {entry["category_id"] for image in self._entries for entry in image["classes"]}
        return f"{len(self._entries)} images, {len(found)} classes found"

    def _mask_file(self, name: str) -> str:
        path = Path("masks") / name
        own = path.with_suffix(".png").as_posix()
        while own in self._masks:
            path = Path(f"{path.as_posix()}.png")
            own = path.as_posix()
        self._masks.add(own)
        return own


def _id_mask(mask: Tensor, categories: Categories) -> Image.Image:
    """Labels as category ids, in the smallest kind of picture that holds all of this network's."""
    kind = np.uint8 if max(categories.ids) <= _HIGHEST_8_BIT else np.uint16
    return Image.fromarray(np.array(categories.ids, kind)[mask.numpy()])


def _shares(mask: Tensor, categories: Categories) -> list[dict[str, Any]]:
    labels, counts = np.unique(mask.numpy(), return_counts=True)
    rows = sorted(zip(labels.tolist(), counts.tolist(), strict=True), key=lambda row: (-row[1], row[0]))
    return [
        {
            "category_id": categories.id_of(label),
            "name": categories.names[label],
            "share": round(count / mask.numel(), 6),
        }
        for label, count in rows
    ]


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
