"""Folders of images and masks, and the segmented digits, as batches."""

from __future__ import annotations

import logging
import shutil

import cv2
import numpy as np
import pytest
import torch

from effvit.datamodules import HandwrittenDigits, SegmentationFolder, SegmentedDigits
from effvit.errors import ConfigError, DatasetError

TINY = {"num_workers": 0, "image_size": (80, 64), "crop_size": (32, 48), "batch_size": 3}


def folder(root, **options):
    return SegmentationFolder(str(root), **TINY | options)


def epoch(data, number=0):
    loader = data.train_dataloader()
    loader.batch_sampler.set_epoch(number)
    return list(loader)


def same(batch, other):
    images, targets = batch
    others, other_targets = other
    ids = [target["image_id"] for target in targets] == [target["image_id"] for target in other_targets]
    return ids and torch.equal(images, others) and all(
        torch.equal(target["mask"], another["mask"]) for target, another in zip(targets, other_targets, strict=True)
    )  # fmt: skip


def test_training_batches(mask_root):
    data = folder(mask_root, pad_divisor=32, photometric=False, flip=0.0)
    data.setup("fit")
    assert data.categories == {1: "left", 3: "right"}
    assert data.num_classes == 2
    assert data.num_train_images == 7
    batches = epoch(data)
    # The seventh image alone would leave BatchNorm without a variance.
    assert [len(targets) for _, targets in batches] == [3, 3]
    for images, targets in batches:
        assert images.dtype == torch.uint8
        assert images.shape == (3, 3, 32, 64)  # the crop, its width rounded up to the divisor
        assert images.is_contiguous(memory_format=torch.channels_last)
        for image, target in zip(images, targets, strict=True):
            h, w = target["size"]
            assert (h, w) <= (32, 48)
            mask = target["mask"]
            assert mask.dtype == torch.int16
            assert mask.shape == images.shape[2:]
            assert set(mask.unique().tolist()) <= {-1, 0, 1}
            assert (mask[h:] == -1).all()
            assert (mask[:, w:] == -1).all()
            assert image[:, h:].sum() + image[:, :, w:].sum() == 0
            # Red is painted where the mask says "left"; two pixels around, the two interpolations differ.
            red = image[0].float() - image[2].float() > 60
            assert (red == (mask == 0))[mask >= 0].float().mean() > 0.93
            assert target["original_size"] == (32, 40)
            assert target["file_name"] == f"images/train/{target['image_id'] - 1:03d}.png"


def test_evaluation_batches(mask_root):
    data = folder(mask_root, val_batch_size=2)
    data.setup("validate")
    first, second = data.val_dataloader()
    assert [target["image_id"] for target in first[1] + second[1]] == [1, 2, 3]
    assert first[0].shape == (2, 3, 64, 96)
    for target in first[1]:
        assert target["size"] == (64, 96)  # 64x80 kept the ratio, aligned to 32
        assert target["original_size"] == tuple(target["mask"].shape) == (32, 40)
    mask = first[1][0]["mask"]
    assert (mask[:2] == -1).all()
    assert (mask[2:, :20] == 0).all()
    assert (mask[2:, 20:] == 1).all()
    padded = folder(mask_root, resize="keep_ratio")
    padded.setup("validate")
    images, targets = next(iter(padded.val_dataloader()))
    assert targets[0]["size"] == (64, 80)
    assert images.shape == (1, 3, 64, 96)
    squashed = folder(mask_root, resize="squash", image_size=(33, 44), pad_divisor=1)
    squashed.setup("validate")
    assert next(iter(squashed.val_dataloader()))[0].shape == (1, 3, 44, 33)


def test_without_a_test_split_the_validation_split_is_tested_and_predicted(mask_root):
    data = folder(mask_root)
    for stage, loader in (("test", data.test_dataloader), ("predict", data.predict_dataloader)):
        data.setup(stage)
        assert [targets[0]["file_name"] for _, targets in loader()] == [f"images/val/{n:03d}.png" for n in range(3)]


def test_original_images(mask_root):
    image = folder(mask_root).read_original("val", 3)
    expected = cv2.cvtColor(cv2.imread(str(mask_root / "images/val/002.png")), cv2.COLOR_BGR2RGB)
    assert (image.permute(1, 2, 0).numpy() == expected).all()


def test_batches_depend_on_seed_and_epoch_alone(mask_root):
    first, again = epoch(folder(mask_root), 1), epoch(folder(mask_root, num_workers=1), 1)
    assert all(map(same, first, again))
    for other in (epoch(folder(mask_root), 2), epoch(folder(mask_root, seed=1), 1)):
        assert not any(map(same, first, other))


