"""The transfer sets, from small files in the layout that torchvision expects."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torchvision.datasets
from scipy.io import savemat

from effvit.datamodules import Transfer
from effvit.errors import ConfigError, DatasetError


def load(name, root, **options):
    data = Transfer(name, str(root), batch_size=4, val_batch_size=10, num_workers=0, image_size=24, **options)
    data.setup("fit")
    return data


def content(loader):
    return [pair for _, t in loader for pair in zip(t["file_names"], t["labels"].tolist(), strict=True)]


def write_image(path, value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((30, 40, 3), value, dtype=np.uint8))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10's python files with 3 + 2 images, and torchvision's checksums made theirs."""
    folder = tmp_path / "made" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    kind = torchvision.datasets.CIFAR10

    def write(name, entry):
        (folder / name).write_bytes(pickle.dumps(entry))
        return [name, md5(folder / name)]

    pixels = np.zeros((5, 3, 32, 32), np.uint8)
    pixels[:, 0] = np.arange(5).reshape(5, 1, 1) * 50  # red tells the image
    train = write("data_batch_1", {"data": pixels[:3].reshape(3, -1), "labels": [1, 0, 2]})
    test = write("test_batch", {"data": pixels[3:].reshape(2, -1), "labels": [2, 1]})
    meta = write("batches.meta", {"label_names": ["plane", "car", "bird"]})
    monkeypatch.setattr(kind, "train_list", [train])
    monkeypatch.setattr(kind, "test_list", [test])
    monkeypatch.setattr(kind, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return folder


def test_cifar10(cifar):
    data = Transfer("cifar10", str(cifar.parent))
    assert data.categories == {0: "plane", 1: "car", 2: "bird"}  # before setup
    data = load("cifar10", cifar.parent)
    assert sorted(content(data.train_dataloader())) == [
        ("cifar10/train/0", 1), ("cifar10/train/1", 0), ("cifar10/train/2", 2)
    ]  # fmt: skip
    assert content(data.val_dataloader()) == [("cifar10/val/0", 2), ("cifar10/val/1", 1)]
    assert data.read_original("val", 1)[:, 5, 5].tolist() == [200, 0, 0]
    assert data.read_original("test", 1).shape == (3, 32, 32)


def test_download(cifar, tmp_path, monkeypatch):
    archive = tmp_path / "served" / "cifar-10-python.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as file:
        file.add(cifar, cifar.name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "tgz_md5", md5(archive))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=archive.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(
            torchvision.datasets.CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{archive.name}"
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        data = Transfer("cifar10", str(tmp_path / "new"), download=True)
        assert data.num_classes == 3
        server.shutdown()
    assert load("cifar10", tmp_path / "new").num_train_images == 3


def test_failed_download(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.DTD, "_URL", "http://127.0.0.1:9/dtd-r1.0.1.tar.gz")
    with pytest.raises(DatasetError, match=r"dtd cannot be read from .*refused.*Put the files there yourself"):
        Transfer("dtd", str(tmp_path), download=True).prepare_data()


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    folder = tmp_path / "flowers-102"
    for number in range(1, 7):
        write_image(folder / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([1, 2, 102, 1, 2, 3])})
    savemat(folder / "setid.mat", {"trnid": np.array([3, 1]), "valid": np.array([2, 6]), "tstid": np.array([4, 5])})
    files = {"image": ("102flowers.tgz", ""), "label": ("imagelabels.mat", md5(folder / "imagelabels.mat")),
             "setid": ("setid.mat", md5(folder / "setid.mat"))}  # fmt: skip
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)
    return folder


def test_flowers_train_on_train_and_valid(flowers):
    data = load("flowers102", flowers.parent)
    assert data.categories[0] == "pink primrose"
    assert data.num_classes == 102
    assert sorted(content(data.train_dataloader())) == [
        ("flowers-102/jpg/image_00001.jpg", 0), ("flowers-102/jpg/image_00002.jpg", 1),
        ("flowers-102/jpg/image_00003.jpg", 101), ("flowers-102/jpg/image_00006.jpg", 2),
    ]  # fmt: skip
    assert content(data.val_dataloader()) == [
        ("flowers-102/jpg/image_00004.jpg", 0), ("flowers-102/jpg/image_00005.jpg", 1)
    ]  # fmt: skip


def test_flowers_label_out_of_range(flowers, monkeypatch):
    savemat(flowers / "imagelabels.mat", {"labels": np.array([1, 2, 103, 1, 2, 3])})
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    with pytest.raises(DatasetError, match="train split has labels 0 … 102 for 102 classes"):
        load("flowers102", flowers.parent)


