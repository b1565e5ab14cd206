"""The check of class folders: its counts, and every fault it finds."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from effvit.datamodules import inspect_image_folder
from effvit.datamodules.image_inspection import has_class_folders
from effvit.errors import ConfigError, DatasetError


def save(path, seed, size=(20, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    """Three cats and two dogs to train on, one of each to validate on; no fault."""
    for number in range(3):
        save(tmp_path / "train" / "cat" / f"{number}.png", number, (20 + number, 12))
    for number in range(2):
        save(tmp_path / "train" / "dog" / "deep" / f"{number}.jpg", 10 + number)
    save(tmp_path / "val" / "cat" / "0.png", 20, (7, 5))
    save(tmp_path / "val" / "dog" / "0.png", 21, (300, 200))
    return tmp_path


def kinds(report):
    return [fault.kind for fault in report.faults]


def test_a_sound_set_is_counted(root):
    report = inspect_image_folder(root)
    assert report.ok
    assert report.class_counts == {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}}
    assert report.imbalance == 1.5
    assert report.image_sizes == ((7, 5), (20, 12), (300, 200))
    assert report.unusual == {}
    text = str(report)
    for told in (
        "7 images (train 5, val 2), 2 classes",
        "largest class over smallest, in training: 1.50",
        "image sizes    7x5 to 300x200, median 20x12",
        "images by class (columns: train, val)\n  cat      3      1\n  dog      2      1",
        "no faults",
    ):
        assert told in text


def test_every_unreadable_file_is_named(root):
    (root / "train" / "cat" / "0.png").write_bytes(b"")
    jpeg = root / "train" / "dog" / "deep" / "0.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (root / "val" / "cat" / "0.png").write_text("<html>")
    (root / "val" / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    report = inspect_image_folder(root)
    assert kinds(report) == ["unreadable-file"] * 4
    names = {"train/cat/0.png", "train/dog/deep/0.jpg", "val/cat/0.png", "val/dog/gone.png"}
    assert {fault.file for fault in report.faults} == names
    assert report.class_counts["train"] == {"cat": 3, "dog": 2}
    assert "4 faults: unreadable-file 4" in str(report)


def test_duplicates_leaks_and_contradicting_labels(root):
    cats, dogs = root / "train" / "cat", root / "train" / "dog" / "deep"
    shutil.copy(cats / "0.png", cats / "again.png")
    shutil.copy(cats / "1.png", root / "val" / "cat" / "leaked.png")
    shutil.copy(dogs / "0.jpg", cats / "both.jpg")
    report = inspect_image_folder(root)
    assert kinds(report) == ["contradicting-labels", "leak", "duplicate"]
    contradiction, leak, duplicate = (fault.message for fault in report.faults)
    assert "one image is of the classes cat, dog: train/cat/both.jpg, train/dog/deep/0.jpg" in contradiction
    assert "in train and val: train/cat/1.png, val/cat/leaked.png" in leak
    assert "there 2 times: train/cat/0.png, train/cat/again.png" in duplicate
    # One split alone has no leak.
    assert kinds(inspect_image_folder(root, ["train"])) == ["contradicting-labels", "duplicate"]


def test_labels_that_contradict_across_splits_are_no_mere_leak(root):
    shutil.copy(root / "train" / "cat" / "0.png", root / "val" / "dog" / "cat.png")
    assert kinds(inspect_image_folder(root)) == ["contradicting-labels"]


def test_faults_of_the_folders_are_found_at_once(root):
    (root / "train" / "bird").mkdir()
    shutil.rmtree(root / "val" / "dog")
    save(root / "val" / "stray.png", 30)
    report = inspect_image_folder(root, decode_images=False)
    assert kinds(report) == ["empty-class", "class-folders", "classes-differ"]
    empty, stray, differ = map(str, report.faults)
    assert empty == "[empty-class] file train: bird: the class folder holds no image"
    assert "stray.png" in stray
    assert "missing: bird, dog" in differ
    assert report.imbalance is None
    assert "3 faults (image files were not opened)" in str(report)
    assert report.image_sizes is None


def test_one_class_only(tmp_path):
    save(tmp_path / "train" / "cat" / "0.png", 0)
    save(tmp_path / "val" / "cat" / "0.png", 1)
    report = inspect_image_folder(tmp_path)
    assert kinds(report) == ["class-folders"] * 2
    assert "one class only, 'cat'" in report.faults[0].message


def test_a_single_tree_is_the_training_split(tmp_path):
    for number in range(3):
        save(tmp_path / "cat" / f"{number}.png", number)
    save(tmp_path / "dog" / "0.png", 10)
    report = inspect_image_folder(tmp_path)
    assert report.class_counts == {"train": {"cat": 3, "dog": 1}}
    assert kinds(report) == ["one-image"]
    assert report.faults[0].file == "dog/0.png"


def test_unusual_images_are_counted_and_no_fault(root):
    folder, picture = root / "train" / "cat", Image.effect_noise((20, 12), 80)
    picture.save(folder / "grey.jpg")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    Image.fromarray(np.full((12, 20), 900, np.uint16)).save(folder / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.convert("RGB").resize((500, 30)).save(folder / "turned.jpg", exif=exif)
    report = inspect_image_folder(root)
    assert report.ok
    assert report.unusual == {
        "greyscale": 1, "CMYK": 1, "palette": 1, "RGBA": 1, "more than 8 bits": 1, "EXIF rotation": 1
    }  # fmt: skip
    assert "EXIF rotation 1" in str(report)
    shutil.rmtree(root / "val")
    assert (30, 500) in inspect_image_folder(root).image_sizes  # as displayed


def test_what_cannot_be_checked(root):
    with pytest.raises(ConfigError, match=r"has no test split; there is: train, val"):
        inspect_image_folder(root, ["test"])
    with pytest.raises(DatasetError, match="there is no folder"):
        inspect_image_folder(root / "gone")
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "Val")
    with pytest.raises(DatasetError, match=r"has Training and Val, by their names splits.*--data\.train Training"):
        inspect_image_folder(root)


def test_a_set_to_evaluate_on_needs_no_training_split(root):
    shutil.rmtree(root / "train")
    report = inspect_image_folder(root)
    assert report.ok
    assert report.class_counts == {"val": {"cat": 1, "dog": 1}}


def test_progress_is_told(root, monkeypatch):
    monkeypatch.setattr("effvit.datamodules.image_inspection._AT_ONCE", 3)
    told = []
    inspect_image_folder(root, progress=lambda done, number: told.append((done, number)))
    assert told == [(3, 7), (6, 7), (7, 7)]


def test_progress_goes_to_stderr(cli, root, monkeypatch):
    monkeypatch.setattr("effvit.datamodules.image_inspection._AT_ONCE", 3)
    monkeypatch.setattr("effvit._cli.check_data._EVERY", 0.0)
    done = cli.run("check-data", root)
    assert "opened 3 of 7 images\nopened 6 of 7 images" in done.err
    assert "opened" not in done.out


def test_other_folders_are_told_apart(root, tmp_path):
    assert has_class_folders(root)
    assert has_class_folders(root / "train")
    assert not has_class_folders(root / "train" / "cat")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert not has_class_folders(tmp_path / "empty")


def test_check_data_of_class_folders(cli, root):
    done = cli.run("check-data", root)
    assert done.code == 0
    assert "no faults" in done.out
    (root / "val" / "cat" / "0.png").write_bytes(b"")
    done = cli.run("check-data", root)
    assert done.code == 1
    assert "[unreadable-file] file val/cat/0.png" in done.out
    assert cli.run("check-data", root, "--split", "train").code == 0
    assert cli.run("check-data", root, "--skip_images").code == 0
    done = cli.run("check-data", root, "--images", root)
    assert done.code == 2
    assert "--images goes with a COCO annotation file" in done.err


def test_check_data_of_a_folder_that_is_neither(cli, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("a")
    done = cli.run("check-data", tmp_path)
    assert done.code == 1
    for told in ("Looked for", "annotations/instances_train.json", "train/<class>/<image>", "There is: notes"):
        assert told in done.err


def test_check_data_takes_pictures_beside_a_json_for_no_classes(cli, tmp_path):
    """A JSON beside folders of images is some other format; beside ``train/<class>`` it is not in the way."""
    for kind in ("images", "thumbnails"):
        save(tmp_path / kind / "0.png", 0)
    (tmp_path / "index.json").write_text("{}")
    assert "is no data set" in cli.run("check-data", tmp_path).err
    for split in ("train", "val"):
        for seed, kind in enumerate(("cat", "dog")):
            save(tmp_path / split / kind / "0.png", seed + (split == "val") * 2)
    assert cli.run("check-data", tmp_path).code == 0


@pytest.mark.realdata
def test_ants_and_bees_are_sound(cli, real_data):
    done = cli.run("check-data", real_data / "ants_bees")
    assert done.code == 0, done.out
    for told in ("200 images (train 120, val 80), 2 classes", "ants     60     40", "no faults"):
        assert told in done.out


@pytest.mark.realdata
def test_real_photographs_copied_between_classes_are_found(real_data, tmp_path):
    shutil.copytree(real_data / "ants_bees" / "val", tmp_path / "train")
    ant = min((tmp_path / "train" / "ants").iterdir())
    shutil.copy(ant, tmp_path / "train" / "bees" / "copy.jpg")
    assert kinds(inspect_image_folder(tmp_path)) == ["contradicting-labels"]
