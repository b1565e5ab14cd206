"""Losses of label maps: cross-entropy, of all pixels or of the hard ones, Dice, and that of an auxiliary head."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.categories import IGNORED
from effvit.errors import ConfigError


class SegmentationLoss(nn.Module):
    """The losses of a segmenter, by name.

    Logits are enlarged to the size of the masks first, bilinearly, as the published recipes do.

    Args:
        num_classes: Number of classes K.
        align_corners: How logits are enlarged, see ``torch.nn.functional.interpolate``.
        ohem_threshold: See `hard_pixels`; ``None`` learns all pixels.
        ohem_kept: See `hard_pixels`.
        dice_weight: Weight of the Dice loss; 0 for none.
        class_weights: Weight of each class in the cross-entropy; ``None`` for 1 each.
        avg_non_ignore: Whether the cross-entropy is a mean over the labelled pixels, or over all. With hard examples
            it is the same mean: pixels that are left out count as zeros, as in mmsegmentation.
        auxiliary_weight: Weight of the cross-entropy of the auxiliary head, which has neither hard examples nor Dice.

    Raises:
        ConfigError: A value out of its range.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        *,
        align_corners: bool = False,
        ohem_threshold: float | None = None,
        ohem_kept: int = 100_000,
        dice_weight: float = 0.0,
        class_weights: list[float] | None = None,
        avg_non_ignore: bool = True,
        auxiliary_weight: float = 0.0,
    ) -> None:
        super().__init__()
        _check(num_classes, ohem_threshold, ohem_kept, dice_weight, class_weights, auxiliary_weight)
        self.align_corners = align_corners
        self.ohem_threshold = ohem_threshold
        self.ohem_kept = ohem_kept
        self.dice_weight = dice_weight
        self.avg_non_ignore = avg_non_ignore
        self.auxiliary_weight = auxiliary_weight
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, outputs: dict[str, Tensor], masks: Tensor) -> dict[str, Tensor]:
        """Losses by name, each with its weight; their sum is minimised.

        Args:
            outputs: ``logits`` ``(B, K, h, w)`` and, of a segmenter with an auxiliary head, ``auxiliary`` likewise.
            masks: Labels ``(B, H, W)``, any integers, -1 for pixels without one. Where all have none, the losses are 0
                and so are their gradients.

        Returns:
            Scalars: ``cross_entropy``, and where there are such ``dice`` and ``auxiliary``.
        """
        masks = masks.long()
        logits = self._enlarged(outputs["logits"], masks)
        losses = {"cross_entropy": self._cross_entropy(logits, masks, self.ohem_threshold)}
        if self.dice_weight:
            losses["dice"] = self.dice_weight * dice_loss(logits, masks)
        if self.auxiliary_weight:
            auxiliary = self._enlarged(outputs["auxiliary"], masks)
            losses["auxiliary"] = self.auxiliary_weight * self._cross_entropy(auxiliary, masks, None)
        return losses

    def _enlarged(self, logits: Tensor, masks: Tensor) -> Tensor:
        # In float32 before and not after, so that only one large map is made.
        return F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=self.align_corners)

    def _cross_entropy(self, logits: Tensor, masks: Tensor, ohem_threshold: float | None) -> Tensor:
        losses = F.cross_entropy(logits, masks, ignore_index=IGNORED, reduction="none")  # 0 where ignored
        labelled = masks != IGNORED
        counted = labelled.float()
        if self.class_weights is not None:
            counted = counted * self.class_weights[masks.clamp(min=0)]
        total = counted.sum() if self.avg_non_ignore else torch.full_like(losses[0, 0, 0], masks.numel())
        if ohem_threshold is not None:
            kept = self.ohem_kept * len(masks)
            counted = counted * hard_pixels(losses.detach(), labelled, ohem_threshold, kept)
        return (losses * counted).sum() / total.clamp(min=torch.finfo(torch.float32).tiny)


def hard_pixels(losses: Tensor, labelled: Tensor, threshold: float, kept: int) -> Tensor:
    """The pixels that online hard example mining learns: arXiv 1604.03540, as mmsegmentation's ``OHEMPixelSampler``.

    Args:
        losses: Cross-entropies without class weights ``(B, H, W)``.
        labelled: Which pixels have a label, bool, likewise.
        threshold: Pixels whose true class has a probability below this are hard, in ``(0, 1]``.
        kept: The hardest so many pixels of the whole batch are taken whatever their probability, but for those as hard
            as the next one; of a batch with no more labelled pixels, all but the easiest.

    Returns:
        bool ``(B, H, W)``.
    """
    probabilities = (-losses).exp()
    known = probabilities[labelled]
    if not len(known):
        return torch.zeros_like(labelled)
    # The (kept + 1)-th smallest: everything below it is in, ties with it are not.
    limit = known.kthvalue(min(kept, len(known) - 1) + 1).values
    return labelled & (probabilities < limit.clamp(min=threshold))


def dice_loss(logits: Tensor, masks: Tensor, smooth: float = 1.0) -> Tensor:
    """Soft Dice loss with squares in its denominator (arXiv 1606.04797, equation 1), a mean over images and classes.

    As mmsegmentation's ``DiceLoss`` with its defaults, but pixels without a label are left out of the denominator too.

    Args:
        logits: ``(B, K, H, W)``.
        masks: Labels, int64 ``(B, H, W)``, -1 for pixels without one.
        smooth: Added to both sides of the fraction, so that a class that is nowhere has none to divide by.

    Returns:
        Scalar in [0, 1].
    """
    labelled = (masks != IGNORED).unsqueeze(1)
    probabilities = logits.softmax(1) * labelled
    index = masks.clamp(min=0).unsqueeze(1)
    # Overlap and area of the truth by label, without a one-hot map of the size of the logits.
    flat = index.flatten(2).squeeze(1)
    of_truth = (probabilities.gather(1, index)).flatten(1)
    overlap = probabilities.new_zeros(probabilities.shape[:2]).scatter_add(1, flat, of_truth)
    area = torch.zeros_like(overlap).scatter_add(1, flat, labelled.flatten(1).to(overlap.dtype))
    squares = probabilities.square().flatten(2).sum(-1)
    return (1 - (2 * overlap + smooth) / (squares + area + smooth)).mean()


def _check(
    num_classes: int,
    ohem_threshold: float | None,
    ohem_kept: int,
    dice_weight: float,
    class_weights: list[float] | None,
    auxiliary_weight: float,
) -> None:
    if ohem_threshold is not None and not 0 < ohem_threshold <= 1:
        raise ConfigError(f"ohem_threshold must be in (0, 1], or null for no hard examples, not {ohem_threshold}")
    if ohem_kept < 1:
        raise ConfigError(f"ohem_kept must be 1 or more pixels of each image, not {ohem_kept}")
    for name, weight in (("dice_weight", dice_weight), ("auxiliary_weight", auxiliary_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"{name} must be 0 or more, not {weight}")
    if class_weights is None:
        return
    if len(class_weights) != num_classes:
        raise ConfigError(
            f"class_weights has {len(class_weights)} numbers, and the data has {num_classes} classes: give one for each"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in class_weights) or not any(class_weights):
        raise ConfigError(f"class_weights must be 0 or more, and not all 0: {class_weights}")
