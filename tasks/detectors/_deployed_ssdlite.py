"""SSDLite's detections with fixed shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
from effvit.tasks.detectors.ssdlite import apply_heads, make_levels

if TYPE_CHECKING:
    from effvit.tasks.detectors.ssdlite import SSDLite


class FixedSSDLite(FixedDetector):
    """See `SSDLite.predict`.

    Args:
        network: The detector, whose layers are shared.
    """

    parts = {  # noqa: RUF012 - the same for all
        "backbone": ("backbone",),
        "pyramid": ("coarser",),
        "heads": ("heads",),
    }

    def __init__(self, network: SSDLite) -> None:
        super().__init__()
        self.backbone = network.backbone
        # A list: the last one is called "global" there, and a graph that `torch.export` recorded is Python code.
        self.coarser = nn.ModuleList(network.coarser.values())
        self.heads = network.heads
        self.anchors = network.anchors
        self.coder = network.coder
        self.levels = network.levels
        self.num_classes = network.num_classes
        self.score_threshold = network.score_threshold
        self.nms_threshold = network.nms_threshold
        self.candidates = network.candidates
        self.detections_per_image = network.detections_per_image

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """See `FixedDetector.forward`."""
        maps = make_levels(self.backbone(images), self.levels, self.coarser)
        outputs = apply_heads(self.heads, maps)
        anchors = self.anchors(static(maps), static([images])[0], images.device)
        scores, places, labels = self._candidates(outputs["cls_logits"].float().softmax(dim=-1))
        codes = taken(outputs["bbox_regression"], places).float()
        boxes = self.coder.decode_single(codes.flatten(0, 1), anchors[places.flatten()]).view_as(codes)
        found = suppress(
            Candidates(boxes, scores, labels, scores > self.score_threshold),
            self.nms_threshold,
            self.detections_per_image,
        )
        scaled = found.boxes * (corners(original_sizes) / corners(sizes))
        return clipped(scaled, original_sizes), found.scores, found.labels

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best scores ``(B, N)`` out of those of the anchors ``(B, A, K + 1)``, their anchors and their classes."""
        own, anchors = best(scores[..., :-1].transpose(1, 2), self.candidates)
        classes = torch.arange(self.num_classes, device=scores.device)[:, None].expand_as(anchors)
        ranked, chosen = best(own.flatten(1), CANDIDATES)
        return ranked, anchors.flatten(1).gather(1, chosen), classes.flatten(1).gather(1, chosen)
