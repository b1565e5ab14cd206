"""mmcv's operators as effvit provides them, against what they are defined to be, in float64."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv import ops
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch.autograd import gradcheck

from effvit.errors import ConfigError
from effvit.tasks.mmdetection import _mmcv_ext


def random_boxes(number, generator, side=50.0):
    corner = torch.rand(number, 2, generator=generator) * side
    return torch.cat([corner, corner + 1 + torch.rand(number, 2, generator=generator) * side / 2], 1)


def iou(a, b, offset):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + offset)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + offset)
    area_a, area_b = ((box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (a, b))
    return width * height / (area_a + area_b - width * height)


def bilinear(image, y, x):
    """Value of ``(H, W)`` between its cells, in double precision; what is outside counts as 0."""
    low_y, low_x = math.floor(y), math.floor(x)
    total = 0.0
    for row, column in itertools.product((low_y, low_y + 1), (low_x, low_x + 1)):
        if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
            total += float(image[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


# --- suppression


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_no_better_box_covers(offset):
    generator = torch.Generator().manual_seed(0)
    boxes, scores = random_boxes(60, generator), torch.rand(60, generator=generator)
    kept = []
    for index in scores.argsort(descending=True).tolist():
        if all(iou(boxes[other].tolist(), boxes[index].tolist(), offset) <= 0.4 for other in kept):
            kept.append(index)
    found, indices = ops.nms(boxes, scores, 0.4, offset=offset)
    assert indices.tolist() == kept
    assert torch.equal(found, torch.cat([boxes, scores[:, None]], 1)[kept])
    as_arrays, places = ops.nms(boxes.numpy(), scores.numpy(), 0.4, offset=offset)
    assert isinstance(as_arrays, np.ndarray)
    assert places.tolist() == kept
    strong = [index for index in kept if scores[index] > 0.3]  # what is weaker never covers what is stronger
    assert ops.nms(boxes, scores, 0.4, offset=offset, score_threshold=0.3, max_num=5)[1].tolist() == strong[:5]


def test_nms_by_class():
    generator = torch.Generator().manual_seed(1)
    boxes, scores = random_boxes(40, generator), torch.rand(40, generator=generator)
    classes = torch.randint(0, 3, (40,), generator=generator)
    _, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    alone = []
    for label in range(3):
        members = (classes == label).nonzero()[:, 0]
        alone += members[ops.nms(boxes[members], scores[members], 0.5)[1]].tolist()
    assert sorted(kept.tolist()) == sorted(alone)


def softly(boxes, scores, threshold, sigma, minimum, method, offset):
    """The definition, with mmcv's swaps, by which ties are decided: index and score of each survivor."""
    places, values = list(range(len(boxes))), list(scores)
    done, left = 0, len(boxes)
    while done < left:
        best = max(range(done, left), key=lambda place: (values[place], -place))
        for entries in (places, values):
            entries[done], entries[best] = entries[best], entries[done]
        place = done + 1
        while place < left:
            overlap = iou(boxes[places[done]], boxes[places[place]], offset)
            if method == "gaussian":
                values[place] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                values[place] *= 1 - overlap if method == "linear" else 0
            if values[place] < minimum:
                left -= 1
                for entries in (places, values):
                    entries[place] = entries[left]
                continue
            place += 1
        done += 1
    return places[:left], values[:left]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lowers_scores(method, offset):
    generator = torch.Generator().manual_seed(2)
    boxes = random_boxes(60, generator).double()
    scores = (torch.rand(60, generator=generator).double() * 8).round() / 8  # with ties
    found, indices = ops.soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=0.2, method=method, offset=offset)
    places, values = softly(boxes.tolist(), scores.tolist(), 0.3, 0.5, 0.2, method, offset)
    assert indices.tolist() == places
    assert 3 < len(places) < 60
    assert torch.equal(found[:, :4], boxes[places])
    torch.testing.assert_close(found[:, 4], torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)


def test_suppression_of_nothing():
    none, scores = torch.zeros(0, 4), torch.zeros(0)
    assert ops.nms(none, scores, 0.5)[0].shape == (0, 5)
    assert ops.soft_nms(none, scores)[0].shape == (0, 5)