def test_an_image_is_augmented_anew_each_epoch_whatever_comes_with_it(mask_root):
    def views(batch_size, number):
        batches = epoch(folder(mask_root, batch_size=batch_size, scale_range=(1.5, 2.0)), number)
        return {t["image_id"]: image for images, targets in batches for image, t in zip(images, targets, strict=True)}

    alone, together, later = views(7, 0), views(4, 0), views(7, 1)
    assert all(torch.equal(alone[number], together[number]) for number in range(1, 8))
    assert not any(torch.equal(alone[number], later[number]) for number in range(1, 8))


def test_an_epoch_goes_on_where_it_was_left(mask_root, monkeypatch):
    whole = epoch(folder(mask_root, batch_size=2), 5)
    data = folder(mask_root, batch_size=2)
    monkeypatch.setattr(data, "_batches_done", lambda: 2)
    loader = data.train_dataloader()
    loader.load_state_dict(loader.state_dict())
    loader.batch_sampler.set_epoch(5)
    rest = list(loader)
    assert len(rest) == 1
    assert same(rest[0], whole[2])


def test_splits_inside_out(mask_tree, tmp_path):
    mask_tree(tmp_path, {"training": 4, "valid": 2, "test": 3}, inside=True)
    data = folder(tmp_path)
    assert data.splits == ["train", "val", "test"]
    data.setup("fit")
    data.setup("test")
    assert [len(data._source(split)) for split in data.splits] == [4, 2, 3]
    assert data._source("val").name(0) == "valid/images/000.png"


@pytest.mark.parametrize("split", ["", "train"])
def test_one_tree_is_split_by_a_seed(mask_tree, tmp_path, split):
    mask_tree(tmp_path, {split: 10})

    def names(**options):
        data = folder(tmp_path, **options)
        data.setup("fit")
        return [{data._source(part).name(i) for i in range(len(data._source(part)))} for part in ("train", "val")]

    train, val = names(val_share=0.3)
    assert len(val) == 3
    assert len(train | val) == 10
    assert names(val_share=0.3) == [train, val]
    assert names(val_share=0.3, split_seed=1) != [train, val]


def test_one_image_cannot_be_split(mask_tree, tmp_path):
    mask_tree(tmp_path, {"": 1})
    with pytest.raises(DatasetError, match="has 1 image with a mask; two or more can be split"):
        folder(tmp_path).setup("fit")


def test_names_that_are_no_class_and_255(mask_tree, tmp_path, caplog):
    mask_tree(tmp_path, {"train": 2, "val": 2}, {"0": "Unlabeled", "1": "left", "3": "right", "9": "void"})
    with caplog.at_level(logging.INFO):
        assert folder(tmp_path).categories == {1: "left", 3: "right"}
    assert "pixels of 0 ('Unlabeled'), 9 ('void') have no label, by the name" in caplog.text
    mask_tree(tmp_path, {"train": 2, "val": 2}, {"1": "left", "3": "right", "255": "sky"})
    assert folder(tmp_path).categories == {1: "left", 3: "right", 255: "sky"}
    assert folder(tmp_path, ignore=[255, 1]).categories == {3: "right"}


def test_merged_values(mask_root):
    data = folder(mask_root, merge={3: 1}, ignore=[255])
    data.setup("validate")
    assert data.categories == {1: "left"}
    assert next(iter(data.val_dataloader()))[1][0]["mask"].unique().tolist() == [-1, 0]
    with pytest.raises(DatasetError, match=r"classes.json: the pixel value 3 is merged into 2, which is no class"):
        folder(mask_root, merge={3: 2}).setup("fit")


def test_a_picture_beside_each_mask_hides_none(mask_root):
    for path in (mask_root / "masks/train").iterdir():
        path.with_suffix(".jpg").write_bytes(b"an overlay")
    data = folder(mask_root)
    data.setup("fit")
    assert len(data.list_pairs("train").pairs) == 7
    assert not data.list_pairs("train").faults


def test_two_classes_of_one_name(mask_root):
    (mask_root / "classes.json").write_text('{"1": "left", "3": "left"}')
    with pytest.raises(DatasetError, match=r"classes 1 and 3 are both called 'left': rename .* --data.merge \{3:1\}"):
        folder(mask_root).categories  # noqa: B018
    assert folder(mask_root, merge={3: 1}).categories == {1: "left"}


