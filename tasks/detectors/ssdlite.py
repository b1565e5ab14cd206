"""SSDLite as published for MobileViT, for any backbone.

Papers: Liu et al., SSD (arXiv 1512.02325); Sandler et al., MobileNetV2 (arXiv 1801.04381), which replaced SSD's
convolutions by separable ones; Mehta and Rastegari, MobileViT (arXiv 2110.02178), section 4.2.1. The settings are those
of apple/ml-cvnets ``config/detection/ssd_coco/mobilevit.yaml``. What differs from ``torchvision.models.detection.SSD``:
the levels and their heads, anchors between 0.1 and 1.05 of the image, hard negatives counted for each image and the
losses divided by the positives of the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import batched_nms, clip_boxes_to_image

from effvit.backbones import Backbone, freeze_unread
from effvit.errors import ConfigError
from effvit.tasks.detectors._checks import at_least, check_thresholds
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.detectors._scales import of_corners
from effvit.tasks.detectors.assigner import assign
from effvit.tasks.detectors.default_boxes import DefaultBoxes
from effvit.tasks.detectors.ssd_head import SSDHead, make_coarser, make_global

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

#: Stride of each level but the last, which is one cell, and the width of its head.
_WIDTHS = {16: 512, 32: 256, 64: 256, 128: 128, 256: 128}
_GLOBAL_WIDTH = 64
#: Aspect ratios of each level.
_RATIOS = ((2, 3), (2, 3), (2, 3), (2, 3), (2, 3), (2,))
_POSITIVE_IOU = 0.5
_NEGATIVES_PER_POSITIVE = 3
#: One over the published variances, 0.1 for centres and 0.2 for sizes.
_CODER_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


class SSDLite(Detector):
    """One-stage detector with separable convolutions on six levels: strides 16 to 256, and one cell for the whole.

    A level whose stride the backbone has is the backbone's own map: 16 and 32 for MobileViT, as published, and for
    EfficientFormer, 16 to 64 for EfficientViT, 16 alone for DynamicViT. Finer maps are not read. Every other level is
    made of the one before it, by a depthwise 3x3 convolution of stride 2 and a pointwise one, and the last by average
    pooling and a pointwise one. So all backbones get the same strides, anchors and widths of the heads. The backbone is
    brought to its dense form, and those of its parameters that no level depends on are frozen, as by
    ``FeaturePyramid``.

    Anchors are shares of the batch: 3232 at the published 320x320 pixels, into which images were squashed. Images of
    any size work; in padded batches, the padding is background.

    Args:
        backbone: Any backbone with a map of stride 16.
        num_classes: Number of object classes, the background not counted.
        score_threshold: Detections need a score above this one.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        candidates: Best candidates that each class may put forward before suppression.
        detections_per_image: Best detections kept for an image.

    Raises:
        ConfigError: The backbone has no map of stride 16, or a count or threshold is out of its range.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.5,
        candidates: int = 400,
        detections_per_image: int = 200,
    ) -> None:
        super().__init__()
        at_least("num_classes", num_classes, 1)
        at_least("candidates", candidates, 1)
        at_least("detections_per_image", detections_per_image, 1)
        check_thresholds(score_threshold, nms_threshold)
        own = {spec.stride: spec for spec in backbone.feature_maps if spec.stride in _WIDTHS}
        if min(_WIDTHS) not in own:
            strides = ", ".join(str(spec.stride) for spec in backbone.feature_maps)
            raise ConfigError(
                f"ssdlite starts at stride {min(_WIDTHS)}, and {backbone.info.name} has maps of the strides {strides}; "
                "use another backbone, or another detector"
            )
        backbone.prepare_for_dense()
        freeze_unread(backbone, [spec.level for spec in own.values()])
        self.backbone = backbone
        self.levels = tuple(own[stride].level if stride in own else None for stride in _WIDTHS)
        self.anchors = DefaultBoxes(_RATIOS)
        self.coarser = nn.ModuleDict()
        self.heads = nn.ModuleList()
        counts = self.anchors.num_anchors_per_location()
        channels = 0
        for (stride, width), count in zip(_WIDTHS.items(), counts, strict=False):
            if stride in own:
                channels = own[stride].channels
            else:
                self.coarser[str(stride)] = make_coarser(channels, width)
                channels = width
            self.heads.append(SSDHead(channels, width, count, num_classes + 1))
        self.coarser["global"] = make_global(channels, _GLOBAL_WIDTH)
        self.heads.append(SSDHead(_GLOBAL_WIDTH, _GLOBAL_WIDTH, counts[-1], num_classes + 1, pointwise=True))
        self.coder = BoxCoder(_CODER_WEIGHTS)
        self.class_parameters = tuple(f"heads.{level}.classes." for level in range(len(self.heads)))
        self.num_classes = num_classes
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.candidates = candidates
        self.detections_per_image = detections_per_image

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs of the heads.

        Args:
            images: Normalised images ``(B, 3, H, W)``.

        Returns:
            ``cls_logits`` ``(B, A, num_classes + 1)``, the background last, and ``bbox_regression`` ``(B, A, 4)`` over
            the A anchors of all levels.
        """
        outputs, _ = self._run(images)
        return outputs

    def _run(self, images: Tensor) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """Head outputs as in `forward`, and the size of each level's map."""
        maps = make_levels(self.backbone(images), self.levels, self.coarser.values())
        return apply_heads(self.heads, maps), [(level.shape[-2], level.shape[-1]) for level in maps]

    def loss(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],  # noqa: ARG002 - the contract's; padding is background here
        targets: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        """Cross-entropy of positives and hard negatives, and smooth L1 of the encoded boxes, in float32.

        An anchor is positive for the object that it overlaps most, from an IoU of 0.5, and for one whose best anchor it
        is. Of the others, those three times as many as the image's positives count that take the background for least
        likely; in an image without objects, none does. Both losses are sums over the batch divided by its number of
        positives, at least 1. Processes of a distributed run count their own, as in ml-cvnets.

        Where several anchors are an object's best with exactly the same IoU, ml-cvnets takes the first and this all of
        them, as `assign` does. It adds 1e-5 of the image's area to each union, which changes an IoU by 0.1 % at most,
        and has no answer to an object without area, which takes no anchor here.

        Source: apple/ml-cvnets ``loss_fn/detection/ssd_multibox_loss.py``, ``cvnets/matcher_det/ssd_matcher.py``.

        Args:
            images: Normalised images ``(B, 3, H, W)``.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            targets: ``boxes`` ``(N, 4)`` xyxy in pixels and ``labels`` ``(N,)`` of each image; N may be 0.

        Returns:
            Scalars ``loss_cls`` and ``loss_bbox``.
        """
        outputs, map_sizes = self._run(images)
        with torch.autocast(images.device.type, enabled=False):
            logits, deltas = outputs["cls_logits"].float(), outputs["bbox_regression"].float()
            anchors = self.anchors(map_sizes, (images.shape[-2], images.shape[-1]), images.device)
            boxes = [torch.as_tensor(target["boxes"], dtype=torch.float32, device=images.device) for target in targets]
            matched = torch.stack(
                [assign(anchors, own, positive_iou=_POSITIVE_IOU, negative_iou=_POSITIVE_IOU) for own in boxes]
            )
            positive = matched >= 0
            classes = torch.full_like(matched, self.num_classes)
            wanted = []
            for image, target in enumerate(targets):
                found = matched[image][positive[image]]
                classes[image, positive[image]] = torch.as_tensor(target["labels"], device=images.device)[found]
                wanted.append(boxes[image][found])
            places = torch.nonzero(positive)[:, 1]
            codes = self.coder.encode_single(torch.cat(wanted), anchors[places])
            count = max(1, len(places))
            return {
                "loss_cls": _mined_cross_entropy(logits, classes, positive) / count,
                "loss_bbox": F.smooth_l1_loss(deltas[positive], codes, reduction="sum") / count,
            }

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects; see `Detector.predict`. Boxes are cut at the image after the suppression.

        Source: apple/ml-cvnets ``cvnets/models/detection/ssd.py``.
        """
        outputs, map_sizes = self._run(images)
        with torch.autocast(images.device.type, enabled=False):
            anchors = self.anchors(map_sizes, (images.shape[-2], images.shape[-1]), images.device)
            scores = outputs["cls_logits"].float().softmax(dim=-1)[..., : self.num_classes]
            codes = outputs["bbox_regression"].float()
            return [
                self._select(own_scores, own_codes, anchors, size, original)
                for own_scores, own_codes, size, original in zip(
                    scores, codes, sizes, original_sizes or sizes, strict=True
                )
            ]

    def _select(
        self, scores: Tensor, codes: Tensor, anchors: Tensor, size: tuple[int, int], original: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Final detections of one image out of its scores ``(A, num_classes)`` and encoded boxes ``(A, 4)``."""
        best, places = scores.t().contiguous().topk(min(self.candidates, len(scores)))
        labels, ranks = torch.nonzero(best > self.score_threshold, as_tuple=True)
        best, places = best[labels, ranks], places[labels, ranks]
        boxes = self.coder.decode_single(codes[places], anchors[places])
        keep = batched_nms(boxes, best, labels, self.nms_threshold)[: self.detections_per_image]
        scale = of_corners(boxes, original[1] / size[1], original[0] / size[0])
        return {
            "boxes": clip_boxes_to_image(boxes[keep] * scale, original),
            "scores": best[keep],
            "labels": labels[keep],
        }


