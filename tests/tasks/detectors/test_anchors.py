"""Anchors against MMDetection's formula, written out in numpy."""

import copy

import numpy as np
import pytest
import torch

from effvit.tasks.detectors.anchors import Anchors

CPU = torch.device("cpu")
STRIDES = (8, 16, 32, 64, 128)


def expected_anchors(map_sizes, strides):
    """Level, row, column, ratio, scale, in float32 and in MMDetection's order of operations."""
    one = np.float32
    rows = []
    for (height, width), stride in zip(map_sizes, strides, strict=True):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    root = np.sqrt(one(ratio))
                    for octave in range(3):
                        scale = one(4 * 2 ** (octave / 3))
                        half_width = one(0.5) * (one(stride) * (one(1) / root) * scale)
                        half_height = one(0.5) * (one(stride) * root * scale)
                        center = one(x * stride), one(y * stride)
                        rows.append(
                            [
                                center[0] - half_width,
                                center[1] - half_height,
                                center[0] + half_width,
                                center[1] + half_height,
                            ]
                        )
    return torch.from_numpy(np.array(rows, dtype=np.float32))


@pytest.mark.parametrize(
    "map_sizes",
    [
        [(32, 36), (16, 18), (8, 9), (4, 5), (2, 3)],
        [(25, 42), (13, 21), (7, 11), (4, 6), (2, 3)],  # odd maps: the padded size is no multiple of the stride
        [(1, 1)] * 5,
    ],
)
def test_bitwise_mmdetection(map_sizes):
    assert torch.equal(Anchors(STRIDES)(map_sizes, CPU), expected_anchors(map_sizes, STRIDES))


@pytest.mark.parametrize("strides", [(16,), (4, 8, 16), (16, 32, 64)])
def test_any_levels(strides):
    map_sizes = [(64 // stride + 1, 96 // stride + 1) for stride in strides]
    anchors = Anchors(strides)
    assert torch.equal(anchors(map_sizes, CPU), expected_anchors(map_sizes, strides))
    assert anchors.num_anchors_per_location() == [9] * len(strides)


def test_smallest_square_anchor_is_four_strides():
    anchors = Anchors((8,))([(1, 1)], CPU)
    assert anchors[3].tolist() == [-16, -16, 16, 16]


def test_grids_are_cached_and_the_cache_is_bounded():
    anchors = Anchors((8,))
    first = anchors([(4, 4)], CPU)
    assert anchors([(4, 4)], CPU) is first
    for width in range(5, 40):
        anchors([(4, width)], CPU)
    assert len(anchors._grids) <= 16
    again = anchors([(4, 4)], CPU)
    assert again is not first
    assert torch.equal(again, first)
    assert anchors.state_dict() == {}
    assert torch.equal(copy.deepcopy(anchors)([(4, 4)], CPU), first)


def test_grid_made_under_inference_mode_serves_training():
    anchors = Anchors((8,))
    with torch.inference_mode():
        grid = anchors([(4, 4)], CPU)
    assert not grid.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (anchors([(4, 4)], CPU) * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("padded", [(64, 96), (96, 128), (32, 32), (96, 32)])
def test_inside_flags_follow_the_images_own_area(padded):
    """A location counts when its cell starts inside the image's own padded area, level by level."""
    strides = (8, 32, 64)
    map_sizes = [(12, 16), (3, 4), (2, 2)]
    flags = Anchors(strides).inside(map_sizes, padded, 32, CPU)
    expected = [
        y * stride < padded[0] and x * stride < padded[1]
        for (height, width), stride in zip(map_sizes, strides, strict=True)
        for y in range(height)
        for x in range(width)
        for _ in range(9)
    ]
    if all(expected):
        assert flags is None
    else:
        assert flags.tolist() == expected
