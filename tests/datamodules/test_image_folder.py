"""Folders of classified images: layouts, splits, and what is wrong with a tree."""

from __future__ import annotations

import logging
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from effvit.datamodules import Augmentation, ImageFolder
from effvit.datamodules._image_data import ImageData
from effvit.datamodules._image_sources import stratified_split
from effvit.errors import ConfigError, DatasetError


def load(root, stage="fit", **options):
    data = ImageFolder(
        str(root), **{"batch_size": 4, "val_batch_size": 2, "num_workers": 0, "image_size": 24} | options
    )
    data.setup(stage)
    return data


def ids(loader):
    return [number for _, targets in loader for number in targets["image_ids"].tolist()]


def break_jpeg(path):
    path.write_bytes(path.read_bytes()[:300])


def test_batches(image_root):
    data = ImageFolder(str(image_root), batch_size=4, val_batch_size=2, num_workers=0, image_size=24)
    assert data.categories == {0: "cat", 1: "dog"}  # before setup
    data.setup("fit")
    assert data.num_train_images == 13
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    for label, name, number in zip(targets["labels"], targets["file_names"], targets["image_ids"], strict=True):
        assert name.startswith(f"train/{data.categories[int(label)]}/")
        assert (int(number) >= 7) == (int(label) == 1)
    assert [len(t["labels"]) for _, t in data.val_dataloader()] == [2, 2, 1]
    assert [t["labels"].tolist() for _, t in data.val_dataloader()] == [[0, 0], [0, 1], [1]]
    assert data.read_original("val", 4).shape == (3, 32, 40)
    assert int(data.read_original("val", 3)[1].float().mean().round()) == 200  # OpenCV writes BGR: the second channel


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_names_of_the_validation_folder(image_root, name):
    (image_root / "val").rename(image_root / name)
    assert ids(load(image_root).val_dataloader()) == [0, 1, 2, 3, 4]


def test_named_folders_and_test_split(image_root, image_tree):
    (image_root / "train").rename(image_root / "learn")
    (image_root / "val").rename(image_root / "check")
    data = load(image_root, train="learn", val="check")
    assert len(ids(data.val_dataloader())) == 5
    assert len(ids(data.test_dataloader())) == 5  # no test split: the validation split
    image_tree(image_root / "test", {"cat": 1, "dog": 1})
    assert len(ids(load(image_root, "test", train="learn", val="check").test_dataloader())) == 2
    with pytest.raises(DatasetError, match=r"no folder .*nothing \(`--data.test`\); folders in .*check, learn, test"):
        load(image_root, train="learn", test="nothing")


@pytest.mark.parametrize("inside", [".", "train"])
def test_one_tree_is_split_by_the_seed(tmp_path, image_tree, inside, caplog):
    caplog.set_level(logging.INFO, "effvit")
    image_tree(tmp_path / inside, {"cat": 10, "dog": 5, "owl": 2})
    first, again, other = (load(tmp_path, batch_size=5, split_seed=seed) for seed in (0, 0, 1))
    names = [next(iter(data.val_dataloader()))[1]["file_names"] for data in (first, again, other)]
    assert names[0] == names[1]
    assert names[0] != names[2]
    held_out = [label for _, t in first.val_dataloader() for label in t["labels"].tolist()]
    assert held_out == [0, 0, 1, 2]
    train = {name for _, t in first.train_dataloader() for name in t["file_names"]}
    val = {name for _, t in first.val_dataloader() for name in t["file_names"]}
    assert train.isdisjoint(val)
    assert len(train | val) == 17
    assert caplog.text.count("4 of its 17 images are held out, 0.2 of each class, by split_seed 0") == 2  # once each


def test_what_is_drawn_of_a_class_depends_on_no_other():
    alone, _ = stratified_split([0] * 10, 0.3, 5)
    beside, _ = stratified_split([0] * 10 + [1] * 6, 0.3, 5)
    assert alone.tolist() == [index for index in beside.tolist() if index < 10]


def test_subfolders_endings_and_other_files(image_root, image_tree, caplog):
    caplog.set_level(logging.INFO, "effvit")
    image_tree(image_root / "train" / "cat", {"more": 2}, ending="PNG")
    (image_root / "train" / "dog" / "notes.txt").write_text("no image")
    (image_root / "train" / "dog" / "._000.jpg").write_text("a Mac was here")
    (image_root / "train" / ".ipynb_checkpoints").mkdir()
    assert load(image_root).num_train_images == 15
    assert "train: 2 files that are no images were passed over" in caplog.text


def test_a_subclass_that_opens_nothing_cannot_be_made():
    class Incomplete(ImageData):
        categories = {0: "a", 1: "b"}  # noqa: RUF012

        def _has(self, split):
            return True

    with pytest.raises(TypeError, match="_open"):
        Incomplete("anywhere")


def test_missing_root(tmp_path):
    with pytest.raises(DatasetError, match=r"no folder .*nowhere; pass .*`--data\.root`"):
        load(tmp_path / "nowhere")