def make_levels(
    given: Mapping[str, Tensor], levels: Sequence[str | None], coarser: Iterable[nn.Module]
) -> list[Tensor]:
    """The map of each level, finest first.

    Args:
        given: What the backbone makes, by level.
        levels: The backbone's level of each stride; ``None`` for one that is made of the level before it.
        coarser: What makes those, and at the end the level of one cell.
    """
    remaining = iter(coarser)
    maps: list[Tensor] = []
    for level in levels:
        maps.append(next(remaining)(maps[-1]) if level is None else given[level])
    return [*maps, next(remaining)(maps[-1])]


def apply_heads(heads: Iterable[nn.Module], maps: Sequence[Tensor]) -> dict[str, Tensor]:
    """Raw outputs as `SSDLite.forward` gives them, of the map of each level."""
    boxes, logits = zip(*(head(level) for head, level in zip(heads, maps, strict=True)), strict=True)
    return {"cls_logits": torch.cat(logits, dim=1), "bbox_regression": torch.cat(boxes, dim=1)}


def _mined_cross_entropy(logits: Tensor, classes: Tensor, positive: Tensor) -> Tensor:
    """Sum of the cross-entropy over positives and the hardest negatives of each image.

    Args:
        logits: ``(B, A, num_classes + 1)``.
        classes: Wanted class of each anchor ``(B, A)``.
        positive: Which anchors have an object ``(B, A)``.
    """
    loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes)
    # Of a negative, the loss is how unlikely it holds the background, which is what its hardness is.
    hardness = loss.detach().masked_fill(positive, -torch.inf)
    rank = hardness.argsort(dim=1, descending=True).argsort(dim=1)
    counted = positive | (rank < _NEGATIVES_PER_POSITIVE * positive.sum(dim=1, keepdim=True))
    return loss.where(counted, 0.0).sum()
