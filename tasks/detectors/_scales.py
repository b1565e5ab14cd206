"""From the resized image back to the original one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def scales_of(
    sizes: Sequence[tuple[int, int]], original_sizes: Sequence[tuple[int, int]] | None
) -> list[tuple[float, float]]:
    """Width and height of each image divided by those of the original, 1 where there is none.

    Args:
        sizes: ``(height, width)`` of each image.
        original_sizes: ``(height, width)`` of each original image.
    """
    return [
        (width / old_width, height / old_height)
        for (height, width), (old_height, old_width) in zip(sizes, original_sizes or sizes, strict=True)
    ]


def divided(boxes: Tensor, scale: tuple[float, float]) -> Tensor:
    """Boxes ``(N, 4)`` divided by a scale of the width and one of the height.

    They are multiplied by its inverse, as MMDetection's ``scale_boxes`` does: the last bit counts.
    """
    return boxes * of_corners(boxes, 1 / scale[0], 1 / scale[1])


def of_corners(like: Tensor, x: float, y: float) -> Tensor:
    """``(x, y, x, y)`` in the type of `like` and on its device, filled there: a copy would wait for the GPU."""
    corners = like.new_full((4,), x)
    corners[1::2] = y
    return corners
