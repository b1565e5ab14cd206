"""What a student learns from a teacher's logits, as DeiT introduced it (arXiv:2012.12877, §3).

EfficientViT and EfficientFormer train with DeiT's ``losses.py``, which is ``EfficientViT/classification/losses.py`` in
microsoft/Cream and ``util/losses.py`` in snap-research/EfficientFormer.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hard_distillation(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross entropy with the teacher's decision as the label (DeiT §3, "hard-label distillation"), of each image.

    Labels are not smoothed, as in the official code.

    Args:
        logits: Of the student ``(B, K)``.
        teacher_logits: ``(B, K)``.

    Returns:
        ``(B,)``.
    """
    return F.cross_entropy(logits.float(), teacher_logits.argmax(1), reduction="none")


def soft_distillation(logits: Tensor, teacher_logits: Tensor, tau: float = 1.0) -> Tensor:
    """``tau² KL(softmax(teacher / tau) || softmax(student / tau)) / K`` of each image.

    The paper has no factor ``1 / K``: it is the official code's, which divides by the number of logits of the batch
    instead of by the number of its images. Its default weights belong to that scale.

    Args:
        logits: Of the student ``(B, K)``.
        teacher_logits: ``(B, K)``.
        tau: Temperature, above 0.

    Returns:
        ``(B,)``.
    """
    return kl_divergence(logits.float() / tau, teacher_logits.float() / tau) * (tau**2 / logits.shape[1])


def kl_divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``KL(softmax(teacher) || softmax(student))`` of each image.

    Its mean over a batch is the KL term of DynamicViT (arXiv:2106.02034, "Training and Inference"; ``batchmean`` in the
    official ``losses.py``).

    Args:
        logits: Of the student ``(B, K)``.
        teacher_logits: ``(B, K)``.

    Returns:
        ``(B,)``.
    """
    student, teacher = logits.float().log_softmax(1), teacher_logits.float().log_softmax(1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
