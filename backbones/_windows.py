"""Windows over feature maps, and the bias of the attention inside them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")
_KEPT_BYTES = 32 * 2**20  # of expanded tables in one module; the newest is kept whatever its size


def divide_up(side: int, step: int) -> int:
    """Whole steps that cover a side.

    Without negative numbers: traced for ONNX, the usual ``-(-side // step)`` would divide towards zero.
    """
    return (side + step - 1) // step


def cut(grid: Tensor, window: int) -> Tensor:
    """Cuts a map into windows.

    A map of at most ``window x window`` is one window of its own size. Any other is padded with zeros at the bottom and
    right to a multiple of `window`; the padding is not masked, as in the official EfficientViT.

    Args:
        grid: ``(B, H, W, C)``.
        window: Side of a window.

    Returns:
        ``(B * windows, h, w, C)``, row by row, contiguous.
    """
    batch, height, width, channels = grid.shape
    if height <= window and width <= window:
        return grid.contiguous()
    if height % window or width % window:
        grid = F.pad(grid, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = grid.shape[1] // window, grid.shape[2] // window
    grid = grid.reshape(batch, rows, window, columns, window, channels).transpose(2, 3)
    return grid.reshape(batch * rows * columns, window, window, channels).contiguous()  # one row of windows: a view


def merge(windows: Tensor, grid: Tensor, window: int) -> Tensor:
    """Undoes ``cut`` and drops the padding.

    Args:
        windows: ``(B * windows, h, w, C)``, contiguous.
        grid: The map that was cut; only its shape is read.
        window: The same as there.

    Returns:
        ``(B, H, W, C)``; a view of `windows` where there is one window for each map, or a part of a fresh tensor.
    """
    batch, height, width, channels = grid.shape
    if height <= window and width <= window:
        return windows
    rows, columns = divide_up(height, window), divide_up(width, window)
    merged = windows.view(batch, rows, columns, window, window, channels).transpose(2, 3)
    return merged.reshape(batch, rows * window, columns * window, channels)[:, :height, :width]


def map_to_cells(x: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B * H * W, C)``; a view where the map is in channels-last memory."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def cells_to_map(cells: Tensor, like: Tensor) -> Tensor:
    """``(B * H * W, C)`` to ``(B, C, H, W)`` in channels-last memory, with B, H and W of `like` ``(B, ..., H, W)``."""
    batch, _, height, width = like.shape
    return cells.view(batch, height, width, -1).permute(0, 3, 1, 2)


def side_of(table: Tensor) -> int:
    """Side R of a table of a square grid ``(heads, R * R)``; of one that is not square, the nearest."""
    return round(math.sqrt(table.shape[1]))  # also of a size that is being traced, which is a tensor


def resize_bias_table(table: Tensor, height: int, width: int) -> Tensor:
    """Resizes tables of absolute offsets, as the official loaders do (bicubic, corners not aligned).

    Args:
        table: ``(heads, R * R)``, offset (dy, dx) at ``dy * R + dx``.
        height: Number of vertical offsets wanted.
        width: Number of horizontal offsets wanted.

    Returns:
        ``(heads, height * width)``.
    """
    heads, side = table.shape[0], side_of(table)
    if (side, side) == (height, width):
        return table
    image = table.view(1, heads, side, side).float()
    resized = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return resized.view(heads, height * width).to(table.dtype)


def fit_bias_table(table: Tensor, shape: torch.Size) -> Tensor | None:
    """A checkpoint's table brought to a network's shape.

    Args:
        table: As the checkpoint has it.
        shape: ``(heads, R * R)``.

    Returns:
        The resized table, or ``None`` where it is of other heads, or of a grid that is not square: how many rows a
        table such as (heads, 950) has cannot be told.
    """
    if table.ndim != 2 or table.shape[0] != shape[0] or side_of(table) ** 2 != table.shape[1]:
        return None
    side = round(shape[1] ** 0.5)
    return resize_bias_table(table, side, side)


def expand_bias(table: Tensor, height: int, width: int, stride: int = 1) -> Tensor:
    """One bias for each pair of a query and a cell of a window, from a table of any size.

    Args:
        table: ``(heads, R * R)``.
        height: Rows of the window.
        width: Columns of the window.
        stride: Every cell is a query for 1; for 2, every second cell of every second row, from the first on.

    Returns:
        ``(heads, queries, cells)`` with ``cells = height * width`` and ``queries`` as many for a stride of 1.
    """
    # Not `repeat_interleave`: ONNX makes something else of it where height and width are left open.
    y = torch.arange(height, device=table.device)[:, None].expand(height, width).flatten()
    x = torch.arange(width, device=table.device).expand(height, width).flatten()
    query_y, query_x = y, x
    if stride > 1:
        chosen = torch.arange(height * width, device=table.device).view(height, width)[::stride, ::stride].flatten()
        query_y, query_x = y[chosen], x[chosen]
    index = (query_y[:, None] - y).abs() * width + (query_x[:, None] - x).abs()
    return resize_bias_table(table, height, width).index_select(1, index.flatten()).view(-1, *index.shape)


def stretch_bias(table: Tensor, height: int, width: int, stride: int = 1) -> Tensor:
    """Like `expand_bias`, but as the official EfficientFormer does it for dense tasks.

    The table is expanded on the square grid that it was made for, and the resulting matrix of query and cell is resized
    (bicubic) as if it were an image. On any other grid than its own, that is no function of the offsets any more;
    weights that were trained so need it.

    Args:
        table: ``(heads, R * R)``.
        height: Rows of the window.
        width: Columns of the window.
        stride: As for `expand_bias`.

    Returns:
        ``(heads, queries, cells)``.
    """
    side = side_of(table)
    matrix = expand_bias(table, side, side, stride)
    size = (divide_up(height, stride) * divide_up(width, stride), height * width)
    if matrix.shape[1:] == size:
        return matrix
    return F.interpolate(matrix[None].float(), size=size, mode="bicubic", align_corners=False)[0].to(table.dtype)


def is_recording() -> bool:
    """Whether a graph is being made of this forward, which a cache would disturb."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


class ShapeCache(Generic[_Value]):
    """Constants of a module by shape, device and type; empty in every copy, since a copy's parameters are others.

    Where all would be too large, as over a data set of images of many large sizes, only the newest is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], _Value] = {}
        self._bytes = 0

    def get_or_make(self, key: tuple[object, ...], make: Callable[[], _Value]) -> _Value:
        """What is kept under `key`, made without gradient where it is not there."""
        kept = self._kept.get(key)
        if kept is None:
            # Outside inference mode, since an inference tensor could not take part in a later recorded forward.
            with torch.inference_mode(mode=False), torch.no_grad():
                kept = make()
            size = _bytes_of(kept)
            if self._bytes + size > _KEPT_BYTES:
                self.clear()
            self._bytes += size
            self._kept[key] = kept
        return kept

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()
        self._bytes = 0

    def __reduce__(self) -> tuple[type[ShapeCache[_Value]], tuple[()]]:
        return (type(self), ())


def _bytes_of(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes_of, value)) if isinstance(value, tuple) else 0


class TableOfShape(nn.Module):
    """What a parameter becomes at the shape of a map: made once per shape, device and type.

    What is kept is only used while no gradient is recorded and the table is the very same tensor at the same version,
    so that an optimizer step or a loaded checkpoint makes it anew. With gradients, it is made in each call: its values
    then change at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._cache: ShapeCache[Tensor] = ShapeCache()
        self._source: tuple[Tensor, int] | None = None

    def forward(self, table: Tensor, height: int, width: int) -> Tensor:
        """What `table` becomes for a map of `height` x `width` cells."""
        if is_recording() or table.is_inference() or (torch.is_grad_enabled() and table.requires_grad):
            return self._expand(table, height, width)
        version = table._version  # noqa: SLF001 - torch's only counter of changes in place
        if self._source is None or self._source[0] is not table or self._source[1] != version:
            self._cache.clear()
            self._source = (table, version)
        key = (height, width, table.device, table.dtype)
        return self._cache.get_or_make(key, lambda: self._expand(table, height, width))

    def _expand(self, table: Tensor, height: int, width: int) -> Tensor:
        raise NotImplementedError

    def train(self, mode: bool = True) -> TableOfShape:
        """Also forgets, for weights that were swapped through ``.data``, which counts no version."""
        self._cache.clear()
        return super().train(mode)

    def _apply(self, *args: object, **kwargs: object) -> TableOfShape:
        self._cache.clear()
        moved: TableOfShape = super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]
        return moved


class AttentionBias(TableOfShape):
    """Expands a bias table to a window.

    Args:
        stride: Which cells are queries, see `expand_bias`.
        stretched: Whether tables of another size are brought to the window by `stretch_bias`.
    """

    def __init__(self, stride: int = 1, *, stretched: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.stretched = stretched

    def _expand(self, table: Tensor, height: int, width: int) -> Tensor:
        expand = stretch_bias if self.stretched else expand_bias
        return expand(table, height, width, self.stride)
