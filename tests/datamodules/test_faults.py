"""Every fault of a data set: its message, what the policies do, and the report of ``effvit check-data``."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from pycocotools import mask as mask_api

from effvit.datamodules._segmentations import segmentation_fault
from effvit.datamodules.coco import CocoDetection
from effvit.datamodules.inspection import inspect_coco
from effvit.errors import DatasetError

GOOD = (1, 1, (4.0, 4.0, 20.0, 20.0))


@pytest.fixture
def faulty(tmp_path, make_coco, save_coco):
    """``faulty(change)`` writes a sound data set whose training JSON was changed by a function."""

    def make(change):
        coco = make_coco(
            [(1, 96, 64), (2, 96, 64)], [GOOD, (2, 3, (10.0, 10.0, 30.0, 30.0)), (2, 90, (1.0, 1.0, 9.0, 9.0))]
        )
        save_coco(tmp_path, coco, "train")
        save_coco(tmp_path, coco, "val")
        change(coco)
        (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(coco))
        return tmp_path

    return make


def set_box(*box):
    return lambda coco: coco["annotations"][1].update(bbox=list(box))


def duplicate(key, position):
    return lambda coco: coco[key].append(dict(coco[key][position]))


# name: (change, kind, part of the message, annotations left by "skip", annotations left by "clip")
FAULTS = {
    "undeclared category": (
        lambda coco: coco["annotations"][1].update(category_id=2),
        "unknown-category",
        r"image 2, annotation 2, file 000002\.jpg: category_id 2 is not declared; declared ids: \[1, 3, 90\]",
        {1: 1, 2: 1},
    ),
    "no area": (
        set_box(10, 10, 0, 5),
        "no-area",
        r"image 2, annotation 2, file 000002\.jpg: bbox \[10, 10, 0, 5\] has no area",
        {1: 1, 2: 1},
    ),
    "negative size": (set_box(10, 10, 5, -5), "no-area", r"has no area", {1: 1, 2: 1}),
    "NaN": (set_box(10, math.nan, 5, 5), "not-finite", r"bbox \[10, nan, 5, 5\] holds NaN or infinity", {1: 1, 2: 1}),
    "infinite": (set_box(10, 10, math.inf, 5), "not-finite", "holds NaN or infinity", {1: 1, 2: 1}),
    "partly outside": (
        set_box(80, 10, 30, 10),
        "outside",
        r"annotation 2, .*bbox \[80, 10, 30, 10\] reaches 14 px beyond the image of 96x64 pixels",
        {1: 1, 2: 1},
    ),
    "wholly outside": (
        set_box(100, 10, 30, 10),
        "wholly-outside",
        r"annotation 2, .*lies outside the image of 96x64 pixels",
        {1: 1, 2: 1},
    ),
    "three numbers": (set_box(10, 10, 30), "bad-box", r"must be four numbers .*found \[10, 10, 30\]", {1: 1, 2: 1}),
    "text": (set_box("10", 10, 30, 4), "bad-box", "must be four numbers", {1: 1, 2: 1}),
    "no box": (
        lambda coco: coco["annotations"][1].pop("bbox"),
        "bad-box",
        "must be four numbers .*found None",
        {1: 1, 2: 1},
    ),
    "duplicate image id": (
        duplicate("images", 0),
        "duplicate-image-id",
        r"image 1, file 000001\.jpg: the id belongs to 000001\.jpg already",
        {1: 1, 2: 2},
    ),
    "duplicate annotation id": (
        duplicate("annotations", 0),
        "duplicate-annotation-id",
        r"image 1, annotation 1, .*an annotation before has the same id",
        {1: 1, 2: 2},
    ),
    "unknown image": (
        lambda coco: coco["annotations"][1].update(image_id=77),
        "unknown-image",
        r"image 77, annotation 2: image_id 77 is not among the images",
        {1: 1, 2: 1},
    ),
    "no annotation id": (
        lambda coco: coco["annotations"][1].pop("id"),
        "bad-annotation",
        r"annotations\[1\] needs an integer 'id'",
        {1: 1, 2: 1},
    ),
    "no image width": (
        lambda coco: coco["images"][1].update(width=0),
        "bad-image",
        "width and height must be positive integers, found width 0, height 64",
        {1: 1},
    ),
    "no file name": (
        lambda coco: coco["images"][1].pop("file_name"),
        "bad-image",
        r"images\[1\] needs an integer 'id' and a 'file_name'",
        {1: 1},
    ),
    "missing file": (
        lambda coco: coco["images"][1].update(file_name="gone.jpg"),
        "missing-file",
        r"image 2, file gone\.jpg: there is no such file in .*train",
        {1: 1},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_error_policy_stops_before_training(faulty, name):
    change, kind, message, _ = FAULTS[name]
    data = CocoDetection(str(faulty(change)), num_workers=0)
    with pytest.raises(DatasetError, match=rf"\[{kind}\] .*{message}") as error:
        data.setup("fit")
    assert "--data.faults skip" in str(error.value)
    assert "instances_train.json" in str(error.value)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("policy", ["skip", "clip"])
def test_other_policies_leave_out_what_is_faulty(faulty, name, policy, caplog):
    change, kind, _, left = FAULTS[name]
    data = CocoDetection(str(faulty(change)), num_workers=0, faults=policy, image_size=(96, 64), flip=0.0)
    data.setup("fit")
    targets = [target for _, batch in data.train_dataloader() for target in batch]
    expected = {1: 1, 2: 2} if (name, policy) == ("partly outside", "clip") else left
    assert {target["image_id"]: len(target["labels"]) for target in targets} == expected
    assert f"{kind}': 1" in caplog.text
    if (name, policy) == ("partly outside", "clip"):
        assert [80.0, 10.0, 96.0, 20.0] in next(t["boxes"].tolist() for t in targets if t["image_id"] == 2)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4]], "must be polygons of at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "must be polygons"),
        ([[1, 2, 3, 4, 5, math.nan]], "must be polygons"),
        ("mask.png", "must be polygons"),
        ({"counts": "abc"}, "needs 'size' and 'counts', it has"),
        ({"size": [96, 64], "counts": [96 * 64]}, r"segmentation of size \[96, 64\] on an image of \[64, 96\]"),
        ({"size": [64, 96], "counts": [50]}, "the run lengths add up to 50 pixels, the image has 96x64"),
        ({"size": [64, 96], "counts": [-1, 64 * 96 + 1]}, "must be integers of 0 or more"),
        ({"size": [64, 96], "counts": "no run lengths"}, "must be integers of 0 or more, or COCO's text"),
        ({"size": [64, 96], "counts": "é"}, "must be integers of 0 or more, or COCO's text"),
        ({"size": [64, 96], "counts": "oooooooo0"}, "must be integers of 0 or more, or COCO's text"),
        ({"size": [64, 96], "counts": "0"}, "the run lengths add up to 0 pixels"),
        ([[0, 0, 1e9, 0, 1e9, 1e9]], r"a polygon goes from 0 to 1e\+09, far beyond the image of 96x64 pixels"),
        ([[0, 0, 9, 0, 9, -65]], "a polygon goes from -65 to 0, far beyond the image"),
    ],
)
def test_bad_segmentation_matters_where_masks_are_loaded(faulty, segmentation, message):
    root = str(faulty(lambda coco: coco["annotations"][1].update(segmentation=segmentation)))
    with pytest.raises(DatasetError, match=rf"bad-segmentation\] image 2, annotation 2, .*{message}"):
        CocoDetection(root, masks=True).setup("fit")
    CocoDetection(root).setup("fit")
    data = CocoDetection(root, masks=True, faults="skip", num_workers=0)
    data.setup("fit")
    targets = [target for _, batch in data.train_dataloader() for target in batch]
    assert {target["image_id"]: len(target["masks"]) for target in targets} == {1: 1, 2: 1}


def test_one_error_lists_the_faults_of_all_splits(faulty):
    def change(coco):
        set_box(10, 10, 0, 5)(coco)
        coco["annotations"][0]["category_id"] = 4
        coco["images"].append({"id": 5, "file_name": "gone.jpg", "width": 5, "height": 5})

    root = faulty(change)
    (root / "annotations" / "instances_val.json").write_text(
        (root / "annotations" / "instances_train.json").read_text()
    )
    with pytest.raises(DatasetError) as error:
        CocoDetection(str(root)).setup("fit")
    for kind in ("no-area", "unknown-category", "missing-file"):
        assert str(error.value).count(f"[{kind}]") == 2


def test_a_border_of_one_pixel_is_no_fault(faulty):
    data = CocoDetection(str(faulty(set_box(-0.5, 0, 97, 64.9))), num_workers=0, image_size=(96, 64), flip=0.0)
    data.setup("fit")
    boxes = [t["boxes"].tolist() for _, batch in data.train_dataloader() for t in batch if t["image_id"] == 2]
    assert boxes[0][0] == [0.0, 0.0, 96.0, 64.0]


def test_ground_truth_follows_the_policy(faulty):
    root = faulty(set_box(80, 10, 30, 10))
    path = root / "annotations" / "instances_val.json"
    path.write_text((root / "annotations" / "instances_train.json").read_text())
    with pytest.raises(DatasetError, match="outside"):
        CocoDetection(str(root)).ground_truth("validate")
    skipped = CocoDetection(str(root), faults="skip").ground_truth("validate")
    assert [annotation["id"] for annotation in skipped["annotations"]] == [1, 3]
    clipped = CocoDetection(str(root), faults="clip").ground_truth("validate")
    assert clipped["annotations"][1]["bbox"] == [80, 10, 16, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not valid JSON"),
        ("{'a': 1}", "is not valid JSON"),
        ("[1, 2]", "is not COCO format: the top level is a list"),
        (
            '{"images": [], "boxes": []}',
            r"needs a list of objects 'annotations', it has the keys \['boxes', 'images'\]",
        ),
        ('{"images": {}, "annotations": [], "categories": []}', "needs a list of objects 'images', 'images' is a dict"),
        ('{"images": [], "annotations": [], "categories": []}', "at least one category"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "needs the keys 'id' and 'name'"),
    ],
)
def test_json_that_is_not_coco(faulty, text, message):
    root = faulty(lambda coco: None)
    path = root / "annotations" / "instances_train.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        CocoDetection(str(root)).setup("fit")
    with pytest.raises(DatasetError, match=message):
        inspect_coco(path, root / "train")


def test_binary_file_in_place_of_json(faulty):
    root = faulty(lambda coco: None)
    (root / "annotations" / "instances_train.json").write_bytes(b"\xff\xd8\xff\xe0 no text")
    with pytest.raises(DatasetError, match="is not valid JSON"):
        CocoDetection(str(root)).setup("fit")


def test_no_image_to_train_on(faulty):
    with pytest.raises(DatasetError, match=r"instances_train\.json has no image to train on"):
        CocoDetection(str(faulty(lambda coco: coco["annotations"].clear()))).setup("fit")


def test_no_image_to_train_on_says_what_was_left_out(faulty):
    root = faulty(lambda coco: [annotation.update(bbox=[1, 1, 0, 5]) for annotation in coco["annotations"]])
    with pytest.raises(DatasetError, match=r"train on after `--data.faults skip`, which found: no-area 3"):
        CocoDetection(str(root), faults="skip").setup("fit")


def test_unreadable_image_names_file_and_id(faulty):
    root = faulty(lambda coco: None)
    (root / "train" / "000002.jpg").write_bytes(b"no picture")
    data = CocoDetection(str(root), num_workers=0)
    data.setup("fit")
    with pytest.raises(DatasetError, match=r"000002\.jpg \(image id 2\) is not an image"):
        list(data.train_dataloader())


def test_report_finds_everything_in_one_pass(faulty):
    def change(coco):
        coco["annotations"][0].update(category_id=2, bbox=[0, 0, 0, 0])
        coco["annotations"][1]["iscrowd"] = 1
        duplicate("images", 0)(coco)
        duplicate("annotations", 2)(coco)
        coco["annotations"] += [
            {"id": 10, "image_id": 99, "category_id": 1, "bbox": [0, 0, 5, 5]},
            {"id": 11, "image_id": 2, "category_id": 1, "bbox": [90, 60, 50, 50]},
            {"id": 12, "image_id": 2, "category_id": 1, "bbox": [0, math.nan, 5, 5]},
        ]
        for number, name in enumerate(("gone.jpg", "cut.jpg", "page.jpg", "other_size.jpg"), start=3):
            coco["images"].append({"id": number, "file_name": name, "width": 96, "height": 64})

    root = faulty(change)
    sound = (root / "train" / "000001.jpg").read_bytes()
    (root / "train" / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    (root / "train" / "page.jpg").write_text("<html>")
    (root / "train" / "other_size.jpg").write_bytes(sound)
    data = json.loads((root / "annotations" / "instances_train.json").read_text())
    data["images"][-1]["width"] = 95
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    report = inspect_coco(root / "annotations" / "instances_train.json", root / "train")
    found = sorted((fault.kind, fault.image_id, fault.annotation_id) for fault in report.faults)
    assert found == [
        ("duplicate-annotation-id", 2, 3),
        ("duplicate-image-id", 1, None),
        ("missing-file", 3, None),
        ("no-area", 1, 1),
        ("not-finite", 2, 12),
        ("outside", 2, 11),
        ("unknown-category", 1, 1),
        ("unknown-image", 99, 10),
        ("unreadable-file", 4, None),
        ("unreadable-file", 5, None),
        ("wrong-size", 6, None),
    ]
    assert not report.ok
    assert (report.num_images, report.num_objects, report.num_crowd, report.num_empty) == (7, 6, 1, 4)
    assert report.class_counts == {"disc": 3, "bar": 0, "ring": 2}
    assert report.box_sizes == {"small": 3, "medium": 1, "large": 0}
    text = str(report)
    for fault in report.faults:
        assert str(fault) in text
    assert "11 faults" in text
    assert list(report.faults_by_image()) == [1, 2, 3, 4, 5, 6, 99]
    without_files = inspect_coco(root / "annotations" / "instances_train.json", root / "train", decode_images=False)
    assert len(without_files.faults) == 8
    assert "image files were not opened" in str(without_files)


@pytest.mark.parametrize("empty", [None, [], {}])
def test_objects_without_a_mask_stop_a_detector_of_masks_only(faulty, empty):
    root = faulty(lambda coco: coco["annotations"][1].update(segmentation=empty))
    with pytest.raises(DatasetError, match=r"\[no-segmentation\] image 2, annotation 2, .*faster_rcnn do without"):
        CocoDetection(str(root), masks=True).setup("fit")
    CocoDetection(str(root)).setup("fit")
    data = CocoDetection(str(root), masks=True, faults="skip", num_workers=0)
    data.setup("fit")
    targets = [target for _, batch in data.train_dataloader() for target in batch]
    assert {target["image_id"]: len(target["masks"]) for target in targets} == {1: 1, 2: 1}
    report = inspect_coco(root / "annotations" / "instances_train.json", root / "train", decode_images=False)
    assert report.ok
    assert "masks        1 of 3 annotations have no segmentation" in str(report)


@pytest.mark.parametrize("policy", ["error", "skip", "clip"])
def test_annotations_of_boxes_only_are_no_place_to_learn_masks(faulty, policy):
    root = faulty(lambda coco: [annotation.pop("segmentation") for annotation in coco["annotations"]])
    with pytest.raises(DatasetError, match=r"3 of 3 objects of .*masks cannot be learnt .* faster_rcnn") as caught:
        CocoDetection(str(root), masks=True, faults=policy).setup("fit")
    assert "faults skip" not in str(caught.value)
    assert str(caught.value).count("\n") == 0
    report = inspect_coco(root / "annotations" / "instances_train.json", root / "train", decode_images=False)
    assert "3 of 3 annotations have no segmentation: enough for a detector of boxes; masks cannot" in str(report)


def test_run_lengths_are_read_as_pycocotools_does():
    random = np.random.default_rng(0)
    for density in (0.0, 0.01, 0.3, 0.99, 1.0):
        for height, width in ((1, 1), (7, 1), (64, 96), (500, 300)):
            mask = np.asfortranarray(random.random((height, width)) < density).astype(np.uint8)
            rle = mask_api.encode(mask)
            fault = segmentation_fault({"size": [height, width], "counts": rle["counts"].decode()}, (height, width))
            assert fault == ""
            pixels = height * width + 1
            fault = segmentation_fault({"size": [1, pixels], "counts": rle["counts"].decode()}, (1, pixels))
            assert f"add up to {height * width} pixels" in fault


def test_report_of_a_sound_data_set(faulty):
    root = faulty(lambda coco: None)
    report = inspect_coco(str(root / "annotations" / "instances_train.json"), str(root / "train"))
    assert report.ok
    assert "no faults" in str(report)
    assert "every annotation has a segmentation" in str(report)
    assert report.image_sizes == ((96, 64), (96, 64))
    with pytest.raises(DatasetError, match="no image folder"):
        inspect_coco(root / "annotations" / "instances_train.json", root / "elsewhere")


def test_report_of_annotations_without_a_usable_id(faulty):
    def change(coco):
        coco["annotations"][0].update(id="first", bbox="none")
        coco["annotations"][1].update(id=None, bbox=[1, 2])

    root = faulty(change)
    report = inspect_coco(root / "annotations" / "instances_train.json", root / "train")
    assert sorted((fault.kind, fault.position) for fault in report.faults) == [
        ("bad-annotation", 0),
        ("bad-annotation", 1),
        ("bad-box", 0),
        ("bad-box", 1),
    ]
    assert report.box_sizes == {"small": 1, "medium": 0, "large": 0}


@pytest.mark.parametrize("category_id", [[3], {"id": 3}, "3", 3.0, True, None])
def test_category_ids_are_integers(faulty, category_id):
    root = faulty(lambda coco: coco["categories"][1].update(id=category_id))
    with pytest.raises(DatasetError, match=re.escape(f"categories[1] needs an integer 'id', found {category_id!r}")):
        inspect_coco(root / "annotations" / "instances_train.json", root / "train")
