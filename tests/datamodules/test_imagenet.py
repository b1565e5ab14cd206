"""ImageNet's layouts, and label files that do not fit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from scipy.io import savemat

from effvit.datamodules import ImageNet, inspect_image_folder
from effvit.errors import DatasetError

WNIDS = {"n01": "tench, Tinca tinca", "n02": "goldfish", "n03": "hen"}


def write_devkit(root, truth):
    """The devkit's two files: ids 1 … 3 are classes in another order than their WordNet ids, 4 is an inner node."""
    data = root / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    synsets = np.zeros(
        4, dtype=[(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    )
    for row, (number, wnid) in enumerate([(1, "n03"), (2, "n01"), (3, "n02")]):
        synsets[row] = (float(number), wnid, WNIDS[wnid], "what it is", 0.0)
    synsets[3] = (4.0, "n00", "animal", "what it is", 3.0)
    savemat(data / "meta.mat", {"synsets": synsets})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{line}\n" for line in truth))


@pytest.fixture
def flat_root(tmp_path, image_tree):
    image_tree(tmp_path / "train", {"n01": 2, "n02": 2, "n03": 2})
    folder = image_tree(tmp_path / "all", {"a": 4}) / "a"
    (tmp_path / "val").mkdir()
    for number, path in enumerate(sorted(folder.iterdir()), start=1):
        path.rename(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    shutil.rmtree(tmp_path / "all")
    return tmp_path


def load(root, stage="fit"):
    data = ImageNet(str(root), batch_size=2, val_batch_size=10, num_workers=0, image_size=24)
    data.setup(stage)
    return data


def labels(data):
    return [label for _, targets in data.val_dataloader() for label in targets["labels"].tolist()]


def test_flat_validation_images_with_devkit(flat_root):
    write_devkit(flat_root, [1, 3, 2, 1])
    assert ImageNet(str(flat_root)).categories == dict(enumerate(WNIDS.values()))  # before setup
    data = load(flat_root)
    assert labels(data) == [2, 1, 0, 2]
    assert data.num_train_images == 6
    names = next(iter(data.val_dataloader()))[1]["file_names"]
    assert names[0] == "val/ILSVRC2012_val_00000001.JPEG"


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([1, 2, 3], r"ground_truth\.txt has 3 labels for the 4 images in .*val"),
        ([1, 4, 2, 1], r"ground_truth\.txt, line 2: '4' is not the id of a class; meta\.mat has 3 classes, 1 … 3"),
        ([1, 2, 3, "n01"], r"line 4: 'n01' is not the id"),
    ],
)
def test_label_file_that_does_not_fit(flat_root, truth, message):
    write_devkit(flat_root, truth)
    with pytest.raises(DatasetError, match=message):
        load(flat_root)


def test_class_without_training_folder(flat_root):
    write_devkit(flat_root, [1, 2, 3, 1])
    shutil.rmtree(flat_root / "train" / "n02")
    with pytest.raises(DatasetError, match=r"names 1 classes without a folder in .*train: n02"):
        load(flat_root)


def test_devkit_is_missing_or_damaged(flat_root):
    with pytest.raises(
        DatasetError, match=r"no file with their labels: put the devkit .*ILSVRC2012_devkit_t12\.tar\.gz"
    ):
        load(flat_root)
    write_devkit(flat_root, [1, 2, 3, 1])
    (flat_root / "ILSVRC2012_devkit_t12" / "data" / "meta.mat").write_text("<html>")
    with pytest.raises(DatasetError, match=r"meta\.mat is not the meta\.mat of ILSVRC2012_devkit_t12"):
        load(flat_root)


def test_class_folders_without_devkit(tmp_path, image_tree):
    for split in ("train", "val"):
        image_tree(tmp_path / split, {"n01": 1, "n02": 2})
    data = load(tmp_path)
    assert data.categories == {0: "n01", 1: "n02"}
    assert labels(data) == [0, 1, 1]
    image_tree(tmp_path / "val", {"n03": 1})
    with pytest.raises(DatasetError, match="only there: n03"):
        load(tmp_path)


def test_validation_folders_alone_keep_the_labels_of_all_classes(tmp_path, image_tree):
    image_tree(tmp_path / "val", {"n01": 1, "n03": 2})
    write_devkit(tmp_path, [])
    data = load(tmp_path, "validate")
    assert data.num_classes == 3
    assert labels(data) == [0, 2, 2]
    with pytest.raises(DatasetError, match=r"no folder .*train"):
        load(tmp_path, "fit")


def test_kaggle_tree(flat_root):
    root = flat_root / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    images.mkdir(parents=True)
    for split in ("train", "val"):
        (flat_root / split).rename(images / split)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} {words}\n" for wnid, words in WNIDS.items()))
    rows = [(1, "n03 1 2 3 4"), (2, "n01 1 2 3 4 n01 5 6 7 8"), (3, "n02 1 2 3 4")]
    solution = root / "LOC_val_solution.csv"
    solution.write_text("ImageId,PredictionString\n" + "".join(f"ILSVRC2012_val_{n:08d},{text} \n" for n, text in rows))
    with pytest.raises(DatasetError, match=r"no label for 1 images: ILSVRC2012_val_00000004\.JPEG"):
        load(root)
    solution.write_text(solution.read_text() + "ILSVRC2012_val_00000004,n02 1 1 1 1\n")
    data = load(root)
    assert labels(data) == [2, 0, 1, 1]
    assert data.categories[0] == "tench, Tinca tinca"


