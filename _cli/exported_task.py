"""``effvit predict --model``: an exported network in the place of the task that it was made of."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from effvit._cli.exported_inputs import network_inputs
from effvit.categories import Categories
from effvit.deploy.exported import Exported
from effvit.errors import ExportError
from effvit.tasks.deployed import unpack_detections
from effvit.tasks.deployed_segmenter import unpack_masks


class ExportedTask(LightningModule):
    """Predicts as the task of a run does, for the same callbacks.

    Args:
        exported: The opened file.

    Attributes:
        categories: The classes.
        canvas: Height and width of the images that the file takes, or the sides that they may have.

    Raises:
        ExportError: The file does not say how images are made for it: it was not written by ``effvit export``.
    """

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        metadata = exported.metadata
        if "preprocessing" not in metadata:
            raise ExportError(
                f"{exported.path} does not say how images are resized for it: it was not written by `effvit export`. "
                "Run it from Python with effvit.deploy.exported.open_exported"
            )
        self.categories = Categories({int(key): name for key, name in metadata["categories"].items()})
        canvas = exported.size or exported.sides
        assert canvas is not None  # `export` writes one of them
        self.canvas = canvas
        self._exported = exported
        self._task = str(metadata["task"])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor | list[dict[str, Any]]:  # noqa: ARG002 - Lightning's signature
        """What the ``predict_step`` of the task returns.

        Probabilities ``(B, K)``, or the detections or the label map of each image.
        """
        inputs = network_inputs(self._task, batch, self.canvas)
        outputs = self._run(inputs)
        if self._task == "classification":
            return outputs[0]
        original_sizes = [target["original_size"] for target in batch[1]]
        if self._task == "segmentation":
            sizes = [target["size"] for target in batch[1]]
            return unpack_masks(outputs, sizes, original_sizes, align_corners=self._exported.metadata["align_corners"])
        return unpack_detections(self._exported.output_names, outputs, original_sizes)

    def _run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """One batch, in as many passes as the file needs; the last image fills up what is left of the last one."""
        number = len(inputs[0])
        step = self._exported.batch or number
        passes = [
            self._exported.run(*(_filled(value[start : start + step], step) for value in inputs))
            for start in range(0, number, step)
        ]
        return [torch.cat(parts)[:number] for parts in zip(*passes, strict=True)]


def _filled(value: Tensor, number: int) -> Tensor:
    """The rows of a batch, the last one repeated up to a number of rows."""
    missing = number - len(value)
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) if missing else value
