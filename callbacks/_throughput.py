"""Speed and learning rate of a training loop, as the progress bar and the report of a run show them."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def images_in_step(batch: Any, trainer: Trainer) -> int:
    """Images of all processes together, from one process's ``(images (B, ...), targets)``; 0 for any other batch."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return int(images.shape[0]) * trainer.world_size if isinstance(images, Tensor) and images.dim() > 0 else 0


def learning_rate(trainer: Trainer) -> float:
    """The highest learning rate of all parameter groups, 0 without an optimizer."""
    rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max(rates, default=0.0)


class Throughput:
    """Counts images against wall time, as a user feels it: waiting for data counts, validation does not.

    Args:
        window: Number of last batches that `rate` looks at.

    Attributes:
        seconds: Time of all batches of this process, in s.
        images: Images of these batches.
        images_seen: Images that the run has trained on, each epoch's counted anew. To be set where a run goes on.
    """

    def __init__(self, window: int = 50) -> None:
        self._window: deque[tuple[float, int]] = deque(maxlen=window)
        self._last: float | None = None
        self.seconds = 0.0
        self.images = 0
        self.images_seen = 0

    def resume(self) -> None:
        """Starts the clock, at the start of training and after each interruption such as validation."""
        self._last = time.perf_counter()

    def add(self, images: int) -> None:
        """Counts one batch, which ends now."""
        now = time.perf_counter()
        if self._last is not None:
            self._window.append((now - self._last, images))
            self.seconds += now - self._last
            self.images += images
        self.images_seen += images
        self._last = now

    def rate(self) -> float:
        """Images/s over the last batches, 0 before the first."""
        seconds = sum(span for span, _ in self._window)
        return sum(images for _, images in self._window) / seconds if seconds else 0.0

    def mean(self) -> float:
        """Images/s over all batches, 0 before the first."""
        return self.images / self.seconds if self.seconds else 0.0
