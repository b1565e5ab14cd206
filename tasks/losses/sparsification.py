"""What teaches DynamicViT which tokens to drop (arXiv:2106.02034, "Training and Inference").

Official code: ``losses.py`` of raoyongming/DynamicViT, class ``DistillDiffPruningLoss_dynamic``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ratio_loss(decisions: Sequence[Tensor], targets: Sequence[float]) -> Tensor:
    """How far the kept share of each image is from the wanted one.

    The paper's ``L_ratio = 1/(B S) sum_b sum_s (rho_s - 1/N sum_i D_i^{b,s})²`` is the mean of this over the batch: the
    share is of one image, so images that keep more are not made up for by others that keep less.

    Args:
        decisions: For each of S stages ``(B, N)``, 1 for kept tokens and 0 for others.
        targets: For each stage the share of all N tokens that is wanted.

    Returns:
        ``(B,)``.
    """
    errors = [(decision.float().mean(1) - target) ** 2 for decision, target in zip(decisions, targets, strict=True)]
    return torch.stack(errors).mean(0)


def token_distillation(tokens: Tensor, teacher_tokens: Tensor, keep: Tensor) -> Tensor:
    """Mean squared difference of the tokens that the student still has at its end.

    The paper's ``L_distill = 1/(sum_b sum_i D_i^{b,S}) sum_b sum_i D_i^{b,S} (t_i - t'_i)²``, where the square is the
    mean over the channels, as in the official code, whose weights belong to that scale.

    Args:
        tokens: Of the student after its last norm ``(B, N, C)``.
        teacher_tokens: The same shape.
        keep: Decisions of the last stage ``(B, N)``, which this does not train; an image with zeros alone is left out.

    Returns:
        A scalar, 0 where no token of the batch is kept.
    """
    kept = (keep.detach() > 0.5).float()
    errors = (tokens.float() - teacher_tokens.float()).square().mean(2)
    return (errors * kept).sum() / kept.sum().clamp(min=1)
