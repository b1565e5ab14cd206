"""The base of our data modules: loaders that know their rank, keep the number of batches equal, and resume."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from effvit.datamodules._samplers import EpochBatches, ResumableLoader
from effvit.datamodules._samples import single_threaded
from effvit.errors import ConfigError, close_matches


class DataModule(LightningDataModule):
    """Base of our data modules: makes loaders of map-style data sets.

    Args:
        batch_size: Training images in a batch, per process.
        val_batch_size: Images in a batch of evaluation.
        num_workers: Processes that load images; 0 loads in the training process.
        collate: Puts samples into a batch.

    Raises:
        ConfigError: A number is too small.
    """

    def __init__(
        self, *, batch_size: int, val_batch_size: int, num_workers: int, collate: Callable[[list[Any]], Any]
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, val_batch_size=val_batch_size)
        check_at_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self._collate = collate

    def _make_train_loader(self, dataset: Dataset[Any], batches: EpochBatches) -> DataLoader[Any]:
        return ResumableLoader(
            dataset,
            batches=batches,
            batches_done=self._batches_done,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            worker_init_fn=single_threaded,
            pin_memory=self._on_cuda(),
        )

    def _make_eval_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        # Every process runs the same number of batches, the last images repeated where the number does not divide:
        # a process that finishes early would leave the others waiting in a collective call (DDP's buffers, FSDP's
        # parameters). The evaluator counts each image id once.
        sampler: DistributedSampler[Any] = DistributedSampler(dataset, *self._ranks(), shuffle=False)
        return DataLoader(
            dataset,
            batch_size=self.val_batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=self._collate,
            worker_init_fn=single_threaded,
            pin_memory=self._on_cuda(),
            persistent_workers=self.num_workers > 0,
        )

    def _make_predict_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        return plain_loader(dataset, self.val_batch_size, self.num_workers, self._collate)

    def _ranks(self) -> tuple[int, int]:
        """Number of processes and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer is not None else (1, 0)

    def _on_cuda(self) -> bool:
        """Whether batches go to a CUDA device: pinning them for a run on the CPU would take GPU memory for nothing."""
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _batches_done(self) -> int:
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready if self.trainer is not None else 0


def plain_loader(
    dataset: Dataset[Any], batch_size: int, num_workers: int, collate: Callable[[list[Any]], Any]
) -> DataLoader[Any]:
    """Batches in order, of one process. Lightning rebuilds the loader of prediction to keep track of indices."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=single_threaded,
    )


def check_unreadable(policy: str) -> None:
    """Raises ``ConfigError`` unless the policy for images that cannot be read is "error" or "skip"."""
    if policy not in {"error", "skip"}:
        raise ConfigError(f"unreadable must be 'error' or 'skip', found {policy!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ``ConfigError`` for a value that is none of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {tuple(choices)}, found {value!r}. {close_matches(value, choices)}")


def check_at_least(least: int, **values: int) -> None:
    """Raises ``ConfigError`` for a value below ``least``."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"{name} must be {least} or more, found {value}")
