"""Whether an exported file says what its source says, on given images."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effvit.deploy._detections import Matched, partners
from effvit.deploy._formats_source import Deployable, as_list
from effvit.errors import ExportError

if TYPE_CHECKING:
    from effvit.deploy.exported import Exported

#: Share of the pixels that may have another label: where two classes are alike, rounding decides.
OTHER_LABELS = 1e-3
#: Share of the detections of both sides that may be without a partner.
_UNMATCHED = 0.01


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from its source.

    Attributes:
        images: How many different ones were compared.
        errors: Largest difference of each output, relative to the largest value that the source gives.
        differences: The same in the output's own unit: probability, score, pixels of the original image.
        tolerance: What `errors` may be.
        top1: Share of images with the source's first class; ``None`` but of a classifier.
        detections: How many the source finds; ``None`` but of a detector.
        unmatched: Detections of either side that the other has not, by class and an overlap of 0.99.
        labels: Share of pixels with the source's label, padding aside; ``None`` but of a segmenter.
    """

    images: int
    errors: Mapping[str, float]
    differences: Mapping[str, float]
    tolerance: float
    top1: float | None = None
    detections: int | None = None
    unmatched: int | None = None
    labels: float | None = None

    @property
    def worst(self) -> str:
        """Name of the output with the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def error(self) -> float:
        """The largest error."""
        return self.errors[self.worst]

    def as_dict(self) -> dict[str, Any]:
        """As it is stored in the file."""
        return {
            "images": self.images,
            "errors": dict(self.errors),
            "differences": dict(self.differences),
            "tolerance": self.tolerance,
            "top1": self.top1,
            "detections": self.detections,
            "unmatched": self.unmatched,
            "labels": self.labels,
        }


@dataclass(frozen=True)
class _Sample:
    """What one image gave."""

    same_class: bool = True
    matched: Matched = field(default_factory=Matched)
    pixels: int = 0
    other_labels: int = 0

    def worse(self, other: _Sample) -> _Sample:
        """Of the same image in two batches, what counts."""
        matched = max(self.matched, other.matched, key=lambda one: one.unmatched)
        other_labels = max(self.other_labels, other.other_labels)
        return _Sample(self.same_class and other.same_class, matched, self.pixels, other_labels)


@dataclass
class _Tally:
    """Largest values so far, and what each image gave, known again where it comes twice."""

    differences: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    samples: dict[bytes, _Sample] = field(default_factory=dict)

    def add(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Compares one output; values of the file that are not finite count as infinitely far."""
        if not expected.numel():
            self.differences[name] = max(self.differences[name], 0.0)
            return
        found, expected = found.double(), expected.double()
        gap = (found - expected).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        self.differences[name] = max(self.differences[name], gap.max().item())
        self.largest[name] = max(self.largest[name], expected.abs().max().item())

    def note(self, batch: tuple[Tensor, ...], samples: Iterable[_Sample]) -> None:
        """Takes down what the images of a batch gave."""
        for number, sample in enumerate(samples):
            key = hashlib.blake2b(b"".join(tensor[number].cpu().numpy().tobytes() for tensor in batch)).digest()
            self.samples[key] = sample.worse(self.samples.get(key, sample))

    def errors(self) -> dict[str, float]:
        return {name: gap / (self.largest[name] or 1.0) for name, gap in self.differences.items()}


def parity(module: Deployable, exported: Exported, batches: Iterable[tuple[Tensor, ...]]) -> Parity:
    """Compares an exported file with its source.

    Class probabilities are compared one by one. Detections are matched by class and overlap first, since rounding may
    turn the order of two that score alike; boxes, scores and masks are compared between partners. Of segmentation the
    logits are compared, and the labels are counted that are others.

    Args:
        module: The source, in eval mode.
        exported: The file, opened.
        batches: What ``forward`` takes, as often as wanted.

    Returns:
        The largest differences over all batches.

    Raises:
        ExportError: An output differs by more than the format's tolerance, more than 1 % of the detections have no
            partner, or more than 1 in 1000 pixels have another label. The message names the worst output. Also where
            the source's own outputs are not finite.
    """
    tally = _Tally()
    names = tuple(module.output_names)
    for batch in batches:
        with torch.no_grad():
            expected = [tensor.cpu() for tensor in as_list(module(*batch))]
        _check_finite(names, expected)
        found = exported.run(*batch)
        _check_shapes(names, found, expected)
        ours, theirs = (dict(zip(names, tensors, strict=True)) for tensors in (found, expected))
        tally.note(batch, _compare(module.task, tally, ours, theirs, batch))
    result, matched = _result(module.task, tally, exported.tolerance)
    _check(result, matched, str(exported.path))
    return result


