"""Losses of label maps against torch, a plain loop, and mmsegmentation's arithmetic written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effvit.errors import ConfigError
from effvit.tasks.losses.segmentation import SegmentationLoss, dice_loss, hard_pixels

CLASSES = 5


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, CLASSES, 6, 5, generator=generator) * 2
    masks = torch.randint(-1, CLASSES, (2, 11, 9), generator=generator, dtype=torch.int16)
    return logits, masks


def enlarged(logits, masks, align_corners=False):
    return F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=align_corners)


@pytest.mark.parametrize("align_corners", [False, True])
def test_it_is_torchs_cross_entropy_over_the_labelled_pixels(sample, align_corners):
    logits, masks = sample
    found = SegmentationLoss(CLASSES, align_corners=align_corners)({"logits": logits}, masks)
    expected = F.cross_entropy(enlarged(logits, masks, align_corners), masks.long(), ignore_index=-1)
    assert list(found) == ["cross_entropy"]
    torch.testing.assert_close(found["cross_entropy"], expected)


def test_with_class_weights_it_is_torchs_weighted_mean(sample):
    logits, masks = sample
    weights = [0.5, 1.0, 2.0, 0.0, 3.0]
    found = SegmentationLoss(CLASSES, class_weights=weights)({"logits": logits}, masks)
    expected = F.cross_entropy(enlarged(logits, masks), masks.long(), weight=torch.tensor(weights), ignore_index=-1)
    torch.testing.assert_close(found["cross_entropy"], expected)


def test_over_all_pixels_it_is_the_mean_of_mmsegmentations_recipes(sample):
    logits, masks = sample
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0])
    each = F.cross_entropy(enlarged(logits, masks), masks.long(), weights, ignore_index=-1, reduction="none")
    found = SegmentationLoss(CLASSES, class_weights=weights.tolist(), avg_non_ignore=False)({"logits": logits}, masks)
    torch.testing.assert_close(found["cross_entropy"], each.mean())


def mmseg_ohem(logits, labels, threshold, min_kept):
    """``OHEMPixelSampler.sample`` with a threshold, step by step: the probability of the truth, sorted."""
    probabilities = logits.softmax(1)
    rows = []
    for image, label in zip(probabilities, labels, strict=True):
        rows += [
            [float(image[int(c), y, x]) if c >= 0 else None for x, c in enumerate(row)] for y, row in enumerate(label)
        ]
    known = sorted(value for row in rows for value in row if value is not None)
    least = known[min(min_kept * len(labels), len(known) - 1)] if known else 0.0
    limit = max(least, threshold)
    chosen = [[value is not None and value < limit for value in row] for row in rows]
    return torch.tensor(chosen).view(labels.shape)


@pytest.mark.parametrize(("threshold", "kept"), [(0.7, 3), (0.05, 20), (0.001, 30), (1.0, 1), (0.3, 10_000)])
def test_hard_pixels_are_those_of_mmsegmentation(sample, threshold, kept):
    logits, masks = sample
    large = enlarged(logits, masks)
    expected = mmseg_ohem(large, masks, threshold, kept)
    assert 0 < expected.sum() <= (masks >= 0).sum()
    each = F.cross_entropy(large, masks.long(), ignore_index=-1, reduction="none")
    assert torch.equal(hard_pixels(each, masks >= 0, threshold, kept * len(masks)), expected)
    found = SegmentationLoss(CLASSES, ohem_threshold=threshold, ohem_kept=kept, avg_non_ignore=False)(
        {"logits": logits}, masks
    )
    torch.testing.assert_close(found["cross_entropy"], (each * expected).mean())
    over_labelled = SegmentationLoss(CLASSES, ohem_threshold=threshold, ohem_kept=kept)({"logits": logits}, masks)
    torch.testing.assert_close(over_labelled["cross_entropy"], (each * expected).sum() / (masks >= 0).sum())


def test_hard_pixels_are_chosen_without_the_class_weights(sample):
    logits, masks = sample
    weights = [1e-3, 1.0, 50.0, 1.0, 1.0]
    each = F.cross_entropy(enlarged(logits, masks), masks.long(), ignore_index=-1, reduction="none")
    chosen = hard_pixels(each, masks >= 0, 0.2, 8)
    expected = (each * chosen * torch.tensor(weights)[masks.long().clamp(min=0)]).mean()
    found = SegmentationLoss(CLASSES, ohem_threshold=0.2, ohem_kept=4, class_weights=weights, avg_non_ignore=False)(
        {"logits": logits}, masks
    )
    torch.testing.assert_close(found["cross_entropy"], expected)


def test_dice_is_the_fraction_of_each_image_and_class():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, CLASSES, 7, 4, generator=generator)
    masks = torch.randint(-1, CLASSES - 1, (3, 7, 4), generator=generator)  # the last class is nowhere
    parts = []
    for image, mask in zip(logits.softmax(1), masks, strict=True):
        for label in range(CLASSES):
            inside = mask >= 0
            p, truth = image[label][inside], (mask[inside] == label).float()
            parts.append(1 - (2 * (p * truth).sum() + 1) / ((p**2).sum() + (truth**2).sum() + 1))
    torch.testing.assert_close(dice_loss(logits, masks), torch.stack(parts).mean())


def test_of_a_perfect_prediction_dice_is_zero():
    masks = torch.tensor([[[0, 1, 2, 3, 4, -1]]])
    logits = 100.0 * F.one_hot(masks.clamp(min=0), CLASSES).permute(0, 3, 1, 2)
    assert float(dice_loss(logits, masks)) == pytest.approx(0.0, abs=1e-6)


def test_dice_and_the_auxiliary_head_are_added_with_their_weights(sample):
    logits, masks = sample
    auxiliary = torch.randn(2, CLASSES, 3, 3)
    loss = SegmentationLoss(CLASSES, dice_weight=3.0, auxiliary_weight=0.4, ohem_threshold=0.3, ohem_kept=5)
    found = loss({"logits": logits, "auxiliary": auxiliary}, masks)
    assert list(found) == ["cross_entropy", "dice", "auxiliary"]
    torch.testing.assert_close(found["dice"], 3 * dice_loss(enlarged(logits, masks), masks.long()))
    plain = F.cross_entropy(enlarged(auxiliary, masks), masks.long(), ignore_index=-1)
    torch.testing.assert_close(found["auxiliary"], 0.4 * plain)


@pytest.mark.parametrize("avg_non_ignore", [True, False])
@pytest.mark.parametrize("ohem_threshold", [None, 0.7])
def test_without_a_labelled_pixel_losses_and_gradients_are_zero(avg_non_ignore, ohem_threshold):
    layer = nn.Conv2d(3, CLASSES, 1)
    logits = layer(torch.randn(2, 3, 4, 4))
    loss = SegmentationLoss(
        CLASSES,
        dice_weight=1.0,
        auxiliary_weight=1.0,
        class_weights=[1.0, 2.0, 3.0, 4.0, 5.0],
        ohem_threshold=ohem_threshold,
        avg_non_ignore=avg_non_ignore,
    )
    losses = loss({"logits": logits, "auxiliary": logits}, torch.full((2, 8, 8), -1, dtype=torch.int16))
    assert [float(value.detach()) for value in losses.values()] == [0.0, 0.0, 0.0]
    sum(losses.values()).backward()
    assert all(not parameter.grad.any() and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_half_precision_logits_are_compared_in_float32(sample):
    logits, masks = sample
    found = SegmentationLoss(CLASSES, dice_weight=1.0)({"logits": logits.bfloat16()}, masks)
    assert all(value.dtype == torch.float32 for value in found.values())
    expected = SegmentationLoss(CLASSES)({"logits": logits.bfloat16().float()}, masks)["cross_entropy"]
    assert torch.equal(found["cross_entropy"], expected)


def test_a_whole_network_learns_from_each_of_them():
    """Steps down every loss lower it: no sign is wrong and no gradient lost."""
    torch.manual_seed(0)
    masks = torch.randint(-1, CLASSES, (2, 8, 8))
    for options in ({}, {"ohem_threshold": 0.9, "ohem_kept": 10}, {"dice_weight": 2.0}):
        logits = torch.zeros(2, CLASSES, 8, 8, requires_grad=True)
        loss = SegmentationLoss(CLASSES, **options)
        seen = []
        for _ in range(30):
            total = sum(loss({"logits": logits}, masks).values())
            (gradient,) = torch.autograd.grad(total, logits)
            logits = (logits - 50 * gradient).detach().requires_grad_()
            seen.append(float(total.detach()))
        assert seen[-1] < 0.2 * seen[0], options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ohem_threshold": 0.0}, r"ohem_threshold must be in \(0, 1\]"),
        ({"ohem_threshold": 70}, r"ohem_threshold must be in \(0, 1\]"),
        ({"ohem_threshold": 0.7, "ohem_kept": 0}, "ohem_kept must be 1 or more"),
        ({"dice_weight": -1.0}, "dice_weight must be 0 or more"),
        ({"auxiliary_weight": float("nan")}, "auxiliary_weight must be 0 or more"),
        ({"class_weights": [1.0]}, "class_weights has 1 numbers, and the data has 5 classes"),
        ({"class_weights": [-1.0, 1, 1, 1, 1]}, "class_weights must be 0 or more"),
        ({"class_weights": [0.0] * 5}, "not all 0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        SegmentationLoss(CLASSES, **options)
