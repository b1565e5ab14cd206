"""Squashed images and SSD's augmentation: windows, colours, order of the steps, and the data module around them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effvit._cli.launch import INPUT_SETTINGS
from effvit.datamodules import CocoDetection
from effvit.datamodules._augment_ops import hue
from effvit.datamodules.images import ImageFiles
from effvit.datamodules.transforms import (
    IoUCrop,
    PhotometricDistort,
    SquashResize,
    eval_transform,
    train_transform,
)
from effvit.errors import ConfigError

BOXES = [[8.0, 12.0, 32.0, 24.0], [40.0, 20.0, 96.0, 60.0], [100.0, 8.0, 118.0, 70.0]]


def sample(boxes=BOXES, size=(80, 120)):
    """An image whose pixels tell their place: red counts columns, green counts rows."""
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([columns, rows, torch.full_like(rows, 77)]).to(torch.uint8)
    return {
        "image": tv_tensors.Image(pixels),
        "boxes": tv_tensors.BoundingBoxes(torch.tensor(boxes).reshape(-1, 4), format="XYXY", canvas_size=size),
        "labels": torch.arange(len(boxes)) + 5,
    }


# Squash


@pytest.mark.parametrize("scale", [(320, 320), (64, 200)])
def test_squash_gives_exactly_the_size_and_scales_each_axis(scale):
    out = eval_transform(scale, "squash")(sample())
    assert out["image"].shape == (3, scale[1], scale[0])
    factors = torch.tensor([scale[0] / 120, scale[1] / 80] * 2)
    torch.testing.assert_close(out["boxes"].as_subclass(torch.Tensor), torch.tensor(BOXES) * factors)
    pixels = sample()["image"].permute(1, 2, 0).contiguous().numpy()
    assert (out["image"].permute(1, 2, 0).numpy() == cv2.resize(pixels, scale)).all()


def test_squash_clips_boxes_and_takes_a_jitter():
    torch.manual_seed(0)
    transform = SquashResize((100, 50), jitter=(0.5, 1.0))
    sizes = {tuple(transform(sample([[-4.0, 0.0, 130.0, 99.0]]))["image"].shape[-2:]) for _ in range(20)}
    assert len(sizes) > 10
    assert all(abs(2 * height - width) <= 1 and 25 <= height <= 50 for height, width in sizes)
    assert SquashResize((60, 40))(sample([[-4.0, 0.0, 130.0, 99.0]]))["boxes"].tolist() == [[0.0, 0.0, 60.0, 40.0]]


# Crop


def test_crop_takes_windows_as_the_recipe_says():
    """200 crops: pixels, boxes and labels belong together, centres and overlaps are as asked for."""
    torch.manual_seed(0)
    crop = IoUCrop()
    originals = torch.tensor(BOXES)
    centres = (originals[:, :2] + originals[:, 2:]) / 2
    whole, best = 0, []
    for _ in range(200):
        out = crop(sample())
        height, width = out["image"].shape[-2:]
        whole += (height, width) == (80, 120)
        left, top = out["image"][:2, 0, 0].tolist()
        assert out["image"][:2, -1, -1].tolist() == [left + width - 1, top + height - 1]
        if (height, width) != (80, 120):
            assert 24 <= height <= 80
            assert 36 <= width <= 120
            assert 0.5 <= height / width <= 2
        window = torch.tensor([left, top, left + width, top + height], dtype=torch.float32)
        inside = ((window[:2] < centres) & (centres < window[2:])).all(1)
        assert out["labels"].tolist() == (inside.nonzero()[:, 0] + 5).tolist()
        kept = torch.minimum(torch.maximum(originals[inside], window[:2].repeat(2)), window[2:].repeat(2))
        assert torch.equal(out["boxes"].as_subclass(torch.Tensor), kept - window[:2].repeat(2))
        best.append(box_iou(window[None], originals).max().item())
    assert 20 <= whole <= 80  # one in six, and more where no window reaches the overlap
    assert min(best) >= 0.1
    assert len({round(value, 1) for value in best}) > 3


def test_crop_is_drawn_as_torchvision_draws_it():
    """The same distribution of areas and of kept objects as torchvision's loop over the same overlaps."""
    torch.manual_seed(0)
    theirs = v2.RandomIoUCrop(sampler_options=[0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    figures = []
    for crop in (IoUCrop(), v2.Compose([theirs, v2.SanitizeBoundingBoxes()])):
        outputs = [crop(sample()) for _ in range(100)]
        areas = torch.tensor([out["image"].shape[-2] * out["image"].shape[-1] / 9600 for out in outputs])
        figures.append((areas.mean().item(), sum(len(out["labels"]) for out in outputs) / 100))
    assert figures[0] == pytest.approx(figures[1], rel=0.15)


@pytest.mark.parametrize("size", [(80, 120), (1, 1), (3, 200), (4, 4)])
@pytest.mark.parametrize("boxes", [[], [[0.0, 0.0, 1.0, 1.0]], [[-3.0, -3.0, 400.0, 400.0]]])
def test_crop_takes_any_image(size, boxes):
    torch.manual_seed(0)
    for _ in range(10):
        out = IoUCrop()(sample(boxes, size))
        height, width = out["image"].shape[-2:]
        assert min(height, width) >= 1
        assert len(out["labels"]) == len(out["boxes"]) <= len(boxes)
        assert (out["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert (height, width) == size or boxes


def test_objects_of_less_than_a_pixel_go_with_their_labels():
    out = IoUCrop()(sample([[10.0, 10.0, 10.4, 40.0], [119.5, 10.0, 140.0, 40.0], [20.0, 20.0, 60.0, 60.0]]))
    assert 5 not in out["labels"].tolist()
    assert 6 not in out["labels"].tolist()


# Colours


@pytest.fixture(scope="module")
def photograph():
    return np.ascontiguousarray(load_sample_images().images[0][::4, ::4])


def test_colours_are_those_of_torchvision_on_pillow_images(photograph):
    """Each draw changes the picture as torchvision's transform changes the Pillow image, up to the steps of hue."""
    torch.manual_seed(0)
    transform = PhotometricDistort()
    tensor = tv_tensors.Image(torch.from_numpy(photograph).permute(2, 0, 1))
    apart, changed = [], 0
    for _ in range(40):
        params = transform.make_params([tensor])
        mine = transform.transform(tensor, params).permute(1, 2, 0).numpy()
        picture = Image.fromarray(photograph)
        order = params.pop("channel_permutation")
        theirs = np.asarray(v2.RandomPhotometricDistort().transform(picture, params | {"channel_permutation": None}))
        theirs = theirs if order is None else theirs[..., order.numpy()]
        apart.append(np.abs(mine.astype(int) - theirs).mean())
        changed += (mine != photograph).any()
        if params["hue_factor"] is None:
            assert apart[-1] < 0.01
    assert max(apart) < 2.5
    assert changed > 30


@pytest.mark.parametrize("shift", [-0.05, -0.01, 0.03, 0.05, 0.5])
def test_hue_is_torchvisions(photograph, shift):
    before = photograph.copy()
    mine = hue(photograph, shift).astype(int)
    theirs = np.asarray(F.adjust_hue(Image.fromarray(photograph), shift)).astype(int)
    assert np.abs(mine - theirs).mean() < 2.5
    assert (photograph == before).all()


# Together


def test_order_of_the_steps():
    names = [type(step).__name__ for step in train_transform((320, 320), 0.5, (1.0, 1.0), "squash", "ssd").transforms]
    assert names == ["IoUCrop", "PhotometricDistort", "RandomHorizontalFlip", "SquashResize"]
    names = [type(step).__name__ for step in train_transform((320, 320), 0.5, (1.0, 1.0)).transforms]
    assert names == ["KeepRatioResize", "RandomHorizontalFlip"]


def load(root, **options):
    options = {"num_workers": 0, "image_size": (64, 48), "resize": "squash", "augmentation": "ssd", **options}
    data = CocoDetection(str(root), **options)
    data.setup("fit")
    return data


def samples(loader):
    pairs = [pair for images, targets in loader for pair in zip(images, targets, strict=True)]
    return {target["image_id"]: (image, target) for image, target in pairs}


def test_batches_are_of_one_size_and_targets_belong_to_them(coco_root):
    data = load(coco_root, batch_size=4, keep_empty=True, pad_divisor=16)
    for images, targets in data.train_dataloader():
        assert images.shape == (len(targets), 3, 48, 64)
        assert images.dtype == torch.uint8
        for target in targets:
            boxes = target["boxes"]
            assert target["size"] == (48, 64)
            assert target["original_size"] in {(64, 96), (96, 64)}
            assert len(boxes) == len(target["labels"])
            assert target["labels"].dtype == torch.int64
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((boxes >= 0) & (boxes <= torch.tensor([64, 48, 64, 48]))).all()
    for images, targets in data.val_dataloader():
        assert images.shape == (1, 3, 48, 64)
        factors = torch.tensor([64 / targets[0]["original_size"][1], 48 / targets[0]["original_size"][0]] * 2)
        truth = data.ground_truth("validate")["annotations"]
        boxes = torch.tensor([a["bbox"] for a in truth if a["image_id"] == targets[0]["image_id"]]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(targets[0]["boxes"], boxes * factors)


def test_augmentation_depends_on_seed_epoch_and_image_alone(coco_root):
    first, again = (samples(load(coco_root, batch_size=size).train_dataloader()) for size in (2, 5))
    for image_id, (image, target) in first.items():
        assert torch.equal(image, again[image_id][0])
        assert torch.equal(target["boxes"], again[image_id][1]["boxes"])
        assert torch.equal(target["labels"], again[image_id][1]["labels"])
    other = samples(load(coco_root, seed=1).train_dataloader())
    assert any(not torch.equal(image, other[image_id][0]) for image_id, (image, _) in first.items())


def test_masks_follow_a_squash_but_no_crop(coco_root):
    data = load(coco_root, masks=True, augmentation="flip", flip=1.0)
    _, targets = next(iter(data.train_dataloader()))
    for target in targets:
        assert target["masks"].shape == (len(target["boxes"]), *target["original_size"])
        width = target["original_size"][1]
        for mask, box in zip(target["masks"], target["boxes"], strict=True):
            columns = mask.any(0).nonzero()
            edges = torch.stack([columns.min(), columns.max() + 1]) / width * 64
            torch.testing.assert_close(edges, box[[0, 2]], atol=1.1, rtol=0)
    with pytest.raises(
        ConfigError, match=r"'ssd' crops images, .*the detector learns them.*`--data.augmentation flip`"
    ):
        load(coco_root, masks=True)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"resize": "sqash"},
            r"resize must be one of \('keep_ratio', 'align', 'squash'\), found 'sqash'. Did you mean 'squash'",
        ),
        ({"augmentation": "sd"}, r"augmentation must be one of \('flip', 'ssd'\), found 'sd'. Did you mean 'ssd'"),
    ],
)
def test_unknown_names_are_refused(coco_root, option, message):
    with pytest.raises(ConfigError, match=message):
        CocoDetection(str(coco_root), **option)


def test_files_to_predict_on_are_squashed_too(coco_root):
    data = ImageFiles(str(coco_root / "val"), batch_size=6, image_size=(64, 48), resize="squash", pad_divisor=16)
    data.setup("predict")
    (images, targets), *_ = data.predict_dataloader()
    assert images.shape == (6, 3, 48, 64)
    assert {target["size"] for target in targets} == {(48, 64)}
    with pytest.raises(ConfigError, match="resize must be one of"):
        ImageFiles(str(coco_root / "val"), resize="crop")


def test_a_checkpoint_keeps_how_images_are_resized(coco_root):
    data = load(coco_root)
    kept = {name: getattr(data, name) for name in INPUT_SETTINGS if hasattr(data, name)}
    assert kept == {"image_size": (64, 48), "resize": "squash", "pad_divisor": 32}
    ImageFiles(str(coco_root / "val"), **kept)
