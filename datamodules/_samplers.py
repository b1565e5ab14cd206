"""The order of training images, as a function of seed and epoch alone, and the loader that resumes within an epoch."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from itertools import accumulate, count, cycle, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

_log = logging.getLogger(__name__)

#: Images in a round of repeated augmentation: the official epoch is cut to a multiple of it.
_ROUND = 256


def batched_by_shape(order: Sequence[int], is_wide: torch.Tensor, batch_size: int) -> list[int]:
    """Reorders images so that every batch holds one orientation, wide or tall; what is left over comes last.

    A batch is padded to its largest height and width, so that mixed orientations waste half of it. The rule is
    MMDetection's ``AspectRatioBatchSampler``.

    Args:
        order: Image indices.
        is_wide: bool ``(N,)``, whether an image is wider than tall.
        batch_size: Images in a batch.

    Returns:
        The same indices.
    """
    buckets: dict[bool, list[int]] = {False: [], True: []}
    out: list[int] = []
    for index in order:
        bucket = buckets[bool(is_wide[index])]
        bucket.append(index)
        if len(bucket) == batch_size:
            out += bucket
            bucket.clear()
    return out + buckets[True] + buckets[False]


class EpochBatches(Sampler[list[Any]]):
    """Batches of one process, in an order that depends on seed and epoch only.

    Every process gets the same number of images; the last ones repeat the first of the order where the number does not
    divide. A batch is a list of keys, each a tuple that begins with the epoch and the index of an image.

    Args:
        num_images: Number of images.
        batch_size: Images in a batch of one process.
        seed: Seed of the order.
        ranks: Number of processes and the rank of this one.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, ranks: tuple[int, int]) -> None:
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.num_replicas, self.rank = ranks
        self.epoch = 0
        self.skip = 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: Lightning tells the epoch to the ``sampler`` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Any]]:
        """Batches of this epoch; the first ``skip`` ones are left out, once."""
        # A generator: DataLoader makes two iterators and uses one, and only that one may take ``skip``.
        skip, self.skip = self.skip, 0
        yield from islice(self._batches(torch.Generator().manual_seed(self.seed + self.epoch)), skip, None)

    def state(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch."""
        return {
            "images": self.num_images,
            "batch_size": self.batch_size,
            "ranks": self.num_replicas,
            "seed": self.seed,
        }

    @abstractmethod
    def _batches(self, generator: torch.Generator) -> Iterator[list[Any]]:
        """The batches of an epoch; all that is random is drawn from ``generator``, alike in every process."""

    def _num_samples(self) -> int:
        """Images of this process in an epoch."""
        return math.ceil(self.num_images / self.num_replicas)

    def _shuffled(self, generator: torch.Generator) -> list[int]:
        """Indices of this process, in the order of PyTorch's ``DistributedSampler``."""
        order = torch.randperm(self.num_images, generator=generator).tolist()
        padded = islice(cycle(order), self._num_samples() * self.num_replicas)
        return list(islice(padded, self.rank, None, self.num_replicas))


class ShapeBatches(EpochBatches):
    """Batches of keys ``(epoch, index)`` in which all images are wide or all are tall, as far as the number allows.

    An incomplete last batch is kept.

    Args:
        is_wide: bool ``(N,)``, whether each image is wider than tall.
        batch_size: Images in a batch of one process.
        seed: Seed of the order.
        ranks: Number of processes and the rank of this one.
    """

    def __init__(self, is_wide: torch.Tensor, batch_size: int, seed: int, ranks: tuple[int, int]) -> None:
        super().__init__(len(is_wide), batch_size, seed, ranks)
        self._is_wide = is_wide

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self._num_samples() / self.batch_size)

    def _batches(self, generator: torch.Generator) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = batched_by_shape(self._shuffled(generator), self._is_wide, self.batch_size)
        for start in range(0, len(order), self.batch_size):
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