def test_classes_of_one_name_are_told_apart(tmp_path, image_tree):
    image_tree(tmp_path / "val", {"n1": 1, "n2": 1, "n3": 1})
    (tmp_path / "LOC_synset_mapping.txt").write_text("n1 crane\nn2 tench\nn3 crane\n")
    assert ImageNet(str(tmp_path)).categories == {0: "crane (n1)", 1: "tench", 2: "crane (n3)"}


def kaggle_tree(flat_root):
    """The files in Kaggle's layout, with a label for each image."""
    root = flat_root / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    images.mkdir(parents=True)
    for split in ("train", "val"):
        (flat_root / split).rename(images / split)
    lines = "".join(f"ILSVRC2012_val_{n:08d},n0{n % 3 + 1} 1 2 3 4\n" for n in range(1, 5))
    (root / "LOC_val_solution.csv").write_text(f"ImageId,PredictionString\n{lines}")
    return root


@pytest.mark.parametrize("layout", ["devkit", "kaggle"])
def test_the_check_reads_the_labels_of_flat_validation_images(flat_root, cli, layout):
    write_devkit(flat_root, [1, 3, 2, 1])
    root = flat_root if layout == "devkit" else kaggle_tree(flat_root)
    report = inspect_image_folder(root, decode_images=False)
    assert report.ok, report
    counts = {"n01": 1, "n02": 1, "n03": 2} if layout == "devkit" else {"n01": 1, "n02": 2, "n03": 1}
    assert report.class_counts == {"train": {"n01": 2, "n02": 2, "n03": 2}, "val": counts}
    done = cli.run("check-data", root, "--skip_images")
    assert done.code == 0, done.err
    assert "10 images (train 6, val 4), 3 classes" in done.out


def test_the_check_names_labels_that_do_not_fit_and_still_opens_the_images(flat_root):
    write_devkit(flat_root, [1, 3, 2])
    (flat_root / "val" / "ILSVRC2012_val_00000002.JPEG").write_bytes(b"")
    report = inspect_image_folder(flat_root, ["val"])
    assert [fault.kind for fault in report.faults] == ["labels", "unreadable-file"]
    assert "has 3 labels for the 4 images" in str(report.faults[0])
    shutil.rmtree(flat_root / "train")
    write = flat_root / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    write.write_text("1\n3\n2\n1\n")
    report = inspect_image_folder(flat_root, decode_images=False)
    assert report.ok
    assert report.class_counts == {"val": {"n01": 1, "n02": 1, "n03": 2}}


def test_another_folder(tmp_path):
    with pytest.raises(DatasetError, match=r"neither .*train nor .*val; `--data\.root` must be"):
        ImageNet(str(tmp_path))


@pytest.mark.realdata
def test_real_samples(real_data):
    data = load(real_data / "imagenet_samples", "validate")
    assert data.num_classes == 100
    images, targets = next(iter(data.val_dataloader()))
    assert images.shape == (10, 3, 24, 24)
    assert targets["labels"].tolist() == list(range(10))
