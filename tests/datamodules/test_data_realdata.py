"""Real COCO images and a real fine-tuning data set."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO

from effvit.datamodules.coco import CocoDetection
from effvit.datamodules.inspection import inspect_coco
from effvit.errors import DatasetError

pytestmark = pytest.mark.realdata


@pytest.fixture
def coco_tiny(real_data):
    return real_data / "coco_tiny"


def test_coco_pixels_boxes_and_masks_are_those_of_opencv_and_pycocotools(coco_tiny):
    data = CocoDetection(str(coco_tiny), num_workers=0, masks=True, image_size=(667, 400))
    data.setup("validate")
    reference = COCO(str(coco_tiny / "annotations" / "instances_val2017.json"))
    assert len(data.categories) == data.num_classes == 80
    assert data.categories == {c["id"]: c["name"] for c in reference.loadCats(reference.getCatIds())}
    seen = 0
    for (image,), (target,) in data.val_dataloader():
        source = cv2.cvtColor(cv2.imread(str(coco_tiny / "val2017" / target["file_name"])), cv2.COLOR_BGR2RGB)
        h, w = target["size"]
        resized = cv2.resize(source, (w, h), interpolation=cv2.INTER_LINEAR)
        assert (image[:, :h, :w].permute(1, 2, 0).numpy() == resized).all()
        assert image[:, h:].sum() + image[:, :, w:].sum() == 0
        assert image.shape[1] % 32 == image.shape[2] % 32 == 0
        annotations = [a for a in reference.imgToAnns[target["image_id"]] if not a["iscrowd"]]
        boxes = np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes *= np.array([w / source.shape[1], h / source.shape[0]] * 2)
        np.testing.assert_allclose(target["boxes"].numpy(), boxes.clip(0, [w, h, w, h]), atol=1e-2)
        ids = sorted(data.categories)
        assert target["labels"].tolist() == [ids.index(a["category_id"]) for a in annotations]
        for mask, annotation in zip(target["masks"].numpy(), annotations, strict=True):
            assert (mask == reference.annToMask(annotation)).all()
        seen += 1
    assert seen == 50


def test_coco_training_split(coco_tiny):
    data = CocoDetection(str(coco_tiny), num_workers=0, image_size=(333, 200))
    data.setup("fit")
    targets = [target for _, batch in data.train_dataloader() for target in batch]
    assert len({target["image_id"] for target in targets}) == len(targets) == 49  # one image has no annotation
    assert sum(len(target["labels"]) for target in targets) == 465
    truth = data.ground_truth("validate")
    assert sum(annotation["iscrowd"] for annotation in truth["annotations"]) == 5


def test_blood_cells_has_two_boxes_without_area(real_data):
    root = real_data / "blood_cells"
    with pytest.raises(DatasetError) as error:
        CocoDetection(str(root)).setup("fit")
    assert str(error.value).count("has no area") == 2
    assert "image 343, annotation 2288, file BloodImage_00343.jpg" in str(error.value)
    assert "--data.faults skip" in str(error.value)
    data = CocoDetection(str(root), faults="skip", num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert data.categories == {1: "RBC", 2: "WBC", 3: "Platelets"}
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert sizes == [205, 87, 72]
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (2, 3, 800, 1088)
    assert images.dtype == torch.uint8


def test_reports(real_data):
    root = real_data / "blood_cells"
    report = inspect_coco(root / "annotations" / "instances_train.json", root / "train")
    assert [(fault.kind, fault.image_id, fault.annotation_id) for fault in report.faults] == [("no-area", 343, 2288)]
    assert report.class_counts == {"RBC": 2382, "WBC": 214, "Platelets": 209}
    coco = real_data / "coco_tiny"
    for split in ("train2017", "val2017"):
        assert inspect_coco(coco / "annotations" / f"instances_{split}.json", coco / split).ok
