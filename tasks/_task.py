"""The template that every task follows, and the optimizer that it builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

# Spelled out instead of taken from lightning.pytorch.cli: that module needs jsonargparse, a task does not.
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer], LRScheduler]

_NORMS = (nn.modules.batchnorm._BatchNorm,)  # noqa: SLF001 - the only common base of BatchNorm1d/2d/3d and SyncBatchNorm


class Task(LightningModule):
    """A network with its losses, metrics and optimizer.

    Constructors of tasks take plain values only (names, numbers, paths), so that a checkpoint can be rebuilt from its
    own hyperparameters. The optimizer and its schedule are injected as callables; the parameter groups are built here.

    Args:
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule, stepped once per epoch. ``None`` keeps the learning rate.
        warmup_steps: Optimizer steps over which the learning rate rises linearly; 0 for none.
        warmup_factor: Share of the learning rate at the first step of the warm-up, in ``(0, 1]``.
    """

    #: Name of the logged metric that says which checkpoint is best, and whether more is better.
    monitor: ClassVar[str]
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        warmup_steps: int,
        warmup_factor: float,
    ) -> None:
        super().__init__()
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._warmup_steps = warmup_steps
        self._warmup_factor = warmup_factor

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        return set()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters, those of `no_weight_decay` in a group of their own."""
        exempt = self.no_weight_decay()
        groups: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[name in exempt].append(parameter)
        decayed, plain = groups
        return [{"params": decayed}] + ([{"params": plain, "weight_decay": 0.0}] if plain else [])

    def configure_optimizers(self) -> Any:
        """Optimizer with the warm-up (per step) and the schedule (per epoch), multiplied as MMEngine does."""
        optimizer = self._optimizer(self.parameter_groups())
        schedulers: list[dict[str, Any]] = []
        if self._warmup_steps:
            warmup = LinearLR(optimizer, start_factor=self._warmup_factor, total_iters=self._warmup_steps)
            schedulers.append({"scheduler": warmup, "interval": "step", "name": "warmup"})
        if self._lr_scheduler is not None:
            schedulers.append({"scheduler": self._lr_scheduler(optimizer), "interval": "epoch", "name": "schedule"})
        return [optimizer], schedulers

    def on_fit_start(self) -> None:
        """Puts the network into training mode, which Lightning leaves to the module since version 2.2."""
        self.train()


def freeze_norm_statistics(module: nn.Module) -> None:
    """Puts every BatchNorm of ``module`` into eval mode; the affine parameters stay trainable.

    The published detection recipes train so (``norm_eval=True`` in MMDetection): two images a GPU are too few for
    batch statistics. To be called after each ``train()``.
    """
    for child in module.modules():
        if isinstance(child, _NORMS):
            child.eval()


def normalise(images: Tensor, sizes: list[tuple[int, int]], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turns uint8 images into what the backbone was trained on, with zeros in the padding.

    Args:
        images: uint8 ``(B, 3, H, W)``, RGB, padded at the bottom and the right.
        sizes: Height and width of each image before padding, in pixels.
        mean: Channel means in ``[0, 1]``.
        std: Channel standard deviations in ``[0, 1]``.

    Returns:
        float32 ``(B, 3, H, W)``. The padding is zeroed after the normalisation, as MMDetection pads.
    """
    deviation = torch.tensor(std, device=images.device).view(1, 3, 1, 1)
    scale = 1 / (255 * deviation)
    shift = torch.tensor(mean, device=images.device).view(1, 3, 1, 1) / deviation
    result = images.to(torch.float32).mul_(scale).sub_(shift)
    for image, (height, width) in zip(result, sizes, strict=True):
        image[:, height:].zero_()
        image[:, :, width:].zero_()
    return result
