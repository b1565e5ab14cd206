"""What real data sets hold and small ones do not: crowds, hundreds of objects, single pixels, nothing at all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from effvit.datamodules import CocoDetection

WIDTH, HEIGHT = 96, 64
CROWD, MANY, PIXEL, EMPTY, PLAIN = 1, 2, 3, 4, 5


@pytest.fixture
def scenes(tmp_path, make_coco, save_coco):
    """Five images: a crowd alone, 300 objects, an object of one pixel, nothing, one plain object."""
    many = [(float(x), float(y), 5.0, 3.0) for x, y in itertools.product(range(0, 90, 6), range(0, 60, 3))]
    assert len(many) == 300
    boxes = [(MANY, (1, 3, 90)[i % 3], box) for i, box in enumerate(many)]
    boxes += [(PIXEL, 3, (17.0, 23.0, 1.0, 1.0)), (PLAIN, 90, (10.0, 20.0, 30.0, 16.0))]
    data = make_coco([(number, WIDTH, HEIGHT) for number in range(1, 6)], [(CROWD, 1, (8.0, 8.0, 40.0, 30.0)), *boxes])
    crowd = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    crowd[8:38, 8:48] = 1
    counts = mask_api.encode(crowd)["counts"].decode()
    data["annotations"][0] |= {"iscrowd": 1, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}
    save_coco(tmp_path, data, "train")
    save_coco(tmp_path, data, "val")
    return tmp_path


def load(root, **options):
    data = CocoDetection(
        str(root),
        **{"num_workers": 0, "image_size": (192, 128), "flip": 0.0, "masks": True, "batch_size": 5, **options},
    )
    data.setup("fit")
    return data


def targets_of(loader):
    return {target["image_id"]: target for _, targets in loader for target in targets}


def test_targets_of_each_scene(scenes):
    targets = targets_of(load(scenes, keep_empty=True).train_dataloader())
    assert {number: len(target["boxes"]) for number, target in targets.items()} == {
        CROWD: 0, MANY: 300, PIXEL: 1, EMPTY: 0, PLAIN: 1,
    }  # fmt: skip
    for target in targets.values():
        number = len(target["boxes"])
        assert target["boxes"].shape == (number, 4)
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].shape == (number,)
        assert target["masks"].shape == (number, HEIGHT, WIDTH)
        assert target["masks"].dtype == torch.uint8
        assert set(target["masks"].unique().tolist()) <= {0, 1}
    assert targets[PIXEL]["boxes"].tolist() == [[34.0, 46.0, 36.0, 48.0]]
    assert targets[PIXEL]["masks"].nonzero().tolist() == [[0, 23, 17]]
    assert targets[MANY]["labels"].tolist() == [0, 1, 2] * 100
    pixels = targets[MANY]["masks"].sum(dim=(1, 2), dtype=torch.int64)
    assert (pixels == 15).all()
    assert targets[MANY]["masks"].sum(0).max() == 1  # they do not overlap


def test_only_images_without_any_annotation_are_left_out_of_training(scenes):
    """A crowd is an annotation, as in the published recipes."""
    assert set(targets_of(load(scenes).train_dataloader())) == {CROWD, MANY, PIXEL, PLAIN}
    assert set(targets_of(load(scenes).val_dataloader())) == {CROWD, MANY, PIXEL, EMPTY, PLAIN}


def test_empty_images_in_every_position_of_a_batch(scenes):
    """Orders of twelve seeds put the crowd and the empty image first, last and in between."""
    places = set()
    for seed in range(12):
        ((images, targets),) = load(scenes, keep_empty=True, seed=seed, masks=False).train_dataloader()
        assert images.shape == (5, 3, 128, 192)
        places |= {i for i, target in enumerate(targets) if not len(target["boxes"])}
    assert places == set(range(5))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_batches_of_empty_images_alone(scenes, batch_size):
    batches = list(load(scenes, keep_empty=True, batch_size=batch_size, flip=1.0).train_dataloader())
    assert sum(len(targets) for _, targets in batches) == 5
    for images, targets in batches:
        assert images.shape == (len(targets), 3, 128, 192)
        for target in targets:
            assert len(target["masks"]) == len(target["labels"]) == len(target["boxes"])


def test_the_ground_truth_is_whole(scenes):
    truth = load(scenes).ground_truth("validate")
    assert len(truth["images"]) == 5
    assert len(truth["annotations"]) == 303
    api = COCO()
    api.dataset = truth
    api.createIndex()
    (crowd,) = (annotation for annotation in truth["annotations"] if annotation["iscrowd"])
    assert int(api.annToMask(crowd).sum()) == 30 * 40
    assert api.getAnnIds(imgIds=[EMPTY]) == []


def test_ssds_augmentation_takes_each_scene(scenes):
    data = load(scenes, keep_empty=True, masks=False, resize="squash", augmentation="ssd", image_size=(64, 64))
    for _ in range(3):
        for target in targets_of(data.train_dataloader()).values():
            assert target["size"] == (64, 64)
            assert len(target["boxes"]) == len(target["labels"]) <= 300
            assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
