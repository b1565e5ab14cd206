"""Faster and Mask R-CNN on torchvision's modules, numerically equal to MMDetection's.

Papers: Ren et al., Faster R-CNN, arXiv 1506.01497; He et al., Mask R-CNN, arXiv 1703.06870. The settings are those of
MMDetection 3.3 ``configs/_base_/models/{faster-rcnn,mask-rcnn}_r50_fpn.py``, with which the published Mask R-CNN tables
of EfficientViT and EfficientFormer were made. The parts: `rpn`, `roi_heads`, `roi_pooling`, `masks`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from effvit.errors import ConfigError
from effvit.tasks.detectors._checks import at_least, check_thresholds
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.detectors._scales import of_corners, scales_of
from effvit.tasks.detectors.masks import mask_targets, paste
from effvit.tasks.detectors.roi_heads import POOLED, Objects, RoIHeads, Samples
from effvit.tasks.detectors.rpn import RegionProposalNetwork

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from effvit.backbones import FeaturePyramid

_TRAINING_CANDIDATES = 2000
PROPOSAL_CANDIDATES = 1000
MASK_SIDE = 14  # of the features that masks are made of
_DUMMY_PROPOSALS, _DUMMY_DETECTIONS = 1000, 100


class FasterRCNN(Detector):
    """Two-stage detector: proposals from a feature pyramid, each classified and refined.

    Args:
        pyramid: Backbone and pyramid, images to one map a level. Proposals come from all levels, features of regions
            from those up to stride 32.
        num_classes: Number of object classes.
        head_channels: Hidden units of the two layers of the box head.
        roi_samples: Regions of each image that the heads learn from in a step.
        score_threshold: Detections need a score above this one.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        detections_per_image: Best detections kept for an image.
        pad_divisor: MMDetection's ``pad_size_divisor``, by which an image's own area in the batch is known.

    Raises:
        ConfigError: A count or threshold out of its range.
    """

    match_low_quality: ClassVar[bool] = False  # in MMDetection Mask R-CNN has it and Faster R-CNN has not

    def __init__(
        self,
        pyramid: FeaturePyramid,
        num_classes: int,
        *,
        head_channels: int = 1024,
        roi_samples: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__()
        at_least("num_classes", num_classes, 1)
        at_least("head_channels", head_channels, 1)
        at_least("roi_samples", roi_samples, 1)
        at_least("detections_per_image", detections_per_image, 1)
        check_thresholds(score_threshold, nms_threshold)
        self.num_classes = num_classes
        self.class_parameters: tuple[str, ...] = ("roi_heads.box_predictor.",)
        self.pyramid = pyramid
        self.rpn = RegionProposalNetwork(pyramid.out_channels, pyramid.strides, pad_divisor=pad_divisor)
        self.roi_heads = RoIHeads(
            pyramid.out_channels,
            pyramid.strides,
            num_classes,
            head_channels=head_channels,
            samples=roi_samples,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
            match_low_quality=self.match_low_quality,
        )

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Raw outputs of all layers, as MMDetection counts them: with 1000 proposals, here the image itself.

        Args:
            images: Normalised images ``(B, 3, H, W)``.

        Returns:
            ``objectness`` and ``anchor_deltas``, a list over the levels of ``(B, A)`` and ``(B, A, 4)``;
            ``cls_logits`` ``(1000 B, num_classes + 1)``, ``bbox_regression`` ``(1000 B, num_classes, 4)`` and, for
            masks, ``mask_logits`` ``(100 B, num_classes, 28, 28)``.
        """
        return self._raw(list(self.pyramid(images).values()))

    def _raw(self, maps: list[Tensor]) -> dict[str, Any]:
        """`forward` from pyramid levels on."""
        outputs = self.rpn(maps)
        pooled = self.roi_heads.pooling.whole(maps, POOLED).repeat_interleave(_DUMMY_PROPOSALS, dim=0)
        logits, deltas = self.roi_heads.classify(pooled)
        return {
            "objectness": outputs.logits,
            "anchor_deltas": outputs.deltas,
            "cls_logits": logits,
            "bbox_regression": deltas,
        }

    def loss(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Losses of the proposals and of the regions, in float32 also under autocast.

        Samples are drawn from torch's generator of the CPU, in MMDetection's order.

        Args:
            images: Normalised images ``(B, 3, H, W)``, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding, in pixels.
            targets: ``boxes`` ``(N, 4)`` xyxy in pixels, ``labels`` ``(N,)`` and, for masks, ``masks`` ``(N, h, w)``
                of 0 and 1 at the size of the original image, for each image; N may be 0.

        Returns:
            Scalars ``loss_rpn_cls``, ``loss_rpn_bbox``, ``loss_cls``, ``loss_bbox`` and, for masks, ``loss_mask``.
        """
        maps = list(self.pyramid(images).values())
        outputs = self.rpn(maps)
        objects = [_objects(target, size, images) for target, size in zip(targets, sizes, strict=True)]
        boxes = [target.boxes for target in objects]
        with torch.autocast(images.device.type, enabled=False):
            losses: dict[str, Tensor] = self.rpn.loss(outputs, sizes, boxes)
            proposals = self.rpn.propose(outputs, sizes, candidates=_TRAINING_CANDIDATES)
            drawn = self.roi_heads.draw(proposals, boxes)
        return losses | self._roi_losses(maps, drawn, objects)

    def _roi_losses(
        self, maps: list[Tensor], drawn: Sequence[Samples], targets: Sequence[Objects]
    ) -> dict[str, Tensor]:
        return self.roi_heads.loss(maps, drawn, targets)

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects; see `Detector.predict`. Boxes are brought to the original image before suppression."""
        maps, proposals = self._propose(images, sizes)
        return self.roi_heads.detect(maps, proposals, sizes, scales_of(sizes, original_sizes))

    def _propose(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        """Pyramid levels, and proposals of each image."""
        maps = list(self.pyramid(images).values())
        outputs = self.rpn(maps)
        with torch.autocast(images.device.type, enabled=False):
            return maps, self.rpn.propose(outputs, sizes, candidates=PROPOSAL_CANDIDATES)


class MaskRCNN(FasterRCNN):
    """Faster R-CNN that gives each detection a mask.

    Args:
        pyramid: Backbone and pyramid, images to one map a level. Proposals come from all levels, features of regions
            from those up to stride 32.
        num_classes: Number of object classes.
        head_convs: Stacked 3x3 convolutions of the mask head, as wide as the pyramid.
        head_channels: Hidden units of the two layers of the box head.
        roi_samples: Regions of each image that the heads learn from in a step.
        score_threshold: Detections need a score above this one.
        nms_threshold: IoU above which the weaker of two boxes of one class is dropped.
        detections_per_image: Best detections kept for an image.
        pad_divisor: MMDetection's ``pad_size_divisor``, by which an image's own area in the batch is known.

    Raises:
        ConfigError: A count or threshold out of its range.
    """

    iou_types = ("bbox", "segm")
    match_low_quality = True

    def __init__(
        self,
        pyramid: FeaturePyramid,
        num_classes: int,
        *,
        head_convs: int = 4,
        head_channels: int = 1024,
        roi_samples: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__(
            pyramid,
            num_classes,
            head_channels=head_channels,
            roi_samples=roi_samples,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
            pad_divisor=pad_divisor,
        )
        at_least("head_convs", head_convs, 0)
        self.class_parameters = (*self.class_parameters, "roi_heads.mask_predictor.mask_fcn_logits.")
        channels = pyramid.out_channels
        self.roi_heads.mask_head = MaskRCNNHeads(channels, (channels,) * head_convs, dilation=1)
        self.roi_heads.mask_predictor = predictor = MaskRCNNPredictor(channels, channels, num_classes)
        for layer in (predictor.conv5_mask, predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def loss(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Losses by name; see `FasterRCNN.loss`.

        Raises:
            ConfigError: The targets have no masks.
        """
        if any("masks" not in target for target in targets):
            raise ConfigError("Mask R-CNN learns from masks, but the data gives boxes only: load it with masks")
        return super().loss(images, sizes, targets)

    def _raw(self, maps: list[Tensor]) -> dict[str, Any]:
        pooled = self.roi_heads.pooling.whole(maps, MASK_SIDE).repeat_interleave(_DUMMY_DETECTIONS, dim=0)
        return {**super()._raw(maps), "mask_logits": self.segment(pooled)}

    def segment(self, pooled: Tensor) -> Tensor:
        """Mask logits ``(R, num_classes, 28, 28)`` of pooled features ``(R, C, 14, 14)``."""
        heads = self.roi_heads.get_submodule
        logits: Tensor = heads("mask_predictor")(heads("mask_head")(pooled))
        return logits

    def _mask_logits(self, maps: list[Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Mask logits ``(R, 28, 28)`` of regions ``(R_b, 4)`` of each image, of one class each, in float32."""
        logits = self.segment(self.roi_heads.pooling(maps, boxes, MASK_SIDE))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def _roi_losses(
        self, maps: list[Tensor], drawn: Sequence[Samples], targets: Sequence[Objects]
    ) -> dict[str, Tensor]:
        """Adds binary cross-entropy of the positives' masks of their own class, a mean over pixels."""
        labels = torch.cat([target.labels[own.objects] for own, target in zip(drawn, targets, strict=True)])
        found = self._mask_logits(maps, [own.positive for own in drawn], labels)
        wanted = torch.cat(
            [
                mask_targets(target.masks, own.objects, own.positive, target.size, target.padded, found.shape[-1])
                for own, target in zip(drawn, targets, strict=True)
                if target.masks is not None  # `loss` has seen to that
            ]
        )
        with torch.autocast(found.device.type, enabled=False):
            total = F.binary_cross_entropy_with_logits(found, wanted, reduction="sum")
        losses = super()._roi_losses(maps, drawn, targets)
        return {**losses, "loss_mask": total / max(1, wanted.numel())}

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects; see `Detector.predict`. Boxes are brought to the original image after suppression."""
        maps, proposals = self._propose(images, sizes)
        detections: list[dict[str, Any]] = self.roi_heads.detect(maps, proposals, sizes, scales_of(sizes, sizes))
        boxes, labels = ([own[name] for own in detections] for name in ("boxes", "labels"))
        probabilities = self._mask_logits(maps, boxes, torch.cat(labels)).sigmoid()
        masks = torch.split(probabilities, [len(own) for own in boxes])
        scales = scales_of(sizes, original_sizes)
        for own, mask, scale, size in zip(detections, masks, scales, original_sizes or sizes, strict=True):
            own["boxes"] = own["boxes"] / of_corners(own["boxes"], *scale)  # not `divided`: the last bit
            own["rles"] = paste(mask, own["boxes"], size)
        return detections


def _objects(target: Mapping[str, Any], size: tuple[int, int], images: Tensor) -> Objects:
    """One image's target on the device of the images."""
    device = images.device
    return Objects(
        torch.as_tensor(target["boxes"], dtype=torch.float32, device=device),
        torch.as_tensor(target["labels"], device=device),
        torch.as_tensor(target["masks"], device=device) if "masks" in target else None,
        size,
        (images.shape[2], images.shape[3]),
    )
