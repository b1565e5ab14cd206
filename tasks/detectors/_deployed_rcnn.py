"""Detections of Faster and Mask R-CNN with fixed shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effvit.tasks.detectors._deployed import (
    CANDIDATES,
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
from effvit.tasks.detectors.rcnn import MASK_SIDE, PROPOSAL_CANDIDATES, FasterRCNN, MaskRCNN
from effvit.tasks.detectors.roi_heads import POOLED
from effvit.tasks.detectors.rpn import PROPOSALS, SUPPRESSION_IOU

if TYPE_CHECKING:
    from collections.abc import Sequence

    from effvit.tasks.detectors.roi_pooling import RoIPooling


class FixedRCNN(FixedDetector):
    """See `FasterRCNN.predict` and `MaskRCNN.predict`.

    Args:
        network: The detector, whose layers are shared.
    """

    network: FasterRCNN

    def __init__(self, network: FasterRCNN) -> None:
        super().__init__()
        self.network = network
        self.pooling = _Pooling(network.roi_heads.pooling)
        layers: tuple[str, ...] = ("box_head", "box_predictor")
        if isinstance(network, MaskRCNN):
            self.outputs = (*type(self).outputs, "masks")
            layers = (*layers, "mask_head", "mask_predictor")
        self.parts = {
            "backbone": ("network.pyramid.backbone",),
            "pyramid": ("network.pyramid",),
            "proposals": ("network.rpn",),
            "pooling": ("pooling",),
            "heads": tuple(f"network.roi_heads.{name}" for name in layers),
        }

    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """See `FixedDetector.forward`."""
        maps = list(self.network.pyramid(images).values())
        proposals = self._propose(self.network.rpn(maps), static(maps), sizes)
        if not isinstance(self.network, MaskRCNN):
            found = self._select(maps, proposals, sizes, corners(original_sizes) / corners(sizes))
            return found.boxes, found.scores, found.labels
        found = self._select(maps, proposals, sizes, None)
        masks = self._masks(self.network, maps, found)
        # Not multiplied with the inverse: the last bit, as there.
        boxes = found.boxes / (corners(sizes) / corners(original_sizes))
        return boxes, found.scores, found.labels, masks

    def _propose(self, outputs: Any, map_sizes: list[tuple[int, int]], sizes: Tensor) -> Candidates:
        """The best proposals of each image, a fixed number; see `RegionProposalNetwork.propose`."""
        rpn = self.network.rpn
        anchors = rpn.anchors(map_sizes, outputs.logits[0].device)
        found, start = [], 0
        for number, (logits, offsets) in enumerate(zip(outputs.logits, outputs.deltas, strict=True)):
            scores, places = best(sigmoid(logits), PROPOSAL_CANDIDATES)
            found.append((scores, places + start, taken(offsets, places).float(), torch.full_like(places, number)))
            start += offsets.shape[1]
        scores, places, deltas, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        boxes = clipped(rpn.coder.decode_single(deltas, anchors[places]), sizes)
        return suppress(Candidates(boxes, scores, levels, solid(boxes)), SUPPRESSION_IOU, PROPOSALS)

    def _select(self, maps: list[Tensor], proposals: Candidates, sizes: Tensor, scale: Tensor | None) -> Candidates:
        """Detections of each image, multiplied by a scale; see `RoIHeads.detect`."""
        heads = self.network.roi_heads
        logits, deltas = heads.classify(self.pooling(maps, proposals.boxes, POOLED))
        probabilities = logits.float().softmax(dim=-1)[:, :-1].reshape(-1, PROPOSALS, heads.num_classes)
        probabilities = probabilities.masked_fill(~proposals.valid[..., None], 0)
        scores, pairs = best(probabilities.flatten(1), CANDIDATES)
        deltas = taken(deltas.float().reshape(-1, PROPOSALS * heads.num_classes, 4), pairs)
        around = taken(proposals.boxes, pairs // heads.num_classes)
        boxes = clipped(heads.coder.decode_single(deltas, around), sizes)
        if scale is not None:
            boxes = boxes * scale
        found = Candidates(boxes, scores, pairs % heads.num_classes, scores > heads.score_threshold)
        return suppress(found, heads.nms_threshold, heads.detections_per_image)

    def _masks(self, network: MaskRCNN, maps: list[Tensor], found: Candidates) -> Tensor:
        """Probabilities ``(B, D, 28, 28)``, 0 where there is no detection."""
        logits = network.segment(self.pooling(maps, found.boxes, MASK_SIDE))
        labels = found.labels.clamp(min=0).flatten()[:, None, None, None]
        own = logits.gather(1, labels.expand(-1, 1, *logits.shape[2:]))
        masks = sigmoid(own).reshape(-1, network.roi_heads.detections_per_image, *own.shape[2:])
        return masks.masked_fill(~found.valid[..., None, None], 0)


class _Pooling(nn.Module):
    """`RoIPooling.by_selection` as a module, whose time can be taken."""

    def __init__(self, pooling: RoIPooling) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, maps: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
        """See `RoIPooling.by_selection`."""
        return self.pooling.by_selection(maps, boxes, size)
