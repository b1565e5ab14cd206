"""Plain image files to predict on."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from effvit.datamodules.images import ClassifiedFiles, ImageFiles
from effvit.errors import ConfigError, DatasetError


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("b.png", "a.jpg", "sub/c.JPG", "sub/deeper/d.bmp")):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((48, 64 + number, 3), 40 * number, dtype=np.uint8))
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def predict_batches(data):
    data.setup("predict")
    return list(data.predict_dataloader())


def test_folder_with_subfolders_in_order(folder):
    batches = predict_batches(ImageFiles(str(folder), batch_size=3, image_size=(128, 96)))
    targets = [target for _, batch in batches for target in batch]
    assert [target["file_name"] for target in targets] == ["a.jpg", "b.png", "sub/c.JPG", "sub/deeper/d.bmp"]
    assert [target["image_id"] for target in targets] == [1, 2, 3, 4]
    assert targets[0]["original_size"] == (48, 65)
    assert targets[0]["size"] == (95, 128)
    assert batches[0][0].shape == (3, 3, 96, 128)
    assert batches[0][0].dtype == torch.uint8
    assert "boxes" not in targets[0]


def test_list_of_files_keeps_its_order(folder):
    data = ImageFiles([str(folder / "b.png"), str(folder / "a.jpg")])
    assert data.names == ["b.png", "a.jpg"]


def test_missing_and_empty_places(tmp_path, folder):
    with pytest.raises(DatasetError, match=r"there is no file or folder .*nowhere"):
        ImageFiles(str(tmp_path / "nowhere"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").touch()
    with pytest.raises(DatasetError, match=r"no image in .*text or its subfolders; there is: notes\.txt"):
        ImageFiles(str(tmp_path / "text"))
    with pytest.raises(DatasetError, match="list of images is empty"):
        ImageFiles([])
    with pytest.raises(ConfigError, match="unreadable must be"):
        ImageFiles(str(folder), unreadable="ignore")


def test_unreadable_file(folder, caplog):
    (folder / "aa.jpg").write_text("<html>")
    with pytest.raises(DatasetError, match=r"aa\.jpg is not an image.*remove the file, or pass `--unreadable skip`"):
        predict_batches(ImageFiles(str(folder)))
    targets = [target for _, batch in predict_batches(ImageFiles(str(folder), unreadable="skip")) for target in batch]
    assert [target["file_name"] for target in targets] == ["a.jpg", "b.png", "sub/c.JPG", "sub/deeper/d.bmp"]
    assert "aa.jpg" in caplog.text
    assert "unreadable skip" not in caplog.text


def test_files_to_classify(folder):
    published = {"size": 32, "crop": 1.0, "interpolation": "bilinear"}
    data = ClassifiedFiles(str(folder), batch_size=3, published=published)
    batches = predict_batches(data)
    assert [len(targets["labels"]) for _, targets in batches] == [3, 1]
    images, targets = batches[0]
    assert images.shape == (3, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets["labels"].tolist() == [-1, -1, -1]
    assert targets["image_ids"].tolist() == [0, 1, 2]
    assert targets["file_names"] == ["a.jpg", "b.png", "sub/c.JPG"]
    assert data.read_original("test", 0).shape == (3, 48, 65)
    assert predict_batches(ClassifiedFiles(str(folder), image_size=24))[0][0].shape == (1, 3, 24, 24)


def test_unreadable_file_to_classify(folder):
    (folder / "aa.jpg").write_text("<html>")
    with pytest.raises(DatasetError, match=r"aa\.jpg is not an image.*or pass `--unreadable skip`"):
        predict_batches(ClassifiedFiles(str(folder)))
    batches = predict_batches(ClassifiedFiles(str(folder), unreadable="skip"))
    assert [name for _, targets in batches for name in targets["file_names"]][:2] == ["a.jpg", "b.png"]
    with pytest.raises(ConfigError, match="batch_size must be 1 or more"):
        ClassifiedFiles(str(folder), batch_size=0)
