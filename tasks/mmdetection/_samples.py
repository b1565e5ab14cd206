"""Batches of effvit in the form that MMDetection's detectors take, and their detections back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torch import Tensor

Size = tuple[int, int]


def describe(
    images: Tensor, sizes: Sequence[Size], original_sizes: Sequence[Size], pad_divisor: int
) -> list[DetDataSample]:
    """What MMDetection knows of each image of a padded batch ``(B, 3, H, W)``, sizes as (height, width)."""
    batch_shape = (images.shape[-2], images.shape[-1])
    samples = []
    for size, original in zip(sizes, original_sizes, strict=True):
        padded = tuple(-(-side // pad_divisor) * pad_divisor for side in size)
        meta = {
            "img_shape": tuple(size),
            "ori_shape": tuple(original),
            "scale_factor": (size[1] / original[1], size[0] / original[0]),
            "pad_shape": padded,
            "batch_input_shape": batch_shape,
        }
        samples.append(DetDataSample(metainfo=meta))
    return samples


def add_objects(samples: Sequence[DetDataSample], targets: Sequence[Mapping[str, Any]], *, masks: bool) -> None:
    """Puts the objects of each image into its sample.

    Args:
        samples: From `describe`.
        targets: ``boxes`` ``(N, 4)``, ``labels`` ``(N,)`` and, for masks, ``masks`` ``(N, h, w)`` of 0 and 1 at the
            size of the original image. They are resized as MMDetection resizes them, to the nearest pixel by OpenCV.
        masks: Whether the detector learns masks.
    """
    for sample, target in zip(samples, targets, strict=True):
        objects = InstanceData(bboxes=target["boxes"].float(), labels=target["labels"])
        if masks:
            pixels = target["masks"].cpu().numpy().astype(np.uint8)
            resized = BitmapMasks(pixels, *pixels.shape[1:]).resize(sample.img_shape)
            objects.masks = resized.pad(sample.batch_input_shape)
        sample.gt_instances = objects


def detections_of(sample: DetDataSample, *, masks: bool) -> dict[str, Any]:
    """What was found in an image, best first: ``boxes``, ``scores``, ``labels`` and, for masks, ``rles``."""
    found = sample.pred_instances
    order = found.scores.argsort(descending=True, stable=True)
    result = {
        "boxes": found.bboxes[order].detach(),
        "scores": found.scores[order].detach(),
        "labels": found.labels[order].detach(),
    }
    if masks:
        result["rles"] = _rles(torch.as_tensor(found.masks)[order], sample.ori_shape)
    return result


def _rles(masks: Tensor, size: Size) -> list[dict[str, Any]]:
    """Compressed COCO masks of ``(N, h, w)``."""
    if not len(masks):
        return []
    assert tuple(masks.shape[1:]) == tuple(size)
    # pycocotools reads Fortran order: (h, w, N) with the rows of each mask nearest in memory.
    pixels = masks.to(torch.uint8).permute(0, 2, 1).contiguous().cpu().numpy().transpose(2, 1, 0)
    encoded: list[dict[str, Any]] = coco_mask.encode(pixels)
    return encoded
