"""MMDetection's detectors behind the contract of effvit's."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor, nn

from effvit.backbones import Backbone, LoadReport, load_state, read_checkpoint
from effvit.errors import CheckpointError, ConfigError
from effvit.tasks.detectors._contract import Detector
from effvit.tasks.mmdetection import _samples
from effvit.tasks.mmdetection._build import build, explained, outline, plans_masks, predicts_masks, without_weights
from effvit.tasks.mmdetection._config import read_model, title, to_text
from effvit.tasks.mmdetection._registry import RegisteredBackbone
from effvit.tasks.mmdetection._swap import set_num_classes, swap_backbone

_PROPOSALS = 1000  # of the box head in MMDetection's ``forward(mode="tensor")``; its mask head takes the first 100
_OURS = "backbone.network."  # effvit's backbone among the names of a detector
_OTHER_ENGINE = (
    "The detectors published for EfficientViT and EfficientFormer have pyramids of their own: effvit's detectors take "
    "those files, --model.detector mask_rcnn or retinanet without --model.mmdet_config"
)


class MMDetector(Detector):
    """A detector that a configuration of MMDetection 3 describes.

    Weights that the configuration names are left out, with a line in the log, so that MMDetection downloads nothing.

    Args:
        config: Path of a configuration, name of one that MMDetection ships, or `config_text` of another detector.
        num_classes: Object classes; takes the place of the configuration's.
        class_names: Names of the classes, which some of MMDetection's heads report.
        backbone: One of effvit's backbones to take the place of the configuration's; ``None`` keeps that.
        backbone_options: Options of its family.
        pretrained: Weights of the backbone: ``True`` for the published ones of effvit's, or the path of a file.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass.
        pad_divisor: Each image counts as padded to a multiple of this.

    Attributes:
        mean: What to subtract from each RGB channel, images in ``[0, 1]``.
        std: What to divide each RGB channel by.
        config_text: The configuration as JSON, before classes and backbone were put in; see `config`.

    Raises:
        ConfigError: There is no such configuration, backbone or option, or the one does not fit the other, or
            MMDetection cannot build what it describes.
        CheckpointError: The weights cannot be had or do not fill the backbone.
    """

    def __init__(
        self,
        config: str,
        num_classes: int,
        *,
        class_names: Sequence[str] = (),
        backbone: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        pretrained: bool | str = False,
        gradient_checkpointing: bool = False,
        pad_divisor: int = 32,
    ) -> None:
        super().__init__()
        model = read_model(config)
        self.config_text = to_text(without_weights(model))
        with explained(model, title(config)):
            if backbone is not None:
                # Fixed statistics of BatchNorm are the task's `norm_eval`.
                settings = {"norm_eval": False, "gradient_checkpointing": gradient_checkpointing}
                model = swap_backbone(model, backbone, backbone_options, {**settings, "pretrained": pretrained})
            else:
                model = _keep_backbone(
                    model, backbone_options, pretrained, gradient_checkpointing=gradient_checkpointing
                )
            self._config = set_num_classes(model, num_classes)
            self.model = build(self._config)
        self.num_classes = num_classes
        self.pad_divisor = pad_divisor
        self.model.dataset_meta = {"classes": tuple(class_names)}
        if backbone is None and isinstance(pretrained, str) and not _is_ours(model):
            _fill_backbone(self.model.backbone, pretrained)
        self.mean, self.std, self._bgr, self._pad_value = _colours(self._config.get("data_preprocessor") or {})
        self.masks = predicts_masks(self.model)
        self.iou_types = ("bbox", "segm") if self.masks else ("bbox",)  # type: ignore[misc] # the model's, not the class's
        self.steps: Tensor  # in the checkpoint, so that a resumed run goes on with the step
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @cached_property
    def class_parameters(self) -> tuple[str, ...]:  # type: ignore[override] # found when first asked for
        """Names of the parameters whose shape depends on the number of classes."""
        other = outline(set_num_classes(self._config, self.num_classes + 1))
        shapes = {name: value.shape for name, value in other.state_dict().items()}
        return tuple(f"model.{name}" for name, value in self.model.state_dict().items() if value.shape != shapes[name])

    def forward(self, images: Tensor) -> Any:
        """Raw outputs of all layers for normalised images ``(B, 3, H, W)``, as MMDetection's ``mode="tensor"``.

        A two-stage detector's heads see 1000 regions of the whole image, so that what is computed does not depend on
        what is seen.
        """
        size = (images.shape[-2], images.shape[-1])
        samples = _samples.describe(images, [size] * len(images), [size] * len(images), self.pad_divisor)
        inputs = self._inputs(images, [size] * len(images))
        if not (getattr(self.model, "with_rpn", False) and getattr(self.model, "with_roi_head", False)):
            return self.model(inputs, samples, mode="tensor")
        features = self.model.extract_feat(inputs)
        whole = images.new_tensor([[0, 0, size[1], size[0]]]).repeat(_PROPOSALS, 1)
        regions = [InstanceData(bboxes=whole) for _ in samples]
        return self.model.rpn_head(features), self.model.roi_head.forward(features, regions, samples)

    def loss(
        self, images: Tensor, sizes: Sequence[tuple[int, int]], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """MMDetection's losses by their names; see `Detector.loss`."""
        originals = [tuple(target["masks"].shape[-2:]) for target in targets] if self.masks else sizes
        samples = _samples.describe(images, sizes, originals, self.pad_divisor)
        _samples.add_objects(samples, targets, masks=self.masks)
        inputs = self._inputs(images, sizes)
        # Augmentations of whole batches, YOLOX's for one, ask MMEngine's runner for the step.
        MessageHub.get_current_instance().update_info("iter", int(self.steps))
        self.steps += 1
        for augment in self.model.data_preprocessor.batch_augments or ():
            inputs, samples = augment(inputs, samples)
        _, values = self.model.parse_losses(self.model.loss(inputs, samples))
        return {name: value for name, value in values.items() if "loss" in name and name != "loss"}

    def predict(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        original_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> list[dict[str, Any]]:
        """Detects objects; see `Detector.predict`."""
        samples = _samples.describe(images, sizes, original_sizes or sizes, self.pad_divisor)
        with torch.no_grad():
            found = self.model.predict(self._inputs(images, sizes), samples, rescale=True)
        return [_samples.detections_of(sample, masks=self.masks) for sample in found]

    def _inputs(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """The images with the channels and the padding that the configuration wants."""
        images = images.flip(1) if self._bgr else images
        if self._pad_value:
            images = images.clone()
            for image, (height, width) in zip(images, sizes, strict=True):
                image[:, height:] = self._pad_value
                image[:, :, width:] = self._pad_value
        return images

    def load(self, state: Mapping[str, Tensor], source: str) -> LoadReport:
        """Loads the weights of a checkpoint that MMDetection wrote for the same configuration.

        Args:
            state: Weights by MMDetection's names.
            source: Where they come from, for messages.

        Raises:
            CheckpointError: They do not fill the detector.
        """
        backbone = self.model.backbone
        if isinstance(backbone, RegisteredBackbone) and not any(name.startswith(_OURS) for name in state):
            return self._load_foreign(backbone.network, state, source)
        report = _compare(self.model.state_dict(), state)
        if report.missing or report.mismatched:
            raise self._unfilled(source, report, "")
        self._take(report, state)
        return report

    def _load_foreign(self, network: Backbone, state: Mapping[str, Tensor], source: str) -> LoadReport:
        """Loads a file whose backbone has the names of its authors' code, such as those published for our families."""
        own = {name: value for name, value in self.model.state_dict().items() if not name.startswith("backbone.")}
        trunk = {name: value for name, value in state.items() if name.startswith("backbone.")}
        report = _compare(own, {name: value for name, value in state.items() if name not in trunk})
        if report.missing or report.mismatched:
            raise self._unfilled(source, report, " " + _OTHER_ENGINE)
        inner = load_state(network, trunk, source)
        lost = [name for name in inner.missing if not name.startswith(network.embed_only)]
        if lost:
            raise CheckpointError(
                f"{source} has no weights for {len(lost)} entries of {network.info.name}, first {lost[0]}. "
                + _OTHER_ENGINE
            )
        self._take(report, state)
        return LoadReport(
            (*(f"{_OURS}{name}" for name in inner.matched), *report.matched),
            tuple(f"{_OURS}{name}" for name in inner.missing),
            (*inner.unexpected, *report.unexpected),
            tuple(f"{_OURS}{name}" for name in inner.resized),
            (),
        )

    def _take(self, report: LoadReport, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict({name: state[name] for name in report.matched}, strict=False)

    def _unfilled(self, source: str, report: LoadReport, more: str) -> CheckpointError:
        return CheckpointError(
            f"{source} does not fill the {type(self.model).__name__} of this configuration with {self.num_classes} "
            f"classes: it was made for another one, or on other classes.{more}\n{report}"
        )


def has_masks(config: str) -> bool:
    """Whether the detector of a configuration learns masks; see `MMDetector` for `config`.

    Raises:
        ConfigError: There is no such configuration, or MMDetection cannot build it.
    """
    model = read_model(config)
    with explained(model, title(config)):
        return plans_masks(model)


def _is_ours(model: dict[str, Any]) -> bool:
    return bool(model["backbone"].get("type") == "effvit.Backbone")


def _keep_backbone(
    model: dict[str, Any], options: dict[str, Any] | None, pretrained: bool | str, *, gradient_checkpointing: bool
) -> dict[str, Any]:
    """The configuration with its own backbone, told what can be told to it."""
    if options:
        raise ConfigError("backbone_options need a backbone: pass --model.backbone too")
    backbone = dict(model["backbone"])
    if _is_ours(model):
        backbone |= {"pretrained": pretrained} if pretrained else {}
        backbone |= {"gradient_checkpointing": True} if gradient_checkpointing else {}
        return {**model, "backbone": backbone}
    if pretrained is True:
        raise ConfigError(
            f"MMDetection's own {backbone['type']} has no published weights here: pass the path of a file with "
            "--model.pretrained, or one of effvit's backbones with --model.backbone"
        )
    if gradient_checkpointing:
        if "with_cp" not in inspect.signature(MODELS.get(backbone["type"])).parameters:
            raise ConfigError(f"MMDetection's own {backbone['type']} has no gradient checkpointing")
        backbone["with_cp"] = True
    return {**model, "backbone": backbone}


def _fill_backbone(backbone: nn.Module, path: str) -> None:
    """Loads a file into a backbone of MMDetection's, whose names are those of torchvision's ResNet."""
    state = read_checkpoint(path)
    inner = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    given = inner or state
    report = _compare(backbone.state_dict(), given)
    if report.missing or report.mismatched:
        raise CheckpointError(f"{path} does not fill MMDetection's {type(backbone).__name__}.\n{report}")
    backbone.load_state_dict({name: given[name] for name in report.matched}, strict=False)


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> LoadReport:
    """Which entries of a network a file has, by name."""
    matched = tuple(name for name in own if name in state and state[name].shape == own[name].shape)
    mismatched = tuple(name for name in own if name in state and state[name].shape != own[name].shape)
    # Counters of seen batches matter to no one, and old files lack them.
    missing = tuple(name for name in own if name not in state and not name.endswith("num_batches_tracked"))
    return LoadReport(matched, missing, tuple(name for name in state if name not in own), (), mismatched)


def _colours(
    preprocessor: dict[str, Any],
) -> tuple[tuple[float, float, float], tuple[float, float, float], bool, float]:
    """Mean and deviation in ``[0, 1]``, RGB order, whether the detector wants BGR, and the value of the padding.

    MMDetection reads images as BGR in ``[0, 255]``; without mean and deviation they stay so.
    """
    bgr = not (preprocessor.get("bgr_to_rgb") or preprocessor.get("rgb_to_bgr"))
    mean = [value / 255 for value in preprocessor.get("mean") or (0, 0, 0)]
    std = [value / 255 for value in preprocessor.get("std") or (1, 1, 1)]
    if bgr:
        mean, std = mean[::-1], std[::-1]
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]), bgr, float(preprocessor.get("pad_value") or 0)