def write_pets(root):
    folder = root / "oxford-iiit-pet"
    for name in ("Abyssinian_1", "Abyssinian_2", "saint_bernard_7", "saint_bernard_8"):
        write_image(folder / "images" / f"{name}.jpg")
    write_lines(folder / "annotations" / "trainval.txt", ["Abyssinian_1 1 1 1", "saint_bernard_7 2 2 1"])
    write_lines(folder / "annotations" / "test.txt", ["saint_bernard_8 2 2 1", "Abyssinian_2 1 1 1"])
    return folder


def test_pets(tmp_path):
    write_pets(tmp_path)
    data = load("oxford_iiit_pets", tmp_path)
    assert data.categories == {0: "Abyssinian", 1: "Saint Bernard"}
    assert data.num_train_images == 2
    assert content(data.val_dataloader()) == [
        ("oxford-iiit-pet/images/saint_bernard_8.jpg", 1), ("oxford-iiit-pet/images/Abyssinian_2.jpg", 0)
    ]  # fmt: skip


def test_label_files_that_do_not_belong_together(tmp_path):
    folder = write_pets(tmp_path)
    write_lines(folder / "annotations" / "test.txt", ["saint_bernard_8 9 2 1"])
    with pytest.raises(DatasetError, match="the val split shows other classes than the training split"):
        load("oxford_iiit_pets", tmp_path)
    write_lines(folder / "annotations" / "trainval.txt", ["Abyssinian_1 1"])
    with pytest.raises(DatasetError, match=r"oxford_iiit_pets cannot be read .*Expected below"):
        load("oxford_iiit_pets", tmp_path)


def test_cars(tmp_path):
    with pytest.raises(DatasetError, match=r"cars_test_annos_withlabels\.mat\. Its download is dead"):
        Transfer("stanford_cars", str(tmp_path), download=True).prepare_data()
    folder = tmp_path / "stanford_cars"
    kind = [("fname", object), ("class", object)]
    for split in ("train", "test"):
        for number in range(1, 3):
            write_image(folder / f"cars_{split}" / f"{number:05d}.jpg")
    (folder / "devkit").mkdir()
    train = np.array([("00001.jpg", 2), ("00002.jpg", 1)], dtype=kind)
    test = np.array([("00001.jpg", 1), ("00002.jpg", 2)], dtype=kind)
    savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": train})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": test})
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array(["Hummer", "Audi"], dtype=object)})
    data = load("stanford_cars", tmp_path)
    assert data.categories == {0: "Hummer", 1: "Audi"}
    assert sorted(content(data.train_dataloader())) == [
        ("stanford_cars/cars_train/00001.jpg", 1), ("stanford_cars/cars_train/00002.jpg", 0)
    ]  # fmt: skip
    assert [label for _, label in content(data.val_dataloader())] == [0, 1]


def test_aircraft_food_and_textures(tmp_path):
    aircraft = tmp_path / "fgvc-aircraft-2013b" / "data"
    write_lines(aircraft / "variants.txt", ["707-320", "A300 B4"])
    write_lines(aircraft / "images_variant_trainval.txt", ["0001 A300 B4", "0002 707-320"])
    write_lines(aircraft / "images_variant_test.txt", ["0003 A300 B4"])
    food = tmp_path / "food-101"
    write_image(food / "images" / "pie" / "1.jpg")
    write_image(food / "images" / "ribs" / "2.jpg")
    write_lines(food / "meta" / "train.json", [json.dumps({"pie": ["pie/1"], "ribs": ["ribs/2"]})])
    write_lines(food / "meta" / "test.json", [json.dumps({"pie": [], "ribs": ["ribs/2"]})])
    textures = tmp_path / "dtd" / "dtd"
    for split, lines in {
        "train": ["dotted/1.jpg", "woven/2.jpg"],
        "val": ["woven/3.jpg", "dotted/6.jpg"],
        "test": ["woven/4.jpg", "dotted/5.jpg"],
    }.items():
        write_lines(textures / "labels" / f"{split}1.txt", lines)
    (textures / "images").mkdir()
    found = {}
    for name in ("fgvc_aircraft", "food101", "dtd"):
        data = load(name, tmp_path)
        found[name] = (data.num_classes, data.num_train_images, data._source("val").labels.tolist())
    assert found == {"fgvc_aircraft": (2, 2, [1]), "food101": (2, 2, [1]), "dtd": (2, 4, [1, 0])}


@pytest.mark.parametrize("name", ["cifar100", "flowers102", "oxford_iiit_pets", "fgvc_aircraft", "food101", "dtd"])
def test_not_downloaded(tmp_path, name):
    with pytest.raises(DatasetError, match=rf"{name} cannot be read from .*Expected below .*`--data\.download true`"):
        load(name, tmp_path)


def test_unknown_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no transfer set 'cifar11'. Did you mean 'cifar10"):
        Transfer("cifar11", str(tmp_path))
