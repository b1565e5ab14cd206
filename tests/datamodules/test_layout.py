"""Where the splits of a data set are found."""

from __future__ import annotations

import json

import pytest

from effvit.datamodules.coco import CocoDetection
from effvit.errors import DatasetError


def place(root, coco, annotations, images):
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(coco))
    (root / images).mkdir(parents=True, exist_ok=True)
    for entry in coco["images"]:
        (root / images / entry["file_name"]).touch()


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}.json", "{}"),
        ("{}/_annotations.coco.json", "{}"),
    ],
)
def test_layouts(tmp_path, make_coco, annotations, images):
    coco = make_coco([(1, 9, 9)], [(1, 1, (1.0, 1.0, 5.0, 5.0))])
    for split in ("train", "val", "test"):
        place(tmp_path, coco, annotations.format(split), images.format(split))
    data = CocoDetection(str(tmp_path), num_workers=0)
    data.setup("fit")
    data.setup("test")
    assert data.test_dataloader().dataset.folder == tmp_path / images.format("test")
    assert data.val_dataloader().dataset.folder == tmp_path / images.format("val")


def test_roboflow_calls_it_valid(tmp_path, make_coco):
    coco = make_coco([(1, 9, 9)], [(1, 1, (1.0, 1.0, 5.0, 5.0))])
    place(tmp_path, coco, "valid/_annotations.coco.json", "valid")
    data = CocoDetection(str(tmp_path), num_workers=0)
    data.setup("validate")
    assert len(data.val_dataloader().dataset) == 1


def test_explicit_files(tmp_path, make_coco):
    coco = make_coco([(1, 9, 9)], [(1, 1, (1.0, 1.0, 5.0, 5.0))])
    place(tmp_path, coco, "labels/a.json", "pictures/a")
    data = CocoDetection(str(tmp_path), val_annotations="labels/a.json", val_images="pictures/a", num_workers=0)
    data.setup("validate")
    assert data.categories == {1: "disc", 3: "bar", 90: "ring"}


def test_no_such_folder(tmp_path):
    (tmp_path / "coco2017").mkdir()
    with pytest.raises(DatasetError, match=r"there is no folder .*coco2018.*where there is: coco2017/"):
        CocoDetection(str(tmp_path / "coco2018")).setup("fit")


def test_no_annotations_lists_what_was_looked_for_and_what_is_there(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "person_keypoints_train2017.json").touch()
    with pytest.raises(DatasetError) as error:
        CocoDetection(str(tmp_path)).setup("fit")
    for part in (
        "no annotations of the train split",
        "annotations/instances_train2017.json",
        "train/_annotations.coco.json",
        "annotations/person_keypoints_train2017.json",
        "train_annotations",
    ):
        assert part in str(error.value)


def test_missing_explicit_files(tmp_path, make_coco):
    with pytest.raises(DatasetError, match=r"no annotation file .*a\.json \(train_annotations\)"):
        CocoDetection(str(tmp_path), train_annotations="a.json").setup("fit")
    place(tmp_path, make_coco([], []), "a.json", "pictures")
    with pytest.raises(DatasetError, match=r"no image folder .*picture \(train_images\).*pictures/"):
        CocoDetection(str(tmp_path), train_annotations="a.json", train_images="picture").setup("fit")


def test_annotations_without_image_folder(tmp_path, make_coco):
    place(tmp_path, make_coco([], []), "annotations/instances_train.json", "elsewhere")
    with pytest.raises(DatasetError, match=r"not its image folder .*train; name it with train_images"):
        CocoDetection(str(tmp_path)).setup("fit")
