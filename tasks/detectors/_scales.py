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
    return boxes * boxes.new_tensor([1 / side for side in scale]).repeat(2)
