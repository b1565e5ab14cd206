"""What a classifier is trained to do: to name images, to agree with a teacher, to drop tokens.

An objective is called with the network, normalised images and their target. What it gives is summed and minimised.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from effvit.backbones import Classifier, InputSpec, create_classifier
from effvit.backbones.dynamicvit import DynamicViT
from effvit.errors import CheckpointError, ConfigError, close_matches
from effvit.tasks._checkpoint import read_run
from effvit.tasks.losses.classification import cross_entropy, labelled, mean_over
from effvit.tasks.losses.distillation import hard_distillation, kl_divergence, soft_distillation
from effvit.tasks.losses.sparsification import ratio_loss, token_distillation

_log = logging.getLogger(__name__)

Distillation = Literal["hard", "soft"]

#: What names of files end in, as names of networks do not.
_FILES = (".ckpt", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Objectives:
    """What an objective says of one batch.

    Attributes:
        losses: By name; scalars, already weighted, whose sum is minimised.
        logs: Other scalars worth logging by name, without gradient.
    """

    losses: dict[str, Tensor]
    logs: dict[str, Tensor] = field(default_factory=dict)


class Teacher:
    """A trained classifier that is asked, and neither trained nor saved.

    Not an ``nn.Module``, so that no module that holds it counts its weights as its own. It follows the images that it
    is given to their device and floating type.

    Args:
        network: The classifier; it is frozen.
        student_spec: How the images that it will be given are normalised.
    """

    def __init__(self, network: Classifier, student_spec: InputSpec) -> None:
        self.network = network.eval().requires_grad_(requires_grad=False).to(memory_format=torch.channels_last)
        spec = network.backbone.input_spec
        self._same = (spec.mean, spec.std) == (student_spec.mean, student_spec.std)
        mean, std, own_mean, own_std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (student_spec.mean, student_spec.std, spec.mean, spec.std)
        )
        self._scale, self._shift = (std / own_std).float(), ((mean - own_mean) / own_std).float()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits ``(B, K)`` of images ``(B, 3, H, W)`` that are normalised for the student."""
        logits: Tensor = self.network(self._fit(images))
        return logits

    @torch.no_grad()
    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and the tokens after the last norm ``(B, N, C)``; see `has_tokens_for`."""
        found = cast("DynamicViT", self.network.backbone).forward_tokens(self._fit(images))
        return self.network.head(found.class_token), found.last

    def has_tokens_for(self, student: DynamicViT) -> bool:
        """Whether the teacher is the student's own network with all its tokens."""
        backbone = self.network.backbone
        return (
            isinstance(backbone, DynamicViT)
            and backbone.keep_ratio == 1
            and backbone.num_features == student.num_features
        )

    def _fit(self, images: Tensor) -> Tensor:
        weight = next(self.network.parameters())
        if (weight.device, weight.dtype) != (images.device, images.dtype):
            self.network.to(images.device, images.dtype)
            self._scale, self._shift = self._scale.to(images), self._shift.to(images)
        if not self._same:
            images = torch.addcmul(self._shift, images, self._scale)
        return images.contiguous(memory_format=torch.channels_last)


def build_teacher(
    name: str,
    *,
    num_classes: int,
    pretrained: bool | str = True,
    options: Mapping[str, Any] | None = None,
    student_spec: InputSpec,
) -> Teacher:
    """Builds a teacher.

    Args:
        name: A backbone, ours or ``timm/``..., under its published head; or the path of a checkpoint of a
            classification run of ours.
        num_classes: Number of the student's classes, which must be the teacher's.
        pretrained: Weights of a named teacher: ``True`` for the published ones, or the path of a file.
        options: Options of the backbone's family by name; for a run, on top of those that it was trained with.
        student_spec: How the student's images are normalised.

    Raises:
        ConfigError: There is no such backbone or option.
        CheckpointError: The weights cannot be had, or are of other classes or another network.
    """
    of_run = name.endswith(_FILES) or Path(name).is_file()
    try:
        backbone, trained_with = _read_settings(name) if of_run else (name, {})
        network = create_classifier(
            backbone,
            num_classes=num_classes,
            pretrained=name if of_run else pretrained,
            fresh_head=not (of_run or pretrained),
            **{**trained_with, **(options or {})},
        )
    except CheckpointError as error:
        raise CheckpointError(f"the teacher cannot teach {num_classes} classes: {error}") from error
    if not (of_run or pretrained):
        _log.warning("the teacher %s has random weights, from which nothing can be learned", name)
    return Teacher(network, student_spec)


