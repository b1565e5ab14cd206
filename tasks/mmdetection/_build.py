"""MMDetection's models built from configurations, with errors that say what is wrong in them."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator
from typing import Any

from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from effvit.backbones import without_memory
from effvit.errors import ConfigError, EffvitError, did_you_mean
from effvit.tasks.mmdetection._config import dictionaries, registered


def build(model: dict[str, Any]) -> Any:
    """Builds a detector, its weights as its configuration draws them."""
    with _quiet(), DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(ConfigDict(model))
        detector.init_weights()
    return detector


def outline(model: dict[str, Any]) -> Any:
    """The detector without memory for its weights, and without reading those that it names."""
    with without_memory(), DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(ConfigDict(without_weights(model)))


def without_weights(model: Any) -> Any:
    """A configuration without files for effvit's backbones: a checkpoint's own weights supersede them."""
    if isinstance(model, dict):
        cleaned = {name: without_weights(entry) for name, entry in model.items()}
        return {**cleaned, "pretrained": False} if cleaned.get("type") == "effvit.Backbone" else cleaned
    return type(model)(without_weights(entry) for entry in model) if isinstance(model, (list, tuple)) else model


def predicts_masks(detector: Any) -> bool:
    """Whether a built detector learns masks."""
    return bool(detector.with_mask) or hasattr(detector, "panoptic_head")


def plans_masks(model: dict[str, Any]) -> bool:
    """What `predicts_masks` says of the detector of a configuration; only one of a user's own type is built for it."""
    head = model.get("roi_head") or {}
    if not all(_is_mmdetections(part) for part in (model, head) if "type" in part):
        return predicts_masks(outline(model))
    return "panoptic_head" in model or model.get("mask_head") is not None or head.get("mask_head") is not None


def _is_mmdetections(part: dict[str, Any]) -> bool:
    kind = MODELS.get(part["type"])
    return kind is not None and kind.__module__.startswith("mmdet.")


@contextlib.contextmanager
def explained(model: dict[str, Any], where: str) -> Iterator[None]:
    """Turns the errors of MMDetection while it builds a model into those of a configuration.

    Args:
        model: The configuration's.
        where: What messages call it.

    Raises:
        ConfigError: MMDetection raised anything; the message has its words, and close matches of the wrong name.
    """
    try:
        yield
    except EffvitError:
        raise
    except Exception as error:  # a constructor fails in any way on arguments that it does not check
        words = str(error.args[0]) if error.args else ""
        hint = _near_type(model) or _near_argument(model, words)
        text = f"MMDetection cannot build the model of {where}: {type(error).__name__}: {words}"
        raise ConfigError(f"{text.rstrip('. ')}. {hint}".rstrip()) from error


def _near_type(model: dict[str, Any]) -> str:
    known = registered()
    names = [part["type"] for part in dictionaries(model) if isinstance(part.get("type"), str)]
    return next((near for name in names if name not in known and (near := did_you_mean(name, known))), "")


def _near_argument(model: dict[str, Any], words: str) -> str:
    found = re.search(r"unexpected keyword argument '(\w+)'", words)
    if found is None:
        return ""
    name = found[1]
    kinds = [MODELS.get(part["type"]) for part in dictionaries(model) if name in part and "type" in part]
    return did_you_mean(name, {argument for kind in kinds if kind is not None for argument in parameters(kind)})


def parameters(kind: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class, and of the classes that it extends."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(inspect.getmro(kind)):
        if "__init__" in vars(base):
            found |= inspect.signature(base.__init__).parameters  # type: ignore[misc]
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without MMEngine's paragraph for each parameter that it draws."""
    logger = MMLogger.get_current_instance()
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
