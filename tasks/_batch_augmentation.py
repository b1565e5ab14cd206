"""What happens to a batch of training images on the device: mixing of images and labels, and random erasing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms import v2

from effvit.errors import ConfigError

#: Of the rectangles that are erased: draws until one fits, share of the image, logarithm of the most oblong ratio.
_ATTEMPTS, _AREA, _LOG_RATIO = 10, (0.02, 1 / 3), math.log(1 / 0.3)


class BatchAugmentation:
    """Random erasing of a normalised batch, then MixUp or CutMix, which are torchvision's.

    The rules are those of timm's ``Mixup`` in batch mode, with which the published recipes were trained: one draw for a
    batch decides whether it is mixed at all, another one which of the two mixes it. Erased rectangles are filled with
    normal noise for each pixel, in each image on its own (arXiv 1708.04896; timm's mode ``pixel``), before the mixing.

    Args:
        num_classes: Number of classes.
        mixup: Alpha of the Beta distribution of MixUp (arXiv 1710.09412); 0 for none.
        cutmix: The same for CutMix (arXiv 1905.04899).
        mix_probability: Share of the batches that are mixed, in ``[0, 1]``.
        switch_probability: Share of the mixed batches that CutMix gets where both are on, in ``[0, 1]``.
        random_erasing: Probability that an image gets a rectangle of noise, in ``[0, 1]``.

    Raises:
        ConfigError: A value out of its range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        switch_probability: float = 0.5,
        random_erasing: float = 0.0,
    ) -> None:
        _check_shares(
            mix_probability=mix_probability, switch_probability=switch_probability, random_erasing=random_erasing
        )
        if mixup < 0 or cutmix < 0:
            raise ConfigError(f"mixup and cutmix must be 0 (off) or more, not {mixup} and {cutmix}")
        self.mixes = bool(mixup or cutmix)
        self._probability = mix_probability
        self._switch = switch_probability if mixup and cutmix else float(cutmix > 0)
        self._mixup = v2.MixUp(alpha=mixup, num_classes=num_classes) if mixup else None
        self._cutmix = v2.CutMix(alpha=cutmix, num_classes=num_classes) if cutmix else None
        self._erasing = random_erasing

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Augments one batch.

        Args:
            images: Normalised ``(B, 3, H, W)``.
            labels: int64 ``(B,)``, none of them -1.

        Returns:
            Images of the same shape; the labels, or class probabilities ``(B, K)`` where the batch was mixed. A single
            image has nothing to be mixed with and stays as it is.
        """
        if self._erasing:
            images = erase(images, self._erasing)
        if not self.mixes or len(images) < 2 or not _chance(self._probability):
            return images, labels
        mix = self._cutmix if _chance(self._switch) else self._mixup
        assert mix is not None
        mixed: tuple[Tensor, Tensor] = mix(images, labels)
        return mixed


def erase(images: Tensor, probability: float) -> Tensor:
    """Fills a rectangle of some images with normal noise, each pixel on its own (arXiv 1708.04896, section 3.2).

    Shares of the area from 2 % to a third and ratios of the sides from 0.3 to 1 / 0.3, both as timm draws them. Written
    here because torchvision erases one image at a time, and draws its noise on the CPU.

    Args:
        images: ``(B, C, H, W)``.
        probability: Share of the images, in ``[0, 1]``.
    """
    height, width = images.shape[2:]
    area = torch.empty(len(images), _ATTEMPTS).uniform_(*_AREA) * (height * width)
    ratio = torch.empty(len(images), _ATTEMPTS).uniform_(-_LOG_RATIO, _LOG_RATIO).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], -1).round().long()
    fits = ((sides < torch.tensor([height, width])) & (sides > 0)).all(-1)
    first = fits.int().argmax(1)  # of the attempts that fit
    sides = sides[torch.arange(len(images)), first]
    corner = (torch.rand(len(images), 2) * (torch.tensor([height, width]) - sides + 1)).long()
    chosen = ((torch.rand(len(images)) < probability) & fits.any(1)).nonzero().flatten()
    if not len(chosen):
        return images
    (top, left), (bottom, right) = (
        edge[chosen].to(images.device)[..., None, None].unbind(1) for edge in (corner, corner + sides)
    )
    rows = torch.arange(height, device=images.device)[:, None]
    columns = torch.arange(width, device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    chosen = chosen.to(images.device)
    before = images[chosen]
    return images.index_copy(0, chosen, torch.where(inside[:, None], torch.randn_like(before), before))


def _chance(probability: float) -> bool:
    """Whether a draw of torch's CPU generator falls below ``probability``."""
    return float(torch.rand(())) < probability


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is a probability and must lie in 0 … 1, not {share}")
