"""The learning rate over a training: warm-up and cosine as the authors of each family counted them, and poly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from effvit.errors import ConfigError


class TrainingSchedule(LRScheduler, ABC):
    """A schedule that knows how long the training is, and says the rate of any step of it.

    A group of the optimizer may carry ``lr_scale``, which multiplies its whole curve (its ``lr`` already contains it),
    absolute rates such as ``min_lr`` too, and ``frozen_epochs``, the epochs in which its rate is 0.

    Args:
        optimizer: Whose groups are set.

    Raises:
        ConfigError: A group's ``lr_scale`` is not positive.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._scales = [float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups]
        self._frozen_epochs = [int(group.get("frozen_epochs", 0)) for group in optimizer.param_groups]
        if min(self._scales) <= 0:
            raise ConfigError(f"lr_scale is {min(self._scales)} in a group of the optimizer; it must be above 0.")
        self._bound = False
        self._epoch = 0
        super().__init__(optimizer)

    def bind(self, epochs: int, steps_per_epoch: int | None, max_steps: int | None = None) -> None:
        """Says how long the training is; to be called before the first step.

        Args:
            epochs: Epochs of the whole training; below 1 where it ends by steps alone.
            steps_per_epoch: Optimizer steps of an epoch; ``None`` where nobody knows.
            max_steps: Optimizer steps after which the training ends, if it has not; ``None`` where only epochs count.

        Raises:
            ConfigError: The training has no end that this schedule can be measured by.
        """
        self._measure(epochs, steps_per_epoch, max_steps)
        self._bound = True
        self._apply()

    def start_epoch(self, epoch: int) -> None:
        """Moves to an epoch, counted from 0; to be called before its first step."""
        self._epoch = epoch
        self._apply()

    def lr_at(self, epoch: int, step: int, group: int = 0) -> float:
        """The learning rate of a group of the optimizer in one step of the training.

        Args:
            epoch: Counted from 0.
            step: Optimizer steps taken before, over all epochs.
            group: Index of the group.
        """
        if epoch < self._frozen_epochs[group]:
            return 0.0
        return self._scales[group] * self._curve(epoch, step, self.peak_lr(group))

    @abstractmethod
    def warmup_end(self) -> tuple[int, int | None]:
        """Where the warm-up is over: the epoch from which on it is, or the step where it is counted in steps."""

    @property
    def by_step(self) -> bool:
        """Whether the rate moves within an epoch."""
        return True

    def peak_lr(self, group: int = 0) -> float:
        """The learning rate at the end of the warm-up, before the ``lr_scale`` of a group."""
        return float(self.base_lrs[group]) / self._scales[group]

    def get_lr(self) -> list[Any]:
        """The learning rate of each group now."""
        if not self._bound and self.last_epoch > 0:
            raise RuntimeError(f"{type(self).__name__}.bind() must be called before the first step")
        return [self.lr_at(self._epoch, self.last_epoch, group) for group in range(len(self.base_lrs))]

    def state_dict(self) -> dict[str, Any]:
        """How far the training is; the shape of the curve comes from the configuration."""
        return {"epoch": self._epoch, "steps": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from `state_dict`, with the learning rates that this configuration gives there once it is bound."""
        self._epoch, self.last_epoch = int(state_dict["epoch"]), int(state_dict["steps"])
        if self._bound:
            self._apply()

    @abstractmethod
    def _measure(self, epochs: int, steps_per_epoch: int | None, max_steps: int | None) -> None:
        """Takes what the curve needs of the length of the training, see `bind`."""

    @abstractmethod
    def _curve(self, epoch: int, step: int, peak: float) -> float:
        """The learning rate of a group without ``lr_scale`` and ``frozen_epochs``, see `lr_at`."""

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


class WarmupCosine(TrainingSchedule):
    r"""Linear warm-up, then half a cosine from the learning rate of the optimizer down to ``min_lr``.

    Three published rules, chosen by the arguments:

    * ``every="epoch"``, warm-up in epochs (EfficientViT, EfficientFormer): timm's ``CosineLRScheduler`` counted in
      epochs. In epoch :math:`t < w` the rate is ``warmup_lr + t (lr - warmup_lr) / w``, from then on
      ``min_lr + (lr - min_lr) (1 + cos(pi t / T)) / 2`` with ``T`` the epochs of the training: the cosine is counted
      from the first epoch, not from the end of the warm-up. Both repositories call ``lr_scheduler.step(epoch)`` with
      the epoch just finished, so that their curve is one epoch late and the first two epochs run at ``warmup_lr``:
      ``delay_epochs=1``.
    * ``every="epoch"``, warm-up in steps (MobileViT; apple/ml-cvnets ``optim/scheduler/cosine.py``): in optimizer step
      :math:`s < N` the rate is ``warmup_lr + s (lr - warmup_lr) / N``, from then on the same cosine of the epoch, again
      counted from the first epoch. ml-cvnets can shorten the period by the epochs of the warm-up
      (``adjust_period_for_epochs``); the first release has no such option and its present MobileViT file leaves it off,
      so it is not offered. ml-cvnets rounds rates to eight decimals; here they are not rounded.
    * ``every="step"`` (DynamicViT; raoyongming/DynamicViT ``utils.cosine_scheduler``): both parts in optimizer steps.
      The warm-up of ``W`` steps reaches the full rate in its last step, ``warmup_lr + s (lr - warmup_lr) / (W - 1)``,
      and the cosine takes the ``N - W`` steps that remain, ``(1 + cos(pi (s - W) / (N - W))) / 2``.

    DynamicViT's backbone is a scaled and frozen group (its ``engine.py`` and ``optim_factory.py``): 0 in epochs 0 to 4,
    then 0.01 times the curve of the predictors, not the smaller of two rates.

    Args:
        optimizer: Whose groups are set.
        warmup_epochs: Epochs of the warm-up; 0 for none.
        warmup_steps: Optimizer steps of the warm-up, instead of epochs.
        warmup_lr: Learning rate at the first step of the warm-up, absolute.
        min_lr: Learning rate at which the cosine ends, absolute.
        every: Whether the cosine moves with each epoch or with each optimizer step.
        delay_epochs: Epochs by which the whole curve is late, ``every="epoch"`` with a warm-up in epochs only.

    Raises:
        ConfigError: An argument is out of its range, or two of them exclude each other.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_epochs: float = 0.0,
        warmup_steps: int | None = None,
        warmup_lr: float = 0.0,
        min_lr: float = 0.0,
        every: Literal["epoch", "step"] = "epoch",
        delay_epochs: int = 0,
    ) -> None:
        _check(warmup_epochs, warmup_steps, warmup_lr, min_lr, every, delay_epochs)
        self._warmup_epochs = warmup_epochs
        self._warmup_steps = warmup_steps
        self._warmup_lr = warmup_lr
        self._min_lr = min_lr
        self._every = every
        self._delay_epochs = delay_epochs
        self._epochs = 1
        self._steps_per_epoch: int | None = None
        super().__init__(optimizer)

    def _measure(self, epochs: int, steps_per_epoch: int | None, max_steps: int | None) -> None:  # noqa: ARG002
        if epochs < 1:
            raise ConfigError(
                f"the cosine ends with the last epoch, and trainer.max_epochs is {epochs}: set trainer.max_epochs to 1 "
                "or more. A training that ends by steps needs the lr_scheduler Poly, one that ends by time another."
            )
        if self._every == "step" and not steps_per_epoch:
            raise ConfigError(
                'lr_scheduler with every: "step" needs the number of steps of an epoch, which this data does not know '
                '(a stream without a length, or sizes drawn per step); use every: "epoch".'
            )
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch

    def _curve(self, epoch: int, step: int, peak: float) -> float:
        warmup, cosine = self._by_step(step) if self._every == "step" else self._by_epoch(epoch, step)
        if warmup is not None:
            return self._warmup_lr + warmup * (peak - self._warmup_lr)
        return self._min_lr + 0.5 * (peak - self._min_lr) * (1 + math.cos(math.pi * cosine))

    @property
    def by_step(self) -> bool:
        """See `TrainingSchedule.by_step`."""
        return self._every == "step" or bool(self._warmup_steps)

    def warmup_end(self) -> tuple[int, int | None]:
        """See `TrainingSchedule.warmup_end`."""
        if self._every == "step":
            return 0, self._warmup_steps or round(self._warmup_epochs * (self._steps_per_epoch or 1))
        if self._warmup_steps:
            return 0, self._warmup_steps
        return (math.ceil(self._warmup_epochs) + self._delay_epochs if self._warmup_epochs else 0), None

    def _by_epoch(self, epoch: int, step: int) -> tuple[float | None, float]:
        """Share of the warm-up done (``None``: it is over), and of the cosine."""
        position = max(0, epoch - self._delay_epochs)
        share = min(1.0, position / self._epochs)
        if self._warmup_steps:
            return (step / self._warmup_steps if step < self._warmup_steps else None), share
        return (position / self._warmup_epochs if position < self._warmup_epochs else None), share

    def _by_step(self, step: int) -> tuple[float | None, float]:
        """Share of the warm-up done (``None``: it is over), and of the cosine."""
        steps_per_epoch = self._steps_per_epoch or 1
        warmup = self._warmup_steps or round(self._warmup_epochs * steps_per_epoch)
        if step < warmup:
            return step / max(1, warmup - 1), 0.0
        return None, min(1.0, (step - warmup) / max(1, self._epochs * steps_per_epoch - warmup))


