"""Masks of regions: what the mask head learns, and its answers as COCO run-length encodings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_masks
from torch import Tensor
from torchvision.ops import clip_boxes_to_image, roi_align

if TYPE_CHECKING:
    from collections.abc import Iterator

_BYTES_AT_ONCE = 2**26  # of float masks while targets are made; of sampling grids while masks are pasted on a GPU
_PASTED_BYTES = 24  # a pixel: grid and its parts, sampled value, flags


def mask_targets(
    masks: Tensor, objects: Tensor, boxes: Tensor, size: tuple[int, int], padded: tuple[int, int], side: int
) -> Tensor:
    """The part of an object's mask that lies in each region, as MMDetection cuts it out.

    There every mask is resized with the image (the nearest pixel, as OpenCV takes it), padded as the batch, copied
    once for every region, and pooled by RoIAlign. The pooled values are compared with one half, which they often meet
    exactly, so neither the origin of the coordinates nor the padding may change. What may: here only the objects that
    a region has are resized, only where regions look, a bounded number at once, and the empty rest beyond the last
    region is left away.

    Source: MMDetection 3.3 ``mmdet/structures/mask/structures.py`` (``BitmapMasks``), ``mask_target.py``.

    Args:
        masks: Objects of one image ``(N, h, w)``, 0 and 1, at the size of the original image.
        objects: Index of the object of each region ``(R,)``.
        boxes: Regions ``(R, 4)``, float32 xyxy in pixels of the resized image.
        size: ``(height, width)`` of the resized image.
        padded: ``(height, width)`` of the padded batch.
        side: Side of the result.

    Returns:
        ``(R, side, side)``, float32 of 0 and 1.
    """
    targets = torch.zeros(len(boxes), side, side, device=boxes.device)
    if len(boxes) == 0:
        return targets
    boxes = clip_boxes_to_image(boxes, padded)
    present, owner = torch.unique(objects, return_inverse=True)
    windows = _windows(boxes, owner, len(present), padded)
    rows, columns = (_nearest(new, old, boxes.device) for new, old in zip(size, masks.shape[1:], strict=True))
    for start, stop, height, width in _portions(windows):
        canvas = torch.zeros(stop - start, 1, height, width, device=boxes.device)
        for number in range(start, stop):
            left, top, right, bottom = windows[number]
            cut = masks[present[number]].index_select(0, rows[top:bottom]).index_select(1, columns[left:right])
            canvas[number - start, 0, top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        chosen = torch.nonzero((owner >= start) & (owner < stop)).squeeze(1)
        regions = torch.cat([(owner[chosen] - start).to(boxes)[:, None], boxes[chosen]], dim=1)
        targets[chosen] = (roi_align(canvas, regions, (side, side), 1.0, -1, True)[:, 0] >= 0.5).float()
        del canvas  # before the next one is made
    return targets


def _nearest(new: int, old: int, device: torch.device) -> Tensor:
    """The source pixel of each of `new` pixels, ``(new,)``: OpenCV rounds down a product of doubles."""
    places = (torch.arange(new, dtype=torch.float64, device=device) * (1 / (new / old))).floor().long()
    return places.clamp(max=old - 1)


def _windows(boxes: Tensor, owner: Tensor, count: int, padded: tuple[int, int]) -> list[list[int]]:
    """For each object the pixels ``[left, top, right, bottom]`` that RoIAlign reads for any of its regions."""
    margin = 2  # half a pixel of shift, the neighbour for the interpolation, rounding
    index = owner[:, None].expand(-1, 2)
    low = boxes.new_full((count, 2), float("inf")).scatter_reduce(0, index, boxes[:, :2], "amin").floor() - margin
    high = boxes.new_zeros(count, 2).scatter_reduce(0, index, boxes[:, 2:], "amax").ceil() + margin
    windows: list[list[int]] = clip_boxes_to_image(torch.cat([low, high], dim=1), padded).long().tolist()
    return windows


def _portions(windows: list[list[int]]) -> Iterator[tuple[int, int, int, int]]:
    """First object, last but one, height and width of canvases that stay within the bounded memory."""
    start = height = width = 0
    for number, (_, _, right, bottom) in enumerate(windows):
        taller, wider = max(height, bottom), max(width, right)
        if number > start and (number + 1 - start) * taller * wider * 4 > _BYTES_AT_ONCE:
            yield start, number, height, width
            start, taller, wider = number, bottom, right
        height, width = taller, wider
    yield start, len(windows), height, width


def paste(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Masks of detections as COCO run-length encodings, without ever holding them at full size.

    A mask is sampled bilinearly at the pixels of its box and the next ones around, further out it is below one half,
    and is set where it is at least one half. Runs are taken from that part alone. One mask at a time on the CPU, as
    many as fit into 64 MB on other devices.

    Source: MMDetection 3.3 ``mmdet/models/roi_heads/mask_heads/fcn_mask_head.py`` (``_do_paste_mask``).

    Args:
        probabilities: ``(N, m, m)``, float32 in [0, 1].
        boxes: ``(N, 4)``, float32 xyxy in pixels of the image.
        size: ``(height, width)`` of the image.

    Returns:
        One ``{"size": [height, width], "counts": bytes}`` for each, as ``pycocotools.mask.encode`` gives.
    """
    height, width = size
    at_once = max(1, _BYTES_AT_ONCE // (height * width * _PASTED_BYTES)) if boxes.device.type != "cpu" else 1
    found = []
    for own, around in zip(torch.split(probabilities, at_once), torch.split(boxes, at_once), strict=True):
        if len(own):
            set_pixels, left, top = _paste_around(own, around, size)
            found += _encode(set_pixels, left, top, size)
    return found


def _paste_around(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, int, int]:
    """Flags ``(N, h, w)`` of the part of the image that holds all boxes, and its left and top."""
    low, high = boxes[:, :2].amin(dim=0).floor() - 1, boxes[:, 2:].amax(dim=0).ceil() + 1
    left, top = low.clamp(min=0).int().tolist()
    right, bottom = high.minimum(high.new_tensor([size[1], size[0]])).int().tolist()
    xs = _relative(left, right, boxes[:, 0:1], boxes[:, 2:3])
    ys = _relative(top, bottom, boxes[:, 1:2], boxes[:, 3:4])
    shape = (len(boxes), ys.shape[1], xs.shape[1])
    grid = torch.stack([xs[:, None, :].expand(shape), ys[:, :, None].expand(shape)], dim=3)
    return F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5, left, top


def _relative(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Pixel centres from `start` to `stop` in coordinates where a box reaches from -1 to 1, ``(N, stop - start)``."""
    centres = torch.arange(start, stop, device=low.device).float() + 0.5
    relative = (centres - low) / (high - low) * 2 - 1
    return relative.masked_fill(relative.isinf(), 0)  # a box without an extent


def _encode(set_pixels: Tensor, left: int, top: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Run-length encodings of images ``size`` that are empty but for one part ``(N, h, w)``."""
    height, width = size
    columns = F.pad(set_pixels.transpose(1, 2).to(torch.uint8), (1, 1))
    masks, column, row = torch.nonzero(columns[:, :, 1:] != columns[:, :, :-1], as_tuple=True)
    changes = ((column + left) * height + (row + top)).cpu().numpy()  # COCO counts down the columns
    bounds = torch.bincount(masks, minlength=len(set_pixels)).cumsum(0).cpu().numpy()
    return [_rle(own, height, width) for own in np.split(changes, bounds[:-1])]


def _rle(changes: np.ndarray[Any, Any], height: int, width: int) -> dict[str, Any]:
    """One encoding out of the ascending pixel numbers at which the value changes."""
    # A run that goes on from the foot of a column to the head of the next was counted as two: both changes go.
    joined = changes[1:] == changes[:-1]
    changes = changes[~(np.append(joined, False) | np.insert(joined, 0, False))] if len(changes) else changes
    changes = changes[changes < height * width]
    counts = np.diff(changes, prepend=0, append=height * width)
    encoded: dict[str, Any] = coco_masks.frPyObjects(
        {"size": [height, width], "counts": counts.tolist()}, height, width
    )
    return encoded
