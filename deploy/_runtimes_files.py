"""What the files are called that runtimes convert networks to, and where they lie."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, str, tuple, list, dict, type(None))


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as the contiguous array that runtimes want."""
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def fingerprint(module: nn.Module, inputs: tuple[Tensor, ...], *words: str) -> str:
    """The same for the same network, shapes and words.

    Args:
        module: Its layers count, their weights, and their plain attributes such as thresholds.
        inputs: Their shapes and types count.
        words: Whatever else a file depends on.
    """
    texts = [torch.__version__, *words, repr(module)]
    texts += [f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in inputs]
    for name, part in module.named_modules():
        for key, value in sorted(vars(part).items()):
            if (isinstance(value, _PLAIN) and not key.startswith("_")) or dataclasses.is_dataclass(value):
                texts.append(f"{name}.{key}={value!r}")
    state = (*module.parameters(), *module.buffers())
    return digest("\n".join(texts), *(as_array(tensor.reshape(-1).view(torch.uint8)) for tensor in state))


def digest(*contents: str | np.ndarray[Any, Any]) -> str:
    """A short hash."""
    total = hashlib.blake2b(digest_size=8)
    for content in contents:
        total.update(content.encode() if isinstance(content, str) else content.data)
    return total.hexdigest()


@contextlib.contextmanager
def kept_in(folder: Path | None) -> Iterator[Path]:
    """The folder, made where it is missing, or one for the time of the context."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="effvit_") as temporary:
        yield Path(temporary)
