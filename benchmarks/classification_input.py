"""ImageNet training input, ours against torchvision v2 on Pillow: ``python benchmarks/classification_input.py --help``.

Both read 500x375 JPEG files (quality 90), crop and resize them to 224, flip, and apply RandAugment, torchvision's list
of operations with its nearest-pixel interpolation. The peer ends with a normalised float batch; ours with a uint8 batch
that the device normalises, or normalised on the same core. The pictures are scikit-learn's two sample photographs,
cropped and brightened at random.

Before it measures, the script compares crop, flip and every operation of both sides, and stops where they disagree.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from _ruler import environment, measure, to_markdown
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effvit.datamodules import _augment_ops as ops
from effvit.datamodules._decode import read_image
from effvit.datamodules._image_samples import TrainImages, collate
from effvit.datamodules._image_sources import FileImages
from effvit.datamodules._rand_augment import TORCHVISION
from effvit.datamodules.augmentation import Augmentation, Policy, train_transform

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, HEIGHT, SIZE, BATCH = 500, 375, 224, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Largest mean difference of an operation in grey levels: rounding in the resize; nearest-pixel rotation and the colour
#: blend differ in one value of 1,000, and all else is equal.
TOLERANCE = 0.05
MAGNITUDE = 9


def write_data(root: Path, number: int) -> list[Path]:
    """Writes photographs as JPEG files."""
    random = np.random.default_rng(0)
    photographs = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in load_sample_images().images]
    files = []
    for index in range(number):
        photograph = photographs[index % 2]
        side = random.uniform(0.6, 1.0)
        h, w = int(photograph.shape[0] * side), int(photograph.shape[1] * side)
        y, x = random.integers(0, photograph.shape[0] - h + 1), random.integers(0, photograph.shape[1] - w + 1)
        crop = cv2.resize(photograph[y : y + h, x : x + w], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        crop = cv2.convertScaleAbs(crop, alpha=random.uniform(0.7, 1.3))
        files.append(root / f"{index}.jpg")
        cv2.imwrite(str(files[-1]), crop, [cv2.IMWRITE_JPEG_QUALITY, 90])
    return files


def peer(files: list[Path], *, augment: bool, interpolation: str) -> Callable[[], torch.Tensor]:
    """Torchvision v2 on Pillow images; each call makes one batch."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, interpolation=v2.InterpolationMode(interpolation), antialias=True),
            v2.RandomHorizontalFlip(),
            *([v2.RandAugment(2, MAGNITUDE)] if augment else []),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    turn = itertools.cycle(files)

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert("RGB"))

    return lambda: torch.stack([read(next(turn)) for _ in range(BATCH)])


def ours(
    files: list[Path], *, policy: Policy, interpolation: str, normalise: bool = False
) -> Callable[[], torch.Tensor]:
    """Our pipeline, through the data set and the collation of every classification set; each call makes one batch."""
    source = FileImages(files[0].parent, [path.name for path in files], [0] * len(files))
    transform = train_transform(Augmentation(policy=policy, magnitude=MAGNITUDE), interpolation)
    dataset = TrainImages(source, transform, seed=0, skip=False)
    keys = ((epoch, index, 0, SIZE) for epoch in itertools.count() for index in range(len(files)))
    mean, std = (torch.tensor(values).mul(255).view(3, 1, 1) for values in (MEAN, STD))

    def batch() -> torch.Tensor:
        images, _ = collate([dataset[next(keys)] for _ in range(BATCH)])
        return images.float().sub_(mean).div_(std) if normalise else images

    return batch


def check_equal(files: list[Path]) -> None:
    """Stops unless both sides give the same pixels for the same crop, flip and operation."""
    theirs = v2.RandAugment(2, MAGNITUDE)
    assert list(TORCHVISION) == list(theirs._AUGMENTATION_SPACE)  # noqa: SLF001
    for path in files[:4]:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        image = read_image(path).permute(1, 2, 0).numpy()
        assert np.array_equal(image, picture), f"{path}: decoded otherwise"
        for mode in ("bilinear", "bicubic"):
            resized = F.resized_crop(picture, 20, 30, 300, 350, [SIZE, SIZE], v2.InterpolationMode(mode), True)
            _compare(f"resized crop, {mode}", ops.resize(image[20:320, 30:380], SIZE, mode), resized, TOLERANCE)
        pixels = np.array(resized)
        _compare("flip", ops.flip(pixels), F.horizontal_flip(resized), 0)
        for name, entry in TORCHVISION.items():
            magnitudes, signed = theirs._AUGMENTATION_SPACE[name]  # noqa: SLF001
            assert signed == entry.signed, name
            values = magnitudes(31, SIZE, SIZE)
            for sign in (1, -1) if signed else (1,):
                value = 0.0 if values is None else sign * float(values[MAGNITUDE])
                result = theirs._apply_image_or_video_transform(  # noqa: SLF001
                    resized, name, value, v2.InterpolationMode.NEAREST, {Image.Image: None}
                )
                mine = entry.apply(pixels, sign * MAGNITUDE / 30, "nearest", (0, 0, 0))
                _compare(name, mine, result, TOLERANCE)


def _compare(name: str, mine: np.ndarray, theirs: Image.Image, tolerance: float) -> None:
    difference = np.abs(mine.astype(int) - np.asarray(theirs).astype(int)).mean()
    if difference > tolerance:
        raise SystemExit(f"{name}: mean difference {difference:.3f} grey levels, allowed {tolerance}")


def main() -> None:
    """Measures and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="how often each variant is visited")
    parser.add_argument("--images", type=int, default=64, help="pictures to write and read")
    parser.add_argument(
        "--interpolation",
        choices=("bilinear", "bicubic"),
        nargs="+",
        default=["bilinear", "bicubic"],
        help="of the resized crop: torchvision's default, and that of the published recipes",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder), options.images)
        check_equal(files)
        rows = []
        for how, augment in itertools.product(options.interpolation, (True, False)):
            policy: Policy = "rand_augment_torchvision" if augment else "none"
            variants: dict[str, Callable[[], object]] = {
                "torchvision v2, Pillow": peer(files, augment=augment, interpolation=how),
                "ours": ours(files, policy=policy, interpolation=how),
                "ours, normalised on the same core": ours(files, policy=policy, interpolation=how, normalise=True),
            }
            title = f"{'RandAugment' if augment else 'crop and flip only'}, {how}"
            rows.append(measure(title, variants, items=BATCH, rounds=options.rounds))
        print(to_markdown(rows), end="\n\n")
    print(environment())


if __name__ == "__main__":
    main()
