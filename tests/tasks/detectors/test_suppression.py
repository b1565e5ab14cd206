"""Suppression by group against a greedy loop and against itself."""

import pytest
import torch

from effvit.tasks.detectors import _suppression
from effvit.tasks.detectors._suppression import suppress


def crowd(count, groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 12, (count, 2), generator=generator).float()
    sides = torch.randint(14, 30, (count, 2), generator=generator).float()
    scores = torch.randperm(count, generator=generator).float() / count
    return torch.cat([corners, corners + sides], dim=1), scores, torch.randint(0, groups, (count,), generator=generator)


def by_loops(boxes, scores, groups, threshold):
    kept = []
    for index in scores.argsort(descending=True).tolist():
        for other in kept:
            if groups[other] != groups[index]:
                continue
            (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = boxes[index].tolist(), boxes[other].tolist()
            both = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
            if both / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - both) > threshold:
                break
        else:
            kept.append(index)
    return kept


@pytest.mark.parametrize("threshold", [0.1, 0.31, 0.7, 1.0])
@pytest.mark.parametrize("groups", [1, 5])
def test_equals_a_greedy_loop(groups, threshold):
    boxes, scores, group = crowd(120, groups)
    expected = by_loops(boxes, scores, group, threshold)
    assert suppress(boxes, scores, group, threshold).tolist() == expected
    assert len(expected) > 1
    assert len(expected) < 120 or threshold == 1.0


@pytest.mark.parametrize(("few", "together"), [(10, 10_000), (10, 100), (1000, 100)])
def test_group_by_group_keeps_the_same(monkeypatch, few, together):
    boxes, scores, groups = crowd(700, 7)
    whole = suppress(boxes, scores, groups, 0.5)
    monkeypatch.setattr(_suppression, "_FEW", few)
    monkeypatch.setattr(_suppression, "_TOGETHER", together)
    assert suppress(boxes, scores, groups, 0.5).tolist() == whole.tolist()


def test_equal_scores_stay_in_the_order_of_the_boxes(monkeypatch):
    boxes, _, groups = crowd(300, 3)
    scores = (torch.arange(300) % 4).float()
    whole = suppress(boxes, scores, groups, 0.5)
    monkeypatch.setattr(_suppression, "_FEW", 10)
    assert suppress(boxes, scores, groups, 0.5).tolist() == whole.tolist()


def test_no_boxes():
    none = torch.zeros(0, dtype=torch.int64)
    assert suppress(torch.zeros(0, 4), torch.zeros(0), none, 0.5).tolist() == []
