"""Every loss against arithmetic that is written out here."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from effvit.tasks.losses.classification import cross_entropy, labelled, mean_over
from effvit.tasks.losses.distillation import hard_distillation, kl_divergence, soft_distillation
from effvit.tasks.losses.sparsification import ratio_loss, token_distillation

# Two images, three classes. The exponentials of a row are 1, 2, 3 of 6 and 4, 1, 1 of 6.
LOGITS = torch.tensor([[log(1), log(2), log(3)], [log(4), log(1), log(1)]])
# Of the teacher: 1, 1, 2 of 4 and 2, 5, 1 of 8.
TEACHER = torch.tensor([[log(1), log(1), log(2)], [log(2), log(5), log(1)]])


def test_cross_entropy_of_indices():
    expected = [-log(3 / 6), -log(1 / 6)]
    assert cross_entropy(LOGITS, torch.tensor([2, 1])).tolist() == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_with_smoothing():
    # 0.3 is spread over 3 classes: the label's share is 0.7 + 0.1, each other's 0.1.
    first = -(0.1 * log(1 / 6) + 0.1 * log(2 / 6) + 0.8 * log(3 / 6))
    second = -(0.1 * log(4 / 6) + 0.8 * log(1 / 6) + 0.1 * log(1 / 6))
    found = cross_entropy(LOGITS, torch.tensor([2, 1]), 0.3)
    assert found.tolist() == pytest.approx([first, second], abs=1e-6)


def test_cross_entropy_of_mixed_labels():
    # As MixUp makes: 0.6 of class 2 and 0.4 of class 0; smoothing by 0.3 leaves 0.7 of that and adds 0.1 to each.
    target = torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]])
    first = -(0.4 * log(1 / 6) + 0.6 * log(3 / 6))
    assert cross_entropy(LOGITS, target).tolist() == pytest.approx([first, -log(1 / 6)], abs=1e-6)
    smoothed = -(0.38 * log(1 / 6) + 0.1 * log(2 / 6) + 0.52 * log(3 / 6))
    assert cross_entropy(LOGITS, target, 0.3)[0].item() == pytest.approx(smoothed, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unknown_labels_count_nowhere(smoothing):
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([1, -1, 3])
    found = mean_over(cross_entropy(logits, target, smoothing), labelled(target))
    expected = F.cross_entropy(logits[[0, 2]], target[[0, 2]], label_smoothing=smoothing)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    found.backward()
    assert logits.grad[1].tolist() == [0, 0, 0, 0]
    probabilities = torch.eye(4)[target.clamp(min=0)] * (target >= 0)[:, None]
    again = mean_over(cross_entropy(logits, probabilities, smoothing), labelled(probabilities))
    assert again.item() == pytest.approx(expected.item(), abs=1e-6)


def test_a_batch_without_any_label_changes_nothing():
    logits = torch.randn(2, 4, requires_grad=True)
    target = torch.tensor([-1, -1])
    loss = mean_over(cross_entropy(logits, target, 0.1), labelled(target))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


def test_hard_distillation_learns_the_teachers_decision():
    # The teacher says class 2, then class 1; its probabilities do not matter.
    found = hard_distillation(LOGITS, TEACHER)
    assert found.tolist() == pytest.approx([-log(3 / 6), -log(1 / 6)], abs=1e-6)
    assert torch.equal(hard_distillation(LOGITS, TEACHER * 3), found)


def test_divergence_is_the_teachers_from_the_student():
    first = 1 / 4 * log((1 / 4) / (1 / 6)) + 1 / 4 * log((1 / 4) / (2 / 6)) + 2 / 4 * log((2 / 4) / (3 / 6))
    second = 2 / 8 * log((2 / 8) / (4 / 6)) + 5 / 8 * log((5 / 8) / (1 / 6)) + 1 / 8 * log((1 / 8) / (1 / 6))
    found = kl_divergence(LOGITS, TEACHER)
    assert found.tolist() == pytest.approx([first, second], abs=1e-6)
    batch = F.kl_div(LOGITS.log_softmax(1), TEACHER.log_softmax(1), reduction="batchmean", log_target=True)
    assert found.mean().item() == pytest.approx(batch.item(), abs=1e-6)
    assert kl_divergence(LOGITS, LOGITS + 5).tolist() == pytest.approx([0, 0], abs=1e-6)


def test_soft_distillation_with_a_temperature():
    # At temperature 2 each probability is the root of the exponential over the sum of the roots.
    student = [[1**0.5, 2**0.5, 3**0.5], [4**0.5, 1.0, 1.0]]
    teacher = [[1.0, 1.0, 2**0.5], [2**0.5, 5**0.5, 1.0]]
    expected = []
    for ours, theirs in zip(student, teacher, strict=True):
        p, q = [value / sum(theirs) for value in theirs], [value / sum(ours) for value in ours]
        divergence = sum(a * log(a / b) for a, b in zip(p, q, strict=True))
        expected.append(4 * divergence / 3)  # tau squared, over the number of classes
    assert soft_distillation(LOGITS, TEACHER, 2.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_soft_distillation_pulls_towards_the_teacher():
    logits = LOGITS.clone().requires_grad_()
    soft_distillation(logits, TEACHER).sum().backward()
    # The gradient of a divergence is the student's probability minus the teacher's, here over three classes.
    expected = (LOGITS.softmax(1) - TEACHER.softmax(1)) / 3
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_ratio_loss_is_of_each_image():
    # Four tokens: the first image keeps 3, then 2; the second all, then none. In the mean that is 0.875 and 0.25.
    first = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 1]], requires_grad=True)
    second = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    found = ratio_loss((first, second), (0.7, 0.49))
    one = ((3 / 4 - 0.7) ** 2 + (2 / 4 - 0.49) ** 2) / 2
    two = ((4 / 4 - 0.7) ** 2 + (0 / 4 - 0.49) ** 2) / 2
    assert found.tolist() == pytest.approx([one, two], abs=1e-7)
    found.mean().backward()
    # d/dD of (mean(D) - target)² / stages / images
    assert first.grad[0].tolist() == pytest.approx([2 * (3 / 4 - 0.7) / 4 / 2 / 2] * 4, abs=1e-7)


def test_token_distillation_reads_the_kept_tokens():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 4.0], [0.0, 0.0]], [[6.0, 6.0], [7.0, 5.0]]])
    keep = torch.tensor([[1.0, 0.0], [1.0, 1.0]], requires_grad=True)
    # Kept: (1, 2) for (1, 4), (5, 6) for (6, 6) and (7, 8) for (7, 5): squares 0 + 4, 1 + 0 and 0 + 9 over 3 x 2.
    found = token_distillation(tokens, teacher, keep)
    assert found.item() == pytest.approx((0 + 4 + 1 + 0 + 0 + 9) / (3 * 2), abs=1e-6)
    found.backward()
    assert keep.grad is None
    assert tokens.grad[0, 1].tolist() == [0, 0]
    assert tokens.grad[0, 0].tolist() == pytest.approx([0, 2 * (2 - 4) / 6], abs=1e-6)
    assert token_distillation(tokens, teacher, torch.zeros(2, 2)).item() == 0


def test_losses_are_computed_in_float32():
    # In half precision exp(12) overflows; probabilities of classes nobody predicts would be lost in bfloat16.
    logits, teacher = torch.tensor([[12.0, 0.0]]), torch.tensor([[0.0, 12.0]])
    for kind in (torch.float16, torch.bfloat16):
        target = torch.tensor([1])
        assert cross_entropy(logits.to(kind), target).item() == pytest.approx(12 + log(1 + exp(-12)), rel=1e-6)
        for loss in (kl_divergence, soft_distillation, hard_distillation):
            assert loss(logits.to(kind), teacher.to(kind)).item() == pytest.approx(loss(logits, teacher).item())
    decision = torch.ones(1, 1001).to(torch.bfloat16)
    assert ratio_loss((decision,), (0.5,)).item() == pytest.approx(0.25, rel=1e-6)
