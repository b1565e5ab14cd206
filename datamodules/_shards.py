"""Reading classification samples from tar shards: how many there are, and who reads which."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from effvit._cache import cache_folder
from effvit.datamodules._augment_ops import Pixels
from effvit.datamodules._decode import decode_image
from effvit.datamodules._image_samples import Sample, collate
from effvit.datamodules._image_sources import image_endings
from effvit.errors import DatasetError

_log = logging.getLogger(__name__)
_REMEDY = "write the shard anew or pass `--data.unreadable skip`"

Raw = dict[str, Any]


class ShardIndex:
    """The tar files of a split, and how many samples each holds.

    Counting reads the headers of all members once; the result is kept in effvit's cache by path, size and time of
    change.

    Args:
        shards: The tar files, in order; the image id of a sample is its position in them.

    Raises:
        DatasetError: A file is missing or no tar file, or holds no sample.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = list(shards)
        self.counts = [_count_cached(shard) for shard in self.shards]
        empty = [shard for shard, number in zip(self.shards, self.counts, strict=True) if not number]
        if empty:
            raise DatasetError(f"{empty[0]} holds no sample")
        self.starts = [0, *accumulate(self.counts)]

    def __len__(self) -> int:
        """Number of samples."""
        return self.starts[-1]

    def read(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, Raw]]:
        """Samples of a range of positions, and their image ids.

        Args:
            order: In which order the shards come.
            start: First position in that order.
            stop: End of the range; beyond the last sample it goes on with the first.
        """
        position = 0
        while position < stop:
            for shard in order:
                first, last = max(start - position, 0), min(stop - position, self.counts[shard])
                if first < last:
                    yield from self._read_shard(shard, first, last)
                position += self.counts[shard]

    def read_one(self, image_id: int) -> Raw:
        """The sample of an image id."""
        shard = bisect_right(self.starts, image_id) - 1
        first = image_id - self.starts[shard]
        return next(self._read_shard(shard, first, first + 1))[1]

    def _read_shard(self, shard: int, first: int, last: int) -> Iterator[tuple[int, Raw]]:
        from webdataset.tariterators import tarfile_samples

        samples = tarfile_samples(iter([{"url": str(self.shards[shard])}]))
        number = first
        for number, sample in enumerate(islice(samples, first, last), start=first + 1):
            yield self.starts[shard] + number - 1, sample
        if number < last:
            raise DatasetError(f"{self.shards[shard]} has {number} samples instead of {self.counts[shard]}")


@dataclass(frozen=True)
class Decoder:
    """Image and label of a raw sample.

    Attributes:
        num_classes: Labels lie below it.
        json_label: Field of the label in a sample's ``json`` member, where it has no ``cls`` member.
    """

    num_classes: int
    json_label: str

    def image(self, sample: Raw) -> Pixels:
        """Uint8 RGB ``(H, W, 3)``.

        Raises:
            DatasetError: There is no image, or it is damaged.
        """
        endings = image_endings()
        data = next((value for key, value in sample.items() if f".{key}" in endings), None)
        if data is None:
            raise DatasetError(f"{name_of(sample)} has no image, only {sorted(_members(sample))}")
        pixels: Pixels = decode_image(data, name_of(sample), remedy=_REMEDY).permute(1, 2, 0).numpy()
        return pixels

    def label(self, sample: Raw) -> int:
        """The label.

        Raises:
            DatasetError: There is none, or it is out of range.
        """
        try:
            label = int(sample["cls"] if "cls" in sample else json.loads(sample["json"])[self.json_label])
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(
                f"{name_of(sample)} has no label: it needs a member .cls with a number, or .json with the field "
                f"{self.json_label!r}; it has {sorted(_members(sample))}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise DatasetError(f"{name_of(sample)} has label {label}; allowed: 0 … {self.num_classes - 1}")
        return label


class ShardStream(IterableDataset[Any]):
    """Batches of one process from shards; each worker reads its own range of samples.

    The samples of an epoch, in the order of the shards, are cut into one range for each process and each of those into
    one for each worker, so that none is read twice. In training the shards are shuffled by seed and epoch, samples
    within a buffer, and what does not fill a batch in every process is left out. In evaluation the shards stay in
    order and the last process repeats the first samples, so that all run the same number of batches.

    Args:
        index: The shards.
        decoder: Reads a sample.
        batch_size: Images in a batch.
        ranks: Number of processes and the rank of this one.
        transform: What is done to an image: the augmentation, or resize and crop.
        size: Height and width that it gives, in pixels.
        skip: Go on after an unreadable image instead of raising.
    """

    def __init__(
        self,
        index: ShardIndex,
        decoder: Decoder,
        batch_size: int,
        ranks: tuple[int, int],
        *,
        transform: Any,
        size: int,
        skip: bool,
    ) -> None:
        self.index = index
        self.decoder = decoder
        self.batch_size = batch_size
        self.ranks = ranks
        self.transform = transform
        self.size = size
        self.skip = skip
        # Shared with the workers, which stay alive from epoch to epoch.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def num_batches(self) -> int:
        """Batches of this process in an epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        """The batches of this worker."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        share = math.ceil(self.num_batches() / workers)
        first, last = min(number * share, self.num_batches()), min((number + 1) * share, self.num_batches())
        start, stop = self._range()
        start, stop = start + first * self.batch_size, min(start + last * self.batch_size, stop)
        samples = self._samples(start, stop, f"{self.ranks[1]}.{number}")
        while batch := list(islice(samples, self.batch_size)):
            yield collate(batch)

    def _range(self) -> tuple[int, int]:
        """Positions of this process."""
        raise NotImplementedError

    def _samples(self, start: int, stop: int, name: str) -> Iterator[Sample]:
        raise NotImplementedError


class TrainStream(ShardStream):
    """Augmented batches; the next readable image stands in for one that is skipped.

    Args:
        seed: Seed of order and augmentation.
        buffer: Samples among which the next one is drawn.

    The other arguments are those of ``ShardStream``.
    """

    def __init__(
        self,
        index: ShardIndex,
        decoder: Decoder,
        batch_size: int,
        ranks: tuple[int, int],
        *,
        transform: Any,
        size: int,
        seed: int,
        buffer: int,
        skip: bool,
    ) -> None:
        super().__init__(index, decoder, batch_size, ranks, transform=transform, size=size, skip=skip)
        self.seed = seed
        self.buffer = buffer
        if not self.num_batches():
            raise DatasetError(
                f"{len(index)} training images are fewer than a batch of {batch_size} on {ranks[0]} processes"
            )

    def num_batches(self) -> int:
        """Full batches of this process in an epoch."""
        return len(self.index) // (self.ranks[0] * self.batch_size)

    def _range(self) -> tuple[int, int]:
        share = self.num_batches() * self.batch_size
        return self.ranks[1] * share, (self.ranks[1] + 1) * share

    def _samples(self, start: int, stop: int, name: str) -> Iterator[Sample]:
        from webdataset.filters import shuffle

        epoch = int(self.epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.index.shards)).tolist()
        raw = self.index.read(order, start, stop)
        owed, last = 0, None
        # Not for secrets: the order of the buffer.
        mixed = shuffle(self.buffer, initial=self.buffer, rng=random.Random(f"{self.seed}.{epoch}.{name}"))  # noqa: S311
        for image_id, sample in mixed(raw):
            try:
                pixels = self.decoder.image(sample)
            except DatasetError as error:
                if not self.skip:
                    raise
                _log.warning("skipped: %s", error)
                owed += 1
                continue
            last = (image_id, sample, pixels)
            for repeat in range(owed + 1):
                yield self._augmented(epoch, *last, repeat)
            owed = 0
        for repeat in range(1, owed + 1):
            if last is None:
                raise DatasetError(f"none of the samples of process {name} can be read")
            yield self._augmented(epoch, *last, repeat)

    def _augmented(self, epoch: int, image_id: int, sample: Raw, pixels: Pixels, repeat: int) -> Sample:
        numbers = np.random.default_rng((self.seed, epoch, image_id, repeat))
        image = self.transform(pixels, numbers, self.size)
        return Sample(image, self.decoder.label(sample), image_id, name_of(sample))


