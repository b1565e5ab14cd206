"""mmcv's compiled focal losses.

Signatures are those of ``mmcv/ops/csrc/pytorch/pybind.cpp``; the functions write into tensors that the caller made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import ops

from effvit.tasks.mmdetection._operators import gradients_of, wide, write


def _focal(logits: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    classes = logits.shape[1]
    wanted = F.one_hot(target.clamp(max=classes), classes + 1)[:, :classes].to(logits)  # the last is the background
    loss: Tensor = ops.sigmoid_focal_loss(logits, wanted, alpha, gamma)
    return loss * weight if weight.numel() else loss


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss (arXiv:1708.02002) of logits ``(N, C)`` for classes ``(N,)``, C for the background, by element.

    ``weight`` ``(C,)`` multiplies the columns; empty for none.
    """
    output.copy_(_focal(wide(logits), target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the gradient of the sum of the losses, see `sigmoid_focal_loss_forward`."""

    def run(logits: Tensor) -> Tensor:
        return _focal(logits, target, weight, gamma, alpha)

    write(gradients_of(run, (logits,), torch.ones_like(logits)), (grad_input,))


def _of_label(softmax: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probability of each row's own class, its logarithm, and the row's weight: 0 where the class is negative."""
    own = target.clamp(min=0)
    probability = softmax.gather(1, own[:, None])[:, 0]
    rows = (target >= 0).to(softmax)
    logarithm = probability.clamp(min=torch.finfo(torch.float32).tiny).log()
    return probability, logarithm, rows * weight[own] if weight.numel() else rows


def softmax_focal_loss_forward(
    softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Focal loss of the probability ``(N, C)`` of each row's class ``(N,)``; rows of a negative class lose nothing."""
    probability, logarithm, scale = _of_label(wide(softmax), target, weight)
    output.copy_(-alpha * (1 - probability) ** gamma * logarithm * scale)


def softmax_focal_loss_backward(
    softmax: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Writes the gradient of the sum of the losses with respect to the logits, see `softmax_focal_loss_forward`."""
    softmax = wide(softmax)
    probability, logarithm, scale = _of_label(softmax, target, weight)
    rest = 1 - probability
    slope = alpha * (gamma * rest ** (gamma - 1) * probability * logarithm - rest**gamma) * scale
    own = F.one_hot(target.clamp(min=0), softmax.shape[1])
    buff.copy_(slope)
    grad_input.copy_(slope[:, None] * (own - softmax))
