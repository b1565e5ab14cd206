"""RetinaNet on torchvision's modules, numerically equal to MMDetection's.

Paper: Lin et al., Focal Loss for Dense Object Detection, arXiv 1708.02002. The settings are those of MMDetection 3.3
``configs/_base_/models/retinanet_r50_fpn.py``, with which the published EfficientViT table was made. What differs from
``torchvision.models.detection.RetinaNet``: anchors are unrounded and on nominal strides (`anchors`), low-quality
matches go to the object that asks for them (`assigner`), size offsets are bounded on both sides (`coder`), anchors
beyond an image's own padding are left out, and losses are divided by the positives of the whole batch.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import Conv2dNormActivation, clip_boxes_to_image

from effvit.tasks.detectors._checks import at_least, check_thresholds
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.detectors._scales import divided, scales_of
from effvit.tasks.detectors._suppression import suppress
from effvit.tasks.detectors.anchors import Anchors
from effvit.tasks.detectors.assigner import IGNORED, assign
from effvit.tasks.detectors.coder import SymmetricBoxCoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effvit.backbones import FeaturePyramid


class RetinaNet(Detector):
    """One-stage detector: a shared convolutional head on every level of a feature pyramid.

    Args:
        pyramid: Backbone and pyramid, images to one map a level.
        num_classes: Number of object classes; the background has no output.
        head_convs: Stacked 3x3 convolutions in each of the two branches of the head.
        score_threshold: Detections need a score above this one.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        candidates_per_level: Best candidates that each level may put forward before suppression.
        detections_per_image: Best detections kept for an image.
        pad_divisor: MMDetection's ``pad_size_divisor``, by which an image's own area in the batch is known.

    Raises:
        ConfigError: A count or threshold out of its range.
    """

    def __init__(
        self,
        pyramid: FeaturePyramid,
        num_classes: int,
        *,
        head_convs: int = 4,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        candidates_per_level: int = 1000,
        detections_per_image: int = 100,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__()
        at_least("num_classes", num_classes, 1)
        at_least("head_convs", head_convs, 0)
        at_least("candidates_per_level", candidates_per_level, 1)
        at_least("detections_per_image", detections_per_image, 1)
        check_thresholds(score_threshold, nms_threshold)
        self.pyramid = pyramid
        self.anchors = Anchors(pyramid.strides)
        self.head = _make_head(
            pyramid.out_channels, self.anchors.num_anchors_per_location()[0], num_classes, head_convs
        )
        self.coder = SymmetricBoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.num_classes = num_classes
        self.class_parameters = ("head.classification_head.cls_logits.",)
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.candidates_per_level = candidates_per_level
        self.detections_per_image = detections_per_image
        self.pad_divisor = pad_divisor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw outputs of the head.

        Args:
            images: Normalised images ``(B, 3, H, W)``.

        Returns:
            ``cls_logits`` ``(B, A, num_classes)`` and ``bbox_regression`` ``(B, A, 4)`` over the A anchors of all
            levels.
        """
        outputs, _ = self._run(images)
        return outputs

    def _run(self, images: Tensor) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """Head outputs as in `forward`, and the size of each level's map."""
        maps = list(self.pyramid(images).values())
        outputs: dict[str, Tensor] = self.head(maps)
        return outputs, [(level.shape[-2], level.shape[-1]) for level in maps]

    def loss(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Focal loss of the classes and L1 loss of the encoded boxes, in float32 also under autocast.

        Both are sums over the batch divided by its number of positive anchors, where an image without any counts as
        one (MMDetection's ``avg_factor``). Processes of a distributed run count their own positives, as there.

        Args:
            images: Normalised images ``(B, 3, H, W)``, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            targets: ``boxes`` ``(N, 4)`` xyxy in pixels and ``labels`` ``(N,)`` of each image; N may be 0.

        Returns:
            Scalars ``loss_cls`` and ``loss_bbox``.
        """
        outputs, map_sizes = self._run(images)
        with torch.autocast(images.device.type, enabled=False):
            logits, deltas = outputs["cls_logits"].float(), outputs["bbox_regression"].float()
            anchors = self.anchors(map_sizes, images.device)
            boxes = [torch.as_tensor(target["boxes"], dtype=torch.float32, device=images.device) for target in targets]
            labels = torch.cat([torch.as_tensor(target["labels"], device=images.device) for target in targets])
            matched = torch.stack(
                [self._match(anchors, own, map_sizes, size) for own, size in zip(boxes, sizes, strict=True)]
            )
            positives = (matched >= 0).sum(dim=1).clamp(min=1).sum()
            image_index, anchor_index = torch.nonzero(matched >= 0, as_tuple=True)
            counts = itertools.accumulate(map(len, boxes[:-1]), initial=0)  # filled in there: a copy waits for the GPU
            first_object = torch.cat([matched.new_full((1,), count) for count in counts])
            objects = matched[image_index, anchor_index] + first_object[image_index]
            wanted = self.coder.encode_single(torch.cat(boxes)[objects], anchors[anchor_index])
            return {
                "loss_cls": _focal_loss(logits, matched, labels[objects]) / positives,
                "loss_bbox": F.l1_loss(deltas[image_index, anchor_index], wanted, reduction="sum") / positives,
            }

    def _match(
        self, anchors: Tensor, boxes: Tensor, map_sizes: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> Tensor:
        """Object index of every anchor ``(A,)`` of one image, ``BACKGROUND`` or ``IGNORED``."""
        inside = self.anchors.inside(map_sizes, size, self.pad_divisor, anchors.device)
        return assign(anchors, boxes, inside=inside)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects; see `Detector.predict`. Boxes are brought to the original image before suppression."""
        outputs, map_sizes = self._run(images)
        with torch.autocast(images.device.type, enabled=False):
            anchors = self.anchors(map_sizes, images.device)
            per_level = [
                height * width * count
                for (height, width), count in zip(map_sizes, self.anchors.num_anchors_per_location(), strict=True)
            ]
            return [
                self._select(logits, deltas, anchors, per_level, size, scale)
                for logits, deltas, size, scale in zip(
                    outputs["cls_logits"],
                    outputs["bbox_regression"],
                    sizes,
                    scales_of(sizes, original_sizes),
                    strict=True,
                )
            ]

    def _select(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        per_level: list[int],
        size: tuple[int, int],
        scale: tuple[float, float],
    ) -> dict[str, Tensor]:
        """Final detections of one image out of its head outputs ``(A, num_classes)`` and ``(A, 4)``."""
        found = []
        start = 0
        for level_logits in torch.split(logits, per_level):
            scores, places, labels = self._candidates(level_logits)
            found.append((scores, places + start, labels))
            start += len(level_logits)
        scores, places, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        boxes = clip_boxes_to_image(self.coder.decode_single(deltas[places].float(), anchors[places]), size)
        boxes = divided(boxes, scale)
        # Boxes that the border cut down to a line are dropped (MMDetection's min_bbox_size=0).
        solid = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
        keep = suppress(boxes, scores, labels, self.nms_threshold)[: self.detections_per_image]
        return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Best scores of one level ``(A, num_classes)`` over the threshold, their anchors and their classes."""
        # Nearly all logits fail, so they are sifted before the sigmoid, by a bound that rounding cannot make too tight.
        floor = torch.special.logit(torch.tensor(self.score_threshold)).item() - 0.1
        places, labels = torch.nonzero(logits > floor, as_tuple=True)
        scores = logits[places, labels].float().sigmoid()
        enough = scores > self.score_threshold
        scores, places, labels = scores[enough], places[enough], labels[enough]
        # Not topk and not stable: the same sort as MMDetection's puts equal scores, of which padding gives many, in its
        # order.
        scores, best = scores.sort(descending=True)
        best = best[: self.candidates_per_level]
        return scores[: self.candidates_per_level], places[best], labels[best]


def _focal_loss(logits: Tensor, matched: Tensor, positive_labels: Tensor) -> Tensor:
    """Sum of the focal loss (alpha 0.25, gamma 2) over all anchors but the ignored ones.

    With z the logit of the wrong answer (x where the class is absent, -x where it is present) both branches of the
    loss are ``sigmoid(z)**2 * softplus(z)``, times 0.75 or 0.25. The value is that of torchvision's
    ``sigmoid_focal_loss``, which blends the branches at every anchor and class and takes 2.2 times as long.

    Args:
        logits: Class logits ``(B, A, num_classes)``.
        matched: Object index of each anchor ``(B, A)``, ``BACKGROUND`` or ``IGNORED``.
        positive_labels: Classes of the positive anchors, in the order of ``matched``.
    """
    present = (*torch.nonzero(matched >= 0, as_tuple=True), positive_labels)
    wrong = logits.index_put(present, -logits[present])
    probability = wrong.sigmoid()
    loss = probability * probability * F.softplus(wrong)
    counted: Tensor = loss.sum(dim=-1)[matched != IGNORED]
    return 0.75 * counted.sum() - (0.75 - 0.25) * loss[present].sum()


def _make_head(channels: int, num_anchors: int, num_classes: int, head_convs: int) -> RetinaNetHead:
    """The head of torchvision, under its names, with any number of convolutions."""
    head = RetinaNetHead(channels, num_anchors, num_classes)
    for branch in (head.classification_head, head.regression_head):
        branch.conv = nn.Sequential(
            *(Conv2dNormActivation(channels, channels, norm_layer=None) for _ in range(head_convs))
        )
        branch.conv.apply(partial(_init_normal, std=0.01))
    return head


def _init_normal(module: nn.Module, std: float) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
