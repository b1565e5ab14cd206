"""The checkpoints of a run: ``best.ckpt`` and ``last.ckpt`` at the top of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from effvit.callbacks import _random_state
from effvit.callbacks._checkpoint_io import AtomicCheckpointIO
from effvit.errors import ConfigError, close_matches

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_RANDOM = "random_states"


class RunCheckpoint(ModelCheckpoint):
    """Keeps ``best.ckpt`` and ``last.ckpt`` in the run folder, such that a run can be killed at any moment and resumed.

    ``best.ckpt`` is the validation with the best ``monitor``; before the first validation there is none. ``last.ckpt``
    is written every ``every_n_train_steps`` optimizer steps, before and after each validation, at the end of each epoch
    and when the process is told to stop (SIGTERM, as SLURM sends it). Files are written aside and renamed, hold tensors
    and plain data only, and are opened with ``weights_only=True``.

    A resumed run goes on with the very next batch and, since the state of all random number generators is part of the
    file, with the same losses as a run that was never stopped. That needs a training loader with ``state_dict`` and
    ``load_state_dict``, as those of `effvit.datamodules` have. Where Lightning 2.6.6 would not resume exactly, nothing
    is saved: in the middle of a step (an error, Ctrl+C), inside a validation (its metrics would miss the images
    before the interruption; it is repeated from its start) and while gradients accumulate. The file of the last exact
    moment then stays.

    Args:
        every_n_train_steps: Optimizer steps from one ``last.ckpt`` to the next.
        monitor: Logged metric that tells the best validation. ``None`` takes the task's own (``monitor``, ``mode``).
        mode: ``max`` or ``min``, whether more or less of ``monitor`` is better. ``None`` takes the task's own.

    Raises:
        ConfigError: A value out of its range, or a monitored metric that no validation logs.
    """

    def __init__(self, every_n_train_steps: int = 200, monitor: str | None = None, mode: str | None = None) -> None:
        if every_n_train_steps < 1:
            raise ConfigError(f"every_n_train_steps must be at least 1, not {every_n_train_steps}")
        if mode not in (None, "max", "min"):
            raise ConfigError(f"mode must be 'max' or 'min', not {mode!r}")
        super().__init__(
            filename="best",
            save_top_k=1,
            save_last=True,
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._chosen = (monitor, mode)
        self._restored_score: float | None = None
        self._restored_random: list[dict[str, Any]] | None = None
        self._validation_due = False  # true while saving before a validation, and after resuming from there

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; options may change between a run and its continuation."""
        return type(self).__name__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Finds the run folder and the metric to watch."""
        # Not ModelCheckpoint's own setup: it warns of a folder that is not empty, and a run folder never is.
        self.dirpath = trainer.strategy.broadcast(str(Path(trainer.default_root_dir).resolve()))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # anything else is the user's choice
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit":
            monitor, mode = self._chosen
            self.monitor = monitor or getattr(pl_module, "monitor", None)  # without one, only last.ckpt is kept
            self.mode = str(mode or getattr(pl_module, "mode", "max"))
            self.kth_value = torch.tensor(torch.inf if self.mode == "min" else -torch.inf)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Goes on with the best score of the run that is resumed, if its file is here."""
        score, self._restored_score = self._restored_score, None
        if score is None:
            return
        path = self.format_checkpoint_name({})
        if not self.file_exists(path, trainer):
            rank_zero_info(f"The run had a best.ckpt, {self.dirpath} has none: its next validation writes one.")
            return
        self.best_model_path = self.kth_best_model_path = path
        self.best_model_score = self.current_score = self.kth_value = torch.tensor(score)
        self.best_k_models = {path: torch.tensor(score)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the random number generators, after all that draws from them on the way to the first batch."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = trainer.global_step  # there is nothing new to save yet
        self._restore_random(trainer)
        if not self._validation_due:
            self._restored_random = None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002 - Lightning's signature
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Saves ``last.ckpt`` at every ``every_n_train_steps``-th optimizer step."""
        if trainer.global_step % self._every_n_train_steps or self._should_skip_saving_checkpoint(trainer):
            return
        loop = trainer.fit_loop.epoch_loop
        fetcher = trainer.fit_loop._data_fetcher  # noqa: SLF001 - no public name says whether a validation follows
        ends_epoch = loop._num_ready_batches_reached()  # noqa: SLF001
        assert fetcher is not None
        if not ends_epoch and not loop._should_check_val_fx(fetcher):  # noqa: SLF001
            self._save_last(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Saves ``last.ckpt`` before a validation, which may be long and is repeated if it is interrupted."""
        if self._validation_due:
            # Resumed here. The counters say so until they are reset, and would in this run's own checkpoints as well.
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset()
            self._restore_random(trainer)  # once more: starting the validation loader may have drawn a number
            self._validation_due, self._restored_random = False, None
        elif not self._should_skip_saving_checkpoint(trainer) and not _accumulates(trainer):
            self._validation_due = True
            self._save_last(trainer)
            self._validation_due = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Saves ``best.ckpt`` if this validation is the best so far, and ``last.ckpt``."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or _is_dry_run(trainer):
            return
        candidates = self._monitor_candidates(trainer)
        if self.monitor is not None:
            if self.monitor not in candidates:
                raise ConfigError(_no_metric(self.monitor, candidates))
            self._save_monitor_checkpoint(trainer, candidates)
        if not _accumulates(trainer):
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Saves ``last.ckpt`` unless a validation has just done so."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Says so where the run ends without a best checkpoint."""
        if not self.best_model_path and not _is_dry_run(trainer):
            rank_zero_info(f"No validation was run, so there is no best.ckpt in {self.dirpath}; last.ckpt is there.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Saves ``last.ckpt`` if training stands exactly between two steps."""
        if self._should_skip_saving_checkpoint(trainer):
            return
        cause = type(exception).__name__
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        between = progress.ready == progress.completed and trainer.training and not _accumulates(trainer)
        # With several processes only SIGTERM is known to reach all of them: another error would leave one waiting.
        if between and (trainer.world_size == 1 or isinstance(exception, SIGTERMException)):
            self._save_last(trainer)
            rank_zero_info(f"Stopped ({cause}) after step {trainer.global_step}, saved {self.last_model_path}.")
        elif self.last_model_path:
            saved = f"{self.last_model_path} is of step {self._last_global_step_saved}"
            rank_zero_info(f"Stopped ({cause}) inside a step or a validation: {saved}.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Adds the state of the random number generators of every process."""
        states: list[Any] = [_random_state.capture(trainer.strategy.root_device)]
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, states[0])
            states = gathered
        checkpoint[_RANDOM] = states
        if self._validation_due:
            # Lightning 2.6.6 repeats a validation only if its counters say that it stopped inside a batch. This is the
            # first one, so that the metrics miss no image.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            stopped = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
            progress.update(total=dict(stopped), current=dict(stopped), is_last_batch=False)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Keeps the random states until training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._restored_random = checkpoint.get(_RANDOM)

    def state_dict(self) -> dict[str, Any]:
        """The best score, and whether a validation comes next; no paths, so that a run folder can be moved."""
        score = self.best_model_score
        return {
            "best_model_score": None if score is None else float(score),
            "validation_due": self._validation_due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state until training starts."""
        self._restored_score = state_dict["best_model_score"]
        self._validation_due = bool(state_dict["validation_due"])

    def _save_last(self, trainer: Trainer) -> None:
        self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _restore_random(self, trainer: Trainer) -> None:
        states = self._restored_random
        if states is not None and trainer.global_rank < len(states):
            _random_state.restore(states[trainer.global_rank], trainer.strategy.root_device)


def _accumulates(trainer: Trainer) -> bool:
    """Whether gradients wait for more batches; a checkpoint does not hold them."""
    return trainer.fit_loop.epoch_loop._should_accumulate()  # noqa: SLF001 - no public name


def _is_dry_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _no_metric(monitor: str, candidates: dict[str, Any]) -> str:
    logged = [name for name in candidates if name not in ("epoch", "step")]
    hint = close_matches(monitor, logged) if logged else "Nothing was logged at all."
    return f"best.ckpt is chosen by {monitor!r}, which the validation does not log. {hint}"
