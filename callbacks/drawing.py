"""Boxes, masks, class names, scores and kept patches on images, legible on a thumbnail and on a photograph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api
from torch import Tensor

from effvit.callbacks._canvas import GREY, INK, PAPER, Colour, Font, cut, luminance, resize, text_font, to_picture
from effvit.callbacks._palette import class_colour

if TYPE_CHECKING:
    from collections.abc import Sequence

Mask = Tensor | Mapping[str, Any]
_Rectangle = tuple[float, float, float, float]

_MASK_OPACITY = 0.45
_DROPPED_OPACITY = 0.85  # enough left to see what was dropped


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None = None,
    *,
    names: Sequence[str],
    masks: Tensor | Sequence[Mask] | None = None,
    score_threshold: float = 0.0,
    min_side: int = 480,
    max_side: int | None = None,
) -> Image.Image:
    """Draws objects on an image.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        boxes: ``(N, 4)`` as (x1, y1, x2, y2), in pixels of ``image``.
        labels: ``(N,)``, contiguous.
        scores: ``(N,)`` in ``[0, 1]``; ``None`` for ground truth.
        names: Class name of each label.
        masks: For each object a mask, true inside, or a compressed COCO RLE. Those of another size than ``image`` are
            resized. Only what is drawn is decoded, one after the other.
        score_threshold: Objects below this score are left out.
        min_side: The picture is enlarged, by at most 4, until its longer side has this many pixels.
        max_side: The picture is shrunk until its longer side has at most this many pixels. ``None`` keeps its size.

    Returns:
        RGB picture; its size differs from that of ``image`` where ``min_side`` or ``max_side`` asks for it.

    Raises:
        ValueError: ``image`` is not uint8 ``(3, H, W)``, or the numbers of boxes, labels, scores and masks differ.
    """
    _check(boxes, labels, scores, masks)
    keep = torch.arange(len(boxes))
    if scores is not None:
        order = scores.detach().cpu().float().argsort(descending=True, stable=True)
        keep = order[scores.detach().cpu().float()[order] >= score_threshold]
    boxes, labels = boxes.detach().cpu().float()[keep], labels.detach().cpu()[keep]
    captions = [_caption(int(label), names) for label in labels]
    if scores is not None:
        captions = [f"{text} {float(s):.2f}" for text, s in zip(captions, scores.detach().cpu()[keep], strict=True)]
    picture = to_picture(image)
    if masks is not None:
        chosen = [masks[index] for index in keep.tolist()]
        picture = Image.fromarray(_blend(np.asarray(picture), chosen, labels.tolist()))
    picture, scale = resize(picture, min_side, max_side)
    _draw(picture, (boxes * scale).tolist(), [class_colour(int(label)) for label in labels], captions)
    return picture


def panel_grid(
    rows: Sequence[Sequence[Image.Image]],
    titles: Sequence[str] = ("ground truth", "prediction"),
    *,
    pairs_per_row: int = 1,
) -> Image.Image:
    """Lays pictures out side by side under titles, each row one image.

    Args:
        rows: Pictures of one image each, as many as there are titles.
        titles: What each column shows.
        pairs_per_row: How many of ``rows`` stand beside each other; the titles repeat.

    Returns:
        RGB picture on white.

    Raises:
        ValueError: There are no rows, or a row has not as many pictures as there are titles.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"panel_grid needs rows of {len(titles)} pictures each, got {[len(row) for row in rows]}")
    gap, margin = 6, 16
    head = 34 if any(titles) else margin
    cell_width = max(picture.width for row in rows for picture in row)
    lines = [rows[start : start + pairs_per_row] for start in range(0, len(rows), pairs_per_row)]
    heights = [max(picture.height for row in line for picture in row) for line in lines]
    pair_width = len(titles) * cell_width + (len(titles) - 1) * gap
    across = min(pairs_per_row, len(rows))
    width = 2 * margin + across * pair_width + (across - 1) * 2 * margin
    sheet = Image.new("RGB", (width, head + sum(heights) + gap * (len(lines) - 1) + margin), PAPER)
    draw = ImageDraw.Draw(sheet)
    lefts = [
        margin + pair * (pair_width + 2 * margin) + column * (cell_width + gap)
        for pair in range(across)
        for column in range(len(titles))
    ]
    for number, left in enumerate(lefts):
        draw.text((left, head / 2), titles[number % len(titles)], fill=INK, font=text_font(16), anchor="lm")
    top = head
    for line, height in zip(lines, heights, strict=True):
        for left, picture in zip(lefts, (picture for row in line for picture in row), strict=False):
            sheet.paste(picture, (left + (cell_width - picture.width) // 2, top + (height - picture.height) // 2))
        top += height + gap
    return sheet


def captioned(image: Tensor, lines: Sequence[str], *, side: int = 240) -> Image.Image:
    """An image in the middle of a square, and lines of text below it; all of one side line up in a `panel_grid`.

    Args:
        image: uint8 ``(3, H, W)``, RGB.
        lines: Text, cut at the end where it is too long.
        side: Of the square, in pixels. The image is shrunk to fit, or enlarged by at most 4.

    Returns:
        RGB picture on white.

    Raises:
        ValueError: ``image`` is not uint8 ``(3, H, W)``.
    """
    picture, _ = resize(to_picture(image), side, side)
    size, spacing = 15, 20
    sheet = Image.new("RGB", (side, side + 6 + spacing * len(lines)), PAPER)
    sheet.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        place = (0, side + 6 + spacing * (number + 0.5))
        draw.text(place, cut(draw, line, size, side), fill=INK, font=text_font(size), anchor="lm")
    return sheet


def draw_kept_patches(
    images: Tensor, decisions: Sequence[Tensor], grid: tuple[int, int], *, patch: int = 16
) -> Image.Image:
    """Shows which patches a network kept at each stage, as figure 1 of the DynamicViT paper does (arXiv 2106.02034).

    Args:
        images: uint8 ``(B, 3, H, W)``, RGB.
        decisions: For each stage ``(B, N)``, 1 for kept patches and 0 for others, row by row of the grid.
        grid: Rows and columns of patches.
        patch: Side of a patch in pixels; the last row and column may stand over the edge of the image.

    Returns:
        RGB picture, one row an image: the image, then each stage with its dropped patches whitened. A line around the
        kept ones, which the paper does not have, shows them on a white background too.

    Raises:
        ValueError: The images are not uint8 ``(B, 3, H, W)``, or a decision does not fit the grid.
    """
    wrong = [tuple(kept.shape) for kept in decisions if kept.shape != (len(images), grid[0] * grid[1])]
    if wrong:
        raise ValueError(f"decisions about {len(images)} images on a grid {grid} cannot have the shape {wrong[0]}")
    stages = [kept.detach().cpu().float().round().view(-1, *grid) for kept in decisions]
    rows = []
    for number, image in enumerate(images.cpu()):
        rows.append([resize(to_picture(image), 240, 320)[0]])
        for kept in stages:
            picture, scale = resize(to_picture(_whiten(image, kept[number], patch)), 240, 320)
            _outline(picture, kept[number], patch * scale)
            rows[-1].append(picture)
    shares = [f"stage {number}: {100 * float(kept.mean()):.0f} % kept" for number, kept in enumerate(stages, start=1)]
    return panel_grid(rows, ("image", *shares))


def _whiten(image: Tensor, kept: Tensor, patch: int) -> Tensor:
    mask = kept.repeat_interleave(patch, 0).repeat_interleave(patch, 1)[: image.shape[1], : image.shape[2]]
    return torch.lerp(image.float(), torch.full((), 255.0), _DROPPED_OPACITY * (1 - mask)).round().to(torch.uint8)


def _outline(picture: Image.Image, kept: Tensor, side: float) -> None:
    """Draws the border between kept and dropped patches, which are squares of ``side`` pixels."""
    draw = ImageDraw.Draw(picture)
    for row, column in (kept[1:] != kept[:-1]).nonzero().tolist():
        y = (row + 1) * side
        draw.line((column * side, y, (column + 1) * side, y), fill=GREY)
    for row, column in (kept[:, 1:] != kept[:, :-1]).nonzero().tolist():
        x = (column + 1) * side
        draw.line((x, row * side, x, (row + 1) * side), fill=GREY)


def _check(boxes: Tensor, labels: Tensor, scores: Tensor | None, masks: Tensor | Sequence[Mask] | None) -> None:
    counts = {"boxes": len(boxes), "labels": len(labels)}
    counts |= {"scores": len(scores)} if scores is not None else {}
    counts |= {"masks": len(masks)} if masks is not None else {}
    if len(set(counts.values())) > 1:
        raise ValueError(f"as many boxes, labels, scores and masks are needed, got {counts}")


def _caption(label: int, names: Sequence[str]) -> str:
    return names[label] if 0 <= label < len(names) else f"class {label}"


def _blend(pixels: np.ndarray, masks: Sequence[Mask], labels: Sequence[int]) -> np.ndarray:
    mixed = pixels.astype(np.float32)
    # Weakest first, so that the best object stays visible where masks overlap.
    for mask, label in zip(reversed(masks), reversed(labels), strict=True):
        inside = _pixels_of(mask, pixels.shape[:2])
        mixed[inside] += _MASK_OPACITY * (np.array(class_colour(label), np.float32) - mixed[inside])
    return mixed.round().astype(np.uint8)


def _pixels_of(mask: Mask, size: tuple[int, ...]) -> np.ndarray:
    """A mask as bool ``(H, W)`` at the size of the picture."""
    decoded = torch.from_numpy(mask_api.decode(mask)) if isinstance(mask, Mapping) else mask.detach().cpu()
    if decoded.shape != size:
        decoded = torch.nn.functional.interpolate(decoded[None, None].float(), size, mode="bilinear")[0, 0] > 0.5
    return decoded.bool().numpy()


def _draw(picture: Image.Image, boxes: list[list[float]], colours: Sequence[Colour], captions: Sequence[str]) -> None:
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    line = max(2, round(side / 320))
    font = text_font(max(12, round(side / 44)))
    for box, colour in zip(reversed(boxes), list(reversed(colours)), strict=True):
        x1, y1, x2, y2 = box
        draw.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=line)
    placed: list[_Rectangle] = []
    for box, colour, caption in zip(boxes, colours, captions, strict=True):
        tag = _place(draw, box, caption, font, picture.size, placed)
        placed.append(tag)
        draw.rectangle(tag, fill=colour)
        ink = PAPER if luminance(colour) < 0.6 else INK
        draw.text(((tag[0] + tag[2]) / 2, (tag[1] + tag[3]) / 2), caption, fill=ink, font=font, anchor="mm")


def _place(
    draw: ImageDraw.ImageDraw,
    box: Sequence[float],
    caption: str,
    font: Font,
    size: tuple[int, int],
    placed: Sequence[_Rectangle],
) -> _Rectangle:
    """Rectangle for a caption at its box: the first of five places inside the picture that covers no other caption."""
    left, top, right, bottom = draw.textbbox((0, 0), caption, font=font)
    _, capital_top, _, descent = draw.textbbox((0, 0), "Ag", font=font)  # one height for all captions
    width, height = right - left + 6, max(bottom - top, descent - capital_top) + 5
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y2), (x1, y1), (x2 - width, y1 - height), (x2 - width, y2)]
    tags = [_inside(x, y, width, height, size) for x, y in corners]
    free = [tag for tag in tags if not any(_overlap(tag, other) for other in placed)]
    return (free or tags)[0]


def _inside(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> _Rectangle:
    x = min(max(x, 0.0), max(0.0, size[0] - 1 - width))
    y = min(max(y, 0.0), max(0.0, size[1] - 1 - height))
    return x, y, x + width, y + height


def _overlap(a: _Rectangle, b: _Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
