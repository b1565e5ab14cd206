"""Operators for mmcv-lite: what stands at ``mmcv._ext`` where mmcv was installed without its compiled extension.

MMDetection imports ``mmcv.ops``, whose modules load ``mmcv._ext``, some 110 functions of C++ and CUDA. mmcv has no
wheels for current torch, and building it takes most of an hour, so `install` puts a module of torchvision's operators
in its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

from effvit.errors import ConfigError
from effvit.tasks.mmdetection import _deformable, _focal, _regions

_NAME = "mmcv._ext"
#: The releases of mmcv that MMDetection 3.3 takes.
MMCV_VERSIONS = ">=2.0.0rc4,<2.2.0"
#: The operators that exist here, by mmcv's names.
OPERATORS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        _regions.nms,
        _regions.softnms,
        _regions.roi_align_forward,
        _regions.roi_align_backward,
        _regions.roi_pool_forward,
        _regions.roi_pool_backward,
        _deformable.deform_conv_forward,
        _deformable.deform_conv_backward_input,
        _deformable.deform_conv_backward_parameters,
        _deformable.modulated_deform_conv_forward,
        _deformable.modulated_deform_conv_backward,
        _focal.sigmoid_focal_loss_forward,
        _focal.sigmoid_focal_loss_backward,
        _focal.softmax_focal_loss_forward,
        _focal.softmax_focal_loss_backward,
        _deformable.ms_deform_attn_forward,
        _deformable.ms_deform_attn_backward,
    )
}


class MissingOperatorError(ConfigError):
    """An operator of mmcv that only its compiled extension has."""


class _Extension(ModuleType):
    """A module with the operators that exist here; any other name is an operator that explains itself when called.

    It does so when called and not when looked up, since ``mmcv.ops`` looks up all of them while it is imported.
    """

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise MissingOperatorError(
                f"this MMDetection model needs mmcv's operator {name!r}, which only mmcv's compiled extension has; "
                f"effvit provides: {', '.join(OPERATORS)}. Install mmcv with its compiled operators, "
                f"'mmcv{MMCV_VERSIONS}', in place of mmcv-lite, or use a model without this operator"
            )

        return missing


def get_compiler_version() -> str:
    """What ``mmcv.ops.get_compiler_version`` reports."""
    return "none (effvit's operators on torchvision)"


def get_compiling_cuda_version() -> str:
    """What ``mmcv.ops.get_compiling_cuda_version`` reports."""
    return "not available"


def install() -> bool:
    """Makes ``import mmcv.ops`` work; to be called before MMDetection's models are imported.

    mmcv's own compiled extension is preferred where it exists.

    Returns:
        Whether effvit's operators are the ones in use.
    """
    there = sys.modules.get(_NAME)
    if there is not None:
        return isinstance(there, _Extension)
    if importlib.util.find_spec(_NAME) is not None:
        return False
    extension = _Extension(_NAME, __doc__)
    extension.__spec__ = ModuleSpec(_NAME, None)
    for function in (*OPERATORS.values(), get_compiler_version, get_compiling_cuda_version):
        setattr(extension, function.__name__, function)
    sys.modules[_NAME] = extension
    importlib.import_module("mmcv").__dict__["_ext"] = extension
    return True
