"""Region features against RoIAlign word by word."""

import math

import pytest
import torch

from effvit.tasks.detectors.roi_pooling import RoIPooling

STRIDES = (4, 8, 16, 32, 64)


def pooled_by_loops(level, box, stride, size):
    """RoIAlign of one region and channel in float64: aligned, as many samples as a bin has pixels, averaged."""
    height, width = level.shape
    x1, y1, x2, y2 = (side / stride - 0.5 for side in box)
    bins = ((y2 - y1) / size, (x2 - x1) / size)
    counts = [math.ceil(side) for side in bins]

    def value(y, x):
        if y < -1 or y > height or x < -1 or x > width:
            return 0.0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(y), int(x)
        down, right = min(top + 1, height - 1), min(left + 1, width - 1)
        return (
            level[top, left] * (1 - (y - top)) * (1 - (x - left))
            + level[top, right] * (1 - (y - top)) * (x - left)
            + level[down, left] * (y - top) * (1 - (x - left))
            + level[down, right] * (y - top) * (x - left)
        )

    return [
        [
            sum(
                value(y1 + (row + (i + 0.5) / counts[0]) * bins[0], x1 + (column + (j + 0.5) / counts[1]) * bins[1])
                for i in range(counts[0])
                for j in range(counts[1])
            )
            / max(1, counts[0] * counts[1])
            for column in range(size)
        ]
        for row in range(size)
    ]


BOXES = [
    torch.tensor([[0.0, 0, 30, 40], [10, 12, 150, 130], [5.5, 3.25, 6.5, 4.25], [0, 0, 256, 192]]),
    torch.zeros(0, 4),
    torch.tensor([[100.25, 90, 256, 192], [3, 3, 3, 60]]),
]


def test_equals_loops_on_every_level():
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 2, 192 // s, 256 // s, generator=generator) for s in STRIDES]
    found = RoIPooling(STRIDES)(maps, BOXES, 3)
    expected = []
    for image, boxes in enumerate(BOXES):
        for box in boxes.tolist():
            scale = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = min(3, max(0, math.floor(math.log2(scale / 56 + 1e-6))))
            rows = maps[level][image].double().numpy()
            expected.append([pooled_by_loops(channel, box, STRIDES[level], 3) for channel in rows])
    torch.testing.assert_close(found, torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("side", "level"), [(1, 0), (56, 0), (111.9, 0), (112, 1), (223, 1), (224, 2), (448, 3), (2000, 3), (0, 0)]
)
def test_level_follows_the_size(side, level):
    assert RoIPooling(STRIDES).levels(torch.tensor([[0.0, 0, side, side]])).tolist() == [level]


def test_a_pyramid_that_starts_later_or_ends_earlier():
    assert RoIPooling((8, 16)).levels(
        torch.tensor([[0.0, 0, 100, 100], [0, 0, 230, 230], [0, 0, 900, 900]])
    ).tolist() == [
        0,
        1,
        1,
    ]
    assert RoIPooling((64,)).strides == [64]


def test_no_regions_at_all_keep_the_graph_of_what_follows():
    maps = [torch.randn(2, 4, 8, 8) for _ in STRIDES]
    assert RoIPooling(STRIDES)(maps, [torch.zeros(0, 4)] * 2, 7).shape == (0, 4, 7, 7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_pooled_in_float32(dtype):
    maps = [torch.randn(1, 2, 192 // s, 256 // s).to(dtype) for s in STRIDES]
    found = RoIPooling(STRIDES)(maps, BOXES[:1], 3)
    exact = RoIPooling(STRIDES)([level.float() for level in maps], BOXES[:1], 3)
    assert found.dtype == dtype
    assert torch.equal(found, exact.to(dtype))
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(RoIPooling(STRIDES)(maps, BOXES[:1], 3), found)
