"""Which anchors the loss is computed on."""

import pytest
import torch

from effvit.tasks.detectors.assigner import BACKGROUND, IGNORED
from effvit.tasks.detectors.sampler import sample


def assignment(positives, negatives, ignored=7):
    values = [0] * positives + [BACKGROUND] * negatives + [IGNORED] * ignored
    return torch.tensor(values)[torch.randperm(len(values), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(3, 100, (3, 17)), (50, 100, (5, 15)), (5, 15, (5, 15)), (50, 4, (5, 4)), (0, 100, (0, 20)), (2, 0, (2, 0))],
)
def test_counts_and_kinds(positives, negatives, expected):
    assigned = assignment(positives, negatives)
    positive, negative = sample(assigned, 20, 0.25)
    assert (len(positive), len(negative)) == expected
    assert (assigned[positive] >= 0).all()
    assert (assigned[negative] == BACKGROUND).all()
    for drawn in (positive, negative):
        assert (drawn.diff() > 0).all()


def test_draws_only_where_there_are_too_many():
    """The generator moves by one permutation of the positives, then one of the background, or not at all."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    sample(assignment(5, 15), 20, 0.25)
    assert torch.equal(torch.get_rng_state(), before)
    assigned = assignment(50, 100)
    positive, negative = sample(assigned, 20, 0.25)
    torch.manual_seed(0)
    places, rest = torch.nonzero(assigned >= 0).flatten(), torch.nonzero(assigned == BACKGROUND).flatten()
    assert positive.tolist() == sorted(places[torch.randperm(50)[:5]].tolist())
    assert negative.tolist() == sorted(rest[torch.randperm(100)[:15]].tolist())
