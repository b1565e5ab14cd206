"""Our detectors against MMDetection's, training step and inference step: ``python benchmarks/detectors.py --help``.

Both sides stand on the same backbone of ours with the same weights, MMDetection's with its own pyramid where that goes
on the backbone, and get the same normalised images, boxes and masks. A training step is losses, backward pass and
AdamW. An inference step goes from images to boxes and compressed masks in pixels of the original image; MMDetection's
masks are compressed as its ``CocoMetric`` does it. MMDetection gets its targets as its pipeline leaves them, with masks
already resized and padded, outside of the clock.

Ours is in channels_last memory, as our task and data bring it; MMDetection's is as its ``Runner`` has it. A row stops
where a loss differs by more than a thousandth, or the detections by more than a hundredth of a pixel. Needs the extra
``mmdet``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _ruler import Measurement, environment, in_own_process, measure, peak_memory, to_markdown
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import create_backbone
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.detectors._mmdet_checkpoint import load_mmdet
from effvit.tasks.detectors.factory import DetectorSettings, make_detector

#: MMDetection's configuration of each detector, the layer whose weights decide how much is found, and the deviation of
#: the classes' logits with which that is about as much as a trained detector finds.
DETECTORS = {
    "retinanet": ("retinanet/retinanet_r50_fpn_1x_coco.py", "bbox_head.retina_cls.weight", 0.6),
    "faster_rcnn": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "roi_head.bbox_head.fc_cls.weight", 3.0),
    "mask_rcnn": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "roi_head.bbox_head.fc_cls.weight", 3.0),
}
SIZES = {"256x256": (256, 256), "512x512": (512, 512), "800x1216": (800, 1216)}
STEPS = ("training", "inference")
CLASSES = 80
OBJECTS = 8
#: Share of the resized image's size that the original has, as 640x480 at (1333, 800).
ORIGINAL = 0.6
LOSSES_APART, PIXELS_APART = 1e-3, 1e-2


class Batch(NamedTuple):
    """Two images, normalised and padded, and what both sides are told of them."""

    images: Tensor
    sizes: list[tuple[int, int]]
    originals: list[tuple[int, int]]
    targets: list[dict[str, Any]]


def make_batch(size: tuple[int, int], device: str) -> Batch:
    """Smooth noise with elliptic objects of every size; the second image is padded."""
    random = torch.Generator().manual_seed(0)
    sizes = [size, (size[0] - 64, size[1])]
    originals = [(round(height * ORIGINAL), round(width * ORIGINAL)) for height, width in sizes]
    images = torch.zeros(2, 3, *size)
    targets = []
    for image, (height, width), original in zip(images, sizes, originals, strict=True):
        coarse = torch.randn(1, 3, height // 16, width // 16, generator=random)
        image[:, :height, :width] = nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
        sides = torch.exp(torch.empty(OBJECTS, 2).uniform_(math.log(16), math.log(height / 2), generator=random))
        corners = torch.rand(OBJECTS, 2, generator=random) * (torch.tensor([width, height]) - sides)
        boxes = torch.cat([corners, corners + sides], dim=1)
        labels = torch.randint(0, CLASSES, (OBJECTS,), generator=random)
        masks = torch.stack([_ellipse(box, original) for box in boxes * ORIGINAL])
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({name: value.to(device) for name, value in target.items()})
    return Batch(images.to(device), sizes, originals, targets)


def _ellipse(box: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1])[None] + 0.5
    x, y = (box[:2] + box[2:]) / 2
    width, height = box[2:] - box[:2]
    return (((columns - x) / width * 2) ** 2 + ((rows - y) / height * 2) ** 2 <= 1).to(torch.uint8)


def make_pair(kind: str, backbone: str, device: str) -> tuple[Detector, Detector]:
    """MMDetection's detector and ours, with the same weights, of which those of the classes find something."""
    from effvit.tasks.mmdetection import MMDetector

    torch.manual_seed(0)
    config, classifier, deviation = DETECTORS[kind]
    theirs = MMDetector(config, CLASSES, backbone=backbone).eval()
    with torch.no_grad():
        dense, regions = theirs(make_batch((256, 256), "cpu").images)
        logits = torch.cat([level.flatten() for level in dense]) if kind == "retinanet" else regions[0]
        theirs.model.get_parameter(classifier).mul_(deviation / logits.std())
    ours = make_detector(kind, create_backbone(backbone), CLASSES, DetectorSettings())
    load_mmdet(ours, theirs.model.state_dict(), "MMDetection's detector")
    return theirs.to(device), ours.to(device, memory_format=torch.channels_last)


