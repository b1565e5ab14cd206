"""Accuracy, loss and calibration of a classifier over a whole data set, on one process or on many."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from effvit.errors import DatasetError

_log = logging.getLogger(__name__)

_TOP = 5
_BINS = 15
_MOST_MISTAKES = 100
_NO_CLASS = -1


@dataclass(frozen=True)
class Mistake:
    """An image in a wrong class.

    Attributes:
        image_id: Position of the image in its split.
        label: The true class.
        predicted: The class that the network chose.
        confidence: Probability that it gave to it.
    """

    image_id: int
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True)
class ClassificationResult:
    """What an evaluation found.

    Attributes:
        metrics: ``top1`` and ``top5`` (the latter for more than five classes) as shares in [0, 1]; ``loss``, the mean
            cross-entropy without label smoothing; ``ece``, the expected calibration error in [0, 1]. All are NaN
            without a labelled image; loss and ECE are NaN too where an image had no finite logits.
        per_class: Share of a class's images that were put into it, by label; NaN for a class without images.
        confusion: ``(K, K)`` int64, images by true class (row) and chosen class (column).
        mistakes: The worst mistakes, the most confident first, at most 100.
        calibration: ``(15, 3)`` float64, for each bin of confidence from 0 to 1 the number of images, their mean
            confidence and their accuracy, the last two NaN for an empty bin.
        not_finite: Images whose logits were NaN or infinite. They count as wrong, and are in no column of `confusion`.
    """

    metrics: dict[str, float]
    per_class: dict[int, float]
    confusion: Tensor
    mistakes: tuple[Mistake, ...]
    calibration: Tensor
    not_finite: int = 0


@dataclass(frozen=True)
class _Records:
    """What is kept of ``N`` images, and exchanged between processes.

    Attributes:
        image_ids: ``(N,)`` int64.
        labels: ``(N,)`` int64, -1 where nobody knows.
        top: ``(N, min(5, K))`` int64, classes from the most probable on; -1 where the logits were not finite.
        confidences: ``(N,)`` float32, probability of the first of ``top``.
        losses: ``(N,)`` float32, negative log-likelihood of the label.
    """

    image_ids: Tensor
    labels: Tensor
    top: Tensor
    confidences: Tensor
    losses: Tensor

    def cpu(self) -> _Records:
        return _Records(*(value.cpu() for value in vars(self).values()))

    def __getitem__(self, rows: Tensor) -> _Records:
        return _Records(*(value[rows] for value in vars(self).values()))

    @staticmethod
    def join(parts: list[_Records]) -> _Records:
        return _Records(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


class ClassificationEvaluator:
    """Collects predictions batch by batch, then computes the metrics over all images that were seen.

    The numbers do not depend on how the images fell into batches and processes: each image id counts once (a
    distributed sampler repeats some to fill the last batch; the lowest process that saw an image speaks for it), and
    nothing is a mean of means. In a distributed run every process calls `compute`, with or without images of its own,
    and all get the same result.

    Logits that are NaN or infinite, those of a network that has diverged, count as wrong and are reported in the log.

    Args:
        num_classes: Number of classes K.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._parts: list[_Records] = []

    def reset(self) -> None:
        """Forgets all images."""
        self._parts = []

    def update(self, image_ids: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch. Nothing is read back from the device here, so that the CPU need not wait for it.

        Args:
            image_ids: int64 ``(B,)``, unique in the split.
            logits: ``(B, K)``.
            labels: int64 ``(B,)``, -1 for images that are not to be judged.

        Raises:
            ValueError: The shapes do not agree.
        """
        if logits.shape != (len(labels), self.num_classes) or image_ids.shape != labels.shape:
            raise ValueError(
                f"needed are logits (B, {self.num_classes}) with B image ids and labels, got {tuple(logits.shape)}, "
                f"{tuple(image_ids.shape)} and {tuple(labels.shape)}"
            )
        logs = logits.detach().float().log_softmax(-1)
        best, top = logs.topk(min(_TOP, self.num_classes), dim=-1)
        broken = logs.isnan().any(-1)  # one NaN or positive infinity spreads over its whole row
        labels = labels.detach().to(logs.device)
        inside = labels.clamp(0, self.num_classes - 1)  # labels out of range are refused in `compute`
        self._parts.append(
            _Records(
                image_ids.detach().to(logs.device),
                labels,
                top.masked_fill(broken[:, None], _NO_CLASS),
                best[:, 0].exp(),
                F.nll_loss(logs, inside, reduction="none"),
            )
        )

    def compute(self) -> ClassificationResult:
        """Evaluates everything seen since the last `reset`, by all processes together.

        Returns:
            The same result on every process.

        Raises:
            DatasetError: A label is not one of the classes.
        """
        own = _Records.join([self._no_images(), *(part.cpu() for part in self._parts)])
        parts, rank = [own], 0
        if dist.is_available() and dist.is_initialized():
            parts, rank = [own] * dist.get_world_size(), dist.get_rank()
            dist.all_gather_object(parts, own)
        records = _once_each(_Records.join(parts))
        self._check_labels(records)
        result = self._evaluate(records)
        if result.not_finite and rank == 0:
            _log.warning(
                "the network has diverged: its logits are NaN or infinite for %d of %d images, which count as wrong. "
                "Go back to an earlier checkpoint, and lower the learning rate, clip gradients or leave half precision",
                result.not_finite,
                len(records.labels),
            )
        return result

    def _no_images(self) -> _Records:
        none = torch.zeros(0, dtype=torch.int64)
        return _Records(none, none, none.view(0, min(_TOP, self.num_classes)), torch.zeros(0), torch.zeros(0))

    def _check_labels(self, records: _Records) -> None:
        wrong = (records.labels >= self.num_classes).nonzero()
        if len(wrong):
            first = int(wrong[0])
            raise DatasetError(
                f"image id {int(records.image_ids[first])} has the label {int(records.labels[first])}, but the network "
                f"has {self.num_classes} classes: labels must be in [0, {self.num_classes - 1}]. Train and evaluate on "
                "the same classes"
            )

    def _evaluate(self, records: _Records) -> ClassificationResult:
        labels, chosen = records.labels, records.top[:, 0]
        hits = records.top == labels[:, None]
        right, sound = hits[:, 0], chosen != _NO_CLASS
        cells = self.num_classes * labels[sound] + chosen[sound]
        confusion = cells.bincount(minlength=self.num_classes**2).view(self.num_classes, self.num_classes)
        accuracies = confusion.diag() / labels.bincount(minlength=self.num_classes)  # 0 / 0 is NaN
        calibration = _calibration(records.confidences[sound].double(), right[sound].double())
        metrics = {"top1": _mean(right)}
        if self.num_classes > _TOP:
            metrics["top5"] = _mean(hits.any(1))
        metrics["loss"] = _mean(records.losses)
        metrics["ece"] = _expected_error(calibration) if sound.all() else torch.nan
        return ClassificationResult(
            metrics,
            dict(enumerate(accuracies.tolist())),
            confusion,
            _worst(records[sound & ~right]),
            calibration,
            int((~sound).sum()),
        )


def _once_each(records: _Records) -> _Records:
    """Labelled images in the order of their ids, the first record of each; sums then do not depend on the batches."""
    records = records[records.labels >= 0]
    records = records[records.image_ids.argsort(stable=True)]
    ids = records.image_ids
    first = torch.ones(len(ids), dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    return records[first]


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def _calibration(confidences: Tensor, right: Tensor) -> Tensor:
    """Images, mean confidence and accuracy in 15 equal bins of confidence, the bins of Guo et al. 2017 (section 2)."""
    bins = (confidences * _BINS).long().clamp(max=_BINS - 1)
    count = bins.bincount(minlength=_BINS)
    sums = [bins.bincount(weights=values, minlength=_BINS) for values in (confidences, right)]
    return torch.stack([count.double(), *(total / count for total in sums)], dim=1)


def _expected_error(calibration: Tensor) -> float:
    """Mean gap between confidence and accuracy, weighted by the images of each bin (Guo et al. 2017, equation 3)."""
    count, confidence, accuracy = calibration.unbind(1)
    gaps = (confidence - accuracy).abs().nan_to_num() * count
    return float(gaps.sum() / count.sum())


def _worst(wrong: _Records) -> tuple[Mistake, ...]:
    wrong = wrong[wrong.confidences.argsort(descending=True, stable=True)[:_MOST_MISTAKES]]
    columns = (wrong.image_ids, wrong.labels, wrong.top[:, 0], wrong.confidences)
    return tuple(Mistake(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
