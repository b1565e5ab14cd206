"""Exponential moving average (EMA) of the weights, evaluated in place of the raw weights.

Lightning's ``WeightAveraging`` (2.6.6) is the model for this file, and its checkpoint keys are kept, but it is not the
base class: it swaps in weights that were never updated (Lightning #21724), pairs tensors by position (wrong as soon as
a network caches a buffer), copies the whole module, evaluates the *raw* weights in ``trainer.test(ckpt_path=...)``
after a fit, loses the raw weights when training ends, and writes them the wrong way round when a checkpoint is saved
during validation.

Checkpoint layout
-----------------
``state_dict``
    The weights to evaluate: averaged ones as soon as there was one update, otherwise the raw ones.
``current_model_state``
    The raw weights, which training goes on with. Absent where ``state_dict`` is raw.
``averaging_state``
    ``{"n_averaged": int}``, the number of updates. Absent where ``state_dict`` is raw.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from effvit.errors import CheckpointError, ConfigError

Which = Literal["auto", "ema", "raw"]

_RAW = "current_model_state"
_STATE = "averaging_state"


def select_weights(checkpoint: dict[str, Any], which: Which = "auto") -> dict[str, Tensor]:
    """Takes one set of weights out of a checkpoint.

    Args:
        checkpoint: What ``torch.load`` returned.
        which: ``ema`` for the averaged weights, ``raw`` for those of the optimizer, ``auto`` for the averaged ones
            where there are any.

    Returns:
        Weights by name, ready for ``load_state_dict``.

    Raises:
        ConfigError: ``which`` is none of the three.
        CheckpointError: ``ema`` is asked for, and the checkpoint holds raw weights only.
    """
    if which not in ("auto", "ema", "raw"):
        raise ConfigError(f"which must be 'auto', 'ema' or 'raw', not {which!r}")
    averaged = _STATE in checkpoint
    if which == "ema" and not averaged:
        raise CheckpointError(
            "the checkpoint holds raw weights only: the run did not average weights, or was saved before the first "
            "update. Use 'raw' or 'auto'."
        )
    weights: dict[str, Tensor] = checkpoint[_RAW] if which == "raw" and averaged else checkpoint["state_dict"]
    return weights


class EMA(Callback):
    """Keeps an exponential moving average of the weights and evaluates it.

    After each optimizer step ``average = d * average + (1 - d) * weights`` with
    ``d = min(decay, (1 + n) / (10 + n))`` after ``n`` updates, the warm-up of TensorFlow's
    ``ExponentialMovingAverage``, so that a run of a few hundred steps has a useful average too. The first update
    copies.

    Parameters and floating-point buffers (running statistics of BatchNorm) are averaged with the same factor, as YOLOX
    and timm's ``ModelEmaV2`` do: the statistics then belong to the averaged weights. Integer buffers are copied.
    Tensors narrower than float32 are averaged in float32. Only what ``state_dict()`` names takes part, so that caches
    do not. Memory: one copy of the weights while training, one more during validation.

    Validation sees the averaged weights, but never before the first update; the log says which set was evaluated, and
    so does the metric ``val/ema_updates`` (0: raw). When a fit ends the module holds the averaged weights.

    Args:
        decay: Largest share that the average keeps at an update, in ``[0, 1)``.

    Attributes:
        evaluated: Which weights the last validation saw, ``ema`` or ``raw``; ``None`` before the first.

    Raises:
        ConfigError: ``decay`` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"decay of the EMA must be in [0, 1), not {decay}")
        self.decay = decay
        self.evaluated: Literal["ema", "raw"] | None = None
        self.updates = 0
        self._average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # filled while the module holds the average
        self._last_step = 0

    def current_decay(self) -> float:
        """Share that the average keeps at the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Goes back to the raw weights when training starts again in the same process."""
        if stage == "fit":
            self._leave_average(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting at the trainer's step, which a resumed run has set."""
        self._last_step = trainer.global_step
        own = _tensors(pl_module)
        self._average = {name: value.to(own[name].device) for name, value in self._average.items() if name in own}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002 - Lightning's signature
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Updates the average after an optimizer step; a batch that only accumulates gradients changes nothing."""
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self._update(_tensors(pl_module))

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the averaged weights into the module, if there are any."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._enter_average(pl_module)
        now: Literal["ema", "raw"] = "ema" if self._raw else "raw"
        if now != self.evaluated and not trainer.sanity_checking:
            self.evaluated = now
            self._announce(trainer.global_step)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the raw weights back to training."""
        if trainer.state.fn == TrainerFn.FITTING:
            updates = float(self.updates if self._raw else 0)
            pl_module.log("val/ema_updates", updates, sync_dist=True)  # equal on all ranks; this keeps Lightning quiet
            self._leave_average(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Leaves the averaged weights in the module; a checkpoint saved from now on still holds both sets."""
        self._enter_average(pl_module)

    def on_save_checkpoint(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Writes both sets of weights, see the layout at the top of this file."""
        if self.updates == 0:
            return
        raw = dict(checkpoint["state_dict"])
        raw.update(self._raw)  # what training goes on with, even if the module holds the average now
        own = _tensors(pl_module)
        averaged = {name: self._average[name].to(own[name].dtype) for name in self._average if name in own}
        checkpoint[_RAW] = raw
        checkpoint["state_dict"] = {**raw, **averaged}
        checkpoint[_STATE] = {"n_averaged": self.updates}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores both sets when training goes on; any other verb keeps the weights to evaluate."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._raw = {}
        self._average = {}
        self.updates = 0
        if _STATE in checkpoint:
            self.updates = int(checkpoint[_STATE]["n_averaged"])
            averaged = checkpoint["state_dict"]
            self._average = {
                name: averaged[name].detach().to(_average_dtype(value), copy=True)
                for name, value in _tensors(pl_module).items()
                if name in averaged
            }
            # Lightning has just loaded `state_dict`, the averaged weights; training goes on with the raw ones.
            pl_module.load_state_dict(checkpoint[_RAW], strict=pl_module.strict_loading)

    @torch.no_grad()
    def _update(self, weights: dict[str, Tensor]) -> None:
        if self.updates == 0:
            self._average = {name: value.to(_average_dtype(value), copy=True) for name, value in weights.items()}
        else:
            pairs = [(self._average[name], value) for name, value in weights.items()]
            for mean, value in pairs:
                if not mean.is_floating_point():
                    mean.copy_(value)
            floating = [(mean, value.to(mean.dtype)) for mean, value in pairs if mean.is_floating_point()]
            means, values = [mean for mean, _ in floating], [value for _, value in floating]
            get_ema_multi_avg_fn(self.current_decay())(means, values, None)  # type: ignore[no-untyped-call]
        self.updates += 1

    def _enter_average(self, pl_module: LightningModule) -> None:
        if self.updates and not self._raw:
            weights = _tensors(pl_module)
            self._raw = {name: value.clone() for name, value in weights.items()}
            _copy(self._average, weights)

    def _leave_average(self, pl_module: LightningModule) -> None:
        if self._raw:
            _copy(self._raw, _tensors(pl_module))
            self._raw = {}

    def _announce(self, step: int) -> None:
        if self.evaluated == "ema":
            rank_zero_info(f"Step {step}: validation sees the averaged weights (EMA, {self.updates} updates).")
        else:
            rank_zero_info(f"Step {step}: validation sees the raw weights, the EMA has not been updated yet.")


def _tensors(pl_module: LightningModule) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, detached, sharing memory with the module."""
    return {name: value for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)}


def _average_dtype(value: Tensor) -> torch.dtype:
    narrow = value.is_floating_point() and torch.finfo(value.dtype).bits < 32  # a step of 1 - decay would round to 0
    return torch.float32 if narrow else value.dtype


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    # In place, so that the optimizer keeps its parameters, and counted by autograd's version counter, so that whatever
    # a network derived from its weights and cached can notice.
    for name, value in target.items():
        if name in source:
            value.copy_(source[name])
