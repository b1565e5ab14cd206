"""``effvit configs --plot-lr``: the learning rate of a configuration over its whole training, without its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from effvit._cli.shipped import find_config, merged_config
from effvit.datamodules._samplers import MultiScaleBatches, SquareBatches
from effvit.deploy._files import whole_file
from effvit.deploy._looks import BLUE, GREEN, style
from effvit.errors import ConfigError
from effvit.tasks import schedules
from effvit.tasks.schedules import TrainingSchedule

#: Training images as published. COCO: the recipes leave out the 1,021 images of train2017 without an object.
_IMAGES = {
    "ImageNet": 1_281_167,
    "DigitImages": 1_438,
    "CocoDetection": 117_266,
    "SegmentedDigits": 1_500,
    "ADE20K": 20_210,
    "PascalVOC": 1_464,
    "Cityscapes": 2_975,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "flowers102": 2_040,  # the official training and validation images, on which the published numbers were trained
    "oxford_iiit_pets": 3_680,
    "stanford_cars": 8_144,
}
_VOC_AUGMENTED = 10_582
_POINTS_AN_EPOCH = 24
_LISTED = 6

#: The learning rate of each kind of parameters, at a step of an epoch.
Rates = Callable[[int, int], tuple[float, ...]]


class Corner(NamedTuple):
    """One line of the table.

    Attributes:
        name: What happens here.
        epoch: Counted from 0.
        step: Optimizer steps before, over all epochs; ``None`` where nobody knows.
        rates: Learning rate of each kind of parameters.
    """

    name: str
    epoch: int
    step: int | None
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """The learning rate over a training.

    Attributes:
        name: Of the configuration.
        global_batch: Images of an optimizer step.
        epochs: Length of the training.
        images: Training images, as published; ``None`` where nobody knows.
        steps_per_epoch: Optimizer steps of an epoch; ``None`` where nobody knows.
        kinds: What has a learning rate of its own.
        corners: Where the curve begins, bends and ends.
        line: Epoch (with fractions) and learning rates, dense enough to be drawn.
    """

    name: str
    global_batch: int
    epochs: int
    images: int | None
    steps_per_epoch: int | None
    kinds: tuple[str, ...]
    corners: list[Corner]
    line: list[tuple[float, tuple[float, ...]]]


def plot_lr(name: str, global_batch: int | None, output: Path) -> None:
    """Prints the corner points of a configuration's learning rate and draws it.

    Args:
        name: A shipped configuration or a file.
        global_batch: Images of an optimizer step; ``None`` for the one that the learning rate is given for.
        output: The PNG to write.
    """
    if global_batch is not None and global_batch < 1:
        raise ConfigError(f"--global_batch is {global_batch}; it must be 1 or more.")
    curve = learning_rate_of(name, global_batch)
    steps = "steps an epoch: unknown"
    if curve.steps_per_epoch is not None:
        steps = f"{curve.steps_per_epoch} steps an epoch of {curve.images:,} images"
    print(f"{curve.name}: {curve.epochs} epochs, global batch {curve.global_batch}, {steps}")
    width = max(len(corner.name) for corner in curve.corners)
    print(f"{'':{width}}  epoch     step  " + "  ".join(f"{kind:>12}" for kind in curve.kinds))
    for corner in curve.corners:
        step = "-" if corner.step is None else str(corner.step)
        rates = "  ".join(f"{rate:12.6g}" for rate in corner.rates)
        print(f"{corner.name:{width}}  {corner.epoch:5d} {step:>8}  {rates}")
    _draw(curve, output)
    print(f"drawn: {output}")


def learning_rate_of(name: str, global_batch: int | None = None) -> Curve:
    """The learning rate of a configuration, from the schedule's own class.

    Args:
        name: A shipped configuration or a file.
        global_batch: Images of an optimizer step; ``None`` for the one that the learning rate is given for.

    Raises:
        ConfigError: There is no such configuration, or its curve depends on data of unknown size.
    """
    config = merged_config(find_config(name))
    model, data = _arguments(config, "model"), _arguments(config, "data")
    epochs, max_steps = (max(0, config.get("trainer", {}).get(key) or 0) for key in ("max_epochs", "max_steps"))
    if not (epochs or max_steps) or "lr" not in _arguments(model, "optimizer"):
        raise ConfigError(
            f"{name} fixes no trainer.max_epochs or trainer.max_steps, or no model.optimizer.init_args.lr: there is no "
            "curve"
        )
    given_for = model.get("lr_batch_size")
    batch = global_batch or given_for or _published_batch(config, data)
    optimizer, kinds = _optimizer(model, batch / given_for if given_for else 1.0)
    images = _images(config, data)
    steps = None if images is None else _steps_per_epoch(images, data, batch)
    made = model.get("lr_scheduler")
    schedule = _class(made["class_path"])(optimizer, **made.get("init_args", {})) if made else None
    fine = schedule.by_step if isinstance(schedule, TrainingSchedule) else bool(model.get("warmup_steps"))
    if steps is None and (fine or not epochs):
        raise ConfigError(
            f"the learning rate of {name} moves with each step, and its data is the user's own: nobody knows here how "
            "many steps an epoch has. A run writes its curve into curves.png."
        )
    ends = [max_steps] if max_steps else []
    if steps is not None:
        ends += [epochs * steps] if epochs else []
        epochs = -(-min(ends) // steps)
    last = min(ends, default=None)
    if isinstance(schedule, TrainingSchedule):
        schedule.bind(epochs, steps, last)
        rates, corners = _own(schedule, epochs, steps, last)
    else:
        rates, corners = _multiplied(model, optimizer, schedule, epochs, steps)
    points = _line(rates, epochs, steps, last, fine=fine)
    return Curve(name, batch, epochs, images, steps, kinds, corners, points)


def _arguments(config: dict[str, Any], key: str) -> dict[str, Any]:
    return dict((config.get(key) or {}).get("init_args") or {})


def _published_batch(config: dict[str, Any], data: dict[str, Any]) -> int:
    """Images of one process, where the configuration does not say what the learning rate is given for."""
    return int(data.get("batch_size", 1)) * int(config["trainer"].get("accumulate_grad_batches", 1))


def _optimizer(model: dict[str, Any], factor: float) -> tuple[torch.optim.Optimizer, tuple[str, ...]]:
    """An optimizer of nothing, with a group for each kind of parameters, its learning rate scaled to the batch."""
    lr = float(_arguments(model, "optimizer")["lr"]) * factor
    scale, frozen = float(model.get("backbone_lr_scale", 1.0)), int(model.get("frozen_epochs", 0))
    head_scale = float(model.get("head_lr_scale", 1.0))
    kinds: dict[str, tuple[float, int]] = {"all": (1.0, 0)}
    if scale != 1.0 or frozen:
        kinds = {"new": (1.0, 0), "backbone": (scale, frozen)}
    elif head_scale != 1.0:
        kinds = {"backbone": (1.0, 0), "head": (head_scale, 0)}
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr * scale, "lr_scale": scale, "frozen_epochs": frozen}
        for scale, frozen in kinds.values()
    ]
    return torch.optim.SGD(groups), tuple(kinds)


def _images(config: dict[str, Any], data: dict[str, Any]) -> int | None:
    """Training images of the published data."""
    kind = str((config.get("data") or {}).get("class_path", "")).rpartition(".")[2]
    made: int | None = data.get("num_train") or (_VOC_AUGMENTED if kind == "PascalVOC" and data.get("aug") else None)
    return made or _IMAGES.get(str(data.get("name")) if kind == "Transfer" else kind)


def _steps_per_epoch(images: int, data: dict[str, Any], batch: int) -> int:
    """Optimizer steps of an epoch; batches of many sizes are those of processes with the configured batch size."""
    repeats = int(data.get("repeats", 1))
    if sizes := data.get("multi_scale"):
        ranks = max(1, round(batch / int(data["batch_size"]))), 0
        size = int(data["image_size"])
        return len(MultiScaleBatches(images, batch // ranks[0], size, sizes, repeats=repeats, seed=0, ranks=ranks))
    return len(SquareBatches(images, batch, 1, repeats=repeats, seed=0, ranks=(1, 0)))


def _class(path: str) -> Callable[..., LRScheduler]:
    """The class that a ``class_path`` names, with its module or without."""
    module, _, name = path.rpartition(".")
    found = getattr(import_module(module) if module else torch.optim.lr_scheduler, name, None)
    if isinstance(own := getattr(schedules, name, None), type) and issubclass(own, TrainingSchedule):
        found = own
    if found is None:
        raise ConfigError(f"there is no schedule {path!r}")
    return found  # type: ignore[no-any-return]


def _own(schedule: TrainingSchedule, epochs: int, steps: int | None, last: int | None) -> tuple[Rates, list[Corner]]:
    """A schedule that knows the whole training: the learning rate as a function of epoch and step, and its corners."""
    groups = range(len(schedule.base_lrs))

    def rates(epoch: int, step: int) -> tuple[float, ...]:
        return tuple(schedule.lr_at(epoch, step, group) for group in groups)

    def corner(name: str, epoch: int, step: int | None = None) -> Corner:
        step = epoch * steps if step is None and steps is not None else step
        return Corner(name, epoch, step, rates(epoch, step or 0))

    corners = [corner("first step", 0)]
    epoch, step = schedule.warmup_end()
    if step is not None:
        corners.append(corner("warm-up over", step // (steps or 1), step))
    elif epoch:
        corners.append(corner("warm-up over", epoch))
    corners += [corner("middle", epochs // 2), corner("last epoch", epochs - 1)]
    if last is not None:
        corners.append(corner("last step", epochs - 1, last - 1))
    return rates, corners


def _multiplied(
    model: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler | None,
    epochs: int,
    steps: int | None,
) -> tuple[Rates, list[Corner]]:
    """Any other schedule, stepped per epoch, times the linear warm-up of the task."""
    optimizer.step()
    by_epoch = []
    for _ in range(epochs):
        by_epoch.append(tuple(float(group["lr"]) for group in optimizer.param_groups))
        if schedule is not None:
            schedule.step()
    warmup = _warmup(int(model.get("warmup_steps", 0)), float(model.get("warmup_factor", 1e-3)))

    def rates(epoch: int, step: int) -> tuple[float, ...]:
        return tuple(rate * warmup[min(step, len(warmup) - 1)] for rate in by_epoch[epoch])

    def corner(name: str, epoch: int, step: int | None) -> Corner:
        return Corner(name, epoch, step, rates(epoch, step or 0))

    start = [corner("first step", 0, 0 if steps else None)]
    if steps and len(warmup) > 1:
        start.append(corner("warm-up over", (len(warmup) - 1) // steps, len(warmup) - 1))
    changes = [epoch for epoch, (one, other) in enumerate(itertools.pairwise(by_epoch), start=1) if one != other]
    changed = [corner("change", epoch, epoch * steps if steps else None) for epoch in changes[:_LISTED]]
    last = epochs - 1
    return rates, [*start, *changed, corner("last epoch", last, last * steps if steps else None)]


def _warmup(steps: int, factor: float) -> list[float]:
    """Factor of torch's ``LinearLR`` at each step, up to the first one after the warm-up."""
    if not steps:
        return [1.0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = LinearLR(optimizer, start_factor=factor, total_iters=steps)
    optimizer.step()
    factors = []
    for _ in range(steps + 1):
        factors.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step()
    return factors


def _line(
    rates: Rates, epochs: int, steps: int | None, last: int | None, *, fine: bool
) -> list[tuple[float, tuple[float, ...]]]:
    """The curve as points: the whole epoch at one rate, or so many steps of each."""
    if not fine or steps is None or last is None:
        return [(epoch + end, rates(epoch, 0)) for epoch in range(epochs) for end in (0.0, 1.0)]
    every = max(1, steps // _POINTS_AN_EPOCH)
    return [
        (epoch + step / steps, rates(epoch, epoch * steps + step))
        for epoch in range(epochs)
        for step in sorted({*range(0, steps, every), steps - 1})
        if epoch * steps + step < last
    ]


def _draw(curve: Curve, output: Path) -> None:
    """Writes the picture: one panel for each kind of parameters, so that a scaled backbone is not a flat line."""
    from matplotlib.figure import Figure

    kinds = len(curve.kinds)
    figure = Figure(figsize=(6.4 * kinds, 3.6), dpi=110, layout="constrained")
    figure.suptitle(
        f"{curve.name}: {curve.epochs} epochs, global batch {curve.global_batch}", fontsize=11, fontweight="bold"
    )
    epochs = [epoch for epoch, _ in curve.line]
    for index, kind in enumerate(curve.kinds):
        axes = figure.add_subplot(1, kinds, index + 1)
        axes.plot(epochs, [rates[index] for _, rates in curve.line], color=GREEN, linewidth=1.6)
        steps = curve.steps_per_epoch
        for corner in curve.corners:
            at = corner.epoch if corner.step is None or not steps else corner.step / steps
            axes.plot(at, corner.rates[index], "o", color=BLUE, markersize=4, clip_on=False)
        style(axes, "learning rate" + ("" if kinds == 1 else f", {kind} parameters"), "epoch")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    with whole_file(output) as temporary:
        figure.savefig(temporary, format="png")
