"""Which anchors or proposals the loss is computed on: MMDetection's ``RandomSampler``."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.tasks.detectors.assigner import BACKGROUND


def sample(assigned: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Draws positives up to their share, and background for the rest.

    It draws only where there are more than needed, the positives first, from torch's generator of the CPU: with the
    same seed these are the samples of MMDetection 3.3 (``mmdet/models/task_modules/samplers/random_sampler.py``).

    Args:
        assigned: What `assign` returned, ``(A,)``.
        count: Samples wanted; fewer where the image has no more.
        positive_fraction: Largest share of positives.

    Returns:
        Indices of positives and of background, int64, each ascending.
    """
    positive = _draw(torch.nonzero(assigned >= 0).squeeze(1), int(count * positive_fraction))
    negative = _draw(torch.nonzero(assigned == BACKGROUND).squeeze(1), count - len(positive))
    return positive, negative


def _draw(places: Tensor, count: int) -> Tensor:
    if len(places) <= count:
        return places
    drawn = torch.randperm(len(places), device="cpu")[:count]
    return places[drawn.to(places.device)].sort().values
