"""The order of training images, as a function of seed and epoch alone, and the loader that resumes within an epoch."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_log = logging.getLogger(__name__)

Key = tuple[int, int]


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


class EpochSampler(DistributedSampler[int]):
    """Yields ``(epoch, index)`` in an order that depends on seed and epoch only.

    Every rank gets the same number of images; the last ones repeat the first of the order where the number does not
    divide, and an incomplete last batch is kept. As it is a ``DistributedSampler``, Lightning leaves it in place.

    Args:
        is_wide: bool ``(N,)``, whether each image is wider than tall.
        batch_size: Images in a batch of one rank.
        seed: Seed of the order.
        ranks: Number of processes and the rank of this one.
    """

    def __init__(self, is_wide: torch.Tensor, batch_size: int, seed: int, ranks: tuple[int, int]) -> None:
        super().__init__(range(len(is_wide)), *ranks, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self._is_wide = is_wide
        self._batch_size = batch_size
        self.skip = 0

    def __iter__(self) -> Iterator[Any]:
        """Keys of this rank's images; the first ``skip`` ones are left out, once."""
        skip, self.skip = self.skip, 0
        order = batched_by_shape(list(super().__iter__()), self._is_wide, self._batch_size)
        return iter([(self.epoch, index) for index in order[skip:]])


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` that continues an epoch where a checkpoint left it, without loading the batches before.

    Lightning asks it for a state when it saves and hands that back when it resumes; the number of batches already used
    is the trainer's own count, read when the first batch is fetched. Lightning creates iterators before it sets the
    epoch, so nothing starts until that first fetch.

    Args:
        dataset: Map-style data set, indexed by the sampler's keys.
        sampler: Order of the images.
        batch_size: Images in a batch.
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
        sampler: EpochSampler,
        batch_size: int,
        batches_done: Callable[[], int],
        num_workers: int,
        collate_fn: Callable[[list[Any]], Any],
        worker_init_fn: Callable[[int], None],
        pin_memory: bool,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate_fn,
            worker_init_fn=worker_init_fn,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            # Its own generator: starting an epoch draws from it, and the model's random numbers must not depend on
            # how often a loader was started.
            generator=torch.Generator().manual_seed(sampler.seed),
        )
        self._batches_done = batches_done
        self._resuming = False

    def __iter__(self) -> Any:
        """Iterates over one epoch, or over the rest of the epoch that is resumed."""
        return self._batches()

    def _batches(self) -> Iterator[Any]:
        if self._resuming:
            assert isinstance(self.sampler, EpochSampler)
            assert self.batch_size is not None
            self.sampler.skip = self._batches_done() * self.batch_size
            self._resuming = False
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """What the order of images depends on, besides the epoch."""
        sampler = self.sampler
        assert isinstance(sampler, EpochSampler)
        return {
            "images": len(sampler.dataset),  # type: ignore[arg-type]
            "batch_size": self.batch_size or 1,
            "ranks": sampler.num_replicas,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
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