class SquareViews(EpochBatches):
    """Base of classification's batches: keys ``(epoch, index, repeat, size)``, one size in a batch.

    With ``repeats`` above 1 this is repeated augmentation as DeiT and timm do it (Hoffer et al., arXiv 1901.09335;
    ``samplers.py`` of DeiT): each image comes ``repeats`` times in a row with another augmentation each, consecutive
    ones go to different processes and hence into the same step, and the epoch ends after ``N // 256 * 256 / processes``
    images of a process, so that it is as long as one without repeats and shows a share of the images. Sets of fewer
    than 256 images are not cut to a round number.

    Args:
        num_images: Number of images.
        batch_size: Images in a batch of one process.
        size: Height and width in pixels that ``batch_size`` is for.
        repeats: How often an image comes, each time augmented anew.
        seed: Seed of the order.
        ranks: Number of processes and the rank of this one.
    """

    def __init__(
        self, num_images: int, batch_size: int, size: int, *, repeats: int, seed: int, ranks: tuple[int, int]
    ) -> None:
        super().__init__(num_images, batch_size, seed, ranks)
        self.size = size
        self.repeats = repeats

    def state(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch."""
        return {**super().state(), "size": self.size, "repeats": self.repeats}

    def _num_samples(self) -> int:
        if self.repeats == 1 or self.num_images < _ROUND:
            return super()._num_samples()
        return self.num_images // _ROUND * _ROUND // self.num_replicas

    def _views(self, generator: torch.Generator) -> list[int]:
        """``index * repeats + repeat`` of this process, in order."""
        if self.repeats == 1:
            return self._shuffled(generator)
        order = torch.randperm(self.num_images, generator=generator).tolist()
        places = range(self.rank, self._num_samples() * self.num_replicas, self.num_replicas)
        # Where processes outnumber images and repeats, the order starts again.
        return [
            order[place // self.repeats % self.num_images] * self.repeats + place % self.repeats for place in places
        ]

    def _keys(self, views: Iterable[int], size: int) -> list[tuple[int, int, int, int]]:
        return [(self.epoch, *divmod(view, self.repeats), size) for view in views]


class SquareBatches(SquareViews):
    """Batches of a fixed number of images of one size.

    The last batch of an epoch may be incomplete, and is left out where it would hold a single image, whose variance
    BatchNorm cannot know; that is another image in each epoch. The arguments are those of ``SquareViews``.
    """

    def __len__(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self._num_samples() / self.batch_size) - self.leaves_one_out

    @property
    def leaves_one_out(self) -> bool:
        """Whether the last batch of an epoch would hold a single image and is left out."""
        full, rest = divmod(self._num_samples(), self.batch_size)
        return rest == 1 and full > 0

    def _batches(self, generator: torch.Generator) -> Iterator[list[tuple[int, int, int, int]]]:
        views = self._views(generator)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield self._keys(views[start : start + self.batch_size], self.size)


class MultiScaleBatches(SquareViews):
    """MobileViT's variable-batch sampler: each batch has one of several sizes, and as many images as fit.

    A batch of size ``s`` holds ``floor(size² · batch_size / s²)`` images (for size 256 and 128 images: 327 of 160 px,
    227 of 192, 101 of 288, 81 of 320), so that a step costs about the same at any size; at least 2, for BatchNorm's
    sake, unless ``batch_size`` is 1. The order of sizes is drawn for each epoch, alike in all processes (Mehta and
    Rastegari, arXiv 2110.02178, §3.2; ``variable_batch_sampler.py`` of ml-cvnets).

    The official sampler draws each size on its own, so that epochs differ in their number of steps. Here every epoch
    has the same known length, which learning-rate schedules by steps and Lightning's exact resumption need, and shows
    every image: as many rounds of one full batch of each size as the images fill, and what is left over in smaller
    batches of some of the sizes, other ones in each epoch, so that over the epochs each size comes equally often. A set
    that fills no round, of a few hundred images, is all such rest. Only where a batch of the rest would hold a single
    image does one come a second time, augmented anew.

    Args:
        num_images: Number of images.
        batch_size: Images in a batch of one process at ``size``.
        size: Height and width in pixels that ``batch_size`` is for.
        sizes: Sizes to draw from.
        repeats: How often an image comes, each time augmented anew.
        seed: Seed of order and sizes.
        ranks: Number of processes and the rank of this one.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        size: int,
        sizes: Sequence[int],
        *,
        repeats: int,
        seed: int,
        ranks: tuple[int, int],
    ) -> None:
        super().__init__(num_images, batch_size, size, repeats=repeats, seed=seed, ranks=ranks)
        least = min(2, batch_size)
        self.scales = [(other, max(least, size * size * batch_size // (other * other))) for other in sorted(sizes)]
        self._least = least
        self._rounds, self._left = divmod(self._num_samples(), sum(number for _, number in self.scales))
        # Enough for what is left over with whatever size they begin, so that all epochs are equally long.
        self._rest = max(self._needed_from(first) for first in range(len(self.scales)))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._rounds * len(self.scales) + self._rest

    def state(self) -> dict[str, Any]:
        """What the order depends on, besides the epoch."""
        return {**super().state(), "sizes": [size for size, _ in self.scales]}

    def _needed_from(self, first: int) -> int:
        """Batches of consecutive sizes that hold what the rounds leave over."""
        before = accumulate((number for _, number in self._from(first)), initial=0)
        return sum(taken < self._left for taken in islice(before, len(self.scales)))

    def _from(self, first: int) -> list[tuple[int, int]]:
        return self.scales[first:] + self.scales[:first]

    def _scales_of_rest(self) -> list[tuple[int, int]]:
        """Size and number of images of the batches that the rounds leave over, cut alike to what there is."""
        scales = self._from(self.epoch % len(self.scales))[: self._rest]
        room = sum(number for _, number in scales)
        ends = [held * self._left // room for held in accumulate((number for _, number in scales), initial=0)]
        return [(size, max(self._least, ends[i + 1] - ends[i])) for i, (size, _) in enumerate(scales)]

    def _batches(self, generator: torch.Generator) -> Iterator[list[tuple[int, int, int, int]]]:
        views = self._views(generator)
        scales = self.scales * self._rounds + self._scales_of_rest()
        # A view that comes again gets the number of a repeat that there was not yet, hence other random numbers.
        endless = (key for again in count() for key in self._numbered(views, again))
        for place in torch.randperm(len(scales), generator=generator).tolist():
            size, number = scales[place]
            yield [(*key, size) for key in islice(endless, number)]

    def _numbered(self, views: Sequence[int], again: int) -> Iterator[tuple[int, int, int]]:
        for view in views:
            index, repeat = divmod(view, self.repeats)
            yield self.epoch, index, repeat + again * self.repeats


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that continues an epoch where a checkpoint left it, without loading the batches before.

    Lightning asks it for a state when it saves and hands that back when it resumes; the number of batches already used
    is the trainer's own count, read when the first batch is fetched. Lightning creates iterators before it sets the
    epoch, so nothing starts until that first fetch.

    Args:
        dataset: Map-style data set, indexed by the keys of the batches.
        batches: Order of the images.
        batches_done: Tells how many batches of this epoch the trainer has used.
        num_workers: Worker processes.
        collate_fn: Puts samples into a batch.
        worker_init_fn: Called in each worker.
        pin_memory: Put batches into page-locked memory, from where a CUDA device fetches them faster.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batches: EpochBatches,
        batches_done: Callable[[], int],
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any],
        worker_init_fn: Callable[[int], None],
        pin_memory: bool,
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own generator: starting an epoch draws from it, and the model's random numbers must not depend on
            # how often a loader was started.
            generator=torch.Generator().manual_seed(batches.seed),
        )
        self._order = batches
        self._batches_done = batches_done
        self._resuming = False

    def __iter__(self) -> Any:
        """Iterates over one epoch, or over the rest of the epoch that is resumed."""
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if self._resuming:
            self._order.skip = self._batches_done()
            self._resuming = False
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """What the order of images depends on, besides the epoch."""
        return self._order.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Marks the next iteration as the continuation of the epoch that the trainer resumes."""
        self._resuming = True
        changed = [
            f"{key} {state[key]} -> {now}" for key, now in self.state_dict().items() if state.get(key, now) != now
        ]
        if changed:
            _log.warning(
                "the data changed since the checkpoint (%s): this epoch continues in another order of images",
                ", ".join(changed),
            )
