"""Networks by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from effvit.backbones._checkpoint import LoadReport, has_distillation_head, load_state, read_checkpoint
from effvit.backbones._contract import Backbone, Classifier
from effvit.backbones._download import fetch
from effvit.backbones._registry import build
from effvit.errors import CheckpointError, ConfigError

_log = logging.getLogger(__name__)


def create_backbone(name: str, *, pretrained: bool | str | Path = False, **overrides: Any) -> Backbone:
    """Builds a backbone.

    Args:
        name: One of ``list_backbones()``, or ``timm/`` and the name of any network of timm that has feature maps.
        pretrained: ``True`` for the published weights, downloaded once; or the path of a checkpoint of this network,
            official, timm's or ours.
        **overrides: Options of the family, such as ``dense=True`` for EfficientViT; checked by name. For a network of
            timm, options of its constructor.

    Raises:
        ConfigError: There is no such backbone or no such option; close matches are offered.
        CheckpointError: The weights cannot be had, are damaged or unsafe, or do not fill the network.
    """
    backbone = build(name, overrides)
    if pretrained:
        path = _weights(backbone, pretrained)
        _load(backbone, read_checkpoint(path), path)
    return backbone


def create_classifier(
    name: str,
    *,
    num_classes: int = 1000,
    pretrained: bool | str | Path = False,
    distilled: bool | None = None,
    fresh_head: bool = True,
    **overrides: Any,
) -> Classifier:
    """Builds a backbone under its published head: images ``(B, 3, H, W)`` to logits ``(B, num_classes)``.

    Args:
        name: As for ``create_backbone``.
        num_classes: Number of logits.
        pretrained: As for ``create_backbone``.
        distilled: Whether there is a second head, to learn from a teacher. By default where the weights have one;
            without weights, where the published network has one.
        fresh_head: Whether a head starts untrained where the weights have none for `num_classes`, or that is an error.
        **overrides: As for ``create_backbone``.

    Raises:
        ConfigError: As ``create_backbone``, or `num_classes` is below 1.
        CheckpointError: As ``create_backbone``, or see `fresh_head`.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
    backbone = build(name, overrides)
    path = _weights(backbone, pretrained) if pretrained else None
    state = None if path is None else read_checkpoint(path)
    if distilled is None:
        distilled = backbone.distilled if state is None else has_distillation_head(state)
    head_dist = backbone.make_classifier(num_classes) if distilled else None
    classifier = Classifier(backbone, backbone.make_classifier(num_classes), head_dist)
    if path is not None and state is not None:
        report = _load(classifier, state, path)
        odd = [name for name in (*report.missing, *report.mismatched) if name.startswith("head")]
        if odd and not fresh_head:
            raise CheckpointError(
                f"{path} has no head of {num_classes} classes for {name} ({odd[0]} is missing or of another shape)"
            )
    return classifier


def _load(network: Backbone | Classifier, state: Mapping[str, Tensor], path: Path) -> LoadReport:
    backbone = network.backbone if isinstance(network, Classifier) else network
    report = load_state(network, state, path)
    _log.info("%s from %s: %s", backbone.info.name, path, report)
    # The rest of the trunk is there, or loading had failed.
    fresh = [name for name in (*report.missing, *report.mismatched) if not name.startswith(backbone.embed_only)]
    if fresh:
        more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
        _log.warning("%s: %s has no weights for %s%s, which start untrained", backbone.info.name, path, fresh[0], more)
    return report


def _weights(backbone: Backbone, pretrained: bool | str | Path) -> Path:
    """The file to load: the one that was named, or the published one."""
    if pretrained is not True:
        return Path(str(pretrained))
    info = backbone.info
    if info.url is None:
        see = f"; see {info.page}" if info.page else ""
        raise CheckpointError(
            f"there are no weights of {info.name} that a program can fetch ({info.origin}{see}). Pass the path of a "
            f"file as `pretrained`.{' ' + info.instead if info.instead else ''}"
        )
    return fetch(info.url, sha256=info.sha256)