def _check_finite(names: tuple[str, ...], expected: list[Tensor]) -> None:
    """Nothing agrees with what is no number; a file that says the same would be as broken as its source."""
    for name, tensor in zip(names, expected, strict=True):
        if not tensor.isfinite().all():
            raise ExportError(
                f"the network itself gives {name} that are not finite (NaN or infinite), so no file of it is of use: "
                "is the checkpoint of a training that diverged?"
            )


def _check_shapes(names: tuple[str, ...], found: list[Tensor], expected: list[Tensor]) -> None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the exported model gives {names} of the shapes {shapes[0]}, its source {shapes[1]}")


def _compare(
    task: str, tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor], batch: tuple[Tensor, ...]
) -> list[_Sample]:
    """What each image of a batch gave."""
    if task == "detection":
        return list(_compare_detections(tally, found, expected))
    if task == "segmentation":
        return list(_compare_labels(tally, found, expected, batch[1]))
    return list(_compare_classes(tally, found, expected))


def _compare_classes(tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[_Sample]:
    for name, tensor in expected.items():
        tally.add(name, found[name], tensor)
    first = next(iter(expected))
    for same in (found[first].argmax(-1) == expected[first].argmax(-1)).tolist():
        yield _Sample(same_class=same)


def _compare_detections(tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor]) -> Iterator[_Sample]:
    for image in partners(found, expected):
        for name, tensor in image.expected.items():
            tally.add(name, image.found[name], tensor)
        yield _Sample(matched=image.matched)


def _compare_labels(
    tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor], sizes: Tensor
) -> Iterator[_Sample]:
    """Labels inside the images; what a network says of their padding has no meaning."""
    tally.add("logits", found["logits"], expected["logits"])
    for own, wanted, (height, width) in zip(found["labels"], expected["labels"], sizes.tolist(), strict=True):
        other = own[:height, :width] != wanted[:height, :width]
        yield _Sample(pixels=other.numel(), other_labels=int(other.sum()))


def _result(task: str, tally: _Tally, tolerance: float) -> tuple[Parity, Matched]:
    samples = tally.samples.values()
    pixels = sum(sample.pixels for sample in samples)
    same = pixels - sum(sample.other_labels for sample in samples)
    matched = sum((sample.matched for sample in samples), Matched())
    return Parity(
        images=len(samples),
        errors=tally.errors(),
        differences=dict(tally.differences),
        tolerance=tolerance,
        top1=sum(sample.same_class for sample in samples) / max(len(samples), 1) if task == "classification" else None,
        detections=matched.detections if task == "detection" else None,
        unmatched=matched.unmatched if task == "detection" else None,
        labels=same / max(pixels, 1) if task == "segmentation" else None,
    ), matched


def _check(result: Parity, matched: Matched, path: str) -> None:
    if not result.images:
        raise ExportError("nothing to compare: no image was given")
    if not result.error <= result.tolerance:
        worst = result.worst
        raise ExportError(
            f"{path} disagrees with its source: {worst} differs by {result.differences[worst]:.3g}, which is "
            f"{result.error:.3g} of its largest value (allowed: {result.tolerance:g}), over {result.images} images"
        )
    if result.labels is not None and not 1 - result.labels <= OTHER_LABELS:
        raise ExportError(
            f"{path} disagrees with its source: {100 * (1 - result.labels):.3g} % of the pixels of {result.images} "
            f"images have another label (allowed: {100 * OTHER_LABELS:g} %)"
        )
    allowed = matched.allowed(_UNMATCHED)
    if matched.unmatched > allowed:
        raise ExportError(
            f"{path} disagrees with its source: of {matched.detections} detections in {result.images} images, "
            f"{matched.unmatched} of either side have no partner of the same class and place (allowed: {allowed})"
        )
