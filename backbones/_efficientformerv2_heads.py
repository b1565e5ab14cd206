"""Attention whose heads lie in the channels of maps: what EfficientFormerV2 and its deploy form share."""

from __future__ import annotations

import torch
from torch import Tensor

from effvit.backbones._windows import cells_to_map, map_to_cells


def mix_heads(attention: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the talking heads' pointwise convolutions are, without a convolution's overhead.

    Args:
        attention: ``(B, heads, M, N)``.
        weight: ``(heads, heads, 1, 1)``.
        bias: ``(heads,)``, or one for each pair too, ``(heads, M, N)``.

    Returns:
        ``(B, heads, M, N)``.
    """
    assert bias is not None
    mixer = weight.flatten(1).expand(attention.shape[0], -1, -1)
    return torch.baddbmm(bias.view(bias.shape[0], -1), mixer, attention.flatten(2)).view(attention.shape)


def score(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """Attention before softmax, ``(B, heads, M, N)``, of ``(B, heads, M, D)``, ``(B, heads, N, D)`` and a bias."""
    products = query @ key.transpose(2, 3)
    # In place where autocast did not make the product less precise: at detection size it has 100 MB.
    return products.add_(bias) if products.dtype == bias.dtype else products + bias


def map_to_heads(x: Tensor, heads: int) -> Tensor:
    """``(B, heads * D, H, W)`` to ``(B, heads, H * W, D)``, contiguous.

    As a view, rows would start 1 to 4 KiB apart, fall into the same few sets of the cache, and make products of some
    hundred rows twice as slow.
    """
    return map_to_cells(x).view(x.shape[0], -1, heads, x.shape[1] // heads).transpose(1, 2).contiguous()


def add_attended(local: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """``local + attention @ values``.

    Args:
        local: The local path ``(B, heads * D, h, w)``, overwritten.
        attention: ``(B, heads, h * w, N)``.
        values: ``(B, heads, N, D)``.

    Returns:
        ``(B, heads * D, h, w)``.
    """
    attended = (attention @ values).transpose(1, 2)
    cells = map_to_cells(local)
    return cells_to_map(cells.view(attended.shape).add_(attended).view(cells.shape), local)
