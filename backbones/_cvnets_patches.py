"""The 2x2 patches of MobileViT and MobileViTv2: attention is among the cells at equal positions of all patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effvit.backbones._windows import divide_up

PATCH = 2


def cut_patches(grid: Tensor) -> Tensor:
    """Sorts the cells of a map by their position in a 2x2 patch.

    Args:
        grid: ``(B, H, W, C)`` of any strides, H and W even.

    Returns:
        ``(B, 4, H * W / 4, C)``, contiguous.
    """
    batch, height, width, channels = grid.shape
    patches = grid.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, PATCH**2, -1, channels)


def merge_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Undoes ``cut_patches``.

    Args:
        patches: ``(B, 4, height * width / 4, C)``, or with the first two sides as one.
        height: Rows of the map, even.
        width: Columns of the map, even.

    Returns:
        ``(B, height, width, C)``, contiguous.
    """
    channels = patches.shape[-1]
    grid = patches.reshape(-1, PATCH, PATCH, height // PATCH, width // PATCH, channels)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, height, width, channels)


def even(side: int) -> int:
    """The side, rounded up to whole patches."""
    return divide_up(side, PATCH) * PATCH


def resize(x: Tensor, height: int, width: int, *, align_corners: bool) -> Tensor:
    """Bilinear; the map itself where it has that size."""
    # Of sides that are left open, it is not known whether they are even: then it is resized to its own size.
    if not isinstance(height + width, torch.SymInt) and x.shape[2:] == (height, width):
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=align_corners)