def training_steps(kind: str, backbone: str, size: tuple[int, int], device: str) -> dict[str, Callable[[], Any]]:
    """A training step of each side; the call returns its losses."""
    from effvit.tasks.mmdetection import _samples

    theirs, ours = make_pair(kind, backbone, device)
    batch = make_batch(size, device)
    samples = _samples.describe(batch.images, batch.sizes, batch.originals, theirs.pad_divisor)
    _samples.add_objects(samples, batch.targets, masks=theirs.masks)
    own_images = batch.images.contiguous(memory_format=torch.channels_last)

    def losses_of_theirs() -> dict[str, Tensor]:
        _, values = theirs.model.parse_losses(theirs.model.loss(batch.images, samples))
        return {name: value for name, value in values.items() if name.startswith("loss_")}

    return {
        "MMDetection": _step(theirs, losses_of_theirs),
        "ours": _step(ours, lambda: ours.loss(own_images, batch.sizes, batch.targets)),
    }


def _step(detector: Detector, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, float]]:
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # as all published detectors of these backbones were trained
    optimizer = AdamW(detector.parameters(), lr=1e-7, weight_decay=0.05)

    def step() -> dict[str, float]:
        torch.manual_seed(0)  # both sides draw the same samples
        values = losses()
        optimizer.zero_grad()
        torch.stack(list(values.values())).sum().backward()
        optimizer.step()
        return {name: float(value) for name, value in values.items()}

    return step


def inference_steps(kind: str, backbone: str, size: tuple[int, int], device: str) -> dict[str, Callable[[], Any]]:
    """An inference step of each side; the call returns its detections."""
    theirs, ours = make_pair(kind, backbone, device)
    batch = make_batch(size, device)
    own_images = batch.images.contiguous(memory_format=torch.channels_last)
    theirs.eval()
    ours.eval()

    def step(detector: Detector, images: Tensor) -> list[dict[str, Any]]:
        with torch.inference_mode():
            found = detector.predict(images, batch.sizes, batch.originals)
            return [{name: value if name == "rles" else value.cpu() for name, value in one.items()} for one in found]

    return {"MMDetection": lambda: step(theirs, batch.images), "ours": lambda: step(ours, own_images)}


def check(step: str, variants: dict[str, Callable[[], Any]]) -> str:
    """Makes sure that both sides compute the same thing.

    Returns:
        How far they are apart, in words.

    Raises:
        RuntimeError: Too far. SystemExit would leave the parent of this process waiting.
    """
    theirs, ours = (variant() for variant in variants.values())
    if step == "training":
        if set(theirs) != set(ours):
            raise RuntimeError(f"losses of other names: {sorted(theirs)} and {sorted(ours)}")
        apart = max(abs(theirs[name] - ours[name]) / max(abs(theirs[name]), 1e-6) for name in theirs)
        if apart > LOSSES_APART:
            raise RuntimeError(f"the losses differ by {apart:.1%}: {theirs} and {ours}")
        return f"{len(ours)} losses at most {apart:.0e} apart, sum {sum(ours.values()):.3f}"
    counts = [len(found["scores"]) for found in ours]
    if counts != [len(found["scores"]) for found in theirs] or not all(counts):
        raise RuntimeError(f"{[len(found['scores']) for found in theirs]} and {counts} detections")
    apart = max(float((a["boxes"] - b["boxes"]).abs().max()) for a, b in zip(theirs, ours, strict=True))
    masks = [x["counts"] == y["counts"] for a, b in zip(theirs, ours, strict=True) for x, y in _masks(a, b)]
    if apart > PIXELS_APART or sum(masks) < 0.98 * len(masks):  # a pixel at 0.5 may fall on either side
        raise RuntimeError(f"boxes {apart:.1e} px apart, {sum(masks)} of {len(masks)} masks equal")
    equal = f", {sum(masks)} of {len(masks)} masks equal" if masks else ""
    return f"{counts} detections at most {apart:.0e} px apart{equal}"


