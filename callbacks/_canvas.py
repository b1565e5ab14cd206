"""What all drawings on images share: ink, text that fits, sizes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Colour = (28, 30, 34)
PAPER: Colour = (255, 255, 255)
GREY: Colour = (110, 114, 120)


def to_picture(image: Tensor) -> Image.Image:
    """A uint8 image ``(3, H, W)`` as RGB picture.

    Raises:
        ValueError: It is something else.
    """
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(f"an image must be uint8 of shape (3, H, W), not {image.dtype} {tuple(image.shape)}")
    return Image.fromarray(np.ascontiguousarray(image.detach().cpu().permute(1, 2, 0).numpy()))


def fit(size: tuple[int, int], min_side: int, max_side: int | None) -> float:
    """Factor by which a picture of this size is enlarged or shrunk.

    Args:
        size: Width and height in pixels.
        min_side: The longer side is enlarged, by at most 4, until it has this many pixels.
        max_side: The longer side is shrunk until it has at most this many. ``None`` keeps it.
    """
    side = max(size)
    scale = min(max(1.0, min_side / side), 4.0)
    return scale if max_side is None else min(scale, max_side / side)


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Width and height times a factor, at least 1 pixel each."""
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def resize(picture: Image.Image, min_side: int, max_side: int | None) -> tuple[Image.Image, float]:
    """A picture at the size that `fit` gives it, and the factor."""
    scale = fit(picture.size, min_side, max_side)
    if scale == 1.0:
        return picture, 1.0
    return picture.resize(scaled(picture.size, scale), Image.Resampling.LANCZOS), scale


def cut(draw: ImageDraw.ImageDraw, text: str, size: int, width: float) -> str:
    """``text``, or as much of its beginning as fits with an ellipsis.

    Args:
        draw: What it is drawn with.
        text: One line.
        size: Of the letters, in pixels.
        width: Room for it, in pixels.
    """
    if draw.textlength(text, font=text_font(size)) <= width:
        return text
    while text and draw.textlength(text + "…", font=text_font(size)) > width:
        text = text[:-1]
    return text + "…"


def luminance(colour: Colour) -> float:
    """How bright a colour is, in ``[0, 1]``."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


@lru_cache(maxsize=16)
def text_font(size: int) -> Font:
    """The font, at a size in pixels."""
    return ImageFont.load_default(size)
