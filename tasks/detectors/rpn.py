"""Region proposals, as Faster and Mask R-CNN of MMDetection make and train them.

Paper: Ren et al., Faster R-CNN, arXiv 1506.01497. The settings are those of MMDetection 3.3
``configs/_base_/models/faster-rcnn_r50_fpn.py``; the head is torchvision's, under its names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import clip_boxes_to_image

from effvit.tasks.detectors._suppression import suppress
from effvit.tasks.detectors.anchors import Anchors
from effvit.tasks.detectors.assigner import assign
from effvit.tasks.detectors.coder import SymmetricBoxCoder
from effvit.tasks.detectors.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAMPLES = 256
_POSITIVE_FRACTION = 0.5
_POSITIVE_IOU, _NEGATIVE_IOU = 0.7, 0.3
PROPOSALS = 1000
SUPPRESSION_IOU = 0.7


class RpnOutputs(NamedTuple):
    """What the head says of the A anchors of each level.

    Attributes:
        logits: Objectness of each level ``(B, A)``.
        deltas: Offsets of each level ``(B, A, 4)``.
        map_sizes: ``(height, width)`` of each level's map.
    """

    logits: list[Tensor]
    deltas: list[Tensor]
    map_sizes: list[tuple[int, int]]


class RegionProposalNetwork(nn.Module):
    """Says of each anchor on every pyramid level whether it holds an object, and how to move it there.

    Args:
        channels: Channels of every level.
        strides: Stride of each level in pixels, finest first.
        pad_divisor: MMDetection's ``pad_size_divisor``, by which an image's own area in the batch is known.
    """

    def __init__(self, channels: int, strides: Sequence[int], *, pad_divisor: int) -> None:
        super().__init__()
        self.anchors = Anchors(strides, octave_base=8.0, scales_per_octave=1)
        self.head = RPNHead(channels, self.anchors.num_anchors_per_location()[0])
        self.coder = SymmetricBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.pad_divisor = pad_divisor

    def forward(self, maps: list[Tensor]) -> RpnOutputs:
        """Raw outputs.

        Args:
            maps: Pyramid levels ``(B, C, H, W)``, finest first.
        """
        logits, deltas = self.head(maps)
        return RpnOutputs(
            [level.permute(0, 2, 3, 1).flatten(1) for level in logits],
            [level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, 4) for level in deltas],
            [(level.shape[-2], level.shape[-1]) for level in maps],
        )

    def loss(self, outputs: RpnOutputs, sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]) -> dict[str, Tensor]:
        """Binary cross-entropy of 256 anchors an image and L1 loss of the positive ones among them.

        Both are sums divided by the number of sampled anchors of the batch, where an image without positives counts
        one, as there. Call it with autocast disabled.

        Args:
            outputs: What `forward` returned.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            boxes: Objects of each image ``(N, 4)``, float32 xyxy.

        Returns:
            Scalars ``loss_rpn_cls`` and ``loss_rpn_bbox``.
        """
        logits, deltas = (torch.cat(levels, dim=1).float() for levels in outputs[:2])
        anchors = self.anchors(outputs.map_sizes, logits.device)
        drawn_logits, drawn_labels, drawn_deltas, wanted = [], [], [], []
        counted = 0
        for index, (own, size) in enumerate(zip(boxes, sizes, strict=True)):
            assigned = assign(
                anchors,
                own,
                positive_iou=_POSITIVE_IOU,
                negative_iou=_NEGATIVE_IOU,
                min_pos_iou=_NEGATIVE_IOU,
                inside=self.anchors.inside(outputs.map_sizes, size, self.pad_divisor, logits.device),
            )
            positive, negative = sample(assigned, _SAMPLES, _POSITIVE_FRACTION)
            counted += max(1, len(positive)) + max(1, len(negative))
            drawn_logits.append(logits[index, torch.cat([positive, negative])])
            drawn_labels.append(torch.arange(len(drawn_logits[-1]), device=logits.device) < len(positive))
            drawn_deltas.append(deltas[index, positive])
            wanted.append(self.coder.encode_single(own[assigned[positive]], anchors[positive]))
        labels = torch.cat(drawn_labels).float()
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(torch.cat(drawn_logits), labels, reduction="sum")
            / counted,
            "loss_rpn_bbox": F.l1_loss(torch.cat(drawn_deltas), torch.cat(wanted), reduction="sum") / counted,
        }

    @torch.no_grad()
    def propose(self, outputs: RpnOutputs, sizes: Sequence[tuple[int, int]], *, candidates: int) -> list[Tensor]:
        """The best proposals of each image. Call it with autocast disabled.

        Args:
            outputs: What `forward` returned.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            candidates: Best anchors that each level may put forward before suppression, which is level by level.

        Returns:
            Boxes ``(P, 4)`` of each image, float32 xyxy inside it, best first, P at most 1000.
        """
        anchors = self.anchors(outputs.map_sizes, outputs.logits[0].device)
        starts = [0]
        scores, places, deltas, levels = [], [], [], []
        for number, (logits, offsets) in enumerate(zip(outputs.logits, outputs.deltas, strict=True)):
            own, best = _best(logits.float().sigmoid(), candidates)
            scores.append(own)
            places.append(best + starts[-1])
            deltas.append(offsets.gather(1, best[..., None].expand(-1, -1, 4)).float())
            levels.append(torch.full_like(best[0], number))
            starts.append(starts[-1] + logits.shape[1])
        level = torch.cat(levels)
        boxes = self.coder.decode_single(torch.cat(deltas, dim=1), anchors[torch.cat(places, dim=1)])
        return [
            _survivors(clip_boxes_to_image(own, size), scored, level)
            for own, scored, size in zip(boxes, torch.cat(scores, dim=1), sizes, strict=True)
        ]


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best scores of each row ``(B, A)`` and their places, all of them as they are if there are fewer."""
    if scores.shape[1] <= count:
        return scores, torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    # Not topk and not stable: the same sort as MMDetection's leaves equal scores, of which padding gives many, in its
    # order.
    ranked, places = scores.sort(dim=1, descending=True)
    return ranked[:, :count], places[:, :count]


def _survivors(boxes: Tensor, scores: Tensor, levels: Tensor) -> Tensor:
    """Proposals of one image, without those that the border cut down to a line and without near duplicates."""
    solid = torch.nonzero(((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)).squeeze(1)
    boxes, scores, levels = boxes[solid], scores[solid], levels[solid]
    return boxes[suppress(boxes, scores, levels, SUPPRESSION_IOU)[:PROPOSALS]]
