"""mmcv's compiled operators on boxes and regions: suppression and pooling.

Signatures are those of ``mmcv/ops/csrc/pytorch/pybind.cpp``; most functions write into tensors that the caller made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from effvit.tasks.mmdetection._operators import Pair, wide, write

_AVERAGE = 1  # of mmcv's two modes of pooling; 0 is the maximum
_LINEAR, _GAUSSIAN = 1, 2  # of mmcv's three methods of soft suppression; 0 is the plain one


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes ``(N, 4)`` that survive, best first; a box is ``x2 - x1 + offset`` wide."""
    grown = wide(boxes) + boxes.new_tensor([0, 0, offset, offset], dtype=wide(boxes).dtype)
    kept: Tensor = ops.nms(grown, wide(scores), iou_threshold)
    return kept


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft suppression (arXiv:1704.04503): overlapping boxes lose score instead of being dropped.

    Args:
        boxes: ``(N, 4)``.
        scores: ``(N,)``.
        dets: ``(N, 5)``, whose first rows are overwritten with the surviving boxes and their scores, best first.
        iou_threshold: Overlap from which methods 0 and 1 act.
        sigma: Width of method 2.
        min_score: Boxes below it are dropped.
        method: 0 drops, 1 multiplies by ``1 - IoU``, 2 by ``exp(-IoU**2 / sigma)``.
        offset: 0 or 1; a box is ``x2 - x1 + offset`` wide.

    Returns:
        Indices of the surviving boxes, in the order of `dets`.
    """
    grown = wide(boxes) + boxes.new_tensor([0, 0, offset, offset], dtype=wide(boxes).dtype)
    scores = wide(scores).clone()
    # mmcv swaps the best box to the front and fills the place of a dropped one with the last. Ties are decided by
    # where a box stands by then, so the same order is kept here.
    waiting = torch.arange(len(boxes), device=boxes.device)
    kept: list[Tensor] = []
    while len(waiting):
        best = int(scores[waiting].argmax())
        chosen = waiting[best].clone()
        kept.append(chosen)
        waiting[best] = waiting[0]
        waiting = waiting[1:]
        overlap = ops.box_iou(grown[chosen][None], grown[waiting])[0]
        scores[waiting] *= _decay(overlap, iou_threshold, sigma, method)
        waiting = _compact(waiting, scores[waiting] >= min_score)
    indices = torch.stack(kept) if kept else waiting
    dets[: len(indices)] = torch.cat([wide(boxes)[indices], scores[indices, None]], 1).to(dets)
    return indices


def _decay(overlap: Tensor, iou_threshold: float, sigma: float, method: int) -> Tensor:
    if method == _GAUSSIAN:
        return torch.exp(-overlap * overlap / sigma)
    damped = 1 - overlap if method == _LINEAR else torch.zeros_like(overlap)
    return torch.where(overlap >= iou_threshold, damped, torch.ones_like(overlap))


def _compact(waiting: Tensor, kept: Tensor) -> Tensor:
    """The kept entries, where each dropped one gave its place to the last kept one behind it."""
    count = int(kept.sum())
    front = waiting[:count].clone()
    front[~kept[:count]] = waiting[count:][kept[count:]].flip(0)
    return front


def roi_align_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Average or maximum of bilinear samples in each bin of each region.

    Args:
        features: ``(B, C, H, W)``.
        rois: ``(N, 5)``: image, x1, y1, x2, y2.
        output: ``(N, C, aligned_height, aligned_width)``, overwritten.
        argmax_y: Of the shape of `output` for the maximum: row of the greatest sample among those of its bin.
        argmax_x: The same for its column.
        aligned_height: Bins from top to bottom.
        aligned_width: Bins from left to right.
        spatial_scale: Cells of the map per pixel of the image.
        sampling_ratio: Samples along each side of a bin; 0 for one per cell.
        pool_mode: 0 for the maximum, 1 for the average.
        aligned: Whether the centre of the first cell is at half a pixel.
    """
    features, rois, size = wide(features), rois.to(wide(features)), (aligned_height, aligned_width)
    if pool_mode == _AVERAGE:
        output.copy_(ops.roi_align(features, rois, size, spatial_scale, sampling_ratio or -1, aligned))
        return
    for chosen, grid in _by_samples(rois, size, spatial_scale, sampling_ratio, aligned=aligned):
        # One sample in the middle of each of (height x rows) bins is where the samples of the bins are.
        samples = ops.roi_align(features, rois[chosen], _times(size, grid), spatial_scale, 1, aligned)
        greatest, places = F.max_pool2d(samples, grid, return_indices=True)
        output[chosen] = greatest.to(output)
        width = samples.shape[-1]
        argmax_y[chosen] = (places // width % grid[0]).to(argmax_y)
        argmax_x[chosen] = (places % width % grid[1]).to(argmax_x)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of the map, see `roi_align_forward`."""
    gradient, size = wide(grad_output), (aligned_height, aligned_width)
    rois = rois.to(gradient)

    def spread(part: Tensor, regions: Tensor, bins: Pair, ratio: int) -> Tensor:
        spreading = torch.ops.torchvision._roi_align_backward  # noqa: SLF001 - what torchvision's own autograd calls
        result: Tensor = spreading(part, regions, spatial_scale, *bins, *grad_input.shape, ratio, aligned)
        return result

    if pool_mode == _AVERAGE:
        grad_input.copy_(spread(gradient, rois, size, sampling_ratio or -1))
        return
    total = torch.zeros_like(wide(grad_input))
    for chosen, grid in _by_samples(rois, size, spatial_scale, sampling_ratio, aligned=aligned):
        bins = _times(size, grid)
        rows = torch.arange(size[0], device=rois.device)[:, None] * grid[0] + argmax_y[chosen].long()
        columns = torch.arange(size[1], device=rois.device) * grid[1] + argmax_x[chosen].long()
        samples = F.max_unpool2d(gradient[chosen], rows * bins[1] + columns, grid, output_size=bins)
        total += spread(samples, rois[chosen], bins, 1)
    grad_input.copy_(total)


def _times(size: Pair, grid: Pair) -> Pair:
    return size[0] * grid[0], size[1] * grid[1]


def _by_samples(
    rois: Tensor, size: Pair, scale: float, sampling_ratio: int, *, aligned: bool
) -> Iterator[tuple[Tensor, Pair]]:
    """Indices of the regions that have the same number of samples a bin, with that number, rows and columns.

    A region without extent, for which mmcv's loop over samples runs zero times, gets one.
    """
    if not len(rois):
        return
    extent = (rois[:, [4, 3]] - rois[:, [2, 1]]) * scale
    extent = extent if aligned else extent.clamp(min=1)
    grids = (extent / extent.new_tensor(size)).ceil().clamp(min=1).long()
    grids = torch.full_like(grids, sampling_ratio) if sampling_ratio > 0 else grids
    distinct, member = torch.unique(grids, dim=0, return_inverse=True)
    for number, (rows, columns) in enumerate(distinct.tolist()):
        yield (member == number).nonzero()[:, 0], (rows, columns)


def roi_pool_forward(
    features: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Greatest cell in each bin of each region ``(N, 5)``, and where it is."""
    features = wide(features)
    results = torch.ops.torchvision.roi_pool(features, rois.to(features), spatial_scale, pooled_height, pooled_width)
    write(results, (output, argmax))


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Writes the gradient of the map, see `roi_pool_forward`."""
    gradient = wide(grad_output)
    spread = torch.ops.torchvision._roi_pool_backward  # noqa: SLF001 - what torchvision's own autograd calls
    shape = (spatial_scale, pooled_height, pooled_width, *grad_input.shape)
    grad_input.copy_(spread(gradient.contiguous(), rois.to(gradient), argmax, *shape))
