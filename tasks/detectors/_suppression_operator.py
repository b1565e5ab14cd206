"""Suppression of duplicates over a batch as one operator, for graphs of any number of images.

``torchvision.ops.nms`` takes one image at a time, and a loop over images cannot be recorded for any number of them.
This operator is only for graphs that are translated to another language: whoever ran it would need effvit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.ops import nms

if TYPE_CHECKING:
    from collections.abc import Callable


def kept_of_batch(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """Which boxes are kept, image by image.

    Args:
        boxes: ``(B, N, 4)``, xyxy. The last of each image is only there to fill up.
        scores: ``(B, N)``.
        threshold: IoU above which the weaker of two boxes is dropped.
        most: How many are kept of an image.

    Returns:
        Places ``(B, most)``, int64, best first, and the last place where there are fewer.
    """
    pairs = zip(boxes.unbind(0), scores.unbind(0), strict=True)
    return torch.stack([_kept(own, rank, threshold, most) for own, rank in pairs])


def _kept(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    kept: Tensor = nms(boxes, scores, threshold)
    filler = torch.full((most,), boxes.shape[0] - 1, dtype=torch.int64, device=boxes.device)
    return torch.cat([kept, filler]).narrow(0, 0, most)


@torch.library.custom_op("effvit::kept_of_batch", mutates_args=())
def _operator(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    return kept_of_batch(boxes, scores, threshold, most)


@_operator.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:  # noqa: ARG001 - the operator's signature
    return scores.new_empty((scores.shape[0], most), dtype=torch.int64)


def recorded(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """`kept_of_batch` as one operator: in a graph it holds for any number of images."""
    found: Tensor = _operator(boxes, scores, threshold, most)
    return found


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """What the operator is in ONNX, for ``torch.onnx.export(custom_translation_table=...)``."""
    from onnxscript import opset18

    def translated(boxes: Any, scores: Any, threshold: float, most: int) -> Any:
        return _in_onnx(opset18, boxes, scores, threshold, most)

    return {torch.ops.effvit.kept_of_batch.default: translated}


def _in_onnx(op: Any, boxes: Any, scores: Any, threshold: float, most: int) -> Any:
    """ONNX's suppression lists (image, class, place) of all images; each goes to its rank among those of its image.

    ONNX promises the best first within an image, but no order of the images: the rank is how many of the image came
    before.
    """
    limits = op.Constant(value_ints=[most]), op.Constant(value_floats=[threshold])
    one, two = op.Constant(value_ints=[1]), op.Constant(value_ints=[2])
    chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, one), *limits)
    image = op.Slice(chosen, op.Constant(value_ints=[0]), one, one)
    place = op.Squeeze(op.Slice(chosen, two, op.Constant(value_ints=[3]), one), one)
    batch, count = op.Shape(scores, start=0, end=1), op.Shape(scores, start=1, end=2)
    zero, step = op.Constant(value_int=0), op.Constant(value_int=1)
    images = op.Unsqueeze(op.Range(zero, op.Squeeze(batch), step), op.Constant(value_ints=[0]))
    so_far = op.CumSum(op.Cast(op.Equal(image, images), to=7), zero)  # 7 is int64
    rank = op.Sub(op.GatherElements(so_far, image, axis=1), one)
    filler = op.Expand(op.Sub(count, one), op.Concat(batch, op.Constant(value_ints=[most]), axis=0))
    return op.ScatterND(filler, op.Concat(image, rank, axis=1), place)
