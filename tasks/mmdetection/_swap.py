"""Configurations of MMDetection for other classes and other backbones."""

from __future__ import annotations

import copy
import inspect
from typing import Any, NamedTuple

import torch
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from effvit.backbones import FeatureMap, create_backbone, without_memory
from effvit.errors import ConfigError
from effvit.tasks.mmdetection._build import parameters
from effvit.tasks.mmdetection._config import dictionaries
from effvit.tasks.mmdetection._registry import maps_of

_SIDE = 256  # of the image whose maps tell strides; every backbone takes it


class _Map(NamedTuple):
    """What a neck gets from a backbone."""

    channels: int
    stride: int


def set_num_classes(model: dict[str, Any], num_classes: int) -> dict[str, Any]:
    """A copy of a configuration's model with the number of classes in each of its heads.

    A region proposal network, which tells objects from background, keeps its own.
    """
    model = copy.deepcopy(model)
    for part in dictionaries({name: entry for name, entry in model.items() if name != "rpn_head"}):
        for name in ("num_classes", "num_things_classes"):
            if name in part:
                _set_class_weights(part, part[name], num_classes)
                part[name] = num_classes
    return model


def _set_class_weights(head: dict[str, Any], before: int, num_classes: int) -> None:
    """Weights of the classes in a loss, the background's last."""
    for part in dictionaries(head):
        weights = part.get("class_weight")
        if isinstance(weights, (list, tuple)) and len(weights) == before + 1:
            part["class_weight"] = [weights[0]] * num_classes + [weights[-1]]