def _masks(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(a.get("rles", []), b.get("rles", []), strict=True))


def _variants(step: str, kind: str, backbone: str, size: tuple[int, int], device: str) -> dict[str, Callable[[], Any]]:
    torch.set_num_threads(1)
    make = training_steps if step == "training" else inference_steps
    return make(kind, backbone, size, device)


def time_row(
    step: str, kind: str, backbone: str, size: tuple[int, int], device: str, rounds: int
) -> tuple[Measurement, str]:
    """Images per second of both sides, and what the check says."""
    variants = _variants(step, kind, backbone, size, device)
    agreement = check(step, variants)
    timed = {name: _waiting(variant) for name, variant in variants.items()} if device != "cpu" else variants
    title = f"{kind}, {step}, {backbone}, 2 images of {size[0]}x{size[1]}"
    return measure(title, timed, items=2, rounds=rounds), agreement


def _waiting(variant: Callable[[], Any]) -> Callable[[], Any]:
    """The call, over when the device is done."""

    def call() -> Any:
        result = variant()
        torch.cuda.synchronize()
        return result

    return call


def one_side(side: str, *row: Any) -> Callable[[], Any]:
    """A step of one side alone, for its memory."""
    return _variants(*row)[side]


def device_memory(side: str, *row: Any) -> float:
    """Peak memory that one side takes on the GPU in three steps, less what model and images take, in MB."""
    variant = one_side(side, *row)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        variant()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def memory_of(side: str, row: Sequence[Any]) -> float:
    """Peak memory of one side, see `peak_memory` and `device_memory`."""
    on_device = row[-1] != "cpu"
    peak: float = in_own_process(device_memory, side, *row) if on_device else peak_memory(one_side, side, *row)
    return peak


def _by_wall(measurement: Measurement) -> Measurement:
    """The same with wall rates in place of CPU rates: a GPU's work costs no CPU seconds."""
    results = [
        dataclasses.replace(result, cpu_rate=result.wall_rate, ratio=result.wall_ratio, ratio_range=(math.nan,) * 2)
        for result in measurement.results
    ]
    return dataclasses.replace(measurement, results=tuple(results))


def main() -> None:
    """Measures and prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--detectors", nargs="*", default=list(DETECTORS), choices=list(DETECTORS))
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--sizes", nargs="*", default=["512x512"], choices=list(SIZES))
    parser.add_argument("--backbone", default="efficientformer_l1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each side by itself")
    parser.add_argument("--json", type=Path, help="also write the measurements there, one JSON object a line")
    own = parser.parse_args()
    rows = [
        (step, kind, own.backbone, SIZES[size], own.device)
        for size in own.sizes
        for kind in own.detectors
        for step in own.steps
    ]
    measurements = []
    for row in rows:
        measurement, agreement = in_own_process(time_row, *row, own.rounds)
        measurements.append(measurement if own.device == "cpu" else _by_wall(measurement))
        print(f"- {measurement.title}: {agreement}; ours {measurements[-1].results[1].ratio:.2f} as fast", flush=True)
    unit = "img" if own.device == "cpu" else "img, by wall time and not"
    print("", to_markdown(measurements, unit=unit), sep="\n", end="\n\n")
    if own.memory:
        for row in rows:
            theirs, ours = (memory_of(side, row) for side in ("MMDetection", "ours"))
            print(f"- {row[1]}, {row[0]}, {row[3]}: peak memory {theirs:.0f} MB MMDetection, {ours:.0f} MB ours")
    print(environment())
    if own.json:
        own.json.write_text("".join(f"{m.to_json()}\n" for m in measurements), encoding="utf-8")


if __name__ == "__main__":
    main()
