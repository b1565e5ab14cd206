"""Configurations of MMDetection: found, read, and turned into text that a checkpoint can hold."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS, WEIGHT_INITIALIZERS
from torch import nn

from effvit.errors import ConfigError, did_you_mean

_log = logging.getLogger(__name__)

#: Types that are no entries of a registry: functions in ``mmcv.ops``, and plain words that one module knows.
_UNREGISTERED = frozenset({"nms", "soft_nms", "dilation", "offset", "conv", "interpolation_conv", "last_conv"})
#: Arguments that name a file to be executed or opened, or weights to be fetched.
_OPENED = ("teacher_config", "teacher_ckpt", "lang_model_name")
#: Types that do so with any argument: one fetches a language model, one runs a configuration of Detectron2.
_OPENING = frozenset({"BertModel", "Detectron2Wrapper"})
_SCOPES = frozenset({"effvit", "mmcv", "mmdet", "mmengine"})
_TUPLE = "__tuple__"


def read_model(source: str) -> dict[str, Any]:
    """The ``model`` part of a configuration, as plain dictionaries, lists and values.

    Args:
        source: Path of a configuration, name of one that MMDetection ships, such as
            ``faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``, or what `to_text` gave. A file is Python and is executed,
            once as long as it does not change; a text never is, and may only name types that are registered, and no
            files.

    Raises:
        ConfigError: There is no such configuration, it cannot be read, it has no detector, or this would open files or
            fetch weights while it is built.
    """
    if is_text(source):
        model = _from_text(source)
    else:
        path = _find(source)
        state = path.stat()
        model = copy.deepcopy(_from_file(path, state.st_mtime_ns, state.st_size))
    _refuse_openings(model, title(source))
    return without_downloads(model)


def is_text(source: str) -> bool:
    """Whether a source is what `to_text` gave."""
    return source.lstrip().startswith("{")


def title(source: str) -> str:
    """What messages call a source."""
    return "the configuration of MMDetection in the checkpoint" if is_text(source) else source


@functools.lru_cache(maxsize=8)
def _from_file(path: Path, changed: int, size: int) -> dict[str, Any]:  # noqa: ARG001 - they tell one content from another
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
    return model


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
    known = registered()
    for part in dictionaries(model):
        name = part.get("type")
        if isinstance(name, str) and name not in known:
            # MMEngine would import and call whatever a dotted name leads to, which a checkpoint must not decide.
            near = f"{did_you_mean(name, known)} ".lstrip()
            raise ConfigError(
                f"{title(text)} names the type {name!r}, which is not registered here. {near}Import the module that "
                "registers it first, or pass the configuration's file again with --model.mmdet_config"
            )
        _refuse_weights(part, title(text))
    return model


def _refuse_weights(part: dict[str, Any], where: str) -> None:
    """Refuses what `to_text` never writes: files of weights, and scopes, which MMEngine imports by their name."""
    if _is_pretrained(part) or part.get("pretrained"):
        raise ConfigError(
            f"{where} names a file of weights to open, {part.get('checkpoint') or part.get('pretrained')!r}, which a "
            "checkpoint must not decide: pass the configuration's file with --model.mmdet_config"
        )
    if part.get("_scope_", "mmdet") not in _SCOPES:
        raise ConfigError(f"{where} names the scope {part['_scope_']!r}, which is none of {', '.join(sorted(_SCOPES))}")


def _refuse_openings(model: dict[str, Any], where: str) -> None:
    """Refuses what MMDetection would execute, open or fetch while it builds a model.

    Raises:
        ConfigError: There is such a type or argument.
    """
    for part in dictionaries(model):
        names = [name for name in _OPENED if part.get(name) is not None and not isinstance(part[name], dict)]
        found = [f"{name}={part[name]!r}" for name in names]
        if str(part.get("type")).rsplit(".", 1)[-1] in _OPENING:
            found.append(f"type={part['type']!r}")
        if found:
            raise ConfigError(
                f"{where} has {found[0]}, for which MMDetection executes, opens or fetches another file while it "
                "builds the model; this engine does not. Train such a model with MMDetection's own Runner"
            )


def registered() -> set[str]:
    """Names that may stand as ``type`` in a configuration, with and without their scope."""
    # MMEngine imports these only when it builds something for the first time, which fills the registries.
    importlib.import_module("mmdet.models")
    layers = vars(importlib.import_module("mmcv.ops"))  # MMDetection looks up those that see regions by attribute
    names = {name for name, entry in layers.items() if inspect.isclass(entry) and issubclass(entry, nn.Module)}
    names |= _UNREGISTERED
    for root in (MODELS, TASK_UTILS, WEIGHT_INITIALIZERS):
        for registry in (root, *root.children.values()):
            names |= {form for name in registry.module_dict for form in (name, f"{registry.scope}.{name}")}
    return names


def _is_pretrained(value: Any) -> bool:
    """Whether it tells MMEngine to load a file of weights."""
    return isinstance(value, dict) and str(value.get("type")).rsplit(".", 1)[-1] in {"Pretrained", "PretrainedInit"}


def without_downloads(model: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the weights that MMDetection would fetch while it builds the model.

    effvit's own layers keep theirs, which are published files that effvit knows, or paths.
    """
    cleaned: dict[str, Any] = _clean(model)
    return cleaned


def _clean(value: Any) -> Any:
    if _is_pretrained(value):
        _log.info("weights of MMDetection's configuration are not loaded: %s", value.get("checkpoint"))
        return None
    if isinstance(value, dict):
        own = {"init_cfg", "pretrained"} if str(value.get("type")).startswith("effvit.") else set()
        cleaned = {name: entry if name in own else _clean(entry) for name, entry in value.items()}
        if "pretrained" not in own and isinstance(value.get("pretrained"), str):
            _log.info("weights of MMDetection's configuration are not loaded: %s", value["pretrained"])
            cleaned["pretrained"] = None
        return cleaned
    if isinstance(value, (list, tuple)):
        entries = [(entry, _clean(entry)) for entry in value]
        return type(value)(after for before, after in entries if not _is_pretrained(before))
    return value


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
