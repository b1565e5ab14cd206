"""The template that every task follows, and the optimizer that it builds."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from effvit.categories import Categories
from effvit.errors import CheckpointError, ConfigError
from effvit.tasks.deployed import Deployed
from effvit.tasks.schedules import TrainingSchedule

_log = logging.getLogger(__name__)

# Spelled out instead of taken from lightning.pytorch.cli: that module needs jsonargparse, a task does not.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

NORMS = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001 - the only common base of BatchNorm1d/2d/3d and SyncBatchNorm


#: Settings of tasks that decide which layers there are, those first that decide most.
_SHAPING = (
    "detector",
    "head",
    "backbone",
    "backbone_options",
    "pyramid_channels",
    "head_convs",
    "head_channels",
    "output_stride",
    "rates",
    "auxiliary_weight",
)


#: Those of them and others that change what the same weights compute.
MEANING = ("backbone_options", "output_stride", "rates", "align_corners")


class Result(Protocol):
    """What an evaluator found."""

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers by name."""


ResultT = TypeVar("ResultT", bound=Result)
ComputedT_co = TypeVar("ComputedT_co", bound=Result, covariant=True)


class Evaluator(Protocol[ComputedT_co]):
    """Collects what a network says of a data set, batch by batch."""

    def compute(self) -> ComputedT_co:
        """The metrics of all that was seen, the same in every process."""

    def reset(self) -> None:
        """Forgets it."""


class Group(NamedTuple):
    """What the parameters of one optimizer group share.

    Attributes:
        decayed: Whether weight decay acts on them.
        lr_scale: Factor on the learning rate.
        frozen_epochs: First epochs in which their learning rate is 0.
    """

    decayed: bool = True
    lr_scale: float = 1.0
    frozen_epochs: int = 0