def _read_settings(path: str) -> tuple[str, dict[str, Any]]:
    """Name and options of the backbone that a run trained."""
    settings = read_run(path)["hyper_parameters"]
    if "backbone" not in settings:
        raise CheckpointError(f"{path} does not say which backbone it is of")
    return settings["backbone"], settings.get("backbone_options") or {}


class Supervised(nn.Module):
    """Cross entropy with the labels; of the mean of both heads where a classifier has two.

    Args:
        label_smoothing: Share of the target that is spread over all classes.
    """

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, network: Classifier, images: Tensor, target: Tensor) -> Objectives:
        """Losses of a batch.

        Args:
            network: The classifier, in training mode.
            images: Normalised ``(B, 3, H, W)``.
            target: Class indices ``(B,)``, -1 for unknown; or probabilities ``(B, K)``.
        """
        losses = cross_entropy(network(images), target, self.label_smoothing)
        return Objectives({"cross_entropy": mean_over(losses, labelled(target))})


class Distilled(nn.Module):
    """``(1 - alpha) * cross entropy + alpha * distillation``, each with a head of its own where there are two.

    As in DeiT, EfficientViT and EfficientFormer, the labels train the head and the teacher the distillation head. A
    classifier with one head learns both with it: DeiT's paper compares that (arXiv:2012.12877, Table 3, without the
    distillation token), the official codes refuse it.

    Args:
        teacher: Who is agreed with.
        label_smoothing: See `Supervised`; labels only.
        distillation: ``hard`` for the teacher's decisions, ``soft`` for its probabilities.
        alpha: Share of the distillation.
        tau: Temperature of soft distillation.
    """

    def __init__(
        self, teacher: Teacher, label_smoothing: float, distillation: Distillation, alpha: float, tau: float
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.label_smoothing = label_smoothing
        self.distillation = distillation
        self.alpha = alpha
        self.tau = tau

    def forward(self, network: Classifier, images: Tensor, target: Tensor) -> Objectives:
        """Losses of a batch; see `Supervised`."""
        logits, distilled = network.forward_heads(images)
        distilled = logits if distilled is None else distilled
        expected = self.teacher.logits(images)
        taught = (
            hard_distillation(distilled, expected)
            if self.distillation == "hard"
            else soft_distillation(distilled, expected, self.tau)
        )
        counted = labelled(target)
        supervised = mean_over(cross_entropy(logits, target, self.label_smoothing), counted)
        return Objectives(
            {
                "cross_entropy": (1 - self.alpha) * supervised,
                "distillation": self.alpha * mean_over(taught, counted),
            }
        )


class Sparsified(nn.Module):
    """DynamicViT's: cross entropy, wanted shares of tokens, and agreement with the network that keeps them all.

    ``L = L_cls + 0.5 L_KL + 0.5 L_distill + 2 L_ratio`` with the published weights (arXiv:2106.02034, "Training and
    Inference"; ``losses.py`` and ``main.py`` of raoyongming/DynamicViT).

    Args:
        network: The classifier on a DynamicViT that drops tokens.
        teacher: The same network with ``keep_ratio=1``, before it learned to drop any; of another, only the logits are
            agreed with. ``None`` for the first two terms alone.
        label_smoothing: See `Supervised`.
        ratio_weight: Of the shares.
        token_weight: Of the squared difference of tokens.
        kl_weight: Of the divergence of logits.
    """

    def __init__(
        self,
        network: Classifier,
        teacher: Teacher | None,
        label_smoothing: float,
        ratio_weight: float,
        token_weight: float,
        kl_weight: float,
    ) -> None:
        super().__init__()
        backbone = cast("DynamicViT", network.backbone)
        self.targets = tuple(backbone.keep_ratio**stage for stage, _ in enumerate(backbone.score_predictor, start=1))
        self.teacher = teacher
        self.label_smoothing = label_smoothing
        self.ratio_weight = ratio_weight
        self.token_weight = token_weight
        self.kl_weight = kl_weight
        if teacher is not None and token_weight and not teacher.has_tokens_for(backbone):
            self.token_weight = 0.0
            _log.warning(
                "the teacher %s has no tokens like those of %s, so only its logits are learned from; token "
                "distillation takes the same network with keep_ratio 1.0",
                teacher.network.backbone.info.name,
                backbone.info.name,
            )

    def forward(self, network: Classifier, images: Tensor, target: Tensor) -> Objectives:
        """Losses of a batch, see `Supervised`, and ``kept_1``, ``kept_2``, ...: the share of tokens kept."""
        found = cast("DynamicViT", network.backbone).forward_tokens(images)
        logits = network.head(found.class_token)
        counted = labelled(target)
        losses = {
            "cross_entropy": mean_over(cross_entropy(logits, target, self.label_smoothing), counted),
            "ratio": self.ratio_weight * mean_over(ratio_loss(found.decisions, self.targets), counted),
        }
        if self.teacher is not None and self.token_weight:
            expected, tokens = self.teacher.tokens(images)
            keep = found.decisions[-1] * counted[:, None]
            losses["token"] = self.token_weight * token_distillation(found.last, tokens, keep)
            losses["kl"] = self.kl_weight * mean_over(kl_divergence(logits, expected), counted)
        elif self.teacher is not None:
            losses["kl"] = self.kl_weight * mean_over(kl_divergence(logits, self.teacher.logits(images)), counted)
        kept = {
            f"kept_{stage}": decision.detach().float().mean() for stage, decision in enumerate(found.decisions, start=1)
        }
        return Objectives(losses, kept)


def make_objective(
    network: Classifier,
    *,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    distillation: Distillation = "hard",
    distillation_alpha: float = 0.5,
    distillation_tau: float = 1.0,
    ratio_weight: float = 2.0,
    token_weight: float = 0.5,
    kl_weight: float = 0.5,
) -> Supervised | Distilled | Sparsified:
    """The objective that a network and a teacher call for: `Sparsified`, `Distilled` or `Supervised`.

    Args:
        network: The classifier to train.
        label_smoothing: Share of the target that is spread over all classes, in ``[0, 1)``.
        teacher: Who it learns from, if anyone.
        distillation: See `Distilled`.
        distillation_alpha: See `Distilled`; in ``[0, 1]``.
        distillation_tau: See `Distilled`; above 0.
        ratio_weight: See `Sparsified`; this and the next two are not negative.
        token_weight: See `Sparsified`.
        kl_weight: See `Sparsified`.

    Raises:
        ConfigError: A value out of its range, or a network that drops tokens and has two heads.
    """
    weights = {"ratio_weight": ratio_weight, "token_weight": token_weight, "kl_weight": kl_weight}
    check_options(label_smoothing, distillation, distillation_alpha, distillation_tau, **weights)
    if isinstance(network.backbone, DynamicViT) and network.backbone.keep_ratio < 1:
        if network.head_dist is not None:
            raise ConfigError(f"{network.backbone.info.name} drops tokens, and learns from a teacher with its one head")
        return Sparsified(network, teacher, label_smoothing, **weights)
    if teacher is not None:
        return Distilled(teacher, label_smoothing, distillation, distillation_alpha, distillation_tau)
    return Supervised(label_smoothing)


def check_options(
    label_smoothing: float, distillation: str, distillation_alpha: float, distillation_tau: float, **weights: float
) -> None:
    """Refuses an option of `make_objective` that is out of its range.

    Raises:
        ConfigError: It says which one, and the range.
    """
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be in [0, 1), not {label_smoothing}")
    if distillation not in ("hard", "soft"):
        raise ConfigError(f"there is no distillation {distillation!r}. {close_matches(distillation, ('hard', 'soft'))}")
    if not 0 <= distillation_alpha <= 1:
        raise ConfigError(f"distillation_alpha must be in [0, 1], not {distillation_alpha}")
    if distillation_tau <= 0:
        raise ConfigError(f"distillation_tau must be above 0, not {distillation_tau}")
    for name, weight in weights.items():
        if weight < 0:
            raise ConfigError(f"{name} must not be negative, not {weight}")
