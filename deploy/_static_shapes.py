"""Tracing with the shapes that the inputs have."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SHAPES = (Tensor.shape.__get__, Tensor.size, Tensor.numel)  # type: ignore[attr-defined]


class StaticShapes(TorchFunctionMode):
    """Within it, `torch.jit.trace` and the exporter of ONNX that is built on it take shapes as the numbers they are.

    By default they record how each shape comes about, although the graph is for the one shape of its inputs: graphs are
    longer, what is computed of shapes in Python is lost all the same, and the exporter turns some of it into something
    else. At 70x90 pixels it fails on a MobileViTv2, and its MobileViT gives other values.
    """

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func`, and makes plain integers of a shape."""
        found = func(*args, **(kwargs or {}))
        if func not in _SHAPES:
            return found
        with warnings.catch_warnings():  # that it becomes a constant is what is wanted
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            return torch.Size([int(side) for side in found]) if isinstance(found, tuple) else int(found)