def test_no_class_folders(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DatasetError, match=r"no class folders; expected .*<class>/<image>, found notes\.txt"):
        load(tmp_path)


def test_validation_folder_without_training_folder(image_root):
    (image_root / "train").rename(image_root / "training")
    with pytest.raises(DatasetError, match=r"has val but no folder train; name .*`--data\.train`.*training, val"):
        load(image_root)


@pytest.mark.parametrize(("split", "stage"), [("val", "validate"), ("val", "test"), ("test", "test")])
def test_one_split_alone_can_be_evaluated(image_root, split, stage):
    shutil.rmtree(image_root / "train")
    (image_root / "val").rename(image_root / split)
    data = load(image_root, stage)
    assert data.categories == {0: "cat", 1: "dog"}
    assert ids(data.val_dataloader() if stage == "validate" else data.test_dataloader()) == [0, 1, 2, 3, 4]
    with pytest.raises(DatasetError, match=rf"has {split} but no folder train; name .*`--data\.train`"):
        load(image_root, "fit")
    if split == "test":
        with pytest.raises(DatasetError, match=r"has test but no folder val; name .*`--data\.val`"):
            load(image_root, "validate")
        assert len(ids(load(image_root, "validate", val="test").val_dataloader())) == 5


@pytest.mark.parametrize("inside", [".", "train"])
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_all_of_one_tree_can_be_evaluated(tmp_path, image_tree, inside, stage, caplog):
    caplog.set_level(logging.INFO, "effvit")
    image_tree(tmp_path / inside, {"cat": 6, "dog": 4})
    assert len(ids(load(tmp_path, stage).val_dataloader())) == 2
    advice = f"only what is held out is evaluated; `--data.val {inside}` evaluates all images"
    assert advice in caplog.text
    caplog.clear()
    assert len(ids(load(tmp_path, stage, val=inside).val_dataloader())) == 10
    assert "held out" not in caplog.text


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("Train", "Test"), "--data.train Train --data.test Test"),
        (("TRAINING", "validating"), "--data.train TRAINING --data.val validating"),
        (("cats", "Testing"), "--data.test Testing"),
    ],
)
def test_splits_by_other_names_are_not_taken_for_classes(tmp_path, image_tree, names, options):
    for name in names:
        image_tree(tmp_path / name, {"cat": 2, "dog": 2})
    with pytest.raises(DatasetError, match=f"has .*splits and not classes; pass `{options}`"):
        load(tmp_path)
    assert load(tmp_path, train=".").categories == dict(enumerate(sorted(names)))
    train, other = options.split("--data.")[1:] if "train" in options else (None, None)
    if train:
        choice = dict(word.split() for word in (train, other))
        assert load(tmp_path, **choice).categories == {0: "cat", 1: "dog"}


def test_empty_class_folder_is_named(image_root):
    (image_root / "train" / "owl").mkdir()
    (image_root / "train" / "owl" / "readme.txt").touch()
    with pytest.raises(DatasetError, match=r"1 of 3 class folders in .*train hold no image: owl"):
        load(image_root)


def test_one_class_only(image_root):
    shutil.rmtree(image_root / "train" / "dog")
    with pytest.raises(DatasetError, match=r"train has one class only, 'cat'"):
        load(image_root)


def test_a_class_of_one_image_cannot_be_split(tmp_path, image_tree):
    image_tree(tmp_path, {"cat": 3, "dog": 1})
    with pytest.raises(DatasetError, match="one image only: dog"):
        load(tmp_path)


def test_classes_differ_between_splits(image_root, image_tree):
    image_tree(image_root / "train", {"owl": 1})
    image_tree(image_root / "val", {"fox": 1})
    with pytest.raises(DatasetError, match=r"val differ from those in .*train; missing: owl; only there: fox"):
        load(image_root)


def test_images_beside_the_class_folders(image_root):
    shutil.copy(image_root / "train" / "cat" / "000.jpg", image_root / "train" / "stray.JPG")
    with pytest.raises(DatasetError, match=r"1 images lie in .*train itself.*stray\.JPG"):
        load(image_root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"image_size": 0}, "image_size must be 1 or more"),
        ({"multi_scale": []}, "multi_scale must list sizes"),
        ({"unreadable": "ignore"}, "unreadable must be 'error' or 'skip'"),
        ({"val_share": 1.0}, "val_share must lie between 0 and 1"),
    ],
)
def test_options_out_of_range(image_root, options, message):
    with pytest.raises(ConfigError, match=message):
        load(image_root, **options)


def test_published_input(image_root):
    published = {"size": 32, "crop": 1.0, "interpolation": "bilinear"}
    data = load(image_root, image_size=None, published=published)
    assert next(iter(data.val_dataloader()))[0].shape == (2, 3, 32, 32)
    assert next(iter(data.train_dataloader()))[0].shape == (4, 3, 32, 32)
    assert load(image_root, published=published).network_input.size == 24
    assert load(image_root, image_size=None).network_input.size == 224
    with pytest.raises(ConfigError, match=r"published has no key 'sise'. Did you mean 'size'"):
        load(image_root, published={"sise": 3}).val_dataloader()


