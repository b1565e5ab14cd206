"""Cross entropy of each image, and means over the images that have a label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The label of an image that is not to be learned.
UNKNOWN = -1


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each image.

    Args:
        logits: ``(B, K)``.
        target: Class indices ``(B,)``, -1 for unknown; or probabilities ``(B, K)``, such as MixUp makes.
        label_smoothing: Share of the target that is spread evenly over all classes, in ``[0, 1)`` (arXiv:1512.00567).

    Returns:
        ``(B,)``; 0 for an unknown index.
    """
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    if target.ndim == 1:
        return F.cross_entropy(logits.float(), target, ignore_index=UNKNOWN, **options)  # type: ignore[arg-type]
    return F.cross_entropy(logits.float(), target.float(), **options)  # type: ignore[arg-type]


def labelled(target: Tensor) -> Tensor:
    """Which images have a label, ``(B,)`` of 1 and 0; rows of probabilities without any have none."""
    known = target != UNKNOWN if target.ndim == 1 else target.sum(1) > 0
    return known.to(torch.float32)


def mean_over(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of those losses ``(B,)`` that are counted, 1 or 0 each; zero with zero gradients where none is."""
    return (losses * counted).sum() / counted.sum().clamp(min=1)
