"""The list of every variant of every family."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from effvit.errors import ConfigError, close_matches

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from effvit.backbones._contract import Backbone, VariantInfo

#: Names that begin so are timm's; the module that knows them imports timm.
_TIMM = "timm/"
_FILLING = {Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_}
_VARIANTS: dict[str, tuple[type[Backbone], VariantInfo]] = {}


def register(family: type[Backbone], variants: Iterable[VariantInfo]) -> None:
    """Makes the rows of a family's variant table known by name.

    Args:
        family: Its network; called as ``family(variant, **overrides)``.
        variants: The rows.
    """
    for variant in variants:
        _VARIANTS[variant.name] = (family, variant)
    _outline.cache_clear()


def list_backbones(pattern: str = "*") -> list[str]:
    """Names that ``create_backbone`` takes.

    Args:
        pattern: Shell-style wildcard, such as ``"efficientvit_*"``. Networks of timm are listed where it begins with
            ``timm/``.

    Returns:
        Matching names, sorted.

    Raises:
        ConfigError: timm is asked for and not installed.
    """
    if pattern.startswith(_TIMM):
        from effvit.backbones import timm

        return timm.names(pattern)
    return sorted(fnmatch.filter(_VARIANTS, pattern))


def backbone_info(name: str) -> VariantInfo:
    """What was published about a network, without building it; a network of timm is measured instead.

    Raises:
        ConfigError: There is no such backbone.
    """
    if name.startswith(_TIMM):
        from effvit.backbones import timm

        return timm.info(name)
    return _lookup(name)[1]


def build(name: str, overrides: Mapping[str, Any]) -> Backbone:
    """Builds a network with fresh weights.

    Args:
        name: A registered name, or one of timm's.
        overrides: Keyword-only arguments of the family's constructor, or of timm's.

    Raises:
        ConfigError: There is no such backbone, or the family has no such option.
    """
    if name.startswith(_TIMM):
        from effvit.backbones import timm

        return timm.build(name, overrides)
    family, variant = _lookup(name)
    options = _options_of(family)
    for override in overrides:
        if override not in options:
            raise ConfigError(f"{name} has no option {override!r}. {close_matches(override, options)}")
    constructor: Any = family
    network: Backbone = constructor(variant, **overrides)
    return network


def can_dilate(name: str, output_stride: int) -> bool:
    """Whether a backbone has an option ``output_stride``, and can be built with this one: 8, 16 or 32.

    Its last stages then keep the map's size and dilate convolutions, as DeepLabv3 (arXiv:1706.05587) has it. A network
    of timm is tried; there is none of a name that is not known.
    """
    if not name.startswith(_TIMM):
        return name in _VARIANTS and "output_stride" in _options_of(_VARIANTS[name][0])
    try:
        with without_memory():
            return build(name, {"output_stride": output_stride}).feature_maps[-1].stride == output_stride
    except ConfigError:
        return False


def _options_of(family: type[Backbone]) -> list[str]:
    """Names of the options that a family's constructor has."""
    parameters = inspect.signature(family).parameters.values()
    return [option.name for option in parameters if option.kind is inspect.Parameter.KEYWORD_ONLY]


def outline(name: str) -> Backbone:
    """The network without memory for its weights, on torch's meta device: everything that shapes can tell, fast.

    It is made once and shared, and only to be looked at.

    Raises:
        ConfigError: As `build`.
    """
    if not name.startswith(_TIMM):
        _lookup(name)
    return _outline(name)


@functools.cache
def _outline(name: str) -> Backbone:
    with without_memory():
        return build(name, {})


@contextlib.contextmanager
def without_memory() -> Iterator[None]:
    """Networks built inside take no memory for their weights and no time to draw them (torch's meta device).

    Shapes can be told from them, and what a forward pass costs, but not its outcome.
    """
    with torch.device("meta"), _NoValues():
        yield


class _NoValues(TorchFunctionMode):
    """Skips what fills tensors, of which there is nothing to fill on the meta device; it is most of the work there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func`, or hands back the tensor that it would have filled."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _lookup(name: str) -> tuple[type[Backbone], VariantInfo]:
    if name not in _VARIANTS:
        raise ConfigError(f"there is no backbone {name!r}. {close_matches(name, _VARIANTS)}")
    return _VARIANTS[name]
