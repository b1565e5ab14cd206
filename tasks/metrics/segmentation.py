"""Mean IoU and accuracies of label maps over a whole data set, on one process or on many, in constant memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from effvit.categories import IGNORED
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentationResult:
    """What an evaluation found.

    The numbers are those of mmsegmentation's ``IoUMetric`` and of PASCAL VOC: pixels of all images together, those
    without a label left out.

    Attributes:
        metrics: ``mIoU``, the mean over the classes that occur in the truth or in a prediction; ``mAcc``, the mean over
            those that occur in the truth; ``aAcc``, the share of pixels that are right. All in [0, 1], NaN without a
            labelled pixel.
        per_class: IoU by label; NaN for a class that occurs nowhere.
        accuracy_per_class: Share of a class's pixels that were found, by label; NaN for a class without pixels.
        confusion: ``(K, K)`` int64, pixels by true class (row) and chosen class (column).
        pixels: ``(K,)`` int64, labelled pixels of each class.
        not_finite: Labelled pixels for which the network gave no finite number. They count as wrong, and are in no
            column of `confusion`.
    """

    metrics: dict[str, float]
    per_class: dict[int, float]
    accuracy_per_class: dict[int, float]
    confusion: Tensor
    pixels: Tensor
    not_finite: int = 0


class SegmentationEvaluator:
    """Counts pixels by true and predicted class, image by image, then computes the metrics over all of them.

    It keeps one matrix of counts and the ids of the images, not the label maps. Each image counts once, however the
    images fell into batches and processes: Lightning's distributed sampler repeats images to give every process
    equally many, at most one to each process and as its last, so that the last image of a process is held back until
    `compute` knows who else has seen it. In a distributed run every process calls `compute`, and all get the same
    result.

    Args:
        num_classes: Number of classes K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forgets all images."""
        self._ids: list[int] = []
        self._seen: set[int] = set()
        self._counts: Tensor | None = None  # all images but the last
        self._last: Tensor | None = None

    def update(self, image_ids: list[int], predictions: list[Tensor], masks: list[Tensor]) -> None:
        """Adds the images of a batch.

        Args:
            image_ids: Unique in the split; an image that was here before is passed over.
            predictions: Label maps ``(h, w)`` on any device, -1 where the network gave no finite number.
            masks: True label maps of the same sizes, -1 for pixels without a label.

        Raises:
            ValueError: A prediction has another size than its mask.
            DatasetError: A label is not one of the classes.
        """
        for image_id, prediction, mask in zip(image_ids, predictions, masks, strict=True):
            if prediction.shape != mask.shape:
                raise ValueError(
                    f"image id {image_id}: the prediction is {tuple(prediction.shape)}, the mask {tuple(mask.shape)}"
                )
            if image_id in self._seen:
                continue
            counts = self._count(image_id, prediction, mask)
            if self._last is not None:
                self._counts = self._last if self._counts is None else self._counts + self._last
            self._last = counts
            self._ids.append(image_id)
            self._seen.add(image_id)

    def _count(self, image_id: int, prediction: Tensor, mask: Tensor) -> Tensor:
        """``(K, K + 1)`` int64, the last column for pixels without a finite prediction."""
        truth = mask.detach().to(prediction.device).long().flatten()
        chosen = prediction.detach().long().flatten()
        labelled = truth != IGNORED
        truth, chosen = truth[labelled], chosen[labelled]
        if len(truth) and not 0 <= int(truth.min()) <= int(truth.max()) < self.num_classes:
            raise DatasetError(
                f"image id {image_id} has pixels with the labels {int(truth.min())} to {int(truth.max())}, but the "
                f"network has {self.num_classes} classes: labels must be in [0, {self.num_classes - 1}], or -1 for "
                "none. Train and evaluate on the same classes"
            )
        columns = self.num_classes + 1
        chosen = torch.where(chosen == IGNORED, self.num_classes, chosen)
        return (truth * columns + chosen).bincount(minlength=self.num_classes * columns).view(-1, columns)

    def compute(self) -> SegmentationResult:
        """Evaluates everything seen since the last `reset`, by all processes together.

        Returns:
            The same result on every process.
        """
        none = torch.zeros(self.num_classes, self.num_classes + 1, dtype=torch.int64)
        counts, last = (none if held is None else held.cpu() for held in (self._counts, self._last))
        own = (self._ids, counts, last)
        parts, rank = [own], 0
        if dist.is_available() and dist.is_initialized():
            parts, rank = [own] * dist.get_world_size(), dist.get_rank()
            dist.all_gather_object(parts, own)
        total, twice = _once_each(parts)
        result = _evaluate(total)
        if twice and rank == 0:
            _log.warning("%d images were seen by several processes and count as often: the sampler repeats them", twice)
        if not total.any() and any(ids for ids, _, _ in parts) and rank == 0:
            _log.warning(
                "no pixel of the images has a label, and without any mIoU is no number: `effvit check-data` tells what "
                "the masks hold"
            )
        if result.not_finite and rank == 0:
            _log.warning(
                "the network has diverged: its logits are NaN or infinite for %d of %d labelled pixels, which count as "
                "wrong. Go back to an earlier checkpoint, and lower the learning rate, clip gradients or leave half "
                "precision",
                result.not_finite,
                int(total.sum()),
            )
        return result


def _once_each(parts: list[tuple[list[int], Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Counts over the processes, each image from the lowest one that saw it; and how many could not be told apart.

    Args:
        parts: Of each process the ids in the order of their images, the counts of all but the last image, and those of
            the last.
    """
    total = torch.zeros_like(parts[0][1])
    seen: set[int] = set()
    twice = 0
    # The last images come after all others: one of them is dropped wherever another process has counted it.
    for ids, counts, _ in parts:
        twice += len(seen.intersection(ids[:-1]))
        seen.update(ids[:-1])
        total += counts
    for ids, _, last in parts:
        if ids and ids[-1] not in seen:
            seen.add(ids[-1])
            total += last
    return total, twice


def _evaluate(counts: Tensor) -> SegmentationResult:
    confusion = counts[:, :-1].contiguous()
    hits, truth, chosen = confusion.diag().double(), counts.sum(1).double(), confusion.sum(0).double()
    iou = hits / (truth + chosen - hits)  # 0 / 0 is NaN
    accuracy = hits / truth
    metrics = {"mIoU": iou.nanmean(), "mAcc": accuracy.nanmean(), "aAcc": hits.sum() / truth.sum()}
    return SegmentationResult(
        {name: float(value) for name, value in metrics.items()},
        dict(enumerate(iou.tolist())),
        dict(enumerate(accuracy.tolist())),
        confusion,
        counts.sum(1),
        int(counts[:, -1].sum()),
    )
