"""Semantic segmentation: a backbone, a head that labels every pixel, and mIoU over a whole data set."""

from __future__ import annotations

import json
import logging
import math
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import Backbone
from effvit.errors import ConfigError
from effvit.tasks._checkpoint import read_published, read_run
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
from effvit.tasks.deployed_segmenter import DeployedSegmenter
from effvit.tasks.losses.segmentation import SegmentationLoss
from effvit.tasks.metrics.segmentation import SegmentationEvaluator, SegmentationResult
from effvit.tasks.segmenters._inference import Inference
from effvit.tasks.segmenters.factory import SegmenterSettings, make_segmenter, unread_settings
from effvit.tasks.segmenters.published import backbone_options_in, is_published, load_published

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, list[dict[str, Any]]]

GivenT = TypeVar("GivenT")

_BACKBONE = "segmenter.backbone."


class Segmentation(Task):
    """Trains and evaluates a semantic segmenter on any backbone.

    Defaults are the recipe of the published EfficientFormer tables (official ``segmentation/configs/sem_fpn``,
    mmsegmentation 0.19): Semantic FPN, cross-entropy, AdamW 2e-4 with weight decay 1e-4 on all parameters.

    Args:
        backbone: Name of the backbone; ``effvit backbones`` lists them.
        categories: Class name by category id. The command line takes it from the data.
        backbone_options: Options of its family by name, such as ``{keep_ratio: 0.5}`` for DynamicViT; those that are
            not named are as the weights of ``checkpoint`` were trained with.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        head: ``semantic_fpn`` (arXiv 1901.02446) or ``deeplabv3`` (arXiv 1706.05587).
        pretrained: Weights of the backbone: ``true`` for the published file, or the path of a file.
        checkpoint: Weights of the whole segmenter to start from or to evaluate: a run's checkpoint, or a file of
            mmsegmentation or ml-cvnets, such as those published for EfficientFormer and MobileViT.
        pyramid_channels: Channels of every pyramid level.
        head_channels: Channels of the head; ``null`` for the published 128 of Semantic FPN and 256 of DeepLabv3.
        output_stride: Stride of the map that DeepLabv3 reads: 8, 16 or 32; ``null`` as the run of ``checkpoint``,
            otherwise 16.
        rates: Dilations of DeepLabv3's three convolutions; ``null`` as the run of ``checkpoint``, otherwise those of
            its paper, 6, 12 and 18 (stride 16).
        dropout: Share of the channels that are dropped before the classifier, in ``[0, 1)``.
        align_corners: How logits are enlarged to pixels, see ``torch.nn.functional.interpolate``; ``null`` as the
            weights of ``checkpoint`` were trained, otherwise false.
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
        align_corners: bool | None = None,
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
        published = read_published(checkpoint, is_published)
        content = None if checkpoint is None or published is not None else read_run(checkpoint)
        run = {} if content is None else content["hyper_parameters"]
        if (run.get("head"), run.get("backbone")) == (head, backbone):  # other weights do not fit, as loading them says
            backbone_options = {**(run.get("backbone_options") or {}), **(backbone_options or {})} or None
            output_stride = _given(output_stride, run.get("output_stride"))
            rates, align_corners = _given(rates, run.get("rates")), _given(align_corners, run.get("align_corners"))
            self.hparams.update(backbone_options=backbone_options, output_stride=output_stride, rates=rates)
        self.norm_eval = norm_eval
        self.head_lr_scale = _positive("head_lr_scale", head_lr_scale)
        self.decay_all = decay_all
        self.inference = Inference(inference, window, window_stride, flip_test, tuple(test_scales))
        settings = SegmenterSettings(
            pyramid_channels=pyramid_channels,
            head_channels=head_channels,
            dropout=dropout,
            output_stride=output_stride,
            rates=None if rates is None else tuple(rates),
            auxiliary=auxiliary_weight > 0,
        )
        for name in unread_settings(head, settings):
            _log.warning("the head %s does not read %s", head, name)
        if published is not None:
            # As the network was of which these weights are; a checkpoint of this run is rebuilt without their file.
            backbone_options = {**backbone_options_in(published, backbone), **(backbone_options or {})}
            self.hparams["backbone_options"] = backbone_options
            _log.info("backbone options with those of the weights: %s", json.dumps(backbone_options, sort_keys=True))
        num_classes = len(self.categories)
        self.segmenter = make_segmenter(
            head, backbone, num_classes, settings, pretrained=pretrained, backbone_options=backbone_options
        )
        self.backbone.set_grad_checkpointing(gradient_checkpointing)
        self.mean, self.std = self.backbone.input_spec.mean, self.backbone.input_spec.std
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.segmenter.to(memory_format=self.memory_format)
        self.evaluator = SegmentationEvaluator(num_classes)
        self.result: SegmentationResult | None = None
        if published is not None:
            _log.info("%s: %s", checkpoint, load_published(self.segmenter, published, str(checkpoint)))
        if align_corners is not None:
            self.segmenter.align_corners = align_corners
        self.hparams["align_corners"] = self.segmenter.align_corners  # what the published file told
        self.criterion = SegmentationLoss(
            num_classes,
            align_corners=self.segmenter.align_corners,
            ohem_threshold=ohem_threshold,
            ohem_kept=ohem_kept,
            dice_weight=dice_weight,
            class_weights=class_weights,
            avg_non_ignore=avg_non_ignore,
            auxiliary_weight=auxiliary_weight,
        )
        if checkpoint is not None and content is not None:
            self.start_from(checkpoint, content)

    @property
    def backbone(self) -> Backbone:
        """The network below the head."""
        return self.segmenter.backbone

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """Decay, and the factor on the learning rate, of a parameter."""
        inside = name.removeprefix(_BACKBONE)
        exempt = parameter.dim() <= 1 or (inside != name and inside in self.backbone.no_weight_decay())
        return Group(self.decay_all or not exempt, 1.0 if inside != name else self.head_lr_scale)

    def train(self, mode: bool = True) -> Segmentation:
        """Training or eval mode; with ``norm_eval`` the backbone's BatchNorm statistics stay fixed in both."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_norm_statistics(self.backbone)
        return self

    def on_fit_start(self) -> None:
        """Starts training mode, and refuses a batch that cannot be trained on."""
        super().on_fit_start()
        self._check_batch(getattr(self.trainer.datamodule, "batch_size", 0))  # type: ignore[attr-defined]
        if len(self.categories) == 1:
            raise ConfigError(
                f"the only class is {self.categories.names[0]!r}, and every pixel would be it: declare what it is to "
                'be told from as another one, such as {"0": "background"}'
            )
        started = self.hparams["pretrained"] or self.hparams["checkpoint"] or self.trainer.ckpt_path
        if self.norm_eval and not started and any(isinstance(module, NORMS) for module in self.backbone.modules()):
            _log.warning(
                "the backbone starts from random weights with fixed BatchNorm statistics (norm_eval), which only fits "
                "pretrained weights: pass --model.pretrained true (or a file), or --model.norm_eval false"
            )

    def _check_batch(self, images: int) -> None:
        """BatchNorm after global pooling sees one value a channel and image, unless it counts all processes."""
        if images != 1 or self.hparams["head"] != "deeplabv3":
            return
        if not any(isinstance(module, nn.SyncBatchNorm) for module in self.segmenter.modules()):
            raise ConfigError(
                "a batch of 1 leaves BatchNorm behind the pooling of deeplabv3 nothing to take statistics of: set "
                "--data.batch_size to 2 or more (and --trainer.accumulate_grad_batches for less memory), or train "
                "--model.head semantic_fpn"
            )

    def prepare(self, batch: Batch) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images ``(B, 3, H, W)`` and their sizes (height, width) before padding, in pixels."""
        images, targets = batch
        self.batch_shape = tuple(images.shape)
        sizes = [target["size"] for target in targets]
        images = normalise(images, self.mean, self.std, sizes)
        images = images.to(self.dtype)  # of the weights: float32 unless the Trainer runs in bf16-true or 16-true
        return images.contiguous(memory_format=self.memory_format), sizes

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Sum of the losses over one batch."""
        images, _ = self.prepare(batch)
        self._check_batch(len(images))  # the last batch of an epoch may be smaller
        masks = torch.stack([target["mask"] for target in batch[1]])
        losses = self.criterion(self.segmenter(images), masks)
        total = torch.stack(list(losses.values())).sum()
        logs = {f"train/{name}": value.detach() for name, value in losses.items() if len(losses) > 1}
        self.log_dict({"train/loss": total.detach(), **logs}, batch_size=len(images))
        return total

    def segment(self, batch: Batch) -> list[Tensor]:
        """Label maps of a batch.

        Args:
            batch: Images and targets as the data module gives them.

        Returns:
            int16 ``(h0, w0)`` of each image at the size of its file, on the device of the network; -1 where the
            network gave no finite number.
        """
        images, sizes = self.prepare(batch)
        return self.inference.label(
            lambda seen: self.segmenter(seen)["logits"],
            images,
            sizes,
            [target["original_size"] for target in batch[1]],
            align_corners=self.segmenter.align_corners,
        )

    def deployable(self) -> DeployedSegmenter:
        """See `Task.deployable`; an image is seen once and whole, however the task evaluates."""
        settings = {"head": self.hparams["head"], "backbone": self.hparams["backbone"]}
        return DeployedSegmenter(self.segmenter, self.categories, self.mean, self.std, settings)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:  # noqa: ARG002 - Lightning's signature
        """Labels the images, and hands the label maps to the evaluator and to the callbacks."""
        found = self.segment(batch)
        targets = batch[1]
        self.evaluator.update([target["image_id"] for target in targets], found, [target["mask"] for target in targets])
        return {"masks": found}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The same as validation."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:  # noqa: ARG002 - Lightning's signature
        """For each image ``mask``, its label map on the CPU, see `segment`."""
        return [{"mask": found.cpu()} for found in self.segment(batch)]

    def on_validation_epoch_start(self) -> None:
        """Evaluates the same statistics in all processes."""
        share_buffers(self.segmenter)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all validation images."""
        self.result = self.log_result(self.evaluator, "val") or self.result

    def on_test_epoch_end(self) -> None:
        """Logs the metrics over all test images."""
        self.result = self.log_result(self.evaluator, "test") or self.result

    def classes_in(self, state_dict: dict[str, Tensor]) -> tuple[tuple[str, ...], int | None]:
        """See `Task.classes_in`."""
        prefixes = tuple(f"segmenter.{prefix}" for prefix in self.segmenter.class_parameters)
        shapes = [value.shape for name, value in state_dict.items() if name.startswith(prefixes)]
        return prefixes, int(shapes[0][0]) if shapes else None


def _given(value: GivenT | None, otherwise: GivenT | None) -> GivenT | None:
    return otherwise if value is None else value


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name} must be positive and finite, not {value}")
    return value
