"""Tar shards: everybody reads something else, and together everything."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from effvit.datamodules import ImageShards
from effvit.datamodules._shards import ShardIndex
from effvit.errors import ConfigError, DatasetError


def jpeg(value):
    return cv2.imencode(".jpg", np.full((32, 40, 3), value, np.uint8))[1].tobytes()


def write_shard(path, samples):
    """A tar of ``{key: {ending: bytes}}``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{key}.{ending}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    """Five training shards of 9, 10, …, 13 images (55) and two validation shards of 4 and 7; label = number % 3."""
    number = 0
    for shard, count in enumerate((9, 10, 11, 12, 13)):
        samples = {f"{i:04d}": {"jpg": jpeg(i), "cls": str(i % 3).encode()} for i in range(number, number + count)}
        write_shard(tmp_path / f"train-{shard:06d}.tar", samples)
        number += count
    for shard, numbers in enumerate((range(4), range(4, 11))):
        samples = {f"sub/{i}": {"json": json.dumps({"label": i % 3}).encode(), "png": jpeg(i)} for i in numbers}
        write_shard(tmp_path / f"val-{shard}.tar", samples)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    return tmp_path


def make(root, rank=(1, 0), **options):
    settings = {
        "train": "train-{000000..000004}.tar", "val": ["val-0.tar", "val-1.tar"], "classes": "classes.json",
        "batch_size": 4, "val_batch_size": 3, "num_workers": 0, "image_size": 16, "shuffle_buffer": 8,
    }  # fmt: skip
    data = ImageShards(str(root), **settings | options)
    data._ranks = lambda: rank
    return data


def ids(loader):
    return [targets["image_ids"].tolist() for _, targets in loader]


def flat(batches):
    return [number for batch in batches for number in batch]


def test_batches(root):
    data = make(root)
    assert data.categories == {0: "a", 1: "b", 2: "c"}
    assert data.num_train_images == 55
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert [number % 3 for number in targets["image_ids"].tolist()] == targets["labels"].tolist()
    number = int(targets["image_ids"][0])
    assert targets["file_names"][0].endswith(f".tar/{number:04d}")
    assert abs(int(images[0].float().mean()) - number) <= 1
    assert abs(int(data.read_original("train", 50).float().mean()) - 50) <= 1
    assert data.read_original("test", 10).shape == (3, 32, 40)


def test_two_processes_with_two_workers_share_the_images(root):
    shares = []
    for rank in range(2):
        loader = make(root, (2, rank), num_workers=2).train_dataloader()
        epochs = []
        for epoch in range(2):
            loader._epoch = lambda epoch=epoch: epoch
            epochs.append(ids(loader))
            assert [len(batch) for batch in epochs[-1]] == [4] * len(loader)
        shares.append(epochs)
    for epoch in range(2):
        seen = flat(shares[0][epoch]) + flat(shares[1][epoch])
        assert len(seen) == len(set(seen)) == 48  # 6 full batches of 4 in each of 2 processes
    assert shares[0][0] != shares[0][1]
    assert set(flat(shares[0][0] + shares[1][0])) != set(flat(shares[0][1] + shares[1][1]))


def test_evaluation_counts_every_image(root):
    for workers in (0, 2):
        shares = [ids(make(root, (2, rank), num_workers=workers).val_dataloader()) for rank in range(2)]
        assert Counter(flat(shares[0] + shares[1])) == Counter([*range(11), 0])
        assert [len(share) for share in shares] == [2, 2]
    labels = flat(t["labels"].tolist() for _, t in make(root).val_dataloader())
    assert labels == [number % 3 for number in range(11)]


def test_epochs_repeat_by_seed(root):
    first, again, other = (ids(make(root, seed=seed).train_dataloader()) for seed in (0, 0, 1))
    assert first == again != other


def test_trainer_tells_the_epoch(root):
    class Seen(BoringModel):
        def __init__(self):
            super().__init__()
            self.seen = {}

        def training_step(self, batch, batch_idx):
            self.seen.setdefault(self.current_epoch, []).extend(batch[1]["image_ids"].tolist())
            return self.layer(torch.ones(1, 32)).sum()

        def validation_step(self, batch, batch_idx):
            pass

    model = Seen()
    trainer = Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False,
                      enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    data = make(root)
    trainer.fit(model, data)
    expected = make(root).train_dataloader()
    for epoch in range(2):
        expected._epoch = lambda epoch=epoch: epoch
        assert model.seen[epoch] == flat(ids(expected))


