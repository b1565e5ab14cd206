"""What Faster R-CNN does with its proposals, numerically as MMDetection's ``StandardRoIHead``.

The layers are torchvision's, under its names, but the background is the last class and has no box, as in MMDetection:
rows of classes map one to one onto its checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import clip_boxes_to_image

from effvit.tasks.detectors._scales import divided
from effvit.tasks.detectors._suppression import suppress
from effvit.tasks.detectors.assigner import assign
from effvit.tasks.detectors.coder import SymmetricBoxCoder
from effvit.tasks.detectors.roi_pooling import RoIPooling
from effvit.tasks.detectors.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

POOLED = 7  # side of the features of a region
_POSITIVE_FRACTION = 0.25
_POSITIVE_IOU = 0.5


class Objects(NamedTuple):
    """What one image of a batch shows.

    Attributes:
        boxes: ``(N, 4)``, float32 xyxy in pixels of the resized image.
        labels: ``(N,)``, int64.
        masks: ``(N, h, w)`` of 0 and 1 at the size of the original image, for a detector of masks.
        size: ``(height, width)`` of the resized image.
        padded: ``(height, width)`` of the padded batch.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None
    size: tuple[int, int]
    padded: tuple[int, int]


class Samples(NamedTuple):
    """The regions of one image that the heads learn from, positives first.

    Attributes:
        boxes: ``(R, 4)``, float32 xyxy.
        objects: Index of the object of each of the P positives ``(P,)``.
    """

    boxes: Tensor
    objects: Tensor

    @property
    def positive(self) -> Tensor:
        """The positives among the boxes ``(P, 4)``."""
        return self.boxes[: len(self.objects)]


class RoIHeads(nn.Module):
    """Classifies proposals and refines their boxes, class by class.

    Args:
        channels: Channels of every pyramid level.
        strides: Stride of each pyramid level in pixels, finest first.
        num_classes: Object classes.
        head_channels: Hidden units of the two layers of the box head.
        samples: Regions of each image in a training step.
        score_threshold: Detections need a score above this one.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        detections_per_image: Best detections kept for an image.
        match_low_quality: Whether an object takes its best proposal, of IoU 0.5 at least, from a better object.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        num_classes: int,
        *,
        head_channels: int,
        samples: int,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        match_low_quality: bool,
    ) -> None:
        super().__init__()
        self.pooling = RoIPooling(strides)
        self.box_head = TwoMLPHead(channels * POOLED**2, head_channels)
        self.box_predictor = FastRCNNPredictor(head_channels, num_classes)
        self.box_predictor.cls_score = nn.Linear(head_channels, num_classes + 1)
        self.coder = SymmetricBoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.num_classes = num_classes
        self.samples = samples
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.match_low_quality = match_low_quality
        self._initialise()

    def _initialise(self) -> None:
        for layer in (self.box_head.fc6, self.box_head.fc7):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def classify(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Raw outputs of the box head.

        Args:
            pooled: Features of regions ``(R, C, 7, 7)``.

        Returns:
            Class logits ``(R, num_classes + 1)``, the background last, and offsets ``(R, num_classes, 4)``.
        """
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits, deltas.view(-1, self.num_classes, 4)

    def draw(self, proposals: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[Samples]:
        """Samples of each image: its objects themselves and its proposals, a quarter of them positive at most.

        Args:
            proposals: ``(P, 4)`` of each image, float32 xyxy.
            boxes: Objects of each image ``(N, 4)``, float32 xyxy.
        """
        drawn = []
        for candidates, own in zip(proposals, boxes, strict=True):
            assigned = assign(
                candidates,
                own,
                positive_iou=_POSITIVE_IOU,
                negative_iou=_POSITIVE_IOU,
                min_pos_iou=_POSITIVE_IOU,
                match_low_quality=self.match_low_quality,
            )
            assigned = torch.cat([torch.arange(len(own), device=own.device), assigned])
            positive, negative = sample(assigned, self.samples, _POSITIVE_FRACTION)
            boxes_of_all = torch.cat([own, candidates])
            drawn.append(Samples(boxes_of_all[torch.cat([positive, negative])], assigned[positive]))
        return drawn

    def loss(self, maps: list[Tensor], drawn: Sequence[Samples], targets: Sequence[Objects]) -> dict[str, Tensor]:
        """Cross-entropy of the classes and L1 loss of the positives' offsets, both divided by the number of samples.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
            drawn: What `draw` returned.
            targets: The objects of each image.

        Returns:
            Scalars ``loss_cls`` and ``loss_bbox``.
        """
        logits, deltas = self.classify(self.pooling(maps, [own.boxes for own in drawn], POOLED))
        with torch.autocast(logits.device.type, enabled=False):
            classes = [target.labels[own.objects] for own, target in zip(drawn, targets, strict=True)]
            labels = torch.cat(
                [
                    F.pad(known, (0, len(own.boxes) - len(known)), value=self.num_classes)
                    for known, own in zip(classes, drawn, strict=True)
                ]
            )
            positive = torch.nonzero(labels < self.num_classes).squeeze(1)
            wanted = torch.cat([target.boxes[own.objects] for own, target in zip(drawn, targets, strict=True)])
            wanted = self.coder.encode_single(wanted, torch.cat([own.positive for own in drawn]))
            found = deltas[positive, labels[positive]].float()
            counted = max(1, len(labels))
            return {
                "loss_cls": F.cross_entropy(logits.float(), labels, reduction="sum") / counted,
                "loss_bbox": F.l1_loss(found, wanted, reduction="sum") / counted,
            }

    def detect(
        self,
        maps: list[Tensor],
        proposals: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        scales: Sequence[tuple[float, float]],
    ) -> list[dict[str, Tensor]]:
        """Detections of each image.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
            proposals: ``(P, 4)`` of each image, float32 xyxy.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            scales: Width and height of each image divided by those of the original: boxes are divided by them.

        Returns:
            ``boxes`` ``(N, 4)``, ``scores`` ``(N,)``, best first, and ``labels`` ``(N,)`` of each image.
        """
        logits, deltas = self.classify(self.pooling(maps, proposals, POOLED))
        counts = [len(own) for own in proposals]
        with torch.autocast(logits.device.type, enabled=False):
            return [
                self._select(*parts)
                for parts in zip(
                    proposals,
                    torch.split(logits.float(), counts),
                    torch.split(deltas.float(), counts),
                    sizes,
                    scales,
                    strict=True,
                )
            ]

    def _select(
        self, proposals: Tensor, logits: Tensor, deltas: Tensor, size: tuple[int, int], scale: tuple[float, float]
    ) -> dict[str, Tensor]:
        """Detections of one image: threshold, decode, rescale, suppress, in the order of MMDetection."""
        probabilities = logits.softmax(dim=-1)
        places, labels = torch.nonzero(probabilities[:, :-1] > self.score_threshold, as_tuple=True)
        scores = probabilities[places, labels]
        boxes = clip_boxes_to_image(self.coder.decode_single(deltas[places, labels], proposals[places]), size)
        boxes = divided(boxes, scale)
        keep = suppress(boxes, scores, labels, self.nms_threshold)[: self.detections_per_image]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}
