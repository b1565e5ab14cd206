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
        top1: Share of images with the source's first class; ``None`` of a detector.
        detections: How many the source finds; ``None`` of a classifier.
        unmatched: Detections of either side that the other has not, by class and an overlap of 0.99.
    """

    images: int
    errors: Mapping[str, float]
    differences: Mapping[str, float]
    tolerance: float
    top1: float | None = None
    detections: int | None = None
    unmatched: int | None = None

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
        }


@dataclass(frozen=True)
class _Sample:
    """What one image gave."""

    same_class: bool = True
    matched: Matched = field(default_factory=Matched)

    def worse(self, other: _Sample) -> _Sample:
        """Of the same image in two batches, what counts."""
        matched = max(self.matched, other.matched, key=lambda one: one.unmatched)
        return _Sample(self.same_class and other.same_class, matched)


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
    turn the order of two that score alike; boxes, scores and masks are compared between partners.

    Args:
        module: The source, in eval mode.
        exported: The file, opened.
        batches: What ``forward`` takes, as often as wanted.

    Returns:
        The largest differences over all batches.

    Raises:
        ExportError: An output differs by more than the format's tolerance, or more than 1 % of the detections have no
            partner. The message names the worst output. Also where the source's own outputs are not finite.
    """
    tally = _Tally()
    names = tuple(module.output_names)
    for batch in batches:
        with torch.no_grad():
            expected = [tensor.cpu() for tensor in as_list(module(*batch))]
        _check_finite(names, expected)
        found = exported.run(*batch)
        _check_shapes(names, found, expected)
        compare = _compare_detections if module.task == "detection" else _compare_classes
        ours, theirs = (dict(zip(names, tensors, strict=True)) for tensors in (found, expected))
        tally.note(batch, list(compare(tally, ours, theirs)))
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


def _result(task: str, tally: _Tally, tolerance: float) -> tuple[Parity, Matched]:
    detects = task == "detection"
    samples = tally.samples.values()
    matched = sum((sample.matched for sample in samples), Matched())
    return Parity(
        images=len(samples),
        errors=tally.errors(),
        differences=dict(tally.differences),
        tolerance=tolerance,
        top1=None if detects else sum(sample.same_class for sample in samples) / max(len(samples), 1),
        detections=matched.detections if detects else None,
        unmatched=matched.unmatched if detects else None,
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
    allowed = matched.allowed(_UNMATCHED)
    if matched.unmatched > allowed:
        raise ExportError(
            f"{path} disagrees with its source: of {matched.detections} detections in {result.images} images, "
            f"{matched.unmatched} of either side have no partner of the same class and place (allowed: {allowed})"
        )
