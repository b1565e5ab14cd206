"""Networks by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from effvit.backbones._checkpoint import load_checkpoint
from effvit.backbones._contract import Backbone, Classifier
from effvit.backbones._download import fetch
from effvit.backbones._registry import backbone_info, build
from effvit.errors import ConfigError

_log = logging.getLogger(__name__)


def create_backbone(name: str, *, pretrained: bool | str | Path = False, **overrides: Any) -> Backbone:
    """Builds a backbone.

    Args:
        name: One of ``list_backbones()``.
        pretrained: ``True`` for the published weights, downloaded once; or the path of a checkpoint of this network,
            official, timm's or ours.
        **overrides: Options of the family, such as ``dense=True`` for EfficientViT; checked by name.

    Raises:
        ConfigError: There is no such backbone or no such option; close matches are offered.
        CheckpointError: The weights cannot be had, are damaged or unsafe, or do not fill the network.
    """
    backbone = build(name, overrides)
    if pretrained:
        _load(backbone, name, pretrained)
    return backbone


def create_classifier(
    name: str, *, num_classes: int = 1000, pretrained: bool | str | Path = False, **overrides: Any
) -> Classifier:
    """Builds a backbone under its published head: images ``(B, 3, H, W)`` to logits ``(B, num_classes)``.

    Args:
        name: One of ``list_backbones()``.
        num_classes: Number of logits.
        pretrained: As for ``create_backbone``. A head of another class count than the checkpoint's starts fresh.
        **overrides: As for ``create_backbone``.

    Raises:
        ConfigError: As ``create_backbone``, or `num_classes` is below 1.
        CheckpointError: As ``create_backbone``.
    """
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, got {num_classes}")
    backbone = build(name, overrides)
    classifier = Classifier(backbone, backbone.make_classifier(num_classes))
    if pretrained:
        _load(classifier, name, pretrained)
    return classifier


def _load(network: Backbone | Classifier, name: str, pretrained: bool | str | Path) -> None:
    path = _weights(name, pretrained)
    _log.info("%s from %s: %s", name, path, load_checkpoint(network, path))


def _weights(name: str, pretrained: bool | str | Path) -> Path:
    if pretrained is True:
        info = backbone_info(name)
        return fetch(info.url, sha256=info.sha256)
    return Path(str(pretrained))
