"""ADE20K, PASCAL VOC and Cityscapes in their published layouts, and their archives."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from effvit.datamodules import ADE20K, Cityscapes, PascalVOC, ade20k, voc
from effvit.datamodules._archives import Archive
from effvit.errors import ConfigError, DatasetError

TINY = {"num_workers": 0, "crop_size": (32, 32), "batch_size": 2}


def save(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, dtype=np.uint8))
    if palette:
        image.putpalette([value for index in range(256) for value in (index * 7 % 256, index, 255 - index)])
    image.save(path)


def ramp(low, high):
    """A mask ``(8, 40)`` that has all values of a range."""
    return np.resize(np.arange(low, high), (8, 40))


def evaluated(data):
    """Image names and masks of the validation split."""
    data.setup("validate")
    targets = [targets[0] for _, targets in data.val_dataloader()]
    return [target["file_name"] for target in targets], [target["mask"].numpy() for target in targets]


@pytest.fixture
def ade_root(tmp_path):
    for split, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            name = f"{split}/ADE_{number:08d}"
            save(tmp_path / "ADEChallengeData2016/images" / f"{name}.jpg", np.zeros((8, 40, 3)))
            save(tmp_path / "ADEChallengeData2016/annotations" / f"{name}.png", ramp(0, 151))
    return tmp_path


def test_ade20k_leaves_zero_out(ade_root):
    for root in (ade_root, ade_root / "ADEChallengeData2016"):
        data = ADE20K(str(root), **TINY)
        names, masks = evaluated(data)
        assert names == ["images/validation/ADE_00000000.jpg", "images/validation/ADE_00000001.jpg"]
        assert (masks[0] == ramp(0, 151) - 1).all()  # 0 becomes -1, and 150 the label 149
    assert data.num_classes == 150
    assert (data.categories[1], data.categories[13], data.categories[150]) == ("wall", "person", "flag")
    data.setup("fit")
    assert data.num_train_images == 3
    data.setup("test")
    assert len(data.test_dataloader()) == 2
    assert data.splits == ["train", "val"]


def test_ade20k_values_above_150_are_unknown(ade_root):
    save(ade_root / "ADEChallengeData2016/annotations/validation/ADE_00000000.png", ramp(150, 152))
    with pytest.raises(DatasetError, match=r"no class: 151 \(160 px\); known values: 0 … 150"):
        evaluated(ADE20K(str(ade_root), **TINY))


def test_ade20k_that_is_not_there(tmp_path):
    with pytest.raises(DatasetError, match=r"the folder with ADEChallengeData2016/. Pass `--data.download true`"):
        ADE20K(str(tmp_path), **TINY).setup("fit")


@pytest.fixture
def voc_root(tmp_path):
    home = tmp_path / "VOCdevkit/VOC2012"
    lists = {"train": ["a", "b"], "val": ["c", "d"]}
    for name in "abcdef":
        save(home / f"JPEGImages/{name}.jpg", np.zeros((8, 40, 3)))
    (home / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (home / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            save(home / f"SegmentationClass/{name}.png", np.where(ramp(0, 22) == 21, 255, ramp(0, 22)), palette=True)
    return tmp_path


def test_voc_has_a_background_and_borders_without_a_label(voc_root):
    for root in (voc_root, voc_root / "VOCdevkit", voc_root / "VOCdevkit/VOC2012"):
        data = PascalVOC(str(root), **TINY)
        names, masks = evaluated(data)
        assert names == ["JPEGImages/c.jpg", "JPEGImages/d.jpg"]
        assert (masks[0] == np.where(ramp(0, 22) == 21, -1, ramp(0, 22))).all()
    assert data.num_classes == 21
    assert (data.categories[0], data.categories[15], data.categories[20]) == ("background", "person", "tvmonitor")
    data.setup("fit")
    assert data.num_train_images == 2


@pytest.mark.parametrize(
    "lines", ["a\ne\nf\n", "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n/JPEGImages/e.jpg x\nf y"]
)
def test_augmented_voc_takes_vocs_own_masks_first(voc_root, lines):
    home = voc_root / "VOCdevkit/VOC2012"
    (home / "ImageSets/Segmentation/trainaug.txt").write_text(lines)
    for name in "aef":
        save(home / f"SegmentationClassAug/{name}.png", np.full((8, 40), 5))
    data = PascalVOC(str(voc_root), aug=True, **TINY)
    data.setup("fit")
    source = data._source("train")
    assert [source.name(index) for index in range(3)] == [f"JPEGImages/{name}.jpg" for name in "aef"]
    assert [(source.read(index)[1] == 5).all() for index in range(3)] == [False, True, True]
    assert evaluated(data)[0] == ["JPEGImages/c.jpg", "JPEGImages/d.jpg"]


def test_what_voc_lacks_is_named(voc_root, tmp_path):
    with pytest.raises(DatasetError, match=r"there is no list .*trainaug.txt. The augmented set is not part of VOC"):
        PascalVOC(str(voc_root), aug=True, **TINY).setup("fit")
    with pytest.raises(DatasetError, match=r"`--data.download true` to fetch it from https://thor.robots"):
        PascalVOC(str(tmp_path / "nowhere"), **TINY).setup("fit")
    (voc_root / "VOCdevkit/VOC2012/SegmentationClass/a.png").unlink()
    (voc_root / "VOCdevkit/VOC2012/JPEGImages/c.jpg").unlink()
    with pytest.raises(DatasetError) as raised:
        PascalVOC(str(voc_root), **TINY).setup("fit")
    assert "[no-mask] file JPEGImages/a.jpg: there is no file SegmentationClass/a.png" in str(raised.value)
    assert "[no-image] file JPEGImages/c.jpg: there is no file JPEGImages/c.jpg" in str(raised.value)


@pytest.fixture
def city_root(tmp_path):
    for split, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau")):
        name = f"{split}/{city}/{city}_000001_000019"
        save(tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png", np.zeros((8, 40, 3)))
        save(tmp_path / "gtFine" / f"{name}_gtFine_labelIds.png", ramp(0, 34))
        save(tmp_path / "gtFine" / f"{name}_gtFine_labelTrainIds.png", np.where(ramp(0, 20) == 19, 255, ramp(0, 20)))
    return tmp_path


def test_cityscapes_labels_are_the_train_ids(city_root):
    data = Cityscapes(str(city_root), **TINY)
    names, (mask,) = evaluated(data)
    assert names == ["leftImg8bit/val/lindau/lindau_000001_000019_leftImg8bit.png"]
    # trainId of each id in cityscapesScripts' helpers/labels.py.
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    train_ids |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    assert (mask == np.vectorize(lambda value: train_ids.get(value, -1))(ramp(0, 34))).all()
    assert data.num_classes == 19
    assert (data.categories[7], data.categories[33]) == ("road", "bicycle")
    data.setup("fit")
    assert data.num_train_images == 2
    ready = Cityscapes(str(city_root), mask_kind="labelTrainIds", **TINY)
    assert (evaluated(ready)[1][0] == np.where(ramp(0, 20) == 19, -1, ramp(0, 20))).all()
    assert list(ready.categories.values()) == list(data.categories.values())


def test_cityscapes_that_is_not_there(city_root, tmp_path):
    with pytest.raises(DatasetError, match=r"cityscapes-dataset.com \(free after registration\)"):
        Cityscapes(str(tmp_path / "nowhere"), **TINY).setup("fit")
    with pytest.raises(ConfigError, match="Did you mean 'labelTrainIds'"):
        Cityscapes(str(city_root), mask_kind="labelTrainId")
    next((city_root / "gtFine/val").rglob("*labelIds.png")).unlink()
    with pytest.raises(DatasetError, match=r"\[no-mask\] file leftImg8bit/val/lindau/"):
        Cityscapes(str(city_root), **TINY).setup("fit")


def md5(path):
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def server(tmp_path_factory):
    """A folder, and the address at which its files can be fetched."""
    place = tmp_path_factory.mktemp("server")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=place)) as served:
        thread = Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield place, f"http://127.0.0.1:{served.server_port}"
        served.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["ade20k", "voc"])
def test_archives_are_fetched_once(kind, ade_root, server, tmp_path_factory, monkeypatch, request):
    (place, url), root = server, tmp_path_factory.mktemp("data") / "new"
    if kind == "ade20k":
        path = place / "ADEChallengeData2016.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in ade_root.rglob("*.*"):
                archive.write(file, file.relative_to(ade_root))
        module, make, folder = ade20k, ADE20K, "ADEChallengeData2016"
    else:
        path = place / "VOCtrainval_11-May-2012.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(request.getfixturevalue("voc_root") / "VOCdevkit", "VOCdevkit")
        module, make, folder = voc, PascalVOC, "VOCdevkit"
    monkeypatch.setattr(module, "_ARCHIVE", Archive(f"{url}/{path.name}", md5(path), folder))
    data = make(str(root), download=True, **TINY)
    assert data.num_classes > 20  # the classes are known before
    data.prepare_data()
    assert len(evaluated(data)[0]) == 2
    path.unlink()
    make(str(root), download=True, **TINY).prepare_data()  # from what is there
    shutil.rmtree(root / folder)
    make(str(root), download=True, **TINY).prepare_data()  # from the archive that was kept
    assert sorted(entry.name for entry in root.iterdir() if entry.is_dir()) == [folder]


def test_nothing_is_fetched_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(Archive, "fetch", lambda *_: pytest.fail("fetched"))
    ADE20K(str(tmp_path), **TINY).prepare_data()
    PascalVOC(str(tmp_path), **TINY).prepare_data()


def test_another_archive_is_refused(server, tmp_path):
    path = server[0] / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("set/file.txt", "content")
    root = tmp_path / "data"
    with pytest.raises(DatasetError, match=r"cannot be fetched to .*Put set.zip there yourself \(MD5 0000\)"):
        Archive(f"{server[1]}/set.zip", "0000", "set").fetch(root)
    with pytest.raises(DatasetError, match=r"cannot be fetched .*unpack it so that .*other is there"):
        Archive(f"{server[1]}/set.zip", md5(path), "other").fetch(root)
    assert not any(entry.is_dir() for entry in root.iterdir())
