"""The order of classification's training images: repeats, sizes, ranks, and resumption within an epoch."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data.distributed import DistributedSampler

from effvit.datamodules import DigitImages, ImageFolder
from effvit.datamodules._samplers import MultiScaleBatches, SquareBatches


def square(number, batch_size, ranks=(1, 0), repeats=1, seed=0, epoch=0):
    batches = SquareBatches(number, batch_size, 32, repeats=repeats, seed=seed, ranks=ranks)
    batches.set_epoch(epoch)
    return batches


def multi_scale(number, batch_size, sizes, ranks=(1, 0), repeats=1, epoch=0, size=256):
    batches = MultiScaleBatches(number, batch_size, size, sizes, repeats=repeats, seed=3, ranks=ranks)
    batches.set_epoch(epoch)
    return batches


def indices(batches):
    return [key[1] for batch in batches for key in batch]


@pytest.mark.parametrize(("number", "processes"), [(20, 1), (23, 3), (2, 3)])
def test_plain_order_is_that_of_pytorch(number, processes):
    for rank in range(processes):
        sampler = DistributedSampler(range(number), processes, rank, seed=5)
        sampler.set_epoch(2)
        assert indices(square(number, 100, (processes, rank), seed=5, epoch=2)) == list(sampler)


@pytest.mark.parametrize(("number", "processes"), [(1000, 1), (1000, 4), (300, 7), (256, 8), (100, 3), (2, 8)])
def test_repeated_augmentation_is_timms(number, processes):
    for rank in range(processes):
        reference = RepeatAugSampler(range(number), processes, rank, num_repeats=3)
        reference.set_epoch(4)
        assert indices(square(number, 2000, (processes, rank), repeats=3, epoch=4)) == list(reference)


def test_a_step_shows_one_image_to_several_processes_in_other_augmentations():
    shares = [[key for batch in square(600, 10, (3, rank), repeats=3) for key in batch] for rank in range(3)]
    assert [len(share) for share in shares] == [512 // 3] * 3
    for together in zip(*shares, strict=True):
        assert len({index for _, index, _, _ in together}) == 1
        assert sorted(repeat for _, _, repeat, _ in together) == [0, 1, 2]


def test_keys_of_an_epoch_are_distinct_over_processes():
    for repeats in (1, 3):
        keys = [
            key for rank in range(4) for batch in square(1024, 16, (4, rank), repeats=repeats, epoch=1) for key in batch
        ]
        assert len(keys) == len(set(keys)) == 1024
        assert {epoch for epoch, *_ in keys} == {1}


@pytest.mark.parametrize(
    ("number", "batch_size", "expected"), [(9, 4, [4, 4]), (10, 4, [4, 4, 2]), (1, 4, [1]), (3, 1, [1] * 3)]
)
def test_length_and_last_batch(number, batch_size, expected):
    batches = square(number, batch_size)
    assert [len(batch) for batch in batches] == expected
    assert len(batches) == len(expected)


def test_table_of_mobilevit():
    table = {160: 327, 192: 227, 256: 128, 288: 101, 320: 81}
    batches = multi_scale(20_000, 128, list(table))
    assert dict(batches.scales) == table
    seen = Counter((batch[0][3], len(batch)) for batch in batches)
    assert {scale for scale, times in seen.items() if times == 20_000 // sum(table.values())} == set(table.items())
    assert sum(number * times for (_, number), times in seen.items()) == 20_000


def test_every_batch_has_one_size_and_all_ranks_the_same():
    steps = []
    for rank in range(2):
        batches = list(multi_scale(501, 16, [16, 24, 32, 48], (2, rank), size=32))
        assert all(len({key[3] for key in batch}) == 1 for batch in batches)
        steps.append([(batch[0][3], len(batch)) for batch in batches])
    assert steps[0] == steps[1]
    assert len({size for size, _ in steps[0]}) > 1


@pytest.mark.parametrize(
    ("images", "batch_size", "size", "sizes", "ranks"),
    [
        (500, 16, 32, [16, 32, 48], 2),
        (120, 64, 224, [160, 192, 224, 256, 288], 1),
        (130, 64, 64, [32, 64, 96], 2),
        (97, 8, 32, [16, 24, 32, 48], 1),
    ],
)
def test_an_epoch_of_sizes_shows_every_image_and_epochs_every_size_equally_often(
    images, batch_size, size, sizes, ranks
):
    seen, lengths = Counter(), set()
    for epoch in range(len(sizes)):
        shares = [
            list(multi_scale(images, batch_size, sizes, (ranks, r), epoch=epoch, size=size)) for r in range(ranks)
        ]
        assert sorted(index for share in shares for index in indices(share)) == list(range(images))
        table = dict(multi_scale(images, batch_size, sizes, size=size).scales)
        for batches in zip(*shares, strict=True):
            assert len({(key[3], len(batch)) for batch in batches for key in batch}) == 1
            assert 2 <= len(batches[0]) <= table[batches[0][0][3]]
        seen.update(batch[0][3] for batch in shares[0])
        lengths.add(len(shares[0]))
    assert lengths == {len(multi_scale(images, batch_size, sizes, (ranks, 0), size=size))}
    assert set(seen) == set(sizes)
    assert len(set(seen.values())) == 1


def test_a_set_smaller_than_a_batch_is_one_batch():
    (batch,) = multi_scale(3, 8, [32], size=32)
    assert sorted(key[1] for key in batch) == [0, 1, 2]


def test_an_image_that_comes_again_is_augmented_anew():
    for repeats in (1, 3):
        full, rest = sorted(multi_scale(9, 8, [32], size=32, repeats=repeats), key=len, reverse=True)
        assert [len(full), len(rest)] == [8, 2]
        assert len({key[:3] for key in full + rest}) == 10
    assert [key[2] for key in next(iter(multi_scale(1, 8, [32], size=32)))] == [0, 1]


def test_epochs_draw_another_order_of_sizes_and_have_the_same_length():
    epochs = [multi_scale(2000, 16, [16, 32, 64], epoch=epoch, size=32) for epoch in range(3)]
    sizes = [[batch[0][3] for batch in batches] for batches in epochs]
    assert sizes[0] != sizes[1] != sizes[2]
    # 64 + 16 + 4 images a round: 23 rounds show 1932; the other 68 need 3 batches where they begin with 16.
    assert [len(batches) for batches in epochs] == [len(drawn) for drawn in sizes] == [72] * 3
    assert Counter(sizes[0]) == {16: 24, 32: 24, 64: 24}
    assert multi_scale(50, 2, [64], size=16).scales == [(64, 2)]  # BatchNorm needs two


def test_sizes_and_repeats_together():
    keys = [key for batch in multi_scale(600, 8, [16, 32], size=32, repeats=3) for key in batch][:512]
    assert len({key[:3] for key in keys}) == 512
    assert len({key[1] for key in keys}) == 171


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], 0

    def training_step(self, batch, batch_idx):
        images, targets = batch
        assert images.shape[0] == len(targets["labels"])
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
        self.seen.append((self.current_epoch, images.shape[-1], targets["image_ids"].tolist(), digest))
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEveryStep(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")


def train(root, out, ckpt=None, **options):
    model = Recorder()
    data = ImageFolder(str(root), batch_size=4, num_workers=0, image_size=24, seed=3, **options)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[SaveEveryStep(out)], max_epochs=3, num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt)
    assert model.validated == (3 - (model.seen[0][0] if model.seen else 2)) * 1
    return model.seen


@pytest.mark.parametrize(
    "options", [{}, {"repeats": 3}, {"multi_scale": [16, 24, 32]}], ids=["plain", "repeats", "sizes"]
)
def test_resumed_within_an_epoch(image_root, tmp_path, options):
    whole = train(image_root, tmp_path, **options)
    epochs = Counter(epoch for epoch, *_ in whole)
    assert sorted(epochs) == [0, 1, 2]
    inside = epochs[0] + 1  # one batch into the second epoch
    for step in (inside, epochs[0] + epochs[1] - 1):
        assert train(image_root, tmp_path / "again", ckpt=tmp_path / f"step{step}.ckpt", **options) == whole[step:]


def test_changed_sizes_are_said(image_root, caplog):
    states = []
    for sizes in ([16, 24], [16, 32]):
        data = ImageFolder(str(image_root), num_workers=0, image_size=24, multi_scale=sizes)
        data.setup("fit")
        states.append(data.train_dataloader())
    states[1].load_state_dict(states[0].state_dict())
    assert "sizes [16, 24] -> [16, 32]" in caplog.text


def test_digits():
    data = DigitImages(batch_size=100, image_size=32)
    assert data.categories[7] == "7"
    data.setup("fit")
    assert data.num_train_images == 1438
    images, targets = next(iter(data.train_dataloader()))
    assert images.shape == (100, 3, 32, 32)
    assert targets["file_names"][0] == f"digits/train/{targets['image_ids'][0]}"
    labels = [label for _, t in data.val_dataloader() for label in t["labels"].tolist()]
    assert len(labels) == 359
    assert set(Counter(labels).values()) <= {35, 36, 37}
    zero = data.read_original("val", labels.index(0))
    assert zero.shape == (3, 64, 64)
    assert int(zero[0, 32, 32]) > 200  # a hole of paper
    assert data.augmentation.flip == 0
    assert data.network_input.crop == 1.0
