"""Semantic segmentation: a backbone, a head that labels every pixel, and mIoU over a whole data set."""

from __future__ import annotations

import json
import logging
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import Backbone
from effvit.errors import ConfigError
from effvit.tasks._checkpoint import read_published
from effvit.tasks._distributed import share_buffers
from effvit.tasks._task import (
    NORMS,
    Group,
    LRSchedulerCallable,
    OptimizerCallable,
    Task,
    freeze_norm_statistics,
    normalise,
)
from effvit.tasks.losses.segmentation import IGNORED, SegmentationLoss
from effvit.tasks.metrics.segmentation import SegmentationEvaluator, SegmentationResult
from effvit.tasks.segmenters._inference import Inference
from effvit.tasks.segmenters.factory import SegmenterSettings, make_segmenter, unread_settings
from effvit.tasks.segmenters.published import backbone_options_in, is_published, load_published

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, list[dict[str, Any]]]


class Segmentation(Task):
    """Trains and evaluates a semantic segmenter on any backbone.

    Defaults are the recipe of the published EfficientFormer tables (official ``segmentation/configs/sem_fpn``,
    mmsegmentation 0.19): Semantic FPN, cross-entropy, AdamW 2e-4 with weight decay 1e-4 on all parameters.

    Args:
        backbone: Name of the backbone; ``effvit backbones`` lists them.
        categories: Class name by category id. The command line takes it from the data.
        backbone_options: Options of its family by name, such as ``{keep_ratio: 0.5}`` for DynamicViT.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        head: ``semantic_fpn`` (arXiv 1901.02446) or ``deeplabv3`` (arXiv 1706.05587).
        pretrained: Weights of the backbone: ``true`` for the published file, or the path of a file.
        checkpoint: Weights of the whole segmenter to start from or to evaluate: a run's checkpoint, or a file of
            mmsegmentation or ml-cvnets, such as those published for EfficientFormer and MobileViT.
        pyramid_channels: Channels of every pyramid level.
        head_channels: Channels of the head; ``null`` for the published 128 of Semantic FPN and 256 of DeepLabv3.
        output_stride: Stride of the map that DeepLabv3 reads: 8, 16 or 32; ``null`` for 16.
        rates: Dilations of DeepLabv3's three convolutions; ``null`` for those of its paper, 6, 12 and 18 (stride 16).
        dropout: Share of the channels that are dropped before the classifier, in ``[0, 1)``.
        auxiliary_weight: Weight of the loss of an auxiliary head; 0 for no such head.
        ohem_threshold: Online hard example mining: only pixels whose true class has a probability below this are
            learned, and the hardest `ohem_kept` always; ``null`` for all pixels.
        ohem_kept: Pixels of each image that are always learned.
        dice_weight: Weight of a Dice loss beside the cross-entropy; 0 for none.
        class_weights: Weight of each class in the cross-entropy, by label; ``null`` for 1 each.
        avg_non_ignore: Whether the cross-entropy is a mean over the labelled pixels, or over all, those without a
            label too. mmsegmentation's recipes take the second (its ``avg_non_ignore=False``).
        norm_eval: Keep the backbone's BatchNorm statistics fixed during training.
        head_lr_scale: Factor on the learning rate of all that is not the backbone; MobileViT's recipe has 10.
        decay_all: Weight decay on norms, biases and what the authors of the backbone leave out too, as published.
        inference: ``whole`` images at once, or windows that ``slide`` over them.
        window: Height and width of a window, in pixels of the resized image.
        window_stride: Distance of two windows, down and across.
        flip_test: Also label the mirrored image, and average the probabilities.
        test_scales: Sizes at which an image is labelled, as factors; the probabilities are averaged.
        channels_last: Keep feature maps in channels-last memory, the faster layout for convolutions.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule: a `Poly` or `WarmupCosine`, or any other one, stepped once per epoch.
        warmup_steps: Optimizer steps over which the learning rate rises linearly. `Poly` and `WarmupCosine` have
            their own.
        warmup_factor: Share of the learning rate at the first step of the warm-up, in ``(0, 1]``.
        lr_batch_size: Global batch that the learning rate is given for; scaled linearly to the real one. ``null`` takes
            it as it is.

    Raises:
        ConfigError: An unknown backbone or head, or a value out of its range.
        CheckpointError: Weights that cannot be opened, or that belong to another network or other classes.
    """

    monitor: ClassVar[str] = "val/mIoU"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        backbone: str,
        categories: dict[int, str],
        backbone_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        head: str = "semantic_fpn",
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        pyramid_channels: int = 256,
        head_channels: int | None = None,
        output_stride: int | None = None,
        rates: list[int] | None = None,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.0,
        ohem_threshold: float | None = None,
        ohem_kept: int = 100_000,
        dice_weight: float = 0.0,
        class_weights: list[float] | None = None,
        avg_non_ignore: bool = True,
        norm_eval: bool = False,
        head_lr_scale: float = 1.0,
        decay_all: bool = True,
        inference: Literal["whole", "slide"] = "whole",
        window: tuple[int, int] = (512, 512),
        window_stride: tuple[int, int] = (341, 341),
        flip_test: bool = False,
        test_scales: list[float] = [1.0],  # noqa: B006 - never changed; jsonargparse shows it as the default
        channels_last: bool = True,
        optimizer: OptimizerCallable = lambda groups: AdamW(groups, lr=2e-4, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_factor: float = 1e-3,
        lr_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            categories,
            optimizer,
            lr_scheduler,
            warmup_steps=warmup_steps,
            warmup_factor=warmup_factor,
            lr_batch_size=lr_batch_size,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
