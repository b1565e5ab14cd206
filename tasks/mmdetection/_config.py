"""Configurations of MMDetection: found, read, and turned into text that a checkpoint can hold."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, WEIGHT_INITIALIZERS

from effvit.errors import ConfigError, did_you_mean

_log = logging.getLogger(__name__)

#: Types that are no entries of a registry: names in ``mmcv.ops``, and plain words that one module knows.
_UNREGISTERED = frozenset(
    {"nms", "soft_nms", "RoIAlign", "RoIPool", "SimpleRoIAlign", "DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"}
    | {"dilation", "offset", "conv", "interpolation_conv", "last_conv"}
)
_TUPLE = "__tuple__"


def read_model(source: str) -> dict[str, Any]:
    """The ``model`` part of a configuration, as plain dictionaries, lists and values.

    Args:
        source: Path of a configuration, name of one that MMDetection ships, such as
            ``faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``, or what `to_text` gave. A file is Python and is executed; a
            text never is, and may only name types that are registered.

    Raises:
        ConfigError: There is no such configuration, it cannot be read, or it has no detector.
    """
    if source.lstrip().startswith("{"):
        model = _from_text(source)
    else:
        path = _find(source)
        try:
            content = Config.fromfile(path).to_dict()
        except ConfigError:
            raise
        except Exception as error:  # a configuration is code, which can fail in any way
            raise ConfigError(f"MMDetection's configuration {path} cannot be read: {error}") from error
        model = content.get("model")
        if not isinstance(model, dict) or "backbone" not in model:
            raise ConfigError(
                f"{path} has no `model` with a `backbone`; pass the configuration of a detector, such as "
                "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
            )
    return without_downloads(model)


def to_text(model: dict[str, Any]) -> str:
    """A configuration as JSON, tuples kept apart from lists; see `read_model`.

    Raises:
        ConfigError: It holds an object that is no plain value.
    """
    return json.dumps({"model": _map(model, _mark)})


def _mark(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: list(value)}
    if value is None or isinstance(value, (bool, int, float, str, list, dict)):
        return value
    raise ConfigError(f"the model of MMDetection's configuration holds {value!r}, which is no plain value")


def _unmark(value: Any) -> Any:
    return tuple(value[_TUPLE]) if isinstance(value, dict) and value.keys() == {_TUPLE} else value


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Applies a function to every value, those inside a container first."""
    if isinstance(value, dict):
        value = {name: _map(entry, function) for name, entry in value.items()}
    elif isinstance(value, (list, tuple)):
        value = type(value)(_map(entry, function) for entry in value)
    return function(value)


def dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary inside a configuration, itself included."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, (dict, list, tuple)):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from dictionaries(entry)


def _from_text(text: str) -> dict[str, Any]:
    try:
        model: dict[str, Any] = _map(json.loads(text), _unmark)["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"this is no text of a configuration of MMDetection: {error!r}") from error
    known = _registered()
    for part in dictionaries(model):
        name = part.get("type")
        if isinstance(name, str) and name not in known:
            # MMEngine would import and call whatever a dotted name leads to, which a checkpoint must not decide.
            raise ConfigError(
                f"the configuration of MMDetection in the checkpoint names the type {name!r}, which is not registered "
                f"here. {did_you_mean(name, known)} Import the module that registers it first, or pass the "
                "configuration's file again with --model.mmdet_config"
            )
    return model


def _registered() -> set[str]:
    names = set(_UNREGISTERED)
    for root in (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS):
        for registry in (root, *root.children.values()):
            names |= {form for name in registry.module_dict for form in (name, f"{registry.scope}.{name}")}
    return names


def without_downloads(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the weights that MMDetection would fetch while it builds the model."""

    def clean(value: Any) -> Any:
        if not isinstance(value, dict) or str(value.get("type")).startswith("effvit."):
            return value
        init = value.get("init_cfg")
        if isinstance(init, dict) and init.get("type") == "Pretrained":
            _log.info("weights of MMDetection's configuration are not loaded: %s", init.get("checkpoint"))
            value = {**value, "init_cfg": None}
        if isinstance(value.get("pretrained"), str):
            _log.info("weights of MMDetection's configuration are not loaded: %s", value["pretrained"])
            value = {**value, "pretrained": None}
        return value

    cleaned: dict[str, Any] = _map(model, clean)
    return cleaned


def _shipped() -> dict[str, Path]:
    """The configurations in MMDetection's wheel by folder and name, and by name alone, with and without ``.py``."""
    spec = importlib.util.find_spec("mmdet")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / ".mim" / "configs"
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*/*.py")):
        if path.parent.name != "_base_":
            short = path.relative_to(root).as_posix()
            found |= dict.fromkeys((short, short.removesuffix(".py"), path.name, path.stem), path)
    return found


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    shipped = _shipped()
    if source in shipped:
        return shipped[source]
    near = did_you_mean(source, shipped)
    raise ConfigError(
        f"there is no file {source}, and MMDetection ships no configuration of this name. "
        + (near or "Names are like faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py.")
    )