# --- pooling of regions


def regions(dtype=torch.float64):
    """Inside, across the border, outside, smaller than a cell, and in the second image."""
    rows = [[0, 3, 4, 17, 19], [0, -6, -3, 9, 30], [1, 40, 40, 60, 60], [1, 5.2, 5.1, 5.9, 6.3], [1, 0, 0, 23, 27]]
    return torch.tensor(rows, dtype=dtype)


def align(features, rois, size, scale, ratio, mode, *, aligned):
    """Definition of ROIAlign (arXiv:1703.06870): mmcv's samples, each by `bilinear`, with its border rule."""
    height, width = features.shape[-2:]
    result = torch.zeros(len(rois), features.shape[1], *size, dtype=torch.float64)
    for number, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (side * scale - (0.5 if aligned else 0) for side in box)
        extent = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        bins = [side / parts for side, parts in zip(extent, size, strict=True)]
        count = [ratio or math.ceil(side) for side in bins]
        for channel, row, column in itertools.product(range(features.shape[1]), range(size[0]), range(size[1])):
            samples = []
            for i, j in itertools.product(range(count[0]), range(count[1])):
                y = y1 + bins[0] * (row + (i + 0.5) / count[0])
                x = x1 + bins[1] * (column + (j + 0.5) / count[1])
                outside = not (-1 <= y <= height and -1 <= x <= width)
                inner = (min(max(y, 0), height - 1), min(max(x, 0), width - 1))
                samples.append(0.0 if outside else bilinear(features[int(image), channel], *inner))
            result[number, channel, row, column] = max(samples) if mode == "max" else sum(samples) / len(samples)
    return result


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align(aligned, ratio, mode):
    features = torch.randn(2, 1, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    pooled = ops.roi_align(features, regions(), (2, 3), 0.37, ratio, mode, aligned)
    expected = align(features, regions(), (2, 3), 0.37, ratio, mode, aligned=aligned)
    torch.testing.assert_close(pooled, expected, rtol=1e-9, atol=1e-12)
    assert gradcheck(
        lambda x: ops.roi_align(x, regions(), (2, 3), 0.37, ratio, mode, aligned),
        (features.requires_grad_(),),
        fast_mode=True,
    )


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_of_no_region(mode):
    features = torch.randn(1, 3, 8, 8, requires_grad=True)
    pooled = ops.roi_align(features, torch.zeros(0, 5), (7, 7), 0.5, 0, mode, True)
    assert pooled.shape == (0, 3, 7, 7)
    pooled.sum().backward()
    assert not features.grad.any()


@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align_in_half_precision(mode):
    features = torch.randn(2, 2, 8, 9, generator=torch.Generator().manual_seed(3))
    rough = features.bfloat16().requires_grad_()
    pooled = ops.roi_align(rough, regions(torch.float32), (2, 3), 0.5, 0, mode, True)
    pooled.sum().backward()
    assert pooled.dtype == rough.grad.dtype == torch.bfloat16
    exact = ops.roi_align(features, regions(torch.float32), (2, 3), 0.5, 0, mode, True)
    torch.testing.assert_close(pooled.float(), exact, rtol=0.02, atol=0.05)


def test_roi_pool():
    features = torch.randn(2, 2, 8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rois = torch.tensor([[0, 1, 2, 14, 13], [1, 0, 0, 8, 4], [1, -9, 3, 5, 9]], dtype=torch.float64)
    pooled = ops.roi_pool(features, rois, (3, 2), 0.5)
    for number, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (math.floor(side * 0.5 + 0.5) if side >= 0 else -math.floor(-side * 0.5 + 0.5) for side in box)
        bins = [max(y2 - y1 + 1, 1) / 3, max(x2 - x1 + 1, 1) / 2]
        for row, column in itertools.product(range(3), range(2)):
            rows = [max(y1 + math.floor(row * bins[0]), 0), min(y1 + math.ceil((row + 1) * bins[0]), 8)]
            columns = [max(x1 + math.floor(column * bins[1]), 0), min(x1 + math.ceil((column + 1) * bins[1]), 9)]
            cells = features[int(image), :, rows[0] : rows[1], columns[0] : columns[1]]
            expected = cells.amax((1, 2)) if cells.numel() else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(pooled[number, :, row, column], expected)
    assert gradcheck(lambda x: ops.roi_pool(x, rois, (3, 2), 0.5), (features.requires_grad_(),))
    assert ops.roi_pool(features, torch.zeros(0, 5, dtype=torch.float64), (3, 2), 0.5).shape == (0, 2, 3, 2)


# --- deformable convolutions

#: Convolution groups, offset groups, stride, padding, dilation; rows and columns differ.
CONVOLUTIONS = [(1, 1, 1, 1, 1), (2, 1, (2, 1), (1, 0), 1), (1, 2, 1, (2, 1), (2, 1)), (2, 4, 2, 1, 1)]


def deformed(x, offset, weight, mask, groups, offset_groups, stride, padding, dilation):
    """The definition: every tap is looked up where its offset says, by torch's own sampling of images."""
    stride, padding, dilation = (
        pair if isinstance(pair, tuple) else (pair, pair) for pair in (stride, padding, dilation)
    )
    batch, channels, height, width = x.shape
    rows, columns = weight.shape[2:]
    out_h, out_w = offset.shape[2:]
    offset = offset.view(batch, offset_groups, rows * columns, 2, out_h, out_w)
    taps = []
    for tap, (i, j) in enumerate(itertools.product(range(rows), range(columns))):
        y = torch.arange(out_h, dtype=x.dtype)[:, None] * stride[0] - padding[0] + i * dilation[0]
        x_ = torch.arange(out_w, dtype=x.dtype) * stride[1] - padding[1] + j * dilation[1]
        y, x_ = y + offset[:, :, tap, 0], x_ + offset[:, :, tap, 1]
        grid = torch.stack([(x_ * 2 + 1) / width - 1, (y * 2 + 1) / height - 1], -1).flatten(0, 1)
        parts = x.reshape(batch * offset_groups, channels // offset_groups, height, width)
        sampled = F.grid_sample(parts, grid, align_corners=False).view(batch, offset_groups, -1, out_h, out_w)
        if mask is not None:
            sampled = sampled * mask.view(batch, offset_groups, -1, out_h, out_w)[:, :, tap, None]
        taps.append(sampled.reshape(batch, groups, channels // groups, out_h, out_w))
    kernels = weight.view(groups, -1, channels // groups, rows * columns)
    return torch.einsum("bgcthw,goct->bgohw", torch.stack(taps, 3), kernels).flatten(1, 2)


def convolution_inputs(groups, offset_groups, stride, padding, dilation):
    generator = torch.Generator().manual_seed(5)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    x, weight = random(2, 4, 6, 5), random(4, 4 // groups, 3, 2)
    out = F.conv2d(x, weight, None, stride, padding, dilation, groups).shape
    offset = random(2, 2 * 6 * offset_groups, *out[2:]) * 0.7
    return x, offset, torch.rand(2, 6 * offset_groups, *out[2:], dtype=torch.float64, generator=generator), weight


@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_deform_conv(shape):
    groups, offset_groups, stride, padding, dilation = shape
    x, offset, _, weight = convolution_inputs(*shape)

    def run(x, offset, weight):
        return ops.deform_conv2d(x, offset, weight, stride, padding, dilation, groups, offset_groups, False, 1)

    torch.testing.assert_close(run(x, offset, weight), deformed(x, offset, weight, None, *shape), rtol=1e-9, atol=1e-11)
    assert gradcheck(run, tuple(t.requires_grad_() for t in (x, offset, weight)), fast_mode=True)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_modulated_deform_conv(shape, with_bias):
    groups, offset_groups, stride, padding, dilation = shape
    x, offset, mask, weight = convolution_inputs(*shape)
    inputs = (x, offset, mask, weight, *([torch.arange(4.0, dtype=torch.float64)] if with_bias else []))

    def run(x, offset, mask, weight, bias=None):
        return ops.modulated_deform_conv2d(
            x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups
        )

    expected = deformed(x, offset, weight, mask, *shape) + (inputs[4].view(-1, 1, 1) if with_bias else 0)
    torch.testing.assert_close(run(*inputs), expected, rtol=1e-9, atol=1e-11)
    assert gradcheck(run, tuple(t.requires_grad_() for t in inputs), fast_mode=True)


# --- focal losses


@pytest.mark.parametrize("weighted", [False, True])
def test_sigmoid_focal_loss(weighted):
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator) * 3
    labels = torch.tensor([0, 1, 2, 3, 3, 1, 0])  # 3 is the background
    weight = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64) if weighted else None
    expected = torch.zeros_like(logits)
    for row, column in itertools.product(range(7), range(3)):
        p = 1 / (1 + math.exp(-logits[row, column]))
        own = labels[row] == column
        value = -0.3 * (1 - p) ** 1.7 * math.log(p) if own else -0.7 * p**1.7 * math.log(1 - p)
        expected[row, column] = value * (float(weight[column]) if weighted else 1)
    found = ops.sigmoid_focal_loss(logits, labels, 1.7, 0.3, weight, "none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    logits.requires_grad_()
    for reduction in ("sum", "mean"):
        assert gradcheck(lambda x: ops.sigmoid_focal_loss(x, labels, 1.7, 0.3, weight, reduction), (logits,))  # noqa: B023
    assert ops.sigmoid_focal_loss(logits[:0], labels[:0], 2.0, 0.25, weight, "sum") == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_softmax_focal_loss(weighted):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 3, -1, 2, 2])  # -1 is ignored
    weight = torch.tensor([0.5, 2.0, 1.5, 3.0], dtype=torch.float64) if weighted else None
    p = logits.softmax(1)
    expected = torch.tensor(
        [
            0.0
            if label < 0
            else -0.4 * (1 - p[row, label]) ** 2 * p[row, label].log() * (weight[label] if weighted else 1)
            for row, label in enumerate(labels)
        ],
        dtype=torch.float64,
    )
    found = ops.softmax_focal_loss(logits, labels, 2.0, 0.4, weight, "none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert gradcheck(lambda x: ops.softmax_focal_loss(x, labels, 2.0, 0.4, weight, "sum"), (logits.requires_grad_(),))


# --- attention


def test_deformable_attention():
    generator = torch.Generator().manual_seed(8)
    sizes = [(4, 3), (2, 2)]
    value = torch.randn(2, 16, 2, 3, dtype=torch.float64, generator=generator)
    places = torch.rand(2, 3, 2, 2, 2, 2, dtype=torch.float64, generator=generator) * 1.2 - 0.1
    weights = torch.rand(2, 3, 2, 2, 2, dtype=torch.float64, generator=generator)
    expected = torch.zeros(2, 3, 2, 3, dtype=torch.float64)
    for b, query, head, channel, level, point in itertools.product(*map(range, (2, 3, 2, 3, 2, 2))):
        height, width = sizes[level]
        first = level * 12
        plane = value[b, first : first + height * width, head, channel].view(height, width)
        x, y = places[b, query, head, level, point].tolist()
        weight = float(weights[b, query, head, level, point])
        expected[b, query, head, channel] += weight * bilinear(plane, y * height - 0.5, x * width - 0.5)

    def run(value, places, weights):
        shapes, starts = torch.tensor(sizes), torch.tensor([0, 12])
        return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, places, weights, 64)

    torch.testing.assert_close(run(value, places, weights), expected.flatten(2), rtol=1e-10, atol=1e-12)
    assert gradcheck(run, tuple(t.requires_grad_() for t in (value, places, weights)), fast_mode=True)


# --- the module


def test_a_missing_operator_says_what_to_install():
    with pytest.raises(ConfigError, match=r"'carafe_forward'.*provides: nms.*mmcv>=2.0.0rc4,<2.2.0"):
        sys.modules["mmcv._ext"].carafe_forward(torch.zeros(1))


def test_mmcv_reports_the_provider():
    assert "effvit" in ops.get_compiler_version()
    assert "available" in ops.get_compiling_cuda_version()


def test_install_is_done_once():
    before = sys.modules["mmcv._ext"]
    assert _mmcv_ext.install()
    assert sys.modules["mmcv._ext"] is before


def test_install_leaves_a_compiled_extension_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert not _mmcv_ext.install()
    assert "mmcv._ext" not in sys.modules
