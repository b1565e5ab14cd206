"""Label maps over images show each class where it is, and can be read."""

from __future__ import annotations

import itertools
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from effvit.callbacks import class_colour, draw_segmentation, draw_segmentation_pair, overlays

NAMES = tuple(f"class {label}" for label in range(60))
GREY = torch.full((3, 100, 200), 128, dtype=torch.uint8)


def _tint(label: int) -> np.ndarray:
    """What a class makes of middle grey."""
    return (0.38 * 128 + 0.62 * np.array(class_colour(label))).round()


def _is(picture: Image.Image, colour: np.ndarray) -> np.ndarray:
    return (np.abs(np.asarray(picture).astype(int) - colour) <= 1).all(-1)


def _halves() -> torch.Tensor:
    mask = torch.zeros(100, 200, dtype=torch.int16)
    mask[:, 120:] = 3
    return mask


def test_colours_lie_where_the_labels_are() -> None:
    picture = draw_segmentation(GREY, _halves(), NAMES, legend=False, min_side=1)
    assert picture.size == (200, 100)
    assert _is(picture, _tint(0))[:, :100].mean() > 0.8  # but for the name
    assert _is(picture, _tint(3))[:, 130:].mean() > 0.6
    assert not _is(picture, _tint(3))[:, :118].any()
    assert not _is(picture, _tint(0))[:, 121:].any()
    column = np.asarray(picture)[0, 115:125].mean(-1)
    assert column.argmax() == 5  # the white line between the two
    assert column.max() > 200


def test_the_image_is_grey_below_the_colours() -> None:
    colourful = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 100, 200)
    mask = torch.zeros(100, 200, dtype=torch.uint8)
    drawn = np.asarray(draw_segmentation(colourful, mask, NAMES, legend=False, min_side=1), np.float32)
    same = np.asarray(draw_segmentation(torch.full_like(GREY, 76), mask, NAMES, legend=False, min_side=1), np.float32)
    np.testing.assert_allclose(drawn, same, atol=1)  # 0.299 x 255


def test_pixels_without_label_are_hatched_and_a_background_is_grey() -> None:
    mask = _halves()
    mask[:, :50] = -1
    pixels = np.asarray(draw_segmentation(GREY, mask, ("background", *NAMES), legend=False, min_side=1)).astype(int)
    assert (pixels[:, :118].max(-1) - pixels[:, :118].min(-1)).max() <= 8
    assert pixels[:, :48].std() > 15
    assert pixels[:20, 60:110].std((0, 1)).max() < 1
    tinted = pixels[:20, 150:190]
    assert (tinted.max(-1) - tinted.min(-1)).min() > 20


def test_image_of_another_size_is_resized_to_the_labels() -> None:
    small = draw_segmentation(GREY[:, :50, :100], _halves(), NAMES, legend=False, min_side=1)
    whole = draw_segmentation(GREY, _halves(), NAMES, legend=False, min_side=1)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(whole))


def test_small_maps_are_enlarged_without_mixing_labels_and_large_ones_shrunk() -> None:
    mask = torch.zeros(10, 20, dtype=torch.int16)
    mask[:, 10:] = 3
    picture = draw_segmentation(GREY, mask, NAMES, legend=False)
    assert picture.size == (80, 40)
    assert _is(picture, _tint(0))[:4, :39].all()
    assert _is(picture, _tint(3))[:4, 42:].all()
    assert draw_segmentation(GREY, _halves(), NAMES, legend=False, max_side=50).size == (50, 25)


def test_names_stand_in_regions_that_have_room() -> None:
    mask = torch.zeros(100, 200, dtype=torch.int16)
    mask[40:50, 90:100] = 3  # too small for its name
    picture = np.asarray(draw_segmentation(GREY, mask, NAMES, legend=False, min_side=1)).astype(int)
    letters = (picture > 220).all(-1)
    assert not letters[41:49, 92:98].any()
    letters[38:52, 88:102] = False  # the line around the small region
    rows, columns = np.nonzero(letters)
    assert len(rows) > 30
    assert (rows.max() - rows.min(), columns.max() - columns.min()) < (14, 60)  # one name only


def test_the_name_in_a_large_picture_stands_in_the_middle_too() -> None:
    mask = torch.zeros(1000, 2000, dtype=torch.int16)
    mask[:, 1200:] = 3
    drawn = draw_segmentation(GREY, mask, NAMES, legend=False, min_side=1)
    for place, (left, right) in {600: (10, 1190), 1600: (1210, 1990)}.items():
        rows, columns = np.nonzero((np.asarray(drawn)[:, left:right] > 250).all(-1))
        assert len(rows) > 100
        assert abs(columns.mean() + left - place) < 30
        assert abs(rows.mean() - 500) < 30


