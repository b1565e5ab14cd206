"""Label maps over images: each class in its colour and, where there is room, with its name; a legend below."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from effvit.callbacks._canvas import GREY, INK, PAPER, Colour, cut, fit, scaled, text_font, to_picture
from effvit.callbacks._palette import class_colour
from effvit.categories import IGNORED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_OPACITY = 0.62
_GAP = 6
_NARROW = 240  # pixels below which a legend is not pressed
_MOST_ENTRIES = 30  # more cannot be told apart by colour; they are counted together
_LEAST_SHARE = 0.95  # of the pixels under a name that are of its class
_SEARCHED = 800  # pixels a side of a picture in which the place for a name is looked for
_HATCH = 8  # pixels from stripe to stripe
_STRIPES: tuple[Colour, Colour] = ((70, 73, 78), (150, 153, 158))
_NEUTRAL: Colour = (214, 216, 220)


class _Entry(NamedTuple):
    """One line of a legend: a colour (``None`` for none), a name, what follows, and whether it is hatched."""

    colour: Colour | None
    name: str
    value: str
    hatched: bool = False


def draw_segmentation(
    image: Tensor,
    mask: Tensor,
    names: Sequence[str],
    *,
    legend: bool = True,
    min_side: int = 480,
    max_side: int | None = None,
) -> Image.Image:
    """Draws a label map on its image.

    The image is turned to grey below the colours, so that these are those of the legend. Thin lines part the regions;
    pixels without label are hatched. A class has the same colour in every picture, see `class_colour`; one that is
    named background is left grey.

    Args:
        image: uint8 ``(3, h, w)``, RGB; of another size than ``mask`` it is resized to it.
        mask: ``(H, W)``, labels, -1 for pixels without one.
        names: Class name of each label.
        legend: List the classes below the picture with their share of the pixels, largest first; the smallest of more
            than 30 together.
        min_side: The picture is enlarged, by at most 4, until its longer side has this many pixels.
        max_side: The picture is shrunk until its longer side has at most this many pixels. ``None`` keeps its size.

    Returns:
        RGB picture on white.

    Raises:
        ValueError: ``image`` is not uint8 ``(3, h, w)``, or ``mask`` no map of whole numbers.
    """
    labels = _to_labels(mask)
    picture = _overlay(to_picture(image), labels, names, min_side, max_side)
    if not legend:
        return picture
    shares = _shares(labels)
    entries = [_entry(label, names, _percent(share)) for label, share in shares.items()]
    rest = sum(list(shares.values())[_MOST_ENTRIES:])
    return _stacked([picture, _draw_legend(_shortened(entries, _percent(rest)), picture.width)])


def draw_segmentation_pair(
    image: Tensor, truth: Tensor, prediction: Tensor, names: Sequence[str], *, title: str = "", side: int = 420
) -> Image.Image:
    """Draws image, ground truth and prediction side by side under titles, and one legend below.

    Above the prediction stands which share of the labelled pixels is right. The legend has for each class its share of
    the pixels in the truth and in the prediction.

    Args:
        image: uint8 ``(3, h, w)``, RGB; of another size than the label maps it is resized to them.
        truth: ``(H, W)``, labels, -1 for pixels without one.
        prediction: ``(H, W)``, likewise.
        names: Class name of each label.
        title: What stands above the image, such as the name of its file.
        side: Longer side of each picture in pixels. Small images are enlarged by at most 4.

    Returns:
        RGB picture on white.

    Raises:
        ValueError: ``image`` is not uint8 ``(3, h, w)``, a label map is no map of whole numbers, or their sizes differ.
    """
    real, found = _to_labels(truth), _to_labels(prediction)
    if real.shape != found.shape:
        raise ValueError(f"truth and prediction need one size, not {real.shape} and {found.shape}")
    original = to_picture(image)
    size = scaled((real.shape[1], real.shape[0]), fit((real.shape[1], real.shape[0]), side, side))
    panels = [original.resize(size, Image.Resampling.LANCZOS)]
    panels += [_overlay(original, labels, names, side, side) for labels in (real, found)]
    width = 3 * size[0] + 2 * _GAP
    strip = Image.new("RGB", (width, size[1]), PAPER)
    for number, panel in enumerate(panels):
        strip.paste(panel, (number * (size[0] + _GAP), 0))
    legend = _draw_legend(_pair_entries(_shares(real), _shares(found), names), width)
    labelled = real != IGNORED
    right = f", {100 * (real == found)[labelled].mean():.0f} % right" if labelled.any() else ""
    titles = (title or "image", "ground truth", f"prediction{right}")
    return _stacked([_heading(titles, size[0]), strip, legend])


def _heading(titles: Sequence[str], width: int) -> Image.Image:
    """Titles of panels of one width."""
    sheet = Image.new("RGB", (len(titles) * (width + _GAP) - _GAP, 22), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, title in enumerate(titles):
        place = (number * (width + _GAP), 11)
        draw.text(place, cut(draw, title, 15, width), fill=INK, font=text_font(15), anchor="lm")
    return sheet


def _pair_entries(truth: dict[int, float], prediction: dict[int, float], names: Sequence[str]) -> list[_Entry]:
    """Classes by their larger share, and what the numbers are."""
    larger = {label: max(truth.get(label, 0.0), prediction.get(label, 0.0)) for label in {**truth, **prediction}}
    order = sorted(larger, key=lambda label: (label == IGNORED, -larger[label], label))
    entries = []
    for label in order:
        shares = " / ".join(_percent(found.get(label, 0.0)) for found in (truth, prediction))
        entries.append(_entry(label, names, shares))
    head = _Entry(None, "share of the pixels", "truth / prediction")
    return [head, *_shortened(entries, "")]


def _to_labels(mask: Tensor) -> np.ndarray:
    """A label map as int32 ``(H, W)``."""
    if mask.dim() != 2 or mask.is_floating_point() or mask.dtype == torch.bool or not mask.numel():
        raise ValueError(f"a label map must be of whole numbers and shape (H, W), not {mask.dtype} {tuple(mask.shape)}")
    return mask.detach().cpu().to(torch.int32).numpy()


def _name(label: int, names: Sequence[str]) -> str:
    if label == IGNORED:
        return "no label"
    return names[label] if 0 <= label < len(names) else f"class {label}"


def _colour(label: int, names: Sequence[str]) -> Colour:
    """What is no class of things is neutral: it would colour most of a picture."""
    return _NEUTRAL if label == IGNORED or _name(label, names) == "background" else class_colour(label)


def _shares(labels: np.ndarray) -> dict[int, float]:
    """Share of the pixels of each label, largest first, those without label last."""
    values, counts = np.unique(labels, return_counts=True)
    shares = dict(zip(values.tolist(), (counts / labels.size).tolist(), strict=True))
    return dict(sorted(shares.items(), key=lambda item: (item[0] == IGNORED, -item[1], item[0])))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 or share == 0 else "< 1 %"


def _shortened(entries: list[_Entry], rest: str) -> list[_Entry]:
    if len(entries) <= _MOST_ENTRIES:
        return entries
    return [*entries[:_MOST_ENTRIES], _Entry(None, f"and {len(entries) - _MOST_ENTRIES} more", rest)]


def _overlay(
    original: Image.Image, labels: np.ndarray, names: Sequence[str], min_side: int, max_side: int | None
) -> Image.Image:
    """The tinted picture, its size that of the label map times what `fit` says."""
    height, width = labels.shape
    size = scaled((width, height), fit((width, height), min_side, max_side))
    shown = labels[_places(height, size[1])[:, None], _places(width, size[0])]
    grey = np.asarray(original.convert("L").resize(size, Image.Resampling.LANCZOS), np.float32)[..., None]
    present = np.unique(shown).tolist()
    table = np.array([_colour(label, names) for label in present], np.float32)
    mixed = (1 - _OPACITY) * grey + _OPACITY * table[np.searchsorted(present, shown)]
    _hatch(mixed, shown == IGNORED)
    line = max(1, round(max(size) / 500))
    _part(mixed, shown, line)
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    _write_names(picture, shown, [label for label in present if label >= 0], names)
    return picture


def _places(length: int, new: int) -> np.ndarray:
    """For each pixel of a resized axis the one that it shows: that in whose middle it lies."""
    return ((np.arange(new) + 0.5) * length / new).astype(np.int64)


def _hatch(pixels: np.ndarray, where: np.ndarray) -> None:
    rows, columns = np.nonzero(where)
    stripes = np.array(_STRIPES, np.float32)[((rows + columns) // (_HATCH // 2)) % 2]
    pixels[rows, columns] = 0.45 * pixels[rows, columns].mean(-1, keepdims=True) + 0.55 * stripes


def _part(pixels: np.ndarray, labels: np.ndarray, line: int) -> None:
    """Draws white lines, ``line`` pixels wide, where labels meet."""
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    where = cv2.dilate(edges, np.ones((line, line), np.uint8)) > 0
    pixels[where] += 0.75 * (255 - pixels[where])


def _write_names(picture: Image.Image, labels: np.ndarray, present: Sequence[int], names: Sequence[str]) -> None:
    """Writes each name into the largest region of its class where it fits."""
    draw = ImageDraw.Draw(picture)
    size = max(12, round(max(picture.size) / 40))
    font, stroke = text_font(size), max(2, size // 8)
    step = -(-max(picture.size) // _SEARCHED)
    coarse = labels[::step, ::step]
    for label in np.intersect1d(present, coarse).tolist():
        inside = labels == label
        x, y = _middle(coarse == label)
        text, centre = _name(label, names), (x * step, y * step)
        box = draw.textbbox(centre, text, font=font, anchor="mm", stroke_width=stroke)
        left, top, right, bottom = (round(value) for value in box)
        if left < 0 or top < 0 or right > picture.width or bottom > picture.height:
            continue
        if inside[top:bottom, left:right].mean() >= _LEAST_SHARE:
            draw.text(centre, text, fill=PAPER, font=font, anchor="mm", stroke_width=stroke, stroke_fill=INK)


def _middle(inside: np.ndarray) -> tuple[int, int]:
    """The place (x, y) in the largest region that is far from its border, which the edge of the picture is too."""
    _, regions, statistics, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
    largest = 1 + int(statistics[1:, cv2.CC_STAT_AREA].argmax())
    distance = cv2.distanceTransform(np.pad((regions == largest).astype(np.uint8), 1), cv2.DIST_L2, 3)
    # A long region has many such places: the one in the middle of them.
    places = np.argwhere(distance >= 0.95 * distance.max())
    y, x = places[np.square(places - places.mean(0)).sum(1).argmin()]
    return int(x) - 1, int(y) - 1


def _draw_legend(entries: Sequence[_Entry], width: int) -> Image.Image:
    """Entries in columns, downwards."""
    size, line, swatch, gap = 14, 20, 14, 18
    font = text_font(size)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [f"{entry.name}  {entry.value}" for entry in entries]
    widest = max((ruler.textlength(text, font=font) for text in texts), default=0)
    column = swatch + 6 + widest + gap
    width = max(width, min(round(column), _NARROW))  # of a narrow picture the legend is wider
    column = min(column, float(width))
    columns = max(1, min(int((width + gap) // column), len(entries)))
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (width, rows * line), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, entry in enumerate(entries):
        left, middle = (number // rows) * column, (number % rows + 0.5) * line
        start = left
        if entry.colour is not None:
            square = _swatch(entry.colour, swatch, hatched=entry.hatched)
            sheet.paste(square, (round(left), round(middle - swatch / 2)))
            start += swatch + 6
        value_width = ruler.textlength(f"  {entry.value}", font=font)
        name = cut(draw, entry.name, size, max(column - gap - (start - left) - value_width, 3 * size))
        draw.text((start, middle), name, fill=INK, font=font, anchor="lm")
        after = start + draw.textlength(name + "  ", font=font)
        draw.text((after, middle), entry.value, fill=GREY, font=font, anchor="lm")
    return sheet


def _entry(label: int, names: Sequence[str], value: str) -> _Entry:
    return _Entry(_colour(label, names), _name(label, names), value, label == IGNORED)


def _swatch(colour: Colour, side: int, *, hatched: bool) -> Image.Image:
    """A square of the colour that a class has over middle grey."""
    mixed = (1 - _OPACITY) * 128 + _OPACITY * np.array(colour, np.float32)
    pixels = np.tile(mixed, (side, side, 1))
    if hatched:
        _hatch(pixels, np.ones((side, side), bool))
    return Image.fromarray(pixels.round().astype(np.uint8))


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    width = max(picture.width for picture in pictures)
    sheet = Image.new("RGB", (width, sum(picture.height for picture in pictures) + _GAP * (len(pictures) - 1)), PAPER)
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + _GAP
    return sheet
