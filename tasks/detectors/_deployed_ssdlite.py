"""SSDLite's detections with fixed shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from effvit.tasks.detectors._deployed import (
    CANDIDATES,
    Candidates,
    FixedDetector,
    best,
    clipped,
    corners,
    static,
    suppress,
    taken,
)

if TYPE_CHECKING:
    from effvit.tasks.detectors.ssdlite import SSDLite


class FixedSSDLite(FixedDetector):
    """See `SSDLite.predict`.

    Args:
        network: The detector, whose layers are shared.
    """

    network: SSDLite

    parts = {  # noqa: RUF012 - the same for all
        "backbone": ("network.backbone",),
        "pyramid": ("network.coarser",),
        "heads": ("network.heads",),
    }

    def __init__(self, network: SSDLite) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """See `FixedDetector.forward`."""
        network = self.network
        maps = network.maps(images)
        outputs = network.apply_heads(maps)
        anchors = network.anchors(static(maps), static([images])[0], images.device)
        scores, places, labels = self._candidates(outputs["cls_logits"].float().softmax(dim=-1))
        codes = taken(outputs["bbox_regression"], places).float()
        boxes = network.coder.decode_single(codes.flatten(0, 1), anchors[places.flatten()]).view_as(codes)
        found = suppress(
            Candidates(boxes, scores, labels, scores > network.score_threshold),
            network.nms_threshold,
            network.detections_per_image,
        )
        scaled = found.boxes * (corners(original_sizes) / corners(sizes))
        return clipped(scaled, original_sizes), found.scores, found.labels

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best scores ``(B, N)`` out of those of the anchors ``(B, A, K + 1)``, their anchors and their classes."""
        own, anchors = best(scores[..., :-1].transpose(1, 2), self.network.candidates)
        classes = torch.arange(self.network.num_classes, device=scores.device)[:, None].expand_as(anchors)
        ranked, chosen = best(own.flatten(1), CANDIDATES)
        return ranked, anchors.flatten(1).gather(1, chosen), classes.flatten(1).gather(1, chosen)
