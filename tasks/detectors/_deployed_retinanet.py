"""RetinaNet's detections with fixed shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effvit.tasks.detectors._deployed import (
    Candidates,
    FixedDetector,
    best,
    clipped,
    corners,
    sigmoid,
    solid,
    static,
    suppress,
    taken,
)

if TYPE_CHECKING:
    from effvit.tasks.detectors.retinanet import RetinaNet


class FixedRetinaNet(FixedDetector):
    """See `RetinaNet.predict`.

    Args:
        network: The detector, whose layers are shared.
    """

    network: RetinaNet

    parts = {  # noqa: RUF012 - the same for all
        "backbone": ("network.pyramid.backbone",),
        "pyramid": ("network.pyramid",),
        "heads": ("network.head",),
    }

    def __init__(self, network: RetinaNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """See `FixedDetector.forward`."""
        maps = list(self.network.pyramid(images).values())
        outputs = self.network.head(maps)
        map_sizes = static(maps)
        counts = self.network.anchors.num_anchors_per_location()
        per_level = [height * width * count for (height, width), count in zip(map_sizes, counts, strict=True)]
        scores, places, labels = self._candidates(outputs["cls_logits"], per_level)
        anchors = self.network.anchors(map_sizes, images.device)
        deltas = taken(outputs["bbox_regression"], places).float()
        boxes = clipped(self.network.coder.decode_single(deltas, anchors[places]), sizes)
        boxes = boxes * (corners(original_sizes) / corners(sizes))
        valid = (scores > self.network.score_threshold) & solid(boxes)
        found = suppress(
            Candidates(boxes, scores, labels, valid), self.network.nms_threshold, self.network.detections_per_image
        )
        return found.boxes, found.scores, found.labels

    def _candidates(self, logits: Tensor, per_level: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Best scores of each level ``(B, N)``, the places of their anchors among all, and their classes."""
        found, start = [], 0
        for level in torch.split(logits, per_level, dim=1):
            scores, places, labels = self._of_level(level)
            found.append((scores, places + start, labels))
            start += per_level[len(found) - 1]
        scores, places, labels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return scores, places, labels

    def _of_level(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one level ``(B, A, K)``, by the best anchors first: the pairs are among theirs."""
        count = self.network.candidates_per_level
        _, anchors = best(logits.amax(dim=-1), count)
        ranked, pairs = best(taken(logits, anchors).flatten(1), count)
        classes = self.network.num_classes
        return sigmoid(ranked), anchors.gather(1, pairs // classes), pairs % classes
