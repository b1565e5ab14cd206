"""Object detection: a backbone, a feature pyramid, a detector, and COCO AP."""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import FeaturePyramid, create_backbone
from effvit.errors import ConfigError, close_matches
from effvit.tasks._task import (
    NORMS,
    Group,
    LRSchedulerCallable,
    OptimizerCallable,
    Task,
    freeze_norm_statistics,
    normalise,
)
from effvit.tasks.detectors.retinanet import RetinaNet
from effvit.tasks.metrics.coco import CocoEvaluator, CocoResult

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, list[dict[str, Any]]]

#: Detectors by the name that a config gives, with the pyramid levels that each one reads.
_DETECTORS = {"retinanet": (RetinaNet, ("p3", "p4", "p5", "p6", "p7"))}


class _GroundTruth(Protocol):
    """What the evaluation asks of a data module: the annotations of a split, as COCO writes them."""

    def ground_truth(self, stage: str) -> dict[str, Any]: ...


class Detection(Task):
    """Trains and evaluates an object detector on any backbone.

    Defaults are the recipe of the published EfficientViT tables (official ``downstream/configs``, MMDetection 1x):
    AdamW 1e-4 with weight decay 0.05, none on attention biases; linear warm-up over 500 steps from 0.001; BatchNorm of
    the backbone in eval mode, its affine parameters trained; nothing frozen.

    Args:
        backbone: Name of the backbone; ``effvit backbones`` lists them.
        backbone_options: Options of its family by name, such as ``{keep_ratio: 0.5}`` for DynamicViT.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        categories: Class name by category id. The command line takes it from the data.
        detector: ``retinanet``.
        pretrained: Weights of the backbone: ``true`` for the published file, or the path of a file.
        checkpoint: A checkpoint of this detector whose weights are the starting point.
        pyramid_channels: Channels of every pyramid level.
        head_convs: Stacked 3x3 convolutions in each branch of the head.
        norm_eval: Keep the backbone's BatchNorm statistics fixed during training. Turn it off from scratch.
        score_threshold: Detections below this score are dropped, in ``[0, 1]``.
        nms_threshold: Overlap (IoU) above which the weaker of two boxes of a class is dropped, in ``(0, 1]``.
        detections_per_image: Most detections that an image may have.
        coco_backend: ``hotcoco``, or ``pycocotools``, the slower reference with the same digits.
        per_class_ap: Also compute the AP of each class.
        pad_divisor: Each image counts as padded to a multiple of this; anchors beyond are left out of the loss. The
            command line takes it from the data.
        channels_last: Keep feature maps in channels-last memory, the faster layout for convolutions.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule, stepped once per epoch.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_factor: Share of the learning rate at the first step of the warm-up, in ``(0, 1]``.

    Raises:
        ConfigError: An unknown backbone, detector or metric backend, or a value out of its range.
        CheckpointError: Weights that cannot be opened, or that belong to another network or other classes.
    """

    monitor: ClassVar[str] = "val/AP"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        backbone: str,
        categories: dict[int, str],
        backbone_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        detector: str = "retinanet",
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        pyramid_channels: int = 256,
        head_convs: int = 4,
        norm_eval: bool = True,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        coco_backend: str = "hotcoco",
        per_class_ap: bool = False,
        pad_divisor: int = 32,
        channels_last: bool = True,
        optimizer: OptimizerCallable = lambda groups: AdamW(groups, lr=1e-4, weight_decay=0.05),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 500,
        warmup_factor: float = 0.001,
    ) -> None:
        super().__init__(categories, optimizer, lr_scheduler, warmup_steps=warmup_steps, warmup_factor=warmup_factor)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        _check_options(detector, score_threshold, nms_threshold)
        self.norm_eval = norm_eval
        self.per_class_ap = per_class_ap
        network = create_backbone(backbone, pretrained=pretrained, **(backbone_options or {}))
        network.set_grad_checkpointing(gradient_checkpointing)
        kind, levels = _DETECTORS[detector]
        self.detector = kind(
            FeaturePyramid(network, levels=levels, out_channels=pyramid_channels),
            len(self.categories),
            num_convs=head_convs,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
            pad_divisor=pad_divisor,
        )
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.detector.to(memory_format=self.memory_format)
        self.input_spec = network.input_spec
        self._exempt = {f"detector.pyramid.backbone.{name}" for name in network.no_weight_decay()}
        self.evaluator = CocoEvaluator(backend=coco_backend)
        self.result: CocoResult | None = None
        if checkpoint is not None:
            self.start_from(checkpoint)

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:  # noqa: ARG002 - the template's signature
        """No weight decay for the attention biases of the backbone."""
        return Group(decayed=name not in self._exempt)

    def train(self, mode: bool = True) -> Detection:
        """Training or eval mode; with ``norm_eval`` the backbone's BatchNorm statistics stay fixed in both."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_norm_statistics(self.detector.pyramid.backbone)
        return self

    def on_fit_start(self) -> None:
        """Starts training mode, and warns of a backbone that cannot be trained well as it is set up."""
        super().on_fit_start()
        options = self.hparams
        started = options["pretrained"] or options["checkpoint"] or self.trainer.ckpt_path
        has_statistics = any(isinstance(module, NORMS) for module in self.detector.pyramid.backbone.modules())
        if self.norm_eval and has_statistics and not started:
            _log.warning(
                "the backbone starts from random weights with fixed BatchNorm statistics (norm_eval), which only fits "
                "pretrained weights: pass --model.pretrained true (or a file), or --model.norm_eval false"
            )

    def prepare(self, batch: Batch) -> tuple[Tensor, list[tuple[int, int]]]:
        """Normalised images ``(B, 3, H, W)`` and their sizes (height, width) before padding, in pixels."""
        images, targets = batch
        sizes = [target["size"] for target in targets]
        images = normalise(images, self.input_spec.mean, self.input_spec.std, sizes)
        images = images.to(self.dtype)  # of the weights: float32 unless the Trainer runs in bf16-true or 16-true
        return images.contiguous(memory_format=self.memory_format), sizes

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Sum of the detector's losses over one batch."""
        images, sizes = self.prepare(batch)
        losses: dict[str, Tensor] = self.detector.loss(images, sizes, batch[1])
        total = torch.stack(list(losses.values())).sum()
        logs = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict({"train/loss": total.detach(), **logs}, batch_size=len(images))
        return total

    def detect(self, batch: Batch) -> list[dict[str, Tensor]]:
        """Detections of a batch, on the CPU.

        Args:
            batch: Images and targets as the data module gives them.

        Returns:
            One dictionary an image: ``boxes`` ``(N, 4)`` as (x1, y1, x2, y2) in pixels of the original image,
            ``scores`` ``(N,)`` and ``labels`` ``(N,)``, best first.
        """
        images, sizes = self.prepare(batch)
        found = self.detector.predict(images, sizes)
        return [_to_original(detections, target) for detections, target in zip(found, batch[1], strict=True)]

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:  # noqa: ARG002 - Lightning's signature
        """Detects, and hands the detections to the evaluator and to the callbacks."""
        detections = self.detect(batch)
        ids = torch.tensor(self.categories.ids)
        entries = [{**found, "category_ids": ids[found["labels"]]} for found in detections]
        self.evaluator.update([target["image_id"] for target in batch[1]], entries)
        return {"detections": detections}

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The same as validation."""
        return self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:  # noqa: ARG002 - Lightning's signature
        """Detections of a batch, see `detect`."""
        return self.detect(batch)

    def on_validation_epoch_end(self) -> None:
        """Logs COCO AP over all validation images."""
        self._log_coco("validate", "val")

    def on_test_epoch_end(self) -> None:
        """Logs COCO AP over all test images."""
        self._log_coco("test", "test")

    def _log_coco(self, stage: str, prefix: str) -> None:
        if self.trainer.sanity_checking:
            self.evaluator.reset()
            return
        self.evaluated_step = self.trainer.global_step
        data = cast("_GroundTruth", self.trainer.datamodule)  # type: ignore[attr-defined]
        self.result = self.evaluator.compute(data.ground_truth(stage), per_class=self.per_class_ap)
        self.evaluator.reset()
        metrics = self.result.metrics["bbox"]
        # Every rank holds the same numbers, so nothing is left to synchronise.
        self.log_dict({f"{prefix}/{name}": value for name, value in metrics.items()}, rank_zero_only=False)

    def classes_in(self, state_dict: dict[str, Tensor]) -> tuple[str, int] | None:
        """See `Task.classes_in`."""
        prefix = "detector.head.classification_head.cls_logits."
        if f"{prefix}bias" not in state_dict:
            return None
        anchors = self.state_dict()[f"{prefix}bias"].numel() // len(self.categories)
        return prefix, state_dict[f"{prefix}bias"].numel() // anchors


def _check_options(detector: str, score_threshold: float, nms_threshold: float) -> None:
    if detector not in _DETECTORS:
        raise ConfigError(f"there is no detector {detector!r}. {close_matches(detector, _DETECTORS)}")
    if not 0 <= score_threshold <= 1:
        raise ConfigError(f"score_threshold must be in [0, 1], not {score_threshold}")
    if not 0 < nms_threshold <= 1:
        raise ConfigError(f"nms_threshold must be in (0, 1], not {nms_threshold}")


def _to_original(detections: dict[str, Tensor], target: dict[str, Any]) -> dict[str, Tensor]:
    """Detections in pixels of the original image: width and height scale apart, since sizes were rounded."""
    (height, width), (original_height, original_width) = target["size"], target["original_size"]
    scale = torch.tensor([width / original_width, height / original_height] * 2)
    moved = {name: value.detach().cpu() for name, value in detections.items()}
    return {**moved, "boxes": moved["boxes"].float() / scale}