@pytest.mark.parametrize("workers", [0, 1])  # torch waits seconds for each worker of a failed loader
def test_corrupt_jpeg_stops_an_epoch(image_root, workers):
    break_jpeg(image_root / "train" / "cat" / "003.jpg")
    with pytest.raises(DatasetError, match=r"train/cat/003\.jpg is truncated or damaged.*`--data\.unreadable skip`"):
        list(load(image_root, num_workers=workers).train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_jpeg_is_skipped(image_root, workers, tmp_path):
    break_jpeg(image_root / "train" / "cat" / "003.jpg")
    break_jpeg(image_root / "train" / "cat" / "004.jpg")
    break_jpeg(image_root / "val" / "dog" / "000.jpg")
    log = logging.FileHandler(tmp_path / "log.txt")  # caplog does not see the workers
    logging.getLogger("effvit").addHandler(log)
    try:
        data = load(image_root, num_workers=workers, unreadable="skip", batch_size=5)
        loader = data.train_dataloader()
        for _ in range(2):
            seen = [
                (number, label) for _, t in loader for number, label in zip(t["image_ids"], t["labels"], strict=True)
            ]
            numbers = [int(number) for number, _ in seen]
            assert sorted(numbers) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 11, 12]  # the next readable one stands in
            assert all((int(label) == 1) == (int(number) >= 7) for number, label in seen)
        batches = list(data.val_dataloader())
        assert [label for _, t in batches for label in t["labels"].tolist()] == [0, 0, 0, -1, 1]
        assert not batches[1][0][1].any()
        data.teardown("fit")
    finally:
        logging.getLogger("effvit").removeHandler(log)
    text = (tmp_path / "log.txt").read_text()
    assert [text.count(name) for name in ("cat/003.jpg", "cat/004.jpg", "dog/000.jpg")] == [1, 1, 1]
    assert "2 of 13 images of the train split could not be read" in text
    assert "1 of 5 images of the val split could not be read" in text


def test_nothing_readable(image_root):
    for path in (image_root / "train").rglob("*.jpg"):
        path.write_text("<html>")
    with pytest.raises(DatasetError, match="none of the 13 training images can be read"):
        next(iter(load(image_root, unreadable="skip").train_dataloader()))


def test_a_last_batch_of_one_image_is_left_out(image_root, caplog):
    caplog.set_level(logging.INFO, "effvit")
    sizes = [len(t["labels"]) for _, t in load(image_root, batch_size=4).train_dataloader()]
    assert sizes == [4, 4, 4]  # of 13 images
    assert "would hold a single image and is left out" in caplog.text
    assert [len(t["labels"]) for _, t in load(image_root, batch_size=5).train_dataloader()] == [5, 5, 3]
    assert [len(t["labels"]) for _, t in load(image_root, batch_size=1).train_dataloader()] == [1] * 13
    assert [len(t["labels"]) for _, t in load(image_root, batch_size=50).train_dataloader()] == [13]


def test_a_sample_depends_on_its_key_alone(image_root):
    # The images are plain, only their colours can differ.
    augmentation = Augmentation(color_jitter=0.4)
    alone = load(image_root, augmentation=augmentation).train_dataloader()
    workers = load(image_root, augmentation=augmentation, num_workers=2).train_dataloader()
    for (images, targets), (others, same) in zip(alone, workers, strict=True):
        assert torch.equal(images, others)
        assert targets["file_names"] == same["file_names"]
    dataset = alone.dataset
    pixels = [dataset[key].pixels for key in ((0, 3, 0, 24), (1, 3, 0, 24), (0, 3, 1, 24), (0, 3, 0, 24))]
    assert np.array_equal(pixels[0], pixels[3])
    assert not np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])


def test_ranks_of_evaluation(image_root):
    data = load(image_root)
    shares = []
    for rank in range(2):
        data._ranks = lambda rank=rank: (2, rank)
        shares.append(ids(data.val_dataloader()))
    assert shares == [[0, 2, 4], [1, 3, 0]]


def test_predict_runs_in_a_trainer(image_root):
    class Names(BoringModel):
        def predict_step(self, batch, batch_idx):
            return batch[1]["file_names"]

    data = ImageFolder(str(image_root), val_batch_size=2, num_workers=0, image_size=24)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    names = [name for batch in trainer.predict(Names(), data) for name in batch]
    assert names[0] == "val/cat/000.jpg"
    assert len(names) == 5


@pytest.mark.realdata
def test_real_photographs(real_data):
    data = load(real_data / "ants_bees", batch_size=16, image_size=64)
    assert data.categories == {0: "ants", 1: "bees"}
    assert len(ids(data.train_dataloader())) == 120
    assert len(ids(data.val_dataloader())) == 80
