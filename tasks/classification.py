"""Image classification: a backbone under its published head, trained from scratch, transferred or distilled."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from effvit.backbones import create_classifier, outline
from effvit.errors import ConfigError, did_you_mean
from effvit.tasks._batch_augmentation import BatchAugmentation
from effvit.tasks._checkpoint import read_run
from effvit.tasks._clipping import clip_adaptively
from effvit.tasks._distributed import shard, share_buffers
from effvit.tasks._task import (
    NORMS,
    Group,
    LRSchedulerCallable,
    OptimizerCallable,
    Task,
    freeze_norm_statistics,
    normalise,
)
from effvit.tasks.deployed import DeployedClassifier
from effvit.tasks.metrics.classification import ClassificationEvaluator, ClassificationResult
from effvit.tasks.objectives import build_teacher, check_options, make_objective

_log = logging.getLogger(__name__)

Batch = tuple[Tensor, dict[str, Any]]

_HEADS = "network.head"


class Classification(Task):
    """Trains and evaluates an image classifier on any backbone, under the head that its family publishes.

    A DynamicViT that drops tokens is trained with its own objective: the cross-entropy and the ratio loss always, the
    two distillation losses where there is a teacher (arXiv 2106.02034, section 3.3).

    Args:
        backbone: Name of the backbone; ``effvit backbones`` lists them.
        categories: Class name by label. The command line takes it from the data.
        backbone_options: Options of its family by name, such as ``{keep_ratio: 0.5}`` for DynamicViT.
        gradient_checkpointing: Compute the backbone's activations again in the backward pass instead of keeping them.
        pretrained: Weights to start from: ``true`` for the published file, or the path of a file, which may be a run's
            checkpoint. A head for other classes starts fresh.
        checkpoint: A checkpoint of a run on the same classes, whose weights are the starting point.
        distilled: A second head that learns from the teacher; ``null``: with a teacher, and where pretrained weights
            have one.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.
        mixup: Alpha of MixUp; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mix_probability: Share of the batches that are mixed, in ``[0, 1]``.
        switch_probability: Share of the mixed batches that CutMix gets where both are on, in ``[0, 1]``.
        random_erasing: Probability that an image gets a rectangle of noise, in ``[0, 1]``.
        freeze: What stays as it is, with its BatchNorm statistics: ``backbone`` for all of it (a linear probe), a
            number of steps from the stem on, of those that ``layer_decay`` counts, or a list of what the names of the
            backbone's parameters begin with.
        norm_eval: Keep all BatchNorm statistics fixed during training.
        layer_decay: Factor on the learning rate for each step from the head down to the stem, in ``(0, 1]``.
        decay_all: Weight decay on norms, biases and what the authors leave out too, as in MobileViT's recipe.
        clip_adaptive: Adaptive gradient clipping with this factor (AGC); ``null`` for none.
        teacher: Network to learn from: a backbone's name, ``timm/`` and any name of timm's, or a run's checkpoint.
        teacher_pretrained: Its weights: ``true`` for the published file, or the path of a file.
        teacher_options: Options of its family by name.
        distillation: ``hard`` learns the teacher's first choice, ``soft`` its probabilities.
        distillation_alpha: Weight of the teacher's part in the loss, in ``[0, 1]``.
        distillation_tau: Temperature of soft distillation, positive.
        ratio_weight: Weight of DynamicViT's ratio loss.
        token_weight: Weight of its token distillation.
        kl_weight: Weight of its prediction distillation.
        backbone_lr_scale: Factor on the learning rate of the backbone, DynamicViT's predictors aside.
        frozen_epochs: First epochs in which that learning rate is 0.
        channels_last: Keep feature maps in channels-last memory, the faster layout for convolutions.
        optimizer: Makes the optimizer from parameter groups.
        lr_scheduler: Makes the schedule.
        lr_batch_size: Global batch that the learning rate is given for; scaled linearly to the real one. ``null`` takes
            it as it is.

    Raises:
        ConfigError: An unknown backbone or option, or a value out of its range.
        CheckpointError: Weights that cannot be opened, or that belong to another network or other classes.
    """

    monitor: ClassVar[str] = "val/top1"
    mode: ClassVar[str] = "max"

    def __init__(
        self,
        backbone: str,
        categories: dict[int, str],
        backbone_options: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        pretrained: bool | str = False,
        checkpoint: str | None = None,
        distilled: bool | None = None,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_probability: float = 1.0,
        switch_probability: float = 0.5,
        random_erasing: float = 0.0,
        freeze: int | str | list[str] = 0,
        norm_eval: bool = False,
        layer_decay: float = 1.0,
        decay_all: bool = False,
        clip_adaptive: float | None = None,
        teacher: str | None = None,
        teacher_pretrained: bool | str = True,
        teacher_options: dict[str, Any] | None = None,
        distillation: Literal["hard", "soft"] = "hard",
        distillation_alpha: float = 0.5,
        distillation_tau: float = 1.0,
        ratio_weight: float = 2.0,
        token_weight: float = 0.5,
        kl_weight: float = 0.5,
        backbone_lr_scale: float = 1.0,
        frozen_epochs: int = 0,
        channels_last: bool = True,
        optimizer: OptimizerCallable = lambda groups: AdamW(groups, lr=1e-3, weight_decay=0.025),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_batch_size: int | None = None,
    ) -> None:
        super().__init__(categories, optimizer, lr_scheduler, lr_batch_size=lr_batch_size)
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        _check_options(self.hparams)
        self.frozen = freeze
        self.norm_eval = norm_eval
        self.layer_decay = layer_decay
        self.decay_all = decay_all
        self.clip_adaptive = clip_adaptive
        self.backbone_lr_scale = backbone_lr_scale
        self.frozen_epochs = frozen_epochs
        num_classes = len(self.categories)
        self.mix = BatchAugmentation(
            num_classes,
            mixup=mixup,
            cutmix=cutmix,
            mix_probability=mix_probability,
            switch_probability=switch_probability,
            random_erasing=random_erasing,
        )
        if distilled is None and not (pretrained and teacher is None):
            # A DynamicViT learns from its teacher with the head and the tokens that it has.
            distilled = teacher is not None and not hasattr(outline(backbone), "forward_tokens")
        self.network = create_classifier(
            backbone,
            num_classes=num_classes,
            pretrained=pretrained,
            distilled=distilled,
            **(backbone_options or {}),
        )
        self.network.backbone.set_grad_checkpointing(gradient_checkpointing)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)
        self.input_spec = self.network.backbone.input_spec
        self._exempt = {f"network.backbone.{name}" for name in self.network.backbone.no_weight_decay()}
        self._freeze()
        self.evaluator = ClassificationEvaluator(num_classes)
        self.result: ClassificationResult | None = None
        self.objective: Any = None
        self._sharded = False
        self._objective = partial(
            make_objective,
            self.network,
            label_smoothing=label_smoothing,
            distillation=distillation,
            distillation_alpha=distillation_alpha,
            distillation_tau=distillation_tau,
            ratio_weight=ratio_weight,
            token_weight=token_weight,
            kl_weight=kl_weight,
        )
        self._teacher = None
        if teacher is not None:
            self._teacher = partial(
                build_teacher,
                teacher,
                num_classes=num_classes,
                pretrained=teacher_pretrained,
                options=teacher_options,
                student_spec=self.input_spec,
            )
        if checkpoint is not None:
            self.start_from(checkpoint, read_run(checkpoint))

    def depth_of(self, name: str) -> int:
        """Step of layer-wise decay that a parameter of this module belongs to; the head is the last."""
        backbone = self.network.backbone
        inside = name.removeprefix("network.backbone.")
        return backbone.num_layers if inside == name else backbone.layer_of(inside)

    def group_of(self, name: str, parameter: nn.Parameter) -> Group:
        """Decay, and the factor on the learning rate, of a parameter.

        Vectors (norms, biases, layer scales) are not decayed, nor is what the backbone names, as with timm's
        optimizers, with which the published networks were trained.
        """
        decayed = self.decay_all or (parameter.dim() > 1 and name not in self._exempt)
        scale = self.layer_decay ** (self.network.backbone.num_layers - self.depth_of(name))
        slow = name.startswith("network.backbone.") and not name.startswith("network.backbone.score_predictor.")
        if not slow:
            return Group(decayed, scale)
        return Group(decayed, scale * self.backbone_lr_scale, self.frozen_epochs)

    def _is_frozen(self, name: str) -> bool:
        """Whether a parameter of this module stays as it is."""
        if isinstance(self.frozen, int):
            return self.depth_of(name) < self.frozen
        inside = name.removeprefix("network.backbone.")
        return inside != name and (self.frozen == "backbone" or inside.startswith(tuple(self.frozen)))

    def _freeze(self) -> None:
        names = [name for name, _ in self.network.backbone.named_parameters()]
        steps = self.network.backbone.num_layers
        if isinstance(self.frozen, int) and not 0 <= self.frozen <= steps:
            raise ConfigError(
                f"freeze must be 0 to {steps}, the steps of {self.hparams['backbone']}, not {self.frozen}"
            )
        for start in self.frozen if isinstance(self.frozen, list) else ():
            if not any(name.startswith(start) for name in names):
                raise ConfigError(f"no parameter's name begins with {start!r} (freeze). {did_you_mean(start, names)}")
        for name, parameter in self.named_parameters():
            if self._is_frozen(name):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Classification:
        """Training or eval mode; what is frozen stays in eval mode, with its statistics, dropout and dropped paths."""
        super().train(mode)
        if mode and self.norm_eval:
            freeze_norm_statistics(self.network)
        if mode and self.frozen:
            for module in self.network.backbone.modules():
                if _is_wholly_frozen(module):
                    module.eval()
        return self

    def configure_model(self) -> None:
        """Shards the network where the Trainer runs Lightning's ``ModelParallelStrategy``."""
        if self.device_mesh is not None and not self._sharded:
            shard(self.network, self.device_mesh["data_parallel"])
            self._sharded = True

    def setup(self, stage: str) -> None:
        """Builds the objective, and the teacher where there is one: neither is needed to evaluate."""
        if stage == "fit" and self.objective is None:
            self.objective = self._objective(teacher=self._teacher() if self._teacher else None)

    def on_fit_start(self) -> None:
        """Starts training mode, and refuses a batch that cannot be trained on."""
        super().on_fit_start()
        images = getattr(self.trainer.datamodule, "batch_size", None)  # type: ignore[attr-defined]
        if images != 1:
            return
        if any(isinstance(module, NORMS) and module.training for module in self.network.modules()):
            raise ConfigError(
                "batch_size 1 leaves BatchNorm nothing to take statistics of: set --data.batch_size to 2 or more (and "
                "--trainer.accumulate_grad_batches for less memory), or fix the statistics with --model.norm_eval true"
            )
        if self.mix.mixes:
            raise ConfigError("mixup and cutmix mix the images of a batch: set --data.batch_size to 2 or more")

    def prepare(self, batch: Batch) -> Tensor:
        """Normalised images ``(B, 3, H, W)`` of a batch."""
        self.batch_shape = tuple(batch[0].shape)
        images = normalise(batch[0], self.input_spec.mean, self.input_spec.std)
        images = images.to(self.dtype)  # of the weights: float32 unless the Trainer runs in bf16-true or 16-true
        return images.contiguous(memory_format=self.memory_format)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Sum of the losses over one batch."""
        images, target = self.mix(self.prepare(batch), batch[1]["labels"])
        found = self.objective(self.network, images.contiguous(memory_format=self.memory_format), target)
        total = torch.stack(list(found.losses.values())).sum()
        logs = {name: value.detach() for name, value in found.losses.items() if len(found.losses) > 1} | found.logs
        logs = {f"train/{name}": value for name, value in {"loss": total.detach(), **logs}.items()}
        self.log_dict(logs, batch_size=len(images))
        return total

    def probabilities(self, batch: Batch) -> Tensor:
        """Class probabilities ``(B, K)`` of a batch, float32."""
        logits: Tensor = self.network(self.prepare(batch))
        return logits.float().softmax(-1)

    def deployable(self) -> DeployedClassifier:
        """See `Task.deployable`."""
        spec = self.input_spec
        settings = {"backbone": self.hparams["backbone"]}
        return DeployedClassifier(self.network, self.categories, spec.mean, spec.std, settings)

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Adaptive clipping where it is on, of every parameter as the official ``engine.py`` do, then the Trainer's."""
        if self.clip_adaptive is not None:
            clip_adaptively(self.network.parameters(), self.clip_adaptive)
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002 - Lightning's signature
        """Classifies, and hands the logits to the evaluator."""
        self.evaluator.update(batch[1]["image_ids"], self.network(self.prepare(batch)), batch[1]["labels"])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same as validation."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002 - Lightning's signature
        """Class probabilities of a batch, see `probabilities`."""
        return self.probabilities(batch)

    def on_validation_epoch_start(self) -> None:
        """Evaluates the same statistics in all processes."""
        share_buffers(self.network)

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics over all validation images."""
        self.result = self.log_result(self.evaluator, "val") or self.result

    def on_test_epoch_end(self) -> None:
        """Logs the metrics over all test images."""
        self.result = self.log_result(self.evaluator, "test") or self.result

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how many heads there are, which pretrained weights may have decided."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["distilled"] = self.network.head_dist is not None

    def classes_in(self, state_dict: dict[str, Tensor]) -> tuple[tuple[str, ...], int | None]:
        """See `Task.classes_in`."""
        shapes = [value.shape for name, value in state_dict.items() if name.startswith(_HEADS) and value.dim() == 2]
        return (_HEADS,), int(shapes[-1][0]) if shapes else None


def _is_wholly_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters, none of which is trained."""
    trained = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trained) and not any(trained)


def _check_options(options: Any) -> None:
    weights = ("ratio_weight", "token_weight", "kl_weight")
    check_options(
        options["label_smoothing"],
        options["distillation"],
        options["distillation_alpha"],
        options["distillation_tau"],
        **{name: options[name] for name in weights},
    )
    if not 0 < options["layer_decay"] <= 1:
        raise ConfigError(f"layer_decay must be above 0 and at most 1, not {options['layer_decay']}")
    for name in ("clip_adaptive", "backbone_lr_scale"):
        if options[name] is not None and options[name] <= 0:
            raise ConfigError(f"{name} must be positive, not {options[name]}")
    if options["frozen_epochs"] < 0:
        raise ConfigError(f"frozen_epochs must be 0 or more, not {options['frozen_epochs']}")
    freeze = options["freeze"]
    if freeze != "backbone" and (isinstance(freeze, bool) or not isinstance(freeze, int | list)):
        raise ConfigError(f"freeze must be 'backbone', a number of steps or a list of names, not {freeze!r}")
