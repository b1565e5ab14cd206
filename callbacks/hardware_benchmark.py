"""What the model in training costs on this machine, measured while it is being trained."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from effvit.callbacks._measuring import MEMORY_COUNTED, measure
from effvit.callbacks._run_folder import run_folder
from effvit.callbacks._undisturbed import undisturbed
from effvit.deploy._files import whole_file
from effvit.deploy.environment import environment
from effvit.deploy.records import Record, Subject
from effvit.errors import ConfigError

_log = logging.getLogger(__name__)

#: What all its metrics begin with; RunReport shows those of latency and memory beside the accuracy.
PREFIX = "hardware/"
_PRECISIONS = {"32-true": "fp32", "bf16-true": "bf16", "bf16-mixed": "bf16", "16-true": "fp16", "16-mixed": "fp16"}


class HardwareBenchmark(Callback):
    """Measures latency, throughput and peak memory of the very model in training, without disturbing it.

    A training with this callback ends with the same losses, weights and optimizer state, bit for bit, as one without:
    modes, gradients, weights, statistics of BatchNorm, random numbers, threads and cuDNN's switches are restored. On a
    GPU, torch's count of the peak memory starts again at each measurement.

    What is measured is eager torch in the Trainer's precision, from bytes to decoded results where the module has
    ``deployable()``, as all tasks of effvit do; of any other LightningModule its ``forward`` on
    ``example_input_array``, repeated to the batch size.

    Peak memory is what a forward pass adds to weights and input: on a GPU by torch's allocator, on a CPU the tensors
    that are alive at once. ``effvit benchmark`` measures the whole process on a CPU, with what operators use inside
    and what the allocator keeps, so the two are not to be compared there.

    A training is measured at its last validation, in the same row of the loggers as the accuracy, with the weights
    that are evaluated: averaged ones, where this callback stands before ``EMA``, as those that are named on the command
    line do. A training that ends otherwise (early stopping, no validation at its end) is measured after it, with the
    weights of the optimizer; what they cost is the same.

    The loggers get ``hardware/latency_ms_b1`` (the median), ``hardware/throughput_b1`` (images a second),
    ``hardware/peak_memory_mb_b1`` (10**6 bytes), and the same for other batch sizes, ``hardware/params_m`` and
    ``hardware/macs_g``, in millions and in billions. ``hardware.json`` in the run folder has all samples, the
    confidence intervals, the machine, and which memory it is. A batch that does not fit into memory is left out, and
    the log says so.

    Args:
        every_n_epochs: Measure at the first validation after every so many epochs; 0 for none. The end of a training,
            of a validation and of a test by itself are always measured.
        batch_sizes: Images in a batch.
        image_size: Height and width in pixels; ``None`` for those of the last batch of the evaluation, padding
            included.
        threads: Threads of torch during the measurement; ``None`` leaves them as they are.

    Raises:
        ConfigError: A value out of its range; at the start, a module that cannot be measured, or weights that are
            spread over several devices.
    """

    def __init__(
        self,
        every_n_epochs: int = 0,
        batch_sizes: Sequence[int] = (1,),
        image_size: tuple[int, int] | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        numbers = [*batch_sizes, *(image_size or ()), *([] if threads is None else [threads])]
        if every_n_epochs < 0 or not batch_sizes or min(numbers) < 1:
            raise ConfigError(
                "HardwareBenchmark needs every_n_epochs of 0 or more, and batch_sizes, image_size and threads of 1 or "
                f"more, not {every_n_epochs}, {list(batch_sizes)}, {image_size} and {threads}"
            )
        self.every_n_epochs = every_n_epochs
        self.batch_sizes = tuple(batch_sizes)
        self.image_size = image_size
        self.threads = threads
        self._shape: tuple[int, int] | None = None
        self._epochs = 0  # after which the last measurement at a validation was
        self._step: int | None = None  # of the last measurement
        self._metrics: dict[str, float] = {}
        self._entries: list[dict[str, Any]] = []
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """After how many epochs the last measurement was; what it found is in ``hardware.json``."""
        return {"epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the measurements of the run that is resumed."""
        self._epochs = int(state_dict["epochs"])
        self._resumed = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be measured, before any work."""
        if stage not in {"fit", "validate", "test"}:
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ConfigError(
                f"HardwareBenchmark cannot measure under the strategy {type(trainer.strategy).__name__}: no process "
                "has all weights of the model. Leave it out, or train with --trainer.strategy auto or ddp"
            )
        _check(pl_module, self.image_size)

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Notes the size of images where there is no validation."""
        self._shape = self._shape or _image_size(batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002 - Lightning's signature
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        """Notes the size of the images."""
        self._shape = _image_size(batch) or self._shape

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Notes the size of the images."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures where it is time to."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn == TrainerFn.FITTING and not (
            self._is_time(trainer.current_epoch + 1) or _is_last(trainer)
        ):
            return
        # Equal in all processes; the mean of equal numbers keeps Lightning quiet.
        pl_module.log_dict(self._measure(trainer, pl_module), sync_dist=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures."""
        pl_module.log_dict(self._measure(trainer, pl_module), sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures, unless a validation has just done so; later the Trainer has moved the model to the CPU."""
        if self._step == trainer.global_step:
            return
        metrics = self._measure(trainer, pl_module)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=max(trainer.global_step - 1, 0))  # as the Trainer counts in its own rows
            logger.save()

    def _is_time(self, epochs: int) -> bool:
        """Whether to measure at the validation after so many epochs; if so, that is noted."""
        if not self.every_n_epochs or epochs - self._epochs < self.every_n_epochs:
            return False
        self._epochs = epochs - epochs % self.every_n_epochs
        return True

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics, the same ones in all processes."""
        if self._step != trainer.global_step:
            found = self._measure_here(trainer, pl_module) if trainer.is_global_zero else {}
            self._metrics = trainer.strategy.broadcast(found)  # the others wait here
            self._step = trainer.global_step
        return self._metrics

    def _measure_here(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        device = pl_module.device
        plugin = trainer.precision_plugin
        with (
            undisturbed(pl_module, device),
            torch.inference_mode(mode=False),
            torch.no_grad(),
            plugin.forward_context(),
        ):
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            subject = self._subject(pl_module)
            records = measure(
                subject,
                self.batch_sizes,
                device,
                _PRECISIONS.get(str(trainer.precision), str(trainer.precision)),
                lambda inputs: tuple(plugin.convert_input(value.to(device)) for value in inputs),
            )
            machine = environment(device.type, torch.get_num_threads())
        self._entries.append(
            {
                "stage": trainer.state.fn.value if trainer.state.fn else "",
                "step": trainer.global_step,
                "peak_memory": MEMORY_COUNTED.get(device.type, ""),
                "records": [asdict(record) for record in records],
                "environment": machine,
            }
        )
        path = run_folder(trainer) / "hardware.json"
        if self._resumed and path.is_file():
            self._entries = json.loads(path.read_text(encoding="utf-8"))["measurements"] + self._entries
        self._resumed = False
        _write(path, self._entries)
        for record in records:
            _say(record)
        return _as_metrics(records)

    def _subject(self, pl_module: LightningModule) -> Subject:
        """The model, in eval mode, with what makes its inputs."""
        name = type(pl_module).__name__
        if not hasattr(pl_module, "deployable"):
            example = _example(pl_module)
            return Subject(
                name, pl_module.eval(), _image_size(example) or (0, 0), lambda batch: _repeat(example, batch)
            )
        size = self.image_size or self._shape
        if size is None:
            raise ConfigError(
                "HardwareBenchmark has seen no batch of images to take their size from: pass its image_size"
            )
        view = _view(pl_module).eval()
        return Subject(
            str(pl_module.hparams.get("backbone") or name),
            view,
            size,
            lambda batch: tuple(view.example_inputs(batch, size)),
        )


def _check(pl_module: LightningModule, image_size: tuple[int, int] | None) -> None:
    """Whether the module can be measured.

    Raises:
        ConfigError: It says neither how it is deployed nor what its input looks like.
    """
    if hasattr(pl_module, "deployable"):
        _view(pl_module)
        return
    if not _example(pl_module):
        raise ConfigError(
            f"HardwareBenchmark cannot measure a {type(pl_module).__name__}: it has no deployable(), as tasks of "
            "effvit do, and no example_input_array. Set self.example_input_array in its constructor to a tensor or a "
            "tuple of them, such as torch.zeros(1, 3, 224, 224)"
        )
    if image_size is not None:
        raise ConfigError(
            f"HardwareBenchmark measures a {type(pl_module).__name__} on its example_input_array: leave image_size out"
        )


def _is_last(trainer: Trainer) -> bool:
    """Whether a training is known to end with this validation."""
    epochs_end = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return epochs_end or trainer.global_step == trainer.max_steps


def _view(pl_module: LightningModule) -> Any:
    """The network of a task with all around it, on its very weights."""
    return cast("Any", pl_module).deployable()


def _example(pl_module: LightningModule) -> tuple[Tensor, ...]:
    """The example input as a tuple; empty where there is none, or none that can be repeated."""
    example: Any = pl_module.example_input_array
    values = example if isinstance(example, tuple | list) else (example,)
    usable = all(isinstance(value, Tensor) and value.dim() > 0 for value in values)
    return tuple(values) if usable else ()


def _repeat(example: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    return tuple(value[:1].expand(batch, *value.shape[1:]).contiguous() for value in example)


def _image_size(batch: Any) -> tuple[int, int] | None:
    """Height and width of the images that a batch begins with."""
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(images, Tensor) and images.dim() == 4:
        return int(images.shape[-2]), int(images.shape[-1])
    return None


def _as_metrics(records: Sequence[Record]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for record in records:
        if record.latency is None or record.throughput is None:
            continue
        metrics[f"{PREFIX}latency_ms_b{record.batch}"] = 1000 * record.latency.median
        metrics[f"{PREFIX}throughput_b{record.batch}"] = record.throughput
        metrics[f"{PREFIX}peak_memory_mb_b{record.batch}"] = (record.peak_memory or 0) / 1e6
        metrics |= {f"{PREFIX}params_m": record.params / 1e6, f"{PREFIX}macs_g": record.macs / 1e9}
    return metrics


def _say(record: Record) -> None:
    if record.latency is not None:
        low, high = record.latency.ci95
        _log.info(
            "hardware: batch of %d at %d x %d on %s: %.2f ms (95 %% interval %.2f to %.2f), %.1f images/s",
            record.batch, *record.size, record.device,
            1000 * record.latency.median, 1000 * low, 1000 * high, record.throughput,
        )  # fmt: skip


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({"measurements": entries}, indent=1) + "\n", encoding="utf-8")
