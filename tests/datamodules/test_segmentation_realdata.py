"""Real photographs with the semantic masks of COCO: category ids with gaps, 0 = unlabelled."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from effvit.datamodules import SegmentationFolder, inspect_masks

pytestmark = pytest.mark.realdata


@pytest.fixture
def coco_semantic(real_data):
    return real_data / "coco_semantic"


def test_masks_are_the_files_with_labels_in_the_order_of_the_ids(coco_semantic):
    data = SegmentationFolder(str(coco_semantic), num_workers=0, image_size=(256, 128))
    names = {int(key): name for key, name in json.loads((coco_semantic / "classes.json").read_text()).items()}
    del names[0]  # "unlabeled"
    assert data.categories == names
    ids = np.array([*sorted(names), 0])  # the label -1 gives the last
    data.setup("validate")
    seen = 0
    for images, (target,) in data.val_dataloader():
        mask = target["mask"].numpy()
        path = coco_semantic / target["file_name"].replace("images", "masks").replace(".jpg", ".png")
        assert (ids[mask] == np.asarray(Image.open(path))).all()
        assert mask.shape == target["original_size"]
        assert images.shape[2] % 32 == images.shape[3] % 32 == 0
        assert target["size"] == tuple(images.shape[2:])
        seen += 1
    assert seen == 50


def test_training_crops(coco_semantic):
    data = SegmentationFolder(str(coco_semantic), num_workers=0, image_size=(512, 128), crop_size=(128, 128))
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert sum(len(targets) for _, targets in batches) == 50
    largest = []
    for images, targets in batches:
        assert images.shape[2:] == (128, 128)
        for target in targets:
            assert target["mask"].max() < data.num_classes
            labels = target["mask"][target["mask"] >= 0].long()
            largest.append(float(labels.bincount().max() / labels.numel()))
    assert np.mean(np.array(largest) < 0.75) > 0.6  # crops of one class are drawn again


def test_the_check_counts_every_pixel(coco_semantic):
    report = inspect_masks(coco_semantic)
    assert report.ok, str(report)
    assert {split: held.num_images for split, held in report.contents.items()} == {"train": 50, "val": 50}
    values = np.concatenate([np.asarray(Image.open(path)).ravel() for path in (coco_semantic / "masks/val").iterdir()])
    counts = np.bincount(values, minlength=256)
    val = report.contents["val"]
    assert val.ignored == counts[0]
    assert val.total == counts.sum()
    ids = list(SegmentationFolder(str(coco_semantic)).categories)
    assert val.pixels.tolist() == counts[ids].tolist()
