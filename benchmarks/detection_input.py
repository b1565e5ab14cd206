"""Detection input, ours against an MMDetection-style OpenCV pipeline: ``python benchmarks/detection_input.py --help``.

Both read 640x480 JPEG files with 8 polygon masks each and end with a batch of two images at (1333, 800), padded to a
multiple of 32. The peer does what MMDetection's transforms do on the CPU: BGR decoding, one bitmap a polygon, image and
each mask resized, flip, float32 normalisation, padding. Ours leaves the batch as uint8 with masks at their source size.
The pictures are scikit-learn's two sample photographs, cropped and brightened at random.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from _ruler import environment, measure, to_markdown
from pycocotools import mask as mask_api
from sklearn.datasets import load_sample_images

from effvit.datamodules.coco import CocoDetection

if TYPE_CHECKING:
    from collections.abc import Callable

    from effvit.datamodules._samples import AnnotatedImages

WIDTH, HEIGHT, OBJECTS, BATCH, SCALE = 640, 480, 8, 2, (1333, 800)
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def write_data(root: Path, number: int) -> None:
    """Writes photographs with random 24-point blobs in COCO layout."""
    random = np.random.default_rng(0)
    photographs = [cv2.cvtColor(image, cv2.COLOR_RGB2BGR) for image in load_sample_images().images]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / "train").mkdir(parents=True)
    for image_id in range(1, number + 1):
        photograph = photographs[image_id % 2]
        side = random.uniform(0.6, 1.0)
        h, w = int(photograph.shape[0] * side), int(photograph.shape[1] * side)
        y, x = random.integers(0, photograph.shape[0] - h + 1), random.integers(0, photograph.shape[1] - w + 1)
        crop = cv2.resize(photograph[y : y + h, x : x + w], (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        crop = cv2.convertScaleAbs(crop, alpha=random.uniform(0.7, 1.3))
        cv2.imwrite(str(root / "train" / f"{image_id}.jpg"), crop, [cv2.IMWRITE_JPEG_QUALITY, 90])
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": WIDTH, "height": HEIGHT})
        annotations += [_blob(random, image_id, len(annotations) + n) for n in range(1, OBJECTS + 1)]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "blob"}]}
    (root / "annotations").mkdir()
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    (root / "val").symlink_to(root / "train")
    (root / "annotations" / "instances_val.json").write_text(json.dumps(data))


def _blob(random: np.random.Generator, image_id: int, number: int) -> dict[str, Any]:
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    radius = random.uniform(20, 110) * random.uniform(0.8, 1.2, 24)
    x = (random.uniform(0, WIDTH) + radius * np.cos(angles)).clip(0, WIDTH)
    y = (random.uniform(0, HEIGHT) + radius * np.sin(angles)).clip(0, HEIGHT)
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1,
        "bbox": [x.min(), y.min(), np.ptp(x), np.ptp(y)],
        "area": float(np.ptp(x) * np.ptp(y)),
        "iscrowd": 0,
        "segmentation": [np.stack([x, y], 1).ravel().round(2).tolist()],
    }


def peer(root: Path, *, masks: bool) -> Callable[[], Any]:
    """The MMDetection-style pipeline; each call makes one batch."""
    data = json.loads((root / "annotations" / "instances_train.json").read_text())
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in data["images"]}
    for annotation in data["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    pairs = itertools.cycle(zip(*[iter(data["images"])] * BATCH, strict=True))
    random = np.random.default_rng(0)
    return lambda: [
        _peer_sample(root / "train" / image["file_name"], objects[image["id"]], masks, random.random() < 0.5)
        for image in next(pairs)
    ]


def _peer_sample(path: Path, objects: list[dict[str, Any]], with_masks: bool, flip: bool) -> dict[str, torch.Tensor]:
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), dtype=np.uint8), cv2.IMREAD_COLOR)
    h, w = image.shape[:2]
    factor = min(SCALE[0] / max(h, w), SCALE[1] / min(h, w))
    size = int(w * factor + 0.5), int(h * factor + 0.5)
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.array([size[0] / w, size[1] / h] * 2, dtype=np.float32)
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    bitmaps = [_bitmap(entry["segmentation"], h, w) for entry in objects] if with_masks else []
    bitmaps = [cv2.resize(bitmap, size, interpolation=cv2.INTER_NEAREST) for bitmap in bitmaps]
    if flip:
        image = np.ascontiguousarray(image[:, ::-1])
        bitmaps = [bitmap[:, ::-1] for bitmap in bitmaps]
        boxes[:, [0, 2]] = size[0] - boxes[:, [2, 0]]
    pixels = image.astype(np.float32)
    cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, pixels)
    cv2.subtract(pixels, np.array(MEAN).reshape(1, -1), pixels)
    cv2.multiply(pixels, 1 / np.array(STD).reshape(1, -1), pixels)
    right, bottom = -size[0] % 32, -size[1] % 32
    pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_CONSTANT, value=0)
    out = {"img": torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), "boxes": torch.from_numpy(boxes)}
    if with_masks:
        out["masks"] = torch.from_numpy(np.pad(np.stack(bitmaps), ((0, 0), (0, bottom), (0, right))))
    return out


def _bitmap(polygons: list[list[float]], height: int, width: int) -> np.ndarray[Any, Any]:
    bitmap: np.ndarray[Any, Any] = mask_api.decode(mask_api.merge(mask_api.frPyObjects(polygons, height, width)))
    return bitmap


def peer_batch(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Collates the peer's images, which have one size here."""
    return torch.stack([sample["img"] for sample in samples])