class Task(LightningModule):
    """A network with its losses, metrics and optimizer.

    Constructors of tasks take plain values only (names, numbers, paths), so that a checkpoint can be rebuilt from its
    own hyperparameters; they have ``pretrained`` and ``checkpoint`` among them. The optimizer and its schedule are
    injected as callables; the parameter groups are built here.

    Args:
        categories: Class name by category id.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule: a `TrainingSchedule`, or any other one, which is stepped once per epoch.
            ``None`` keeps the learning rate.
        warmup_steps: Optimizer steps over which the learning rate rises linearly; 0 for none.
        warmup_factor: Share of the learning rate at the first step of the warm-up, in ``(0, 1]``.
        lr_batch_size: Global batch that the learning rate is given for: it is scaled linearly to the real one, images
            of all processes and accumulated batches together. ``None`` takes it as it is.
    """

    #: Name of the logged metric that says which checkpoint is best, and whether more is better.
    monitor: ClassVar[str]
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        categories: dict[int, str],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        *,
        warmup_steps: int = 0,
        warmup_factor: float = 1.0,
        lr_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if lr_batch_size is not None and lr_batch_size < 1:
            raise ConfigError(f"lr_batch_size must be 1 or more, or null, not {lr_batch_size}")
        self.categories = Categories(categories)
        self.evaluated_step: int | None = None
        #: Shape of the images that are being worked on, for the message if memory runs out.
        self.batch_shape: tuple[int, ...] = ()
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._warmup_steps = warmup_steps
        self._warmup_factor = warmup_factor
        self._lr_batch_size = lr_batch_size

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:  # noqa: ARG002 - for subclasses
        """The optimizer group of a parameter, by its name in this module."""
        return Group()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters by `group_of`, in the order in which the groups first occur."""
        members: dict[Group, list[Tensor]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                members.setdefault(self.group_of(name, parameter), []).append(parameter)
        if not members:
            raise ConfigError("nothing is left to train: every parameter is frozen")
        return [
            {"params": parameters, "lr_scale": group.lr_scale, "frozen_epochs": group.frozen_epochs}
            | ({} if group.decayed else {"weight_decay": 0.0})
            for group, parameters in members.items()
        ]

    def configure_optimizers(self) -> Any:
        """Optimizer with its learning rate scaled to the real batch, and its schedule.

        A `TrainingSchedule` brings its own warm-up. Any other schedule is stepped per epoch and multiplied with the
        warm-up per step, as MMEngine does.
        """
        optimizer = self._optimizer(self.parameter_groups())
        batch = self.global_batch()
        factor = batch / self._lr_batch_size if self._lr_batch_size and batch else 1.0
        for group in optimizer.param_groups:
            group["lr"] *= factor * group["lr_scale"]
        schedulers: list[dict[str, Any]] = []
        if self._warmup_steps:
            warmup = LinearLR(optimizer, start_factor=self._warmup_factor, total_iters=self._warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step", "name": "warmup"})
        if self._lr_scheduler is not None:
            schedule = self._lr_scheduler(optimizer)
            own = isinstance(schedule, TrainingSchedule)
            if own and self._warmup_steps:
                _log.warning("model.warmup_steps has no effect: %s has a warm-up of its own", type(schedule).__name__)
            schedulers.append({"scheduler": schedule, "interval": "step" if own else "epoch", "name": "schedule"})
        return [optimizer], schedulers

    def global_batch(self) -> int:
        """Images of one optimizer step, all processes and accumulated batches together; 0 where nobody knows."""
        if self._trainer is None:
            return 0
        images = int(getattr(self.trainer.datamodule, "batch_size", 0))  # type: ignore[attr-defined]
        return images * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; ``None`` where they differ."""
        batches = self.trainer.num_training_batches
        return None if batches == float("inf") else -(-int(batches) // self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        """Puts the network into training mode, which Lightning leaves to the module since version 2.2.

        Each process gets random numbers of its own: all were built from one seed, and would mix their images and drop
        their paths and tokens alike. A resumed run restores them afterwards.
        """
        self.train()
        if self.trainer.global_rank:
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)

    def on_train_start(self) -> None:
        """Tells the schedule how long the training is, and writes the arithmetic of its learning rate into the log.

        Not before: where the optimizer is made, the number of batches is not known yet, and asking for it would make
        the loaders before a resumed run has restored their state.
        """
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        for schedule in self._schedules():
            schedule.bind(-1 if epochs is None else epochs, self._steps_per_epoch(), steps if steps > 0 else None)
        if self.global_batch() and self.trainer.is_global_zero:
            _log.info("%s; %s; %s", self._batch_arithmetic(), self._rate_arithmetic(), self._step_arithmetic())

    def _batch_arithmetic(self) -> str:
        batch, processes, accumulated = (
            self.global_batch(),
            self.trainer.world_size,
            self.trainer.accumulate_grad_batches,
        )
        images = batch // processes // accumulated
        return f"global batch {batch} = {images} images x {processes} processes x {accumulated} accumulated"

    def _rate_arithmetic(self) -> str:
        group = max(self.trainer.optimizers[0].param_groups, key=lambda group: group["lr_scale"])
        rate = group.get("initial_lr", group["lr"]) / group["lr_scale"]
        for schedule in self._schedules():  # its rates are those of this run, the optimizer's may be of the one resumed
            rate = schedule.peak_lr()
        if not self._lr_batch_size:
            return f"learning rate {rate:g}"
        given = rate * self._lr_batch_size / self.global_batch()
        return f"learning rate {rate:g} = {given:g} x {self.global_batch()} / {self._lr_batch_size}"

    def _step_arithmetic(self) -> str:
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        ends = [f"{epochs} epochs"] if epochs is not None and epochs > 0 else []
        ends += [f"{steps} steps in all"] if steps > 0 else []
        return (
            f"{self._steps_per_epoch() or 'varying'} steps an epoch, {' and at most '.join(ends) or 'without an end'}"
        )

    def on_train_epoch_start(self) -> None:
        """Tells the schedule which epoch it is."""
        for schedule in self._schedules():
            schedule.start_epoch(self.current_epoch)

    def _schedules(self) -> list[TrainingSchedule]:
        """The schedules that follow the training themselves."""
        schedulers = self.lr_schedulers()
        several = schedulers if isinstance(schedulers, list) else [schedulers]
        return [schedule for schedule in several if isinstance(schedule, TrainingSchedule)]

    def log_result(self, evaluator: Evaluator[ResultT], prefix: str) -> ResultT | None:
        """Computes and logs what an evaluator has seen, and empties it.

        Args:
            evaluator: All processes hold the same numbers after it has computed.
            prefix: Of the names in the log, ``val`` or ``test``.

        Returns:
            What it found; ``None`` of Lightning's sanity check, which has not seen all images.
        """
        if self.trainer.sanity_checking:
            evaluator.reset()
            return None
        self.evaluated_step = self.trainer.global_step
        result = evaluator.compute()
        evaluator.reset()
        # Every rank holds the same numbers, so nothing is left to synchronise.
        self.log_dict({f"{prefix}/{name}": value for name, value in result.metrics.items()})
        return result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes that the weights inside supersede any starting point, which need not exist where they are loaded."""
        checkpoint["hyper_parameters"] |= {"pretrained": False, "checkpoint": None}

    def load_weights(self, state_dict: dict[str, Tensor], source: str, stored: Mapping[str, Any] | None = None) -> None:
        """Loads all weights of the task, or fails.

        Args:
            state_dict: Weights under the names that this module gives them.
            source: Where they come from, for the message.
            stored: Hyperparameters of the task that they are of, likewise.

        Raises:
            CheckpointError: The weights belong to another backbone, or to another number of classes.
        """
        own = self.state_dict()
        odd = [name for name in own if name not in state_dict or own[name].shape != state_dict[name].shape]
        odd += [name for name in state_dict if name not in own]
        if odd:
            raise CheckpointError(f"{source} {self._explain_mismatch(odd, state_dict, stored or {})}")
        self.load_state_dict(state_dict)

    def start_from(self, path: str, content: Mapping[str, Any]) -> None:
        """Loads all weights of a run's checkpoint as the starting point; see `load_weights`.

        Args:
            path: The file, for messages.
            content: What `read_run` finds in it.

        Raises:
            CheckpointError: As `load_weights`, or the classes have other names.
        """
        stored = content["hyper_parameters"]
        self.load_weights(content["state_dict"], path, stored)
        for name in MEANING:
            if (stored.get(name) or None) != (self.hparams.get(name) or None):
                _log.warning(
                    "%s was trained with %s %s, and this network has %s: its weights mean something else here",
                    path, name, stored.get(name), self.hparams.get(name),
                )  # fmt: skip
        classes = stored.get("categories")
        if classes is not None and Categories(classes) != self.categories:
            raise CheckpointError(
                f"{path} was trained on other classes, {_brief(Categories(classes).names)}; the data has "
                f"{_brief(self.categories.names)}. Use data that declares the same ones, or start from its backbone "
                "with --model.pretrained."
            )

    def deployable(self) -> Deployed:
        """The network with all around it, for export and for measuring: on the very weights, in the mode that it is in.

        Nothing of the task changes. The caller puts the view into eval mode, and the task back where it goes on.

        Raises:
            ExportError: There is none of this network.
        """
        raise NotImplementedError

    def classes_in(self, state_dict: dict[str, Tensor]) -> tuple[tuple[str, ...], int | None]:
        """Prefixes of the parameters that depend on the number of classes, and that number in given weights."""
        raise NotImplementedError

    def _explain_mismatch(self, odd: list[str], given: dict[str, Tensor], stored: Mapping[str, Any]) -> str:
        for name in _SHAPING:
            if name in stored and name not in self.hparams:
                return (
                    f"is of another task than this {type(self).__name__.lower()} network: start from its backbone with "
                    "--model.pretrained FILE"
                )
            if stored.get(name) != self.hparams.get(name) and name in stored:
                return (
                    f"is of a network with {name} {stored[name]!r}, and this one has {self.hparams.get(name)!r}: pass "
                    f"--model.{name} {_as_word(stored[name])}, or evaluate what the run trained with `effvit test "
                    "--checkpoint FILE`"
                )
        prefixes, number = self.classes_in(given)
        if all(name.startswith(prefixes) for name in odd):
            return (
                f"was trained on {number or 'other'} classes, the data has {len(self.categories)}: "
                f"{_brief(self.categories.names)}. Use the data set it was trained on, "
                "or start from its backbone with --model.pretrained."
            )
        return (
            f"does not fit a {type(self).__name__.lower()} network on {self.hparams['backbone']!r}: {len(odd)} of "
            f"{len(self.state_dict())} tensors are missing, unknown or of another shape, first {odd[0]!r}. Leave "
            "--model.backbone out to use the one of the checkpoint."
        )


def _as_word(value: Any) -> str:
    """A setting as it is written on a command line."""
    return "null" if value is None else shlex.quote(json.dumps(value)) if isinstance(value, dict) else str(value)


def _brief(names: tuple[str, ...], most: int = 20) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def freeze_norm_statistics(module: nn.Module) -> None:
    """Puts every BatchNorm of ``module`` into eval mode; the affine parameters stay trainable.

    The published detection recipes train so (``norm_eval=True`` in MMDetection): two images a GPU are too few for
    batch statistics. To be called after each ``train()``.
    """
    for child in module.modules():
        if isinstance(child, NORMS):
            child.eval()


def normalise(
    images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], sizes: list[tuple[int, int]] | None = None
) -> Tensor:
    """Turns uint8 images into what the backbone was trained on, with zeros in the padding.

    Args:
        images: uint8 ``(B, 3, H, W)``, RGB, padded at the bottom and the right.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.
        sizes: Height and width of each image before padding, in pixels; none is padded by default.

    Returns:
        float32 ``(B, 3, H, W)``. The padding is zeroed after the normalisation, as MMDetection pads.
    """
    deviation = torch.tensor(std, dtype=torch.float32, device=images.device).view(1, 3, 1, 1)
    scale = 1 / (255 * deviation)
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(1, 3, 1, 1) / deviation
    result = images.to(torch.float32).mul_(scale).sub_(shift)
    for image, (height, width) in zip(result, sizes or (), strict=sizes is not None):
        image[:, height:].zero_()
        image[:, :, width:].zero_()
    return result
