"""Detection with shapes that follow from shapes alone, for what is exported: no number decides what is computed.

`Detector.predict` sifts: what is below a threshold is gone, and later steps are cheap. Here a fixed number of
candidates goes all the way, and those that do not count are marked. Which detections come out is the same.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from effvit.tasks.detectors._suppression_operator import kept_of_batch, recorded

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Most candidates of an image that are compared with each other. Suppression goes from the best down, so the next ones
#: could only count where so many leave fewer than the wanted detections.
CANDIDATES = 5000


class Candidates(NamedTuple):
    """What may become a detection, the same number in each image.

    Attributes:
        boxes: ``(B, N, 4)``, float32 xyxy.
        scores: ``(B, N)``, float32, positive where `valid`.
        labels: ``(B, N)``, int64.
        valid: Which count ``(B, N)``.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    valid: Tensor


class FixedDetector(nn.Module, ABC):
    """A detector's eval-mode view with fixed shapes, on its very layers.

    Attributes:
        parts: Names of the submodules in here by part: backbone, pyramid, heads.
        outputs: Names of what `forward` returns.
    """

    parts: dict[str, tuple[str, ...]]
    outputs: tuple[str, ...] = ("boxes", "scores", "labels")

    @abstractmethod
    def forward(self, images: Tensor, sizes: Tensor, original_sizes: Tensor) -> tuple[Tensor, ...]:
        """Detections as arrays, see `DeployedDetector`.

        Args:
            images: Normalised images ``(B, 3, H, W)``, padded at the bottom and at the right.
            sizes: ``(height, width)`` of each image before padding ``(B, 2)``, int64.
            original_sizes: The same of each image before it was resized ``(B, 2)``, int64.
        """


def static(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of maps ``(..., H, W)`` as plain numbers, also while `torch.jit.trace` records."""
    if not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return [(tensor.shape[-2], tensor.shape[-1]) for tensor in tensors]
    with warnings.catch_warnings():  # that they become constants is what is wanted: anchors are
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return [(int(tensor.shape[-2]), int(tensor.shape[-1])) for tensor in tensors]


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of each row ``(..., N)`` and their places, best first; all of them where there are fewer."""
    ((_, size),) = static([scores[..., None, :]])
    return scores.topk(torch.sym_min(count, size), dim=-1)


def sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid by its definition, in float32.

    ONNX Runtime's own is off by 1e-7 whatever the value, which turns the order of most values below 1e-4 and with it
    what suppression keeps of a coarse map. This one is exact to rounding, as torch's is.
    """
    return 1 / (1 + (-logits.float()).exp())


def taken(values: Tensor, places: Tensor) -> Tensor:
    """The rows of ``(B, N, C)`` at ``(B, M)``: ``(B, M, C)``."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def corners(sizes: Tensor) -> Tensor:
    """``(height, width)`` of each image ``(B, 2)`` as ``(B, 1, 4)``, float32: width, height, width, height."""
    return sizes.flip(1).to(torch.float32).repeat(1, 2)[:, None]


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes ``(B, N, 4)`` cut at their images, of ``(height, width)`` ``(B, 2)``."""
    return boxes.clamp(min=0).minimum(corners(sizes))


def solid(boxes: Tensor) -> Tensor:
    """Which boxes ``(B, N, 4)`` the border did not cut down to a line ``(B, N)``."""
    return ((boxes[..., 2:] - boxes[..., :2]) > 0).all(dim=-1)


def suppress(found: Candidates, threshold: float, most: int) -> Candidates:
    """The best candidates that overlap no better one of their own label too much, see `_suppression.suppress`.

    Labels are shifted apart as there. Candidates that do not count all lie on one place beside the others, with the
    lowest score: the first of them drops the rest, which so cost nothing.

    Args:
        found: The candidates of each image.
        threshold: IoU above which the weaker of two boxes is dropped.
        most: How many are kept.

    Returns:
        ``most`` of each image, best first; boxes and scores are 0 and labels -1 where there are fewer.
    """
    found = _with_filler(found)
    inside = found.boxes.masked_fill(~found.valid[..., None], 0)
    lowest, highest = inside.amin((1, 2), keepdim=True), inside.amax((1, 2), keepdim=True)
    apart = inside + found.labels.to(inside)[..., None] * (highest - lowest + 1)
    nowhere = torch.cat([lowest - 3, lowest - 3, lowest - 2, lowest - 2], dim=-1)
    apart = apart.where(found.valid[..., None], nowhere)
    scores = found.scores.masked_fill(~found.valid, -1)
    # A number of images that is left open cannot be looped over.
    keep = (recorded if isinstance(scores.shape[0], torch.SymInt) else kept_of_batch)(apart, scores, threshold, most)
    valid = found.valid.gather(1, keep)
    return Candidates(
        taken(inside, keep),
        found.scores.gather(1, keep).masked_fill(~valid, 0),
        found.labels.gather(1, keep).masked_fill(~valid, -1),
        valid,
    )


def _with_filler(found: Candidates) -> Candidates:
    """One more candidate that does not count, which stands for what is missing."""
    return Candidates(*(torch.cat([values, torch.zeros_like(values[:, :1])], dim=1) for values in found))
