"""What the callbacks that write into a run's folder share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

#: Drawing takes from a quarter of a second to some seconds, which a run of short epochs would feel.
SECONDS_BETWEEN_PICTURES = 20.0


def run_folder(trainer: Trainer) -> Path:
    """Folder of the run."""
    return Path(trainer.default_root_dir)


def spread(wanted: int, batches: int) -> tuple[int, set[int]]:
    """Images to take from each chosen batch, and the batches, evenly over the loader."""
    if wanted == 0 or batches == 0:
        return 0, set()
    per_batch = -(-wanted // batches)
    count = -(-wanted // per_batch)
    return per_batch, {index * batches // count for index in range(count)}
