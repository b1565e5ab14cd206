"""The check of images with masks, and ``effvit check-data`` on them."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from effvit.datamodules import inspect_masks
from effvit.datamodules.segmentation_inspection import has_masks
from effvit.errors import ConfigError, DatasetError


@pytest.fixture
def sound(mask_tree, tmp_path):
    """Four and two images; class 8 has no pixel anywhere."""
    return mask_tree(tmp_path, {"train": 4, "val": 2}, {"1": "left", "3": "right", "8": "nothing"})


def test_a_sound_set(sound):
    report = inspect_masks(sound)
    assert report.ok
    assert report.layout == "SegmentationFolder"
    assert report.names == ("left", "right", "nothing")
    train, val = report.contents["train"], report.contents["val"]
    # 40x32 pixels, two rows ignored; "left" is 20, 21, 22 and 23 columns wide.
    assert train.pixels.tolist() == [30 * 86, 30 * 74, 0]
    assert train.images.tolist() == [4, 4, 0]
    assert (train.ignored, train.unknown, train.total) == (4 * 80, 0, 4 * 40 * 32)
    assert val.pixels.tolist() == [30 * 41, 30 * 39, 0]
    assert report.image_sizes == ((40, 32),) * 3
    assert report.absent == {"train": ["nothing"], "val": ["nothing"]}
    text = str(report)
    assert "6 images (train 4, val 2), 3 classes" in text
    assert "without a label    train 6.25%, val 6.25% of the pixels" in text
    assert f"\n  left   {'53.75%':>9}{4:>7}{'51.25%':>9}{2:>7}\n" in text
    assert "\nno pixel in train: 1 of 3 classes, nothing\n" in text
    assert text.endswith("no faults")


@pytest.fixture
def faulty(sound):
    """One fault of each kind, all in the training split."""
    (sound / "masks/train/000.png").unlink()
    cv2.imwrite(str(sound / "masks/train/001.png"), np.ones((32, 20), np.uint8))
    mask = cv2.imread(str(sound / "masks/train/002.png"), cv2.IMREAD_UNCHANGED)
    mask[5:7] = 77
    mask[9] = 66
    cv2.imwrite(str(sound / "masks/train/002.png"), mask)
    mask[:] = 255
    cv2.imwrite(str(sound / "masks/train/003.png"), mask)
    Image.new("L", (4, 4), 1).save(sound / "masks/train/009.png")
    return sound


def test_every_fault_is_listed(faulty):
    report = inspect_masks(faulty)
    assert not report.ok
    assert sorted(fault.kind for fault in report.faults) == ["no-image", "no-mask", "unknown-value", "wrong-size"]
    assert report.unknown == {"77": (80, 1), "66": (40, 1)}
    assert report.unlabelled == ["masks/train/003.png"]
    assert report.contents["train"].unknown == 120
    assert report.contents["train"].total == 2 * 40 * 32
    text = str(report)
    assert "no class           pixel value 77: 80 pixels in 1 mask\n" in text
    assert "leave them out, --ignore [77,66]; or count them as a class, --merge {77:ID}" in text
    assert "wholly without     1 mask: masks/train/003.png" in text
    assert "the image has 40x32 pixels (width x height), its mask 20x32" in text
    assert "[unknown-value] file images/train/002.png: masks/train/002.png: pixel values that are no class: 66" in text


def test_a_split_without_any_label_is_a_fault(sound, cli):
    for path in (sound / "masks/val").iterdir():
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        cv2.imwrite(str(path), np.full_like(mask, 255))
    report = inspect_masks(sound)
    assert [fault.kind for fault in report.faults] == ["no-label"]
    assert "no pixel of the val split has a class" in str(report)
    assert inspect_masks(sound, decode_images=False).ok


def test_without_opening_files_only_partners_are_checked(faulty):
    report = inspect_masks(faulty, decode_images=False)
    assert sorted(fault.kind for fault in report.faults) == ["no-image", "no-mask"]
    assert "image files were not opened" in str(report)
    assert "share of the labelled pixels" not in str(report)


def test_chosen_splits(faulty):
    assert list(inspect_masks(faulty, ["val"]).contents) == ["val"]
    assert inspect_masks(faulty, ["val"]).ok
    with pytest.raises(ConfigError, match="has no test split; there is: train, val"):
        inspect_masks(faulty, ["test"])


def test_progress(sound):
    seen = []
    inspect_masks(sound, progress=lambda done, number: seen.append((done, number)))
    assert seen[-1] == (6, 6)


def test_published_layouts_are_recognised(sound, tmp_path):
    def move(pairs, target):
        shutil.rmtree(target, ignore_errors=True)
        for source, place in pairs.items():
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(sound / source, target / place)
        return inspect_masks(target)

    image, mask, ade = "images/val/000.png", "masks/val/000.png", "ADEChallengeData2016"
    places = {image: f"{ade}/images/validation/a.png", mask: f"{ade}/annotations/validation/a.png"}
    report = move(places, tmp_path / "ade")
    assert (report.layout, len(report.names), list(report.contents)) == ("ADE20K", 150, ["val"])
    assert report.contents["val"].images[[0, 2]].tolist() == [1, 1]
    assert report.faults[0].kind == "unknown-value"  # 255 is no value of ADE20K
    city = "val/x/x_000000_000000"
    report = move(
        {image: f"leftImg8bit/{city}_leftImg8bit.png", mask: f"gtFine/{city}_gtFine_labelIds.png"}, tmp_path / "city"
    )
    assert (report.layout, report.unlabelled) == ("Cityscapes", [f"gtFine/{city}_gtFine_labelIds.png"])
    assert [fault.kind for fault in report.faults] == ["no-label"]  # those values are void ones of Cityscapes
    (tmp_path / "list").write_text("a\n")
    places = {image: "VOCdevkit/VOC2012/JPEGImages/a.jpg", mask: "VOCdevkit/VOC2012/SegmentationClass/a.png"}
    report = move({**places, "list": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"}, tmp_path / "voc")
    assert (report.layout, report.ok) == ("PascalVOC", True)


def test_what_is_no_segmentation_set(image_root, tmp_path):
    assert not has_masks(image_root)
    assert not has_masks(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="there is no folder"):
        inspect_masks(tmp_path / "nowhere")


def test_what_is_ignored_and_merged_is_said_as_in_training(sound, cli, tmp_path_factory):
    report = inspect_masks(sound, ignore=[255, 3], merge={8: 1})
    assert report.names == ("left",)
    assert report.contents["train"].pixels.tolist() == [30 * 86]
    assert report.contents["train"].ignored == 4 * 80 + 30 * 74
    assert [fault.kind for fault in report.faults] == ["one-class"]
    done = cli.run("check-data", sound, "--ignore", "[255,3]", "--merge", "{8:1}")
    assert (done.code, "1 class\n" in done.out) == (1, True), done.err
    for words, match in (
        (["--ignore", "255"], "no list of pixel values, such as [0,255]"),
        (["--merge", "[8]"], "which pixel values are which class, such as {8:7}"),
        (["--merge", "{8:"], "which pixel values are which class, such as {8:7}"),
    ):
        done = cli.run("check-data", sound, *words)
        assert done.code == 2
        assert match in done.err
    done = cli.run("check-data", tmp_path_factory.mktemp("other"), "--ignore", "[0]")
    assert "--ignore and --merge are about masks" in done.err


def test_the_command(sound, cli):
    done = cli.run("check-data", sound)
    assert done.code == 0, done.err
    assert done.out.startswith("images with masks")
    (sound / "masks/val/001.png").unlink()
    done = cli.run("check-data", sound)
    assert done.code == 1
    assert "[no-mask] file images/val/001.png" in done.out
    assert cli.run("check-data", sound, "--split", "train").code == 0
    done = cli.run("check-data", sound, "--images", sound)
    assert "--images goes with a COCO annotation file" in done.err
    (sound / "classes.json").unlink()
    done = cli.run("check-data", sound)
    assert done.code != 0
    assert "which names the classes" in done.err