def test_unknown_values(mask_root):
    with pytest.raises(DatasetError, match=r"masks/val/000.png has pixel values that are no class: 255 \(80 px\)"):
        next(iter(folder(mask_root, ignore=[]).val_dataloader()))
    data = folder(mask_root, ignore=[], unknown="ignore")
    assert next(iter(data.val_dataloader()))[1][0]["mask"].unique().tolist() == [-1, 0, 1]


def test_palette_colours(mask_tree, tmp_path):
    classes = [{"id": 4, "name": "a", "color": [9, 9, 9]}, {"id": 2, "name": "void", "color": [250, 0, 0]}]
    mask_tree(tmp_path, {"train": 2, "val": 1}, classes)
    for path in (tmp_path / "masks").rglob("*.png"):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        colours = np.where((mask == 1)[..., None], [9, 9, 9], [0, 0, 250])  # BGR
        cv2.imwrite(str(path), colours.astype(np.uint8))
    data = folder(tmp_path)
    assert data.categories == {4: "a"}
    mask = next(iter(data.val_dataloader()))[1][0]["mask"]
    assert (mask[2:, :20] == 0).all()
    assert (mask[:, 20:] == -1).all()


def test_masks_without_any_label(mask_root):
    for path in (mask_root / "masks").rglob("*.png"):
        cv2.imwrite(str(path), np.full((32, 40), 255, np.uint8))
    data = folder(mask_root)
    assert all((target["mask"] == -1).all() for _, targets in epoch(data) for target in targets)


@pytest.fixture
def faulty(mask_root):
    (mask_root / "masks/train/000.png").unlink()
    cv2.imwrite(str(mask_root / "masks/train/001.png"), np.ones((32, 20), np.uint8))
    (mask_root / "images/train/002.png").write_bytes(b"no picture")
    (mask_root / "images/val/001.png").unlink()
    return mask_root


def test_faults_of_all_splits_are_in_one_report(faulty):
    with pytest.raises(DatasetError) as raised:
        folder(faulty).setup("fit")
    text = str(raised.value)
    assert "3 faults in the train split" in text
    assert "1 fault in the val split" in text
    assert "[no-mask] file images/train/000.png: there is no mask" in text
    assert "the image has 40x32 pixels (width x height), its mask 20x32 (masks/train/001.png)" in text
    assert "[unreadable-file] file images/train/002.png" in text
    assert "[no-image] file masks/val/001.png: the mask has no image in" in text
    assert text.endswith("pass `--data.faults skip` to leave these out.")


def test_faulty_pairs_are_left_out(faulty, caplog):
    data = folder(faulty, faults="skip")
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    assert data.num_train_images == 4
    assert len(data._source("val")) == 2
    assert "'no-mask': 1" in caplog.text
    assert "train split: 4 of 7 images, 2 categories" in caplog.text
    shutil.rmtree(faulty / "masks/val")
    (faulty / "masks/val").mkdir()
    with pytest.raises(DatasetError, match=r"no image in .*images/val has a mask in .*masks/val: a mask has the name"):
        folder(faulty, faults="skip").setup("validate")


def test_a_file_that_is_cut_short_is_named_or_skipped(mask_root, caplog):
    """Its header is sound, so that it is found when it is first decoded."""
    path = mask_root / "images/train/002.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError, match=r"images/train/002.png is truncated or damaged .* `--data.faults skip`"):
        epoch(folder(mask_root))
    data = folder(mask_root, faults="skip", batch_size=7)
    ids = [sorted(t["image_id"] for t in targets) for number in (0, 1) for _, targets in epoch(data, number)]
    assert ids == [[1, 2, 4, 4, 5, 6, 7]] * 2  # the next one stands in
    assert caplog.text.count("skipped: ") == 2  # once for each loader, not once an epoch and image
    path = mask_root / "masks/val/000.png"
    path.write_bytes(path.read_bytes()[:-40])
    evaluated = [targets[0]["image_id"] for _, targets in folder(mask_root, faults="skip").val_dataloader()]
    assert evaluated == [2, 2, 3]  # under its own id, so that it counts once


