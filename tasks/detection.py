"""Object detection: a backbone, a feature pyramid, a detector, and COCO AP."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import Backbone, create_backbone
from effvit.errors import ConfigError, ExportError
from effvit.tasks._checkpoint import read_published, read_run
from effvit.tasks._task import (
    NORMS,
    Group,
    LRSchedulerCallable,
    OptimizerCallable,
    Task,
    freeze_norm_statistics,
    normalise,
)
from effvit.tasks.deployed import DeployedDetector
from effvit.tasks.detectors._checks import check_thresholds
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.detectors._cvnets_checkpoint import is_cvnets, load_cvnets
from effvit.tasks.detectors._mmdet_checkpoint import backbone_options_in, is_mmdet, load_mmdet
from effvit.tasks.detectors.factory import DetectorSettings, detector_kind, make_detector, unread_settings
from effvit.tasks.metrics.coco import CocoEvaluator, CocoResult

if TYPE_CHECKING:
    from effvit.tasks.mmdetection import MMDetector

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, list[dict[str, Any]]]

#: What the metrics of each kind of overlap are called in the log.
_METRIC_NAMES = {"bbox": "", "segm": "mask_"}


class _Network(NamedTuple):
    """The backbone to build, see `Detection`."""

    name: str | None
    options: dict[str, Any] | None
    pretrained: bool | str
    checkpointing: bool


class _GroundTruth(Protocol):
    """What the evaluation asks of a data module: the annotations of a split, as COCO writes them."""

    def ground_truth(self, stage: str) -> dict[str, Any]: ...


class Detection(Task):
    """Trains and evaluates an object detector on any backbone.

    Defaults are the recipe of the published EfficientViT tables (official ``downstream/configs``, MMDetection 1x):
    AdamW 1e-4 with weight decay 0.05, none on attention biases; linear warm-up over 500 steps from 0.001; BatchNorm of
    the backbone in eval mode, its affine parameters trained; nothing frozen.

    Args:
        backbone: Name of the backbone; ``effvit backbones`` lists them. ``None`` keeps the one of ``mmdet_config``.
        backbone_options: Options of its family by name, such as ``{keep_ratio: 0.5}`` for DynamicViT.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        categories: Class name by category id. The command line takes it from the data.
        detector: ``retinanet``, ``faster_rcnn``, ``mask_rcnn``, ``ssdlite``, or ``mmdet`` for MMDetection's engine.
        mmdet_config: For ``mmdet``: a configuration of MMDetection, as a path or as the name of one that it ships.
        pretrained: Weights of the backbone: ``true`` for the published file, or the path of a file.
        checkpoint: Weights of the whole detector to start from or to evaluate: a run's checkpoint, or a file of
            MMDetection or ml-cvnets, such as those published for EfficientViT, EfficientFormer and MobileViT.
        pyramid_channels: Channels of every pyramid level.
        head_convs: Stacked 3x3 convolutions: in each branch of RetinaNet's head, in the mask head of Mask R-CNN.
        head_channels: Hidden units of the box head of Faster and Mask R-CNN.
        roi_samples: Regions of each image that the heads of Faster and Mask R-CNN learn from.
        norm_eval: Keep the backbone's BatchNorm statistics fixed during training. Turn it off from scratch. Of a
            backbone of MMDetection's own its configuration decides.
        score_threshold: Detections below this score are dropped, in ``[0, 1]``; ``None`` for the detector's published
            value (0.05; SSDLite 0.01).
        nms_threshold: Overlap (IoU) above which the weaker of two boxes of a class is dropped, in ``(0, 1]``; ``None``
            for 0.5, as published.
        detections_per_image: Most detections that an image may have; ``None`` for the published 100 (SSDLite 200).
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
        backbone: str | None,
        categories: dict[int, str],
        backbone_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        detector: str = "retinanet",
        mmdet_config: str | None = None,
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        pyramid_channels: int = 256,
        head_convs: int = 4,
        head_channels: int = 1024,
        roi_samples: int = 512,
        norm_eval: bool = True,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        detections_per_image: int | None = None,
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
        _check_options(detector, mmdet_config, backbone)
        check_thresholds(score_threshold, nms_threshold)
        self.norm_eval = norm_eval
        self.per_class_ap = per_class_ap
        settings = DetectorSettings(
            pyramid_channels=pyramid_channels,
            head_convs=head_convs,
            head_channels=head_channels,
            roi_samples=roi_samples,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            detections_per_image=detections_per_image,
            pad_divisor=pad_divisor,
        )
        for name in unread_settings(detector, settings):
            _log.warning("the detector %s does not read %s", detector, name)
        published = read_published(checkpoint, lambda state: is_mmdet(state) or is_cvnets(state))
        if published is not None and backbone is not None:
            # As the network was of which these weights are; a checkpoint of this run is rebuilt without their file.
            backbone_options = {**backbone_options_in(published, backbone), **(backbone_options or {})}
            self.hparams["backbone_options"] = backbone_options
            # `effvit tables coco` reads this line from the log of a run: its config.yaml lacks what the file tells.
            _log.info("backbone options with those of the weights: %s", json.dumps(backbone_options, sort_keys=True))
        network = _Network(backbone, backbone_options, pretrained, gradient_checkpointing)
        if mmdet_config is not None:
            self.detector = self._mmdetector(mmdet_config, network, pad_divisor)
        else:
            self.detector = self._built_in(detector, network, settings)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.detector.to(memory_format=self.memory_format)
        self._exempt = self._undecayed()
        self.evaluator = CocoEvaluator(self.detector.iou_types, backend=coco_backend)
        self.result: CocoResult | None = None
        if published is not None:
            self._load_published(published, str(checkpoint))
        elif checkpoint is not None:
            self.start_from(checkpoint, read_run(checkpoint))

    def _built_in(self, name: str, network: _Network, settings: DetectorSettings) -> Detector:
        """A detector of ours."""
        assert network.name is not None
        backbone = create_backbone(network.name, pretrained=network.pretrained, **(network.options or {}))
        backbone.set_grad_checkpointing(network.checkpointing)
        self.mean, self.std = backbone.input_spec.mean, backbone.input_spec.std
        return make_detector(name, backbone, len(self.categories), settings)

    def _mmdetector(self, config: str, network: _Network, pad_divisor: int) -> Detector:
        """The detector of a configuration of MMDetection."""
        from effvit.tasks.mmdetection import MMDetector

        detector = MMDetector(
            config,
            len(self.categories),
            class_names=self.categories.names,
            backbone=network.name,
            backbone_options=network.options,
            pretrained=network.pretrained,
            gradient_checkpointing=network.checkpointing,
            pad_divisor=pad_divisor,
        )
        self.hparams["mmdet_config"] = detector.config_text  # a checkpoint is rebuilt without the user's file
        self.mean, self.std = detector.mean, detector.std
        return detector

    def _load_published(self, state: dict[str, Tensor], path: str) -> None:
        if self.hparams["detector"] == "mmdet":
            report = cast("MMDetector", self.detector).load(state, path)
        else:
            load = load_cvnets if is_cvnets(state) else load_mmdet
            report = load(self.detector, state, path)
        _log.info("%s: %s", path, report)

    @property
    def backbone(self) -> Backbone | None:
        """The network below the detector; ``None`` where MMDetection brings one of its own."""
        return next((module for module in self.detector.modules() if isinstance(module, Backbone)), None)

    def _undecayed(self) -> set[str]:
        """Names of the parameters without weight decay, as the backbone says."""
        for prefix, module in self.named_modules():
            if isinstance(module, Backbone):
                return {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return set()

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:  # noqa: ARG002 - the template's signature
        """No weight decay for the attention biases of the backbone."""
        return Group(decayed=name not in self._exempt)

    def train(self, mode: bool = True) -> Detection:
        """Training or eval mode; with ``norm_eval`` the backbone's BatchNorm statistics stay fixed in both."""
        super().train(mode)
        if mode and self.norm_eval and self.backbone is not None:
            freeze_norm_statistics(self.backbone)
        return self

    def on_fit_start(self) -> None:
        """Starts training mode, and warns of a backbone that cannot be trained well as it is set up."""
        super().on_fit_start()
        if "segm" in self.detector.iou_types and not getattr(self.trainer.datamodule, "masks", True):  # type: ignore[attr-defined]
            raise ConfigError("this detector learns masks, which the data does not load: make the data with masks=True")
        options = self.hparams
        started = options["pretrained"] or options["checkpoint"] or self.trainer.ckpt_path
        network = self.backbone
        has_statistics = network is not None and any(isinstance(module, NORMS) for module in network.modules())
        if self.norm_eval and has_statistics and not started:
            _log.warning(
                "the backbone starts from random weights with fixed BatchNorm statistics (norm_eval), which only fits "
                "pretrained weights: pass --model.pretrained true (or a file), or --model.norm_eval false"
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
        """Sum of the detector's losses over one batch."""
        images, sizes = self.prepare(batch)
        losses = self.detector.loss(images, sizes, batch[1])
        total = torch.stack(list(losses.values())).sum()
        logs = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict({"train/loss": total.detach(), **logs}, batch_size=len(images))
        return total

    def detect(self, batch: Batch) -> list[dict[str, Any]]:
        """Detections of a batch, on the CPU.

        Args:
            batch: Images and targets as the data module gives them.

        Returns:
            One dictionary an image: ``boxes`` ``(N, 4)`` as (x1, y1, x2, y2) in pixels of the original image,
            ``scores`` ``(N,)`` and ``labels`` ``(N,)``, best first, and of a detector with masks ``rles``, N compressed
            COCO masks of the original size.
        """
        images, sizes = self.prepare(batch)
        original_sizes = [target["original_size"] for target in batch[1]]
        return [_on_cpu(found) for found in self.detector.predict(images, sizes, original_sizes)]

    def deployable(self) -> DeployedDetector:
        """See `Task.deployable`; it has the digits of `detect`.

        Raises:
            ExportError: It is a detector of MMDetection's.
        """
        name = self.hparams["detector"]
        if name == "mmdet":
            raise ExportError(
                "a detector of MMDetection's engine (--model.detector mmdet) is exported with MMDetection's own tools, "
                "such as mmdeploy; retinanet, faster_rcnn, mask_rcnn and ssdlite are exported here"
            )
        settings = {"detector": name, "backbone": self.hparams["backbone"]}
        return DeployedDetector(self.detector, self.categories, self.mean, self.std, settings)

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

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:  # noqa: ARG002 - Lightning's signature
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
        metrics = {
            f"{prefix}/{_METRIC_NAMES[kind]}{name}": value
            for kind, values in self.result.metrics.items()
            for name, value in values.items()
        }
        # Every rank holds the same numbers, so nothing is left to synchronise.
        self.log_dict(metrics, rank_zero_only=False)

    def classes_in(self, state_dict: dict[str, Tensor]) -> tuple[tuple[str, ...], int | None]:
        """See `Task.classes_in`."""
        prefixes = tuple(f"detector.{prefix}" for prefix in self.detector.class_parameters)
        background = {"retinanet": 0, "faster_rcnn": 1, "mask_rcnn": 1, "ssdlite": 1}.get(self.hparams["detector"])
        own = self.state_dict()
        name = next((name for name in own if name.startswith(prefixes) and name.endswith(".bias")), None)
        if background is not None and name in state_dict:
            rows = own[name].numel() // (len(self.categories) + background)  # outputs for each class
            return prefixes, state_dict[name].numel() // rows - background
        return prefixes, None


def _check_options(detector: str, mmdet_config: str | None, backbone: str | None) -> None:
    """What can be said before anything is loaded."""
    if detector == "mmdet":
        if mmdet_config is None:
            raise ConfigError(
                "the detector mmdet needs a configuration of MMDetection: pass --model.mmdet_config FILE, or the name "
                "of one that it ships, such as faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
            )
        return
    detector_kind(detector)
    if mmdet_config is not None:
        raise ConfigError(f"mmdet_config is for the detector mmdet, not for {detector}: --model.detector mmdet")
    if backbone is None:
        raise ConfigError(f"{detector} needs a backbone: pass --model.backbone; `effvit backbones` lists them")


def _on_cpu(detections: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in detections.items()}
