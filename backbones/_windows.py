"""Windows over feature maps, and the bias of the attention inside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_windows(x: Tensor, window: int) -> Tensor:
    """Cuts a map into windows.

    A map of at most ``window × window`` is one window of its own size. Any other is padded with zeros at the bottom and
    right to a multiple of `window`; the padding is not masked, as in the official EfficientViT.

    Args:
        x: ``(B, C, H, W)``.
        window: Side of a window.

    Returns:
        ``(B * windows, C, h, w)``, row by row, in channels-last memory.
    """
    batch, channels, height, width = x.shape
    x = x.permute(0, 2, 3, 1)
    if height <= window and width <= window:
        return x.contiguous().permute(0, 3, 1, 2)
    if height % window or width % window:
        x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3)
    return x.reshape(batch * rows * columns, window, window, channels).permute(0, 3, 1, 2)


def from_windows(windows: Tensor, x: Tensor, window: int) -> Tensor:
    """Undoes ``to_windows`` and drops the padding.

    Args:
        windows: ``(B * windows, C, h, w)``.
        x: The map that was cut; only its shape is read.
        window: The same as there.

    Returns:
        ``(B, C, H, W)``.
    """
    batch, channels, height, width = x.shape
    if height <= window and width <= window:
        return windows
    rows, columns = -(-height // window), -(-width // window)
    merged = windows.permute(0, 2, 3, 1).reshape(batch, rows, columns, window, window, channels).transpose(2, 3)
    merged = merged.reshape(batch, rows * window, columns * window, channels)
    return merged[:, :height, :width].permute(0, 3, 1, 2)


def resize_bias_table(table: Tensor, height: int, width: int) -> Tensor:
    """Resizes tables of absolute offsets, as the official loaders do (bicubic, corners not aligned).

    Args:
        table: ``(heads, R * R)``, offset (dy, dx) at ``dy * R + dx``.
        height: Number of vertical offsets wanted.
        width: Number of horizontal offsets wanted.

    Returns:
        ``(heads, height * width)``.
    """
    heads, entries = table.shape
    side = round(entries**0.5)
    if (side, side) == (height, width):
        return table
    image = table.view(1, heads, side, side).float()
    resized = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return resized.view(heads, height * width).to(table.dtype)


def _offset_index(height: int, width: int, device: torch.device) -> Tensor:
    """Entry of the ``height × width`` table for each pair of cells of a window, ``(cells * cells,)``."""
    y = torch.arange(height, device=device).repeat_interleave(width)
    x = torch.arange(width, device=device).repeat(height)
    return ((y[:, None] - y).abs() * width + (x[:, None] - x).abs()).flatten()


class _Cache(dict[tuple[object, ...], tuple[Tensor, int, Tensor]]):
    """A cache that is born empty in every copy, since a copied parameter counts its versions anew."""

    def __reduce__(self) -> tuple[type[_Cache], tuple[()]]:
        return (_Cache, ())


def _must_expand(table: Tensor) -> bool:
    """Whether a cached bias could be wrong (a gradient is wanted) or would disturb (a graph is being recorded)."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return recording or table.is_inference() or (torch.is_grad_enabled() and table.requires_grad)


class AttentionBias(nn.Module):
    """Expands a bias table to a window: resized and gathered once per shape, device and type.

    What is cached is only used while no gradient is recorded and the table is the very same tensor at the same version,
    so an optimizer step or a loaded checkpoint makes it anew. With gradients, the table is gathered in each call:
    its values then change at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache = _Cache()

    def forward(self, table: Tensor, height: int, width: int) -> Tensor:
        """Expanded bias.

        Args:
            table: ``(heads, R * R)``.
            height: Rows of the window.
            width: Columns of the window.

        Returns:
            ``(heads, cells, cells)`` with ``cells = height * width``.
        """
        if _must_expand(table):
            return self._expand(table, height, width)
        key = (height, width, table.device, table.dtype)
        kept = self._cache.get(key)
        if kept is None or kept[0] is not table or kept[1] != table._version:  # noqa: SLF001 - torch's only change counter
            # Leaving inference mode: an inference tensor could not take part in a later recorded forward.
            with torch.inference_mode(mode=False), torch.no_grad():
                kept = self._cache[key] = (table, table._version, self._expand(table, height, width))  # noqa: SLF001
        return kept[2]

    def _expand(self, table: Tensor, height: int, width: int) -> Tensor:
        index = _offset_index(height, width, table.device)
        cells = height * width
        return resize_bias_table(table, height, width).index_select(1, index).view(-1, cells, cells)

    def train(self, mode: bool = True) -> AttentionBias:
        """Also forgets, for weights that were swapped through ``.data``, which counts no version."""
        self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: object, **kwargs: object) -> AttentionBias:
        self._cache.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[arg-type]
