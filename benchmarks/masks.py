"""Memory and time of turning 100 detections' masks into RLE at 1333x800: ``python benchmarks/masks.py --help``.

Both sides take the same 28x28 probabilities and boxes and end with compressed COCO masks, which must be equal. Ours
samples each mask where its box is and keeps its runs. The peer does what is usual outside: all masks of the image are
pasted at full size as floats (MMDetection's rule, ``grid_sample``), compared with one half, and encoded.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _ruler import environment, measure, peak_memory, to_markdown
from pycocotools import mask as mask_api
from torch import Tensor

from effvit.tasks.detectors.masks import paste

HEIGHT, WIDTH, INSTANCES = 800, 1333, 100
LAYOUTS = ("mixed", "full")


def make_masks(layout: str) -> tuple[Tensor, Tensor]:
    """Smooth random probabilities ``(100, 28, 28)``, and boxes of all sizes or of the whole image ``(100, 4)``."""
    random = torch.Generator().manual_seed(0)
    limits = torch.tensor([WIDTH, HEIGHT])
    sides = torch.rand(INSTANCES, 2, generator=random) ** 2 * limits + 8
    corners = torch.rand(INSTANCES, 2, generator=random) * (limits - sides).clamp(min=0)
    boxes = torch.cat([corners, (corners + sides).minimum(limits)], dim=1)
    if layout == "full":
        boxes = torch.tensor([[0.0, 0.0, WIDTH, HEIGHT]]).repeat(INSTANCES, 1)
    coarse = torch.randn(INSTANCES, 1, 6, 6, generator=random)
    return (F.interpolate(coarse, (28, 28), mode="bicubic")[:, 0] * 4).sigmoid(), boxes


def ours(layout: str) -> Callable[[], list[dict[str, Any]]]:
    """One image's masks, ours."""
    probabilities, boxes = make_masks(layout)
    return lambda: paste(probabilities, boxes, (HEIGHT, WIDTH))


def dense(layout: str) -> Callable[[], list[dict[str, Any]]]:
    """One image's masks through floats of the full size."""
    probabilities, boxes = make_masks(layout)

    def run() -> list[dict[str, Any]]:
        xs = (torch.arange(WIDTH) + 0.5 - boxes[:, 0:1]) / (boxes[:, 2:3] - boxes[:, 0:1]) * 2 - 1
        ys = (torch.arange(HEIGHT) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:4] - boxes[:, 1:2]) * 2 - 1
        shape = (INSTANCES, HEIGHT, WIDTH)
        grid = torch.stack([xs[:, None, :].expand(shape), ys[:, :, None].expand(shape)], dim=3)
        full = F.grid_sample(probabilities[:, None], grid, align_corners=False)[:, 0] >= 0.5
        return [mask_api.encode(np.asfortranarray(one.numpy(), dtype=np.uint8)) for one in full]

    return run


def main() -> None:
    """Checks, then prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    own = parser.parse_args()
    torch.set_num_threads(1)
    print(environment())
    rows = []
    for layout in LAYOUTS:
        variants = {"dense floats": dense(layout), "effvit": ours(layout)}
        found = [make() for make in variants.values()]
        apart = [one for one, other in zip(*found, strict=True) if one["counts"] != other["counts"]]
        assert not apart, f"{len(apart)} of {INSTANCES} masks differ"
        rows.append(measure(f"{INSTANCES} masks, {layout} boxes", variants, rounds=own.rounds, items=INSTANCES))
    print(to_markdown(rows, unit="mask"))
    print("\n| masks | dense floats, peak MB | effvit, peak MB |\n| --- | --- | --- |")
    for layout in LAYOUTS:
        print(f"| {layout} boxes | {peak_memory(dense, layout):.0f} | {peak_memory(ours, layout):.0f} |")


if __name__ == "__main__":
    main()