class Poly(TrainingSchedule):
    r"""The poly rule of semantic segmentation, moved with each optimizer step (arXiv 1606.00915, section 4.1).

    With warm-up as in mmsegmentation (mmcv's ``PolyLrUpdaterHook``, MMEngine's ``PolyLR``): in step :math:`t` of
    :math:`T` the rate is ``min_lr + (lr - min_lr) (1 - t / T)**power``; in the first ``warmup_steps`` :math:`W` it is
    multiplied with ``1 - (1 - t / W) (1 - warmup_factor)``. ``T`` are all optimizer steps of the training:
    ``trainer.max_steps``, or those of ``trainer.max_epochs``, whichever ends first.

    Args:
        optimizer: Whose groups are set.
        power: Exponent.
        min_lr: Learning rate at which the curve ends, absolute.
        warmup_steps: Optimizer steps of the warm-up; 0 for none.
        warmup_factor: Share of the learning rate at the first step of the warm-up.

    Raises:
        ConfigError: An argument is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        power: float = 0.9,
        min_lr: float = 0.0,
        warmup_steps: int = 0,
        warmup_factor: float = 1e-6,
    ) -> None:
        _check_ranges({"power": power, "min_lr": min_lr, "warmup_steps": warmup_steps, "warmup_factor": warmup_factor})
        self._power = power
        self._min_lr = min_lr
        self._warmup_steps = warmup_steps
        self._warmup_factor = warmup_factor
        self._steps = 1
        super().__init__(optimizer)

    def _measure(self, epochs: int, steps_per_epoch: int | None, max_steps: int | None) -> None:
        ends = [max_steps] if max_steps is not None and max_steps > 0 else []
        ends += [epochs * steps_per_epoch] if epochs > 0 and steps_per_epoch else []
        if not ends:
            raise ConfigError(
                f"poly ends with the last step: set trainer.max_steps to 1 or more (it is {max_steps}), or "
                f"trainer.max_epochs (it is {epochs}) with data that knows the steps of an epoch"
            )
        self._steps = min(ends)

    def _curve(self, epoch: int, step: int, peak: float) -> float:  # noqa: ARG002 - only steps count
        left = math.pow(1 - min(1.0, step / self._steps), self._power)
        rate = self._min_lr + (peak - self._min_lr) * left
        if step >= self._warmup_steps:
            return rate
        return rate * (1 - (1 - step / self._warmup_steps) * (1 - self._warmup_factor))

    def warmup_end(self) -> tuple[int, int | None]:
        """See `TrainingSchedule.warmup_end`."""
        return 0, self._warmup_steps or None


def _check(
    warmup_epochs: float, warmup_steps: int | None, warmup_lr: float, min_lr: float, every: str, delay_epochs: int
) -> None:
    ranges = {
        "warmup_epochs": warmup_epochs,
        "warmup_steps": warmup_steps or 0,
        "warmup_lr": warmup_lr,
        "min_lr": min_lr,
        "delay_epochs": delay_epochs,
    }
    _check_ranges(ranges)
    if every not in ("epoch", "step"):
        raise ConfigError(f'lr_scheduler: every is {every!r}; it must be "epoch" or "step".')
    if warmup_epochs and warmup_steps:
        raise ConfigError(
            f"lr_scheduler: a warm-up of {warmup_epochs} epochs and of {warmup_steps} steps; set only one of "
            "warmup_epochs and warmup_steps."
        )
    if delay_epochs and (every == "step" or warmup_steps):
        raise ConfigError(
            'lr_scheduler: delay_epochs needs every: "epoch" and a warm-up in epochs; a curve of steps is never late.'
        )


def _check_ranges(values: dict[str, float]) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"lr_scheduler: {name} is {value}; it must be 0 or more.")
