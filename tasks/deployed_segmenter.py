"""A segmenter with all around it, for export, for measuring speed and for the callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.errors import ExportError
from effvit.tasks.deployed import Deployed, inside, noise, of_weights, open_sides_of
from effvit.tasks.segmenters._inference import label_logits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effvit.categories import Categories
    from effvit.tasks.segmenters._contract import Segmenter


class DeployedSegmenter(Deployed):
    """A segmenter that takes pixels and gives a label for each, seeing an image once and whole.

    Args:
        segmenter: Semantic FPN or DeepLabv3.
        categories: The classes.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.
        settings: What else `metadata` is to hold, JSON-able.
    """

    task = "segmentation"
    input_names = ("images", "sizes")
    output_names = ("labels", "logits")

    def __init__(
        self,
        segmenter: Segmenter,
        categories: Categories,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Mapping[str, Any],
    ) -> None:
        enlarging = {"align_corners": segmenter.align_corners}
        super().__init__(categories, mean, std, {**settings, **enlarging}, of_weights(segmenter).device)
        self.segmenter = segmenter
        self.open_sides = open_sides_of(segmenter)
        named = dict(segmenter.named_children())
        parts = {"backbone": "backbone", "pyramid": "neck", "heads": "head"}
        self.parts = {part: (f"segmenter.{name}",) for part, name in parts.items() if named.get(name) is not None}

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of the pixels, and what they are made of.

        Args:
            images: uint8 or float32 from 0 to 255 ``(B, 3, H, W)``, RGB, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding ``(B, 2)``, int64.

        Returns:
            ``labels`` ``(B, H, W)``, int64, of no meaning in the padding; and ``logits`` ``(B, K, h, w)``, float32, at
            the stride of the network, from which labels at the size of the file are made: enlarged to ``(H, W)``, cut,
            resized, and compared.
        """
        pixels = self._normalised(images)
        pixels = pixels.masked_fill(~inside(pixels, sizes), 0).to(of_weights(self.segmenter).dtype)
        logits: Tensor = self.segmenter(pixels)["logits"].float()
        enlarged = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=self.segmenter.align_corners)
        return enlarged.argmax(1), logits

    def unpack(
        self,
        outputs: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """``mask`` of each image, see `unpack_masks`.

        Args:
            outputs: ``labels`` and ``logits``, on the CPU.
            original_sizes: ``(height, width)`` of each image as it was before it was resized.
            sizes: The same before padding; ``None`` where there is none.

        Raises:
            ExportError: There are no original sizes.
        """
        if original_sizes is None:
            raise ExportError("label maps have the size of their files: pass original_sizes")
        labels = outputs[0]
        sizes = sizes or [(labels.shape[1], labels.shape[2])] * len(labels)
        return unpack_masks(outputs, sizes, original_sizes, align_corners=self.segmenter.align_corners)

    def example_inputs(self, batch: int, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """See `Deployed.example_inputs`; the images are not padded."""
        return noise(batch, size), torch.tensor([size] * batch)


def unpack_masks(
    outputs: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    original_sizes: Sequence[tuple[int, int]],
    *,
    align_corners: bool,
) -> list[dict[str, Any]]:
    """What a run of a `DeployedSegmenter`, or of a file that was made of one, found in each image.

    Args:
        outputs: ``labels`` and ``logits``, on the CPU.
        sizes: ``(height, width)`` of each image before padding, in pixels.
        original_sizes: The same before it was resized, for the file.
        align_corners: How logits are enlarged, as the metadata says.

    Returns:
        ``mask`` of each image, int16 ``(h0, w0)``, with the digits of ``Segmentation.segment``.
    """
    labels, logits = outputs
    padded = (labels.shape[1], labels.shape[2])
    found = label_logits(logits, padded, sizes, original_sizes, align_corners=align_corners)
    return [{"mask": mask} for mask in found]