def swap_backbone(
    model: dict[str, Any], name: str, options: dict[str, Any] | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """A copy of a configuration's model on one of effvit's backbones.

    A neck keeps its type where the backbone has a map of each stride that the neck reads. A ``ChannelMapper`` below a
    transformer, which does not depend on strides, takes the backbone's coarsest maps otherwise. Any other neck gives
    way to effvit's pyramid, with the same levels.

    Args:
        model: The configuration's.
        name: Name of the backbone.
        options: Options of its family.
        settings: More arguments of ``effvit.Backbone``.

    Raises:
        ConfigError: There is no such backbone, or the neck is of a kind that cannot be rebuilt for it.
    """
    model = copy.deepcopy(model)
    maps = maps_of(name, options)
    rest, neck = _first_neck(model)
    chosen, neck = _refit(model, neck, maps, {"backbone": name, "backbone_options": options})
    model["neck"] = [neck, *rest] if rest else neck
    levels = [spec.level for spec in chosen]
    model["backbone"] = {"type": "effvit.Backbone", "name": name, "options": options, "levels": levels, **settings}
    with without_memory():
        spec = create_backbone(name, **(options or {})).input_spec
    model["data_preprocessor"] = {
        **model.get("data_preprocessor", {"type": "DetDataPreprocessor"}),
        "mean": [255 * value for value in spec.mean],
        "std": [255 * value for value in spec.std],
        "bgr_to_rgb": True,
        "rgb_to_bgr": False,
    }
    return model


def _first_neck(model: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The neck that reads the backbone, after those that read other necks."""
    neck = model.get("neck")
    if isinstance(neck, (list, tuple)):
        return list(neck[1:]), neck[0]
    if not isinstance(neck, dict):
        raise ConfigError(
            f"the {model.get('type')} of MMDetection's configuration has no neck: its heads read the maps of their own "
            "backbone, which cannot be swapped. Use a configuration with FPN or ChannelMapper, or leave "
            "--model.backbone out"
        )
    return [], neck


def _refit(
    model: dict[str, Any], neck: dict[str, Any], maps: tuple[FeatureMap, ...], source: dict[str, Any]
) -> tuple[list[FeatureMap], dict[str, Any]]:
    """Which maps of the backbone the neck gets, and the neck."""
    if neck["type"] == "effvit.FeaturePyramid":
        return _on_maps({**neck, "levels": neck.get("levels", ["p3", "p4", "p5", "p6", "p7"])}, maps, source)
    if not isinstance(neck.get("out_channels"), int) or not isinstance(neck.get("in_channels"), (int, list, tuple)):
        raise _unknown(model, neck)
    before = _outline(model["backbone"])
    if isinstance(neck["in_channels"], int):
        return _one_map(neck, before, maps)
    return _several_maps(model, neck, before, maps, source)


def _unknown(model: dict[str, Any], neck: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"the neck {neck.get('type')} of this {model.get('type')} cannot be rebuilt for another backbone: FPN, PAFPN, "
        "ChannelMapper and necks with the same arguments (in_channels, out_channels) can. Write a configuration with "
        "type='effvit.Backbone' and a neck for it, and leave --model.backbone out"
    )


def _outline(backbone: dict[str, Any]) -> list[_Map]:
    """The maps of a configuration's own backbone, found by running it without computing anything."""
    with torch.device("meta"), torch.no_grad():
        network = MODELS.build(ConfigDict(backbone))
        network.eval()
        maps = network(torch.zeros(1, 3, _SIDE, _SIDE))
    return [_Map(level.shape[1], _SIDE // level.shape[-1]) for level in maps]


def _one_map(
    neck: dict[str, Any], before: list[_Map], maps: tuple[FeatureMap, ...]
) -> tuple[list[FeatureMap], dict[str, Any]]:
    """For a neck that reads the coarsest map alone, such as YOLOF's."""
    chosen = [spec for spec in maps if spec.stride == before[-1].stride]
    if not chosen or neck["in_channels"] != before[-1].channels:
        offered = ", ".join(str(spec.stride) for spec in maps)
        raise ConfigError(
            f"the neck {neck['type']} reads one map of stride {before[-1].stride}, which the backbone does not have: "
            f"its maps are of stride {offered}"
        )
    return chosen, {**neck, "in_channels": chosen[0].channels}


def _several_maps(
    model: dict[str, Any],
    neck: dict[str, Any],
    before: list[_Map],
    maps: tuple[FeatureMap, ...],
    source: dict[str, Any],
) -> tuple[list[FeatureMap], dict[str, Any]]:
    """Which maps the neck gets, and the neck."""
    if list(neck["in_channels"]) != [level.channels for level in before]:  # it reads them in an order of its own
        raise _unknown(model, neck)
    strides = [level.stride for level in before][_start(neck) : neck.get("end_level", -1) % len(before) + 1]
    kept = {name: value for name, value in neck.items() if name not in {"start_level", "end_level"}}
    kept |= {"start_level": 0} if _takes(neck, "start_level") else {}
    chosen = [spec for spec in maps if spec.stride in strides]
    if len(chosen) < len(strides) and neck["type"] == "ChannelMapper" and "decoder" in model:
        chosen = list(maps[-len(strides) :])
    if len(chosen) == len(strides):
        return chosen, {**kept, "in_channels": [spec.channels for spec in chosen]}
    return _pyramid(neck, strides, maps, source)


def _pyramid(
    neck: dict[str, Any], strides: list[int], maps: tuple[FeatureMap, ...], source: dict[str, Any]
) -> tuple[list[FeatureMap], dict[str, Any]]:
    """The pyramid of effvit with as many levels as the neck had, from the same stride on."""
    first = strides[0].bit_length() - 1
    pyramid = {
        "type": "effvit.FeaturePyramid",
        "levels": [f"p{number}" for number in range(first, first + neck.get("num_outs", len(strides)))],
        "out_channels": neck["out_channels"],
        "extra": _extra(neck),
        "relu": neck.get("relu_before_extra_convs", False),
    }
    return _on_maps(pyramid, maps, source)


def _on_maps(
    pyramid: dict[str, Any], maps: tuple[FeatureMap, ...], source: dict[str, Any]
) -> tuple[list[FeatureMap], dict[str, Any]]:
    """The pyramid of effvit on those maps of a backbone that it has levels for."""
    chosen = [spec for spec in maps if spec.level.replace("c", "p") in pyramid["levels"]]
    return chosen, {**pyramid, **source, "in_levels": [spec.level for spec in chosen]}


def _extra(neck: dict[str, Any]) -> str:
    """How a neck makes levels beyond the backbone's, in the words of ``effvit.FeaturePyramid``."""
    extra = neck.get("add_extra_convs", neck["type"] == "ChannelMapper")
    if not extra:
        return "pool"
    return "on_input" if extra in {True, "on_input"} else "on_output"  # `on_lateral` too: the nearest there is


def _start(neck: dict[str, Any]) -> int:
    """Index of the first map that a neck reads."""
    default = _parameters(neck).get("start_level")
    return int(neck.get("start_level", 0 if default is None else default.default))


def _takes(neck: dict[str, Any], name: str) -> bool:
    return name in _parameters(neck)


def _parameters(neck: dict[str, Any]) -> dict[str, inspect.Parameter]:
    return parameters(MODELS.get(neck["type"]))
