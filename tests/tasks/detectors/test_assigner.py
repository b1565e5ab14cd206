"""The assignment against loops over the recipe, and on cases small enough to check by eye."""

import numpy as np
import pytest
import torch

from effvit.tasks.detectors import assigner
from effvit.tasks.detectors.anchors import Anchors
from effvit.tasks.detectors.assigner import BACKGROUND, IGNORED, assign


def overlap(a, b):
    """IoU in float32, as the anchors are: which of two mirrored anchors is best depends on the last bit."""
    a, b = np.float32(a), np.float32(b)
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def assign_by_loops(anchors, boxes):
    """MaxIoUAssigner(0.5, 0.4, min_pos_iou=0) word by word."""
    table = [[overlap(box, anchor) for anchor in anchors.numpy()] for box in boxes.numpy()]
    result = []
    for index in range(len(anchors)):
        column = [row[index] for row in table]
        best = column.index(max(column))
        if column[best] >= 0.5:
            result.append(best)
        else:
            result.append(BACKGROUND if column[best] < 0.4 else IGNORED)
    for number, row in enumerate(table):
        highest = max(row)
        for index, value in enumerate(row):
            if value == highest > 0:
                result[index] = number
    return result


def crowded_boxes(count, seed):
    """Boxes on a grid of quarter pixels, exact in float32, many of them nearly equal."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.randint(12, 300, (count, 2), generator=generator) / 4
    corners = torch.randint(0, 250, (count, 2), generator=generator) / 4
    boxes = torch.cat([corners, corners + sides], dim=1)
    return torch.cat([boxes, boxes[: count // 3] + 0.25])


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (3, 1), (9, 2), (30, 3)])
def test_equals_loops(count, seed):
    anchors = Anchors((8, 16, 32))([(13, 13), (7, 7), (4, 4)], torch.device("cpu"))
    boxes = crowded_boxes(count, seed)
    expected = assign_by_loops(anchors, boxes)
    assert assign(anchors, boxes).tolist() == expected
    assert len(set(expected)) > 2


def test_a_crowd_in_small_portions_gives_the_same(monkeypatch):
    anchors = Anchors((8, 16))([(13, 13), (7, 7)], torch.device("cpu"))
    boxes = crowded_boxes(24, 5)
    whole = assign(anchors, boxes)
    for portion in (1, 3, 10):
        monkeypatch.setattr(assigner, "_OVERLAPS_AT_ONCE", portion * len(anchors))
        assert torch.equal(assign(anchors, boxes), whole)


def test_thresholds_of_a_second_object():
    """IoU 0.5 is positive, just below is ignored, 0.4 is ignored, below is background; the first takes all the best."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 10, 4], [0, 0, 10, 3.9]])
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    assert assign(anchors, boxes).tolist() == [0, 0, IGNORED, IGNORED, BACKGROUND]


def test_low_quality_match_goes_to_the_object_that_needs_it():
    """The anchor overlaps object 0 more, but it is the best that object 1 has."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9]])
    boxes = torch.tensor([[0.0, 0, 10, 9.4], [0, 0, 10, 30]])
    assert overlap(anchors[0].numpy(), boxes[0].numpy()) > overlap(anchors[0].numpy(), boxes[1].numpy())
    assert assign(anchors, boxes).tolist() == [1, 0]


def test_low_quality_match_below_every_threshold():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    assert assign(anchors, torch.tensor([[0.0, 0, 2, 2]])).tolist() == [0, BACKGROUND]


def test_ties_are_all_taken_and_the_later_object_wins():
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [40, 40, 50, 50]])
    between = torch.tensor([[5.0, 0, 15, 10]])
    assert assign(anchors, between).tolist() == [0, 0, BACKGROUND]
    assert assign(anchors, between.repeat(3, 1)).tolist() == [2, 2, BACKGROUND]


def test_object_that_touches_no_anchor_takes_none():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    boxes = torch.tensor([[0.0, 0, 9, 9], [100, 100, 110, 110], [5, 5, 5, 5]])
    assert assign(anchors, boxes).tolist() == [0, BACKGROUND]


def test_no_objects_is_all_background():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    assert assign(anchors, torch.zeros(0, 4)).tolist() == [BACKGROUND, BACKGROUND]