def test_legend_lists_the_largest_first() -> None:
    picture = draw_segmentation(GREY, _halves(), NAMES, min_side=1)
    legend = picture.crop((0, 106, picture.width, picture.height))
    first, second = (np.argwhere(_is(legend, _tint(label))) for label in (0, 3))
    assert len(first) == len(second) == 14 * 14
    assert tuple(first.min(0)) < tuple(second.min(0))
    assert draw_segmentation(GREY, torch.zeros(100, 200, dtype=torch.int16), NAMES, min_side=1).height == 126


def test_legend_of_many_classes_ends_with_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = (torch.arange(40).repeat_interleave(5)).expand(100, 200).to(torch.int16)
    seen: list[list[tuple[str, str]]] = []
    draw = overlays._draw_legend
    monkeypatch.setattr(
        overlays,
        "_draw_legend",
        lambda entries, width: seen.append([entry[1:3] for entry in entries]) or draw(entries, width),
    )
    draw_segmentation(GREY, mask, NAMES)
    assert seen[0][0] == ("class 0", "2 %")
    assert seen[0][29:] == [("class 29", "2 %"), ("and 10 more", "25 %")]


def test_narrow_pictures_have_a_legible_legend() -> None:
    image = torch.zeros(3, 90, 2, dtype=torch.uint8)
    picture = draw_segmentation(image, torch.full((90, 2), -1), ("name",))
    assert picture.width > 100
    assert (np.asarray(picture)[-20:, 30:] < 128).any()


def test_pair_shows_truth_prediction_and_their_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, prediction = _halves(), torch.zeros(100, 200, dtype=torch.int16)
    truth[:, :20] = -1
    titles: list[str] = []
    entries: list[tuple[str, str]] = []
    heading, legend = overlays._heading, overlays._draw_legend
    monkeypatch.setattr(overlays, "_heading", lambda texts, width: titles.extend(texts) or heading(texts, width))
    monkeypatch.setattr(
        overlays,
        "_draw_legend",
        lambda rows, width: entries.extend(row[1:3] for row in rows) or legend(rows, width),
    )
    picture = draw_segmentation_pair(GREY, truth, prediction, NAMES, title="a.jpg", side=200)
    assert titles == ["a.jpg", "ground truth", "prediction, 56 % right"]  # 100 of 180 columns
    assert entries[1:] == [("class 0", "50 % / 100 %"), ("class 3", "40 % / 0 %"), ("no label", "10 % / 0 %")]
    assert picture.width == 3 * 200 + 2 * 6
    strip = picture.crop((0, 28, picture.width, 128))
    assert _is(strip, _tint(3))[:, 206 + 130 : 406].mean() > 0.5
    assert not _is(strip, _tint(3))[:, 412:].any()
    assert _is(strip, np.array([128, 128, 128]))[:, :200].all()


def test_a_pair_without_labels_says_nothing_about_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    heading = overlays._heading
    monkeypatch.setattr(overlays, "_heading", lambda texts, width: titles.extend(texts) or heading(texts, width))
    draw_segmentation_pair(GREY, torch.full((100, 200), -1), _halves(), NAMES)
    assert titles == ["image", "ground truth", "prediction"]


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.zeros(1, 5, 5, dtype=torch.int16), r"\(1, 5, 5\)"),
        (torch.zeros(5, 5), "float32"),
        (torch.zeros(5, 5, dtype=torch.bool), "bool"),
    ],
)
def test_what_is_no_label_map_is_named(mask: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draw_segmentation(GREY, mask, NAMES)


def test_maps_of_two_sizes_are_no_pair() -> None:
    with pytest.raises(ValueError, match="one size"):
        draw_segmentation_pair(GREY, _halves(), _halves()[:50], NAMES)


def test_colours_of_many_classes_can_be_told_apart() -> None:
    colours = np.array([class_colour(label) for label in range(150)], np.float32)
    seen = cv2.cvtColor(colours[None] / 255, cv2.COLOR_RGB2LAB)[0]
    # A difference of 2.3 in CIELAB is just noticeable.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 12
    assert class_colour(256) == class_colour(0)


@pytest.mark.realdata
def test_real_images_of_every_shape_are_drawn(real_data) -> None:
    root = real_data / "coco_semantic"
    names = json.loads((root / "classes.json").read_text())
    ids = sorted(map(int, names))
    words = [names[str(number)] for number in ids]
    for file in sorted((root / "images" / "val").glob("*.jpg"))[:6]:
        values = np.asarray(Image.open(root / "masks" / "val" / f"{file.stem}.png"))
        labels = torch.from_numpy(np.searchsorted(ids, values).astype(np.int16) - 1)  # 0 is unlabelled
        image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        picture = draw_segmentation(image, labels, words[1:], max_side=320)
        assert picture.width <= 320
        assert picture.height > round(320 * values.shape[0] / max(values.shape)) + 20