def ours(root: Path, *, masks: bool, normalise: bool) -> Callable[[], Any]:
    """Our pipeline, through the datamodule's own data set and collation; each call makes one batch."""
    data = CocoDetection(str(root), batch_size=BATCH, num_workers=0, masks=masks)
    data.setup("fit")
    loader = data.train_dataloader()
    dataset: AnnotatedImages = loader.dataset  # type: ignore[assignment]
    keys = ((epoch, index) for epoch in itertools.count() for index in range(len(dataset)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def batch() -> Any:
        images, targets = loader.collate_fn([dataset[next(keys)] for _ in range(BATCH)])
        return (images.float().sub_(mean).div_(std) if normalise else images), targets

    return batch


def enlarge_masks(batch: tuple[torch.Tensor, list[dict[str, Any]]]) -> list[torch.Tensor]:
    """What keeping masks at source size saves: resizes all masks of an image together, as one image of 8 channels."""
    _, targets = batch
    out = []
    for target in targets:
        height, width = target["size"]
        channels = np.ascontiguousarray(target["masks"].permute(1, 2, 0).numpy())
        resized = cv2.resize(channels, (width, height), interpolation=cv2.INTER_NEAREST)
        out.append(torch.from_numpy(resized).permute(2, 0, 1))
    return out


def check_equal(root: Path) -> None:
    """Stops unless both pipelines give the same pixels, boxes and masks where nothing is flipped."""
    data = CocoDetection(str(root), num_workers=0, masks=True)
    data.setup("validate")
    truth = data.ground_truth("validate")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for image, (images, (target,)) in zip(truth["images"][:4], data.val_dataloader(), strict=False):
        objects = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        theirs = _peer_sample(root / "val" / image["file_name"], objects, with_masks=True, flip=False)
        height, width = target["size"]
        torch.testing.assert_close(((images[0] - mean) / std)[:, :height, :width], theirs["img"][:, :height, :width])
        torch.testing.assert_close(target["boxes"], theirs["boxes"], rtol=0, atol=1e-3)
        (masks,) = enlarge_masks((images, [target]))
        assert torch.equal(masks, theirs["masks"][:, :height, :width])


def main() -> None:
    """Measures and prints Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="how often each variant is visited")
    parser.add_argument("--images", type=int, default=40, help="pictures to write and read")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_data(root, options.images)
        check_equal(root)
        for title, masks in (("8 masks", True), ("boxes only", False)):
            theirs = peer(root, masks=masks)
            variants: dict[str, Callable[[], object]] = {
                "MMDetection style": lambda theirs=theirs: peer_batch(theirs()),
                "ours": ours(root, masks=masks, normalise=False),
                "ours, and normalised on the same core": ours(root, masks=masks, normalise=True),
            }
            if masks:
                enlarged = ours(root, masks=True, normalise=False)
                variants["ours, masks enlarged together"] = lambda enlarged=enlarged: enlarge_masks(enlarged())
            print(to_markdown([measure(title, variants, items=BATCH, rounds=options.rounds)]), end="\n\n")
    print(environment())


if __name__ == "__main__":
    main()
