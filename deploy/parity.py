"""Whether an exported file says what its source says, on given images."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from effvit.deploy._formats_source import Deployable, as_list
from effvit.errors import ExportError

if TYPE_CHECKING:
    from effvit.deploy.exported import Exported

#: Overlap from which two boxes of a class are the same detection. Where suppression kept another one of two boxes that
#: lie almost alike, what comes out of it is another detection, not a rounded one.
SAME = 0.99
#: Share of detections that may be without a partner: rounding can turn the order of two scores, or an overlap or a
#: score at the threshold, and with it what non-maximum suppression keeps. One such turn leaves two, one of either side.
_UNMATCHED = 0.01
_ONE_TURN = 2


@dataclass(frozen=True)
class Parity:
    """How far an exported file is from its source.

    Attributes:
        images: How many were compared.
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


@dataclass
class _Tally:
    """Largest values so far."""

    differences: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    largest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    images: int = 0
    same_class: int = 0
    detections: int = 0
    unmatched: int = 0

    def add(self, name: str, found: Tensor, expected: Tensor) -> None:
        """Compares one output; NaN on one side only counts as infinitely far."""
        if not expected.numel():
            self.differences[name] = max(self.differences[name], 0.0)
            return
        found, expected = found.double(), expected.double()
        gap = (found - expected).abs()
        gap[found.isnan() & expected.isnan()] = 0
        self.differences[name] = max(self.differences[name], gap.nan_to_num(nan=math.inf, posinf=math.inf).max().item())
        self.largest[name] = max(self.largest[name], expected.nan_to_num().abs().max().item())

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
            partner. The message names the worst output.
    """
    tally = _Tally()
    names = tuple(module.output_names)
    for batch in batches:
        with torch.no_grad():
            expected = [tensor.cpu() for tensor in as_list(module(*batch))]
        found = exported.run(*batch)
        _check_shapes(names, found, expected)
        tally.images += len(batch[0])
        compare = _compare_detections if module.task == "detection" else _compare_classes
        compare(tally, dict(zip(names, found, strict=True)), dict(zip(names, expected, strict=True)))
    result = _result(module.task, tally, exported.tolerance)
    _check(result, str(exported.path))
    return result


def _check_shapes(names: tuple[str, ...], found: list[Tensor], expected: list[Tensor]) -> None:
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"the exported model gives {names} of the shapes {shapes[0]}, its source {shapes[1]}")


def _compare_classes(tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        tally.add(name, found[name], tensor)
    first = next(iter(expected))
    tally.same_class += int((found[first].argmax(-1) == expected[first].argmax(-1)).sum())


def _compare_detections(tally: _Tally, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for index in range(len(expected["labels"])):
        ours, theirs = (
            {name: tensor[index][side["labels"][index] >= 0] for name, tensor in side.items()}
            for side in (found, expected)
        )
        rows, columns = match_detections(ours, theirs)
        tally.detections += len(theirs["labels"])
        tally.unmatched += len(ours["labels"]) + len(theirs["labels"]) - 2 * len(rows)
        for name in theirs:
            if name != "labels":
                tally.add(name, ours[name][rows], theirs[name][columns])


def match_detections(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], least_overlap: float = SAME
) -> tuple[Tensor, Tensor]:
    """Pairs the detections of one image by class and overlap, each with the partner it overlaps most.

    Args:
        found: ``boxes`` ``(N, 4)`` xyxy and ``labels`` ``(N,)``.
        expected: The same of ``M`` detections.
        least_overlap: Overlap (IoU) that partners have at least.

    Returns:
        Positions among `found` and positions among `expected`, of the same length.
    """
    overlap = box_iou(found["boxes"].double(), expected["boxes"].double())
    overlap[found["labels"][:, None] != expected["labels"]] = 0
    pairs = []
    for _ in range(min(overlap.shape)):
        best = int(overlap.argmax())
        row, column = divmod(best, overlap.shape[1])
        if not overlap[row, column] >= least_overlap:
            break
        pairs.append((row, column))
        overlap[row], overlap[:, column] = -1, -1
    rows = torch.tensor([row for row, _ in pairs], dtype=torch.long)
    return rows, torch.tensor([column for _, column in pairs], dtype=torch.long)


def _result(task: str, tally: _Tally, tolerance: float) -> Parity:
    detects = task == "detection"
    return Parity(
        images=tally.images,
        errors=tally.errors(),
        differences=dict(tally.differences),
        tolerance=tolerance,
        top1=None if detects else tally.same_class / max(tally.images, 1),
        detections=tally.detections if detects else None,
        unmatched=tally.unmatched if detects else None,
    )


def _check(result: Parity, path: str) -> None:
    if not result.images:
        raise ExportError("nothing to compare: no image was given")
    if not result.error <= result.tolerance:
        worst = result.worst
        raise ExportError(
            f"{path} disagrees with its source: {worst} differs by {result.differences[worst]:.3g}, which is "
            f"{result.error:.3g} of its largest value (allowed: {result.tolerance:g}), over {result.images} images"
        )
    if result.unmatched is not None and result.detections is not None:
        allowed = max(_ONE_TURN, math.floor(_UNMATCHED * 2 * result.detections))
        if result.unmatched > allowed:
            raise ExportError(
                f"{path} disagrees with its source: of {result.detections} detections in {result.images} images, "
                f"{result.unmatched} of either side have no partner of the same class and place (allowed: {allowed})"
            )