class EvalStream(ShardStream):
    """Batches for evaluation; an image that is skipped is black, with the label -1."""

    def num_batches(self) -> int:
        """Batches of this process, the last one perhaps incomplete."""
        return math.ceil(self._share() / self.batch_size)

    def _share(self) -> int:
        return math.ceil(len(self.index) / self.ranks[0])

    def _range(self) -> tuple[int, int]:
        return self.ranks[1] * self._share(), (self.ranks[1] + 1) * self._share()

    def _samples(self, start: int, stop: int, name: str) -> Iterator[Sample]:
        del name
        for image_id, sample in self.index.read(range(len(self.index.shards)), start, stop):
            try:
                pixels = self.transform(self.decoder.image(sample))
                label = self.decoder.label(sample)
            except DatasetError as error:
                if not self.skip:
                    raise
                _log.warning("skipped: %s", error)
                pixels, label = np.zeros((self.size, self.size, 3), np.uint8), -1
            yield Sample(pixels, label, image_id, name_of(sample))


class ShardLoader(DataLoader[Any]):
    """Loader of a ``ShardStream`` that knows its length and tells it the epoch.

    Args:
        stream: The batches.
        epoch: Tells the epoch, when the first batch is fetched.
        num_workers: Worker processes.
        worker_init_fn: Called in each worker.
        pin_memory: Put batches into page-locked memory.
    """

    def __init__(
        self, stream: ShardStream, *, epoch: Any, num_workers: int, worker_init_fn: Any, pin_memory: bool
    ) -> None:
        super().__init__(
            stream,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # starting an epoch must not draw from the model's random numbers
        )
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.dataset.num_batches()  # type: ignore[attr-defined,no-any-return]

    def __iter__(self) -> Any:
        """The batches of an epoch."""
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        self.dataset.epoch.fill_(self._epoch())  # type: ignore[attr-defined]
        yield from super().__iter__()


def name_of(sample: Raw) -> str:
    """What a sample is called: its shard and its key."""
    return f"{Path(sample['__url__']).name}/{sample['__key__']}"


def _members(sample: Raw) -> list[str]:
    return [f".{key}" for key in sample if not key.startswith("__")]


def _count_cached(shard: Path) -> int:
    try:
        facts = shard.stat()
    except OSError as error:
        raise DatasetError(f"there is no shard {shard}") from error
    words = f"{shard.resolve()} {facts.st_size} {facts.st_mtime_ns}"
    kept = cache_folder() / "shards" / hashlib.sha256(words.encode()).hexdigest()[:32]
    if kept.is_file():
        return int(kept.read_text(encoding="ascii"))
    number = _count(shard)
    kept.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: several processes may count at once.
    draft = kept.with_name(f"{kept.name}.{os.getpid()}")
    draft.write_text(str(number), encoding="ascii")
    draft.replace(kept)
    return number


def _count(shard: Path) -> int:
    """Samples of a shard: runs of members of the same name up to the first dot, as webdataset groups them."""
    from webdataset.tariterators import base_plus_ext

    number, current = 0, None
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                key = base_plus_ext(member.name)[0] if member.isreg() else None
                number += key is not None and key != current
                current = key if key is not None else current
    except (tarfile.TarError, OSError) as error:
        raise DatasetError(f"{shard} is not a complete, uncompressed tar file: {error}") from error
    return number