def test_a_damaged_image(root, caplog):
    samples = {str(i): {"jpg": jpeg(i)[: 200 if i == 3 else None], "cls": b"1"} for i in range(8)}
    write_shard(root / "train-bad.tar", samples)
    write_shard(root / "val-bad.tar", samples)
    options = {"train": "train-bad.tar", "val": "val-bad.tar"}
    with pytest.raises(DatasetError, match=r"train-bad\.tar/3 is truncated or damaged.*`--data\.unreadable skip`"):
        ids(make(root, **options).train_dataloader())
    data = make(root, unreadable="skip", **options)
    assert len(set(flat(ids(data.train_dataloader())))) == 7
    assert [len(batch) for batch in ids(data.train_dataloader())] == [4, 4]
    assert flat(t["labels"].tolist() for _, t in data.val_dataloader()) == [1, 1, 1, -1, 1, 1, 1, 1]
    assert "skipped: image train-bad.tar/3" in caplog.text


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": jpeg(1)}, r"val-x\.tar/0 has no label: .*it has \['\.jpg'\]"),
        ({"jpg": jpeg(1), "cls": b"3"}, r"val-x\.tar/0 has label 3; allowed: 0 … 2"),
        ({"jpg": jpeg(1), "json": b'{"class": 1}'}, r"the field 'label'"),
        ({"cls": b"1"}, r"val-x\.tar/0 has no image, only \['\.cls'\]"),
    ],
)
def test_samples_that_cannot_be_used(root, members, message):
    write_shard(root / "val-x.tar", {"0": members})
    with pytest.raises(DatasetError, match=message):
        ids(make(root, val="val-x.tar").val_dataloader())


def test_missing_and_damaged_shards(root):
    with pytest.raises(DatasetError, match=r"2 of 7 shards of .* are missing in .*, the first is train-000005\.tar"):
        make(root, train="train-{000000..000006}.tar").setup("fit")
    (root / "val-0.tar").write_bytes(b"<html>" * 300)
    with pytest.raises(DatasetError, match=r"val-0\.tar is not a complete, uncompressed tar file"):
        make(root).setup("validate")
    write_shard(root / "val-0.tar", {})
    with pytest.raises(DatasetError, match=r"val-0\.tar holds no sample"):
        make(root).setup("validate")
    with pytest.raises(DatasetError, match="55 training images are fewer than a batch of 60"):
        make(root, batch_size=60).train_dataloader()


def test_class_names(root):
    assert make(root, classes=["x", "y"]).categories == {0: "x", 1: "y"}
    (root / "named.json").write_text('{"1": "y", "0": "x"}')
    assert make(root, classes="named.json").categories == {0: "x", 1: "y"}
    (root / "named.json").write_text('{"1": "y", "2": "x"}')
    with pytest.raises(DatasetError, match="must name the labels 0 … 1"):
        make(root, classes="named.json")
    with pytest.raises(DatasetError, match=r"cannot read the class names from .*nothing\.json"):
        make(root, classes="nothing.json")
    with pytest.raises(DatasetError, match="needs two or more class names"):
        make(root, classes=["x"])
    with pytest.raises(ConfigError, match="shuffle_buffer must be 1 or more"):
        make(root, shuffle_buffer=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repeats": 3}, r"repeats is 3, .*`--data\.repeats 1`"),
        ({"multi_scale": [16, 24]}, r"multi_scale is \[16, 24\], .*`--data\.multi_scale null`"),
    ],
)
def test_what_shards_cannot_do_is_refused(root, options, message):
    with pytest.raises(ConfigError, match=message):
        make(root, **options)


def test_counts_are_kept_until_a_shard_changes(root, monkeypatch):
    shard = root / "val-0.tar"
    assert len(ShardIndex([shard])) == 4
    monkeypatch.setattr("effvit.datamodules._shards._count", lambda _: 99)
    assert len(ShardIndex([shard])) == 4
    time.sleep(0.01)
    shard.write_bytes(shard.read_bytes())
    assert len(ShardIndex([shard])) == 99