def test_nothing_readable(mask_root):
    for path in (mask_root / "images/train").iterdir():
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError, match="none of the 7 images can be read together with its mask"):
        epoch(folder(mask_root, faults="skip"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("[1, 2", "is not valid JSON"),
        ("[]", "must name the classes, as"),
        ('{"a": "b"}', "the id of a class is its pixel value, an integer"),
        ('{"1": 2}', "each class needs 'id' and 'name'"),
        ('[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "id 1 is declared twice"),
        ('[{"id": 1, "name": "a", "color": [1, 2]}]', r"a color is \[red, green, blue\]"),
        ('[{"id": 1, "name": "a", "color": [1, 2, 3]}, {"id": 2, "name": "b"}]', "these have none: 'b'"),
        ('{"1": "a\\nb"}', "the name of a class is one line"),
        ('{"99999": "a"}', "the category id 99999 is no pixel value"),
    ],
)
def test_faulty_declarations(mask_root, classes, message):
    (mask_root / "classes.json").write_text(classes)
    with pytest.raises(DatasetError, match=message):
        folder(mask_root).categories  # noqa: B018
    (mask_root / "classes.json").unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*classes.json, which names the classes"):
        folder(mask_root).categories  # noqa: B018


def test_folders_that_are_not_there(mask_root, tmp_path):
    with pytest.raises(DatasetError, match=r"there is no folder .*nowhere; pass the folder"):
        folder(tmp_path / "nowhere")
    shutil.rmtree(mask_root / "masks/val")
    with pytest.raises(DatasetError, match=r"has images, but there is no folder .*masks/val with their masks"):
        folder(mask_root)
    (tmp_path / "other").mkdir()
    with pytest.raises(DatasetError, match=r"has no images with masks. Looked for images/train"):
        folder(tmp_path / "other")


def test_masks_are_never_jpeg(mask_root):
    for path in (mask_root / "masks/train").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(DatasetError, match="Masks are never JPEG"):
        folder(mask_root).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_range": (2.0, 0.5)}, "scale_range"),
        ({"short_side": (0, 9)}, "short_side"),
        ({"class_limit": 0.0}, "class_limit"),
        ({"flip": 1.5}, "flip"),
        ({"crop_size": (0, 5)}, r"crop_size\[0\]"),
        ({"image_size": (5, 0)}, r"image_size\[1\]"),
        ({"resize": "aligned"}, "Did you mean 'align'"),
        ({"faults": "clip"}, "faults must be one of"),
        ({"unknown": "skip"}, "unknown must be one of"),
        ({"val_share": 1.0}, "val_share"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_options_out_of_their_range(mask_root, options, message):
    with pytest.raises(ConfigError, match=message):
        folder(mask_root, **options)


@pytest.fixture(scope="module")
def digits():
    data = SegmentedDigits(num_train=20, num_val=8, scene_size=64, num_workers=0)
    data.prepare_data()
    return data


def test_digits_are_segmented(digits):
    assert digits.categories == {0: "background"} | {digit + 1: str(digit) for digit in range(10)}
    assert digits.num_classes == 11
    digits.setup("fit")
    images, targets = next(iter(digits.train_dataloader()))
    assert images.shape == (16, 3, 64, 64)
    assert all(target["mask"].shape == (64, 64) for target in targets)
    assert any(target["mask"].max() > 0 for target in targets)


def test_masks_of_digits_are_those_of_the_detection_task(digits):
    """The same scenes: each object's pixels have its digit, and nothing else has."""
    scenes = HandwrittenDigits(num_train=20, num_val=8, scene_size=64, num_workers=0, masks=True)
    scenes.setup("validate")
    assert scenes.root == digits.root
    (_, objects), (_, masks) = next(iter(scenes.val_dataloader())), next(iter(digits.val_dataloader()))
    assert len(objects) == len(masks) == 8
    for expected, found in zip(objects, masks, strict=True):
        assert found["file_name"] == expected["file_name"]
        for label, inside in zip(expected["labels"].tolist(), expected["masks"].bool(), strict=True):
            assert (found["mask"][inside] == label + 1).all()
        assert (found["mask"] == 0).sum() == (~expected["masks"].bool().any(0)).sum()


def test_digits_options(tmp_path):
    with pytest.raises(ConfigError, match="scene_size 64 or more"):
        SegmentedDigits(scene_size=32)
    data = SegmentedDigits(str(tmp_path), num_train=2, num_val=1, scene_size=64, num_workers=0)
    assert data.root.parent == tmp_path
    assert data.read_original("val", 1).shape == (3, 64, 64)  # makes the scenes


def test_two_images_of_one_name_cannot_share_a_mask(mask_root):
    shutil.copy(mask_root / "images/val/000.png", mask_root / "images/val/000.jpg")
    with pytest.raises(DatasetError, match=r"\[same-name\] file .*000.png: images/val/000.jpg has the same mask"):
        folder(mask_root).setup("fit")
    data = folder(mask_root, faults="skip")
    data.setup("validate")
    assert len(data._source("val")) == 3
