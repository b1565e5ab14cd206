"""Pictures show every object where it is, and can be read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from effvit.callbacks import class_colour, draw_detections, panel_grid

NAMES = ("zero", "one", "two")


def _grey(height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), 128, dtype=torch.uint8)


def _has(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(picture) == np.array(colour)).all(-1)


def test_box_lies_where_it_is() -> None:
    picture = draw_detections(_grey(500, 600), torch.tensor([[100.0, 200, 300, 400]]), torch.tensor([1]), names=NAMES)
    assert picture.size == (600, 500)
    drawn = _has(picture, class_colour(1))
    rows, columns = np.nonzero(drawn)
    assert columns.min() == 100
    assert columns.max() == 300
    assert rows.max() == 400
    assert drawn[300, 100]
    assert drawn[300, 300]
    assert not drawn[300, 200]


def test_small_image_is_enlarged_and_its_boxes_with_it() -> None:
    picture = draw_detections(_grey(120, 160), torch.tensor([[20.0, 60, 80, 100]]), torch.tensor([0]), names=NAMES)
    assert picture.size == (480, 360)
    rows, columns = np.nonzero(_has(picture, class_colour(0)))
    assert (columns.min(), columns.max(), rows.max()) == (60, 240, 300)


def test_large_image_is_shrunk_on_demand_only() -> None:
    boxes, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)
    assert draw_detections(_grey(1000, 800), boxes, labels, names=NAMES).size == (800, 1000)
    assert draw_detections(_grey(1000, 800), boxes, labels, names=NAMES, max_side=500).size == (400, 500)
    assert draw_detections(_grey(1, 1), boxes, labels, names=NAMES).size == (4, 4)


def test_threshold_keeps_scores_at_and_above() -> None:
    boxes = torch.tensor([[50.0, 100, 150, 200], [250.0, 100, 350, 200], [450.0, 100, 550, 200]])
    picture = draw_detections(
        _grey(500, 600), boxes, torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.3, 0.29]), names=NAMES,
        score_threshold=0.3,
    )  # fmt: skip
    assert _has(picture, class_colour(0)).any()
    assert _has(picture, class_colour(1)).any()
    assert not _has(picture, class_colour(2)).any()


def test_captions_do_not_cover_each_other_where_there_is_room() -> None:
    box = torch.tensor([[200.0, 200, 300, 300]])
    alone = draw_detections(_grey(500, 600), box, torch.tensor([0]), torch.tensor([0.9]), names=NAMES)
    two = draw_detections(
        _grey(500, 600), box.repeat(2, 1), torch.tensor([0, 1]), torch.tensor([0.9, 0.8]), names=NAMES
    )
    top = np.nonzero(_has(alone, class_colour(0)))[0].min()
    assert _has(two, class_colour(0))[top:200].sum() == _has(alone, class_colour(0))[top:200].sum()
    assert _has(two, class_colour(1))[301:].any()  # the second caption went below the box


def test_captions_stay_inside_the_picture() -> None:
    boxes = torch.tensor([[0.0, 0, 40, 30], [570.0, 470, 600, 500]])
    picture = draw_detections(_grey(500, 600), boxes, torch.tensor([0, 1]), names=("a long class name",) * 2)
    drawn = _has(picture, class_colour(0))
    assert drawn[:, :100].sum() > 1000  # a filled caption, not only a frame
    assert _has(picture, class_colour(1))[:, -150:].sum() > 1000


def test_masks_tint_their_pixels_only() -> None:
    masks = torch.zeros(1, 500, 600, dtype=torch.bool)
    masks[0, 250:300, 250:300] = True
    picture = draw_detections(
        _grey(500, 600), torch.tensor([[200.0, 200, 400, 400]]), torch.tensor([1]), names=NAMES, masks=masks
    )
    pixels = np.asarray(picture)
    expected = 128 + 0.45 * (np.array(class_colour(1)) - 128.0)
    np.testing.assert_allclose(pixels[275, 275], expected, atol=1)
    assert (pixels[320, 320] == 128).all()


def test_masks_may_be_run_lengths_of_another_size() -> None:
    small = np.zeros((250, 300), dtype=np.uint8, order="F")
    small[100:200, 100:200] = 1
    boxes, labels = torch.tensor([[200.0, 200, 400, 400]]), torch.tensor([1])
    dense = torch.from_numpy(small).repeat_interleave(2, 0).repeat_interleave(2, 1)[None]
    expected = draw_detections(_grey(500, 600), boxes, labels, names=NAMES, masks=dense)
    drawn = draw_detections(_grey(500, 600), boxes, labels, names=NAMES, masks=[mask_api.encode(small)])
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))
    assert (np.asarray(drawn)[300, 300] != 128).any()


def test_only_drawn_masks_are_decoded() -> None:
    inside = np.asfortranarray(np.ones((40, 60), np.uint8))
    masks = [{"size": [40, 60], "counts": b"never read"}, mask_api.encode(inside)]
    boxes, scores = torch.tensor([[1.0, 1, 9, 9], [0.0, 0, 60, 40]]), torch.tensor([0.3, 0.8])
    picture = draw_detections(
        _grey(40, 60), boxes, torch.tensor([0, 1]), scores, names=NAMES, masks=masks, score_threshold=0.5
    )
    assert (np.asarray(picture)[80, 120] != 128).any()
    with pytest.raises(ValueError, match="'boxes': 2, 'labels': 2, 'masks': 1"):
        draw_detections(_grey(40, 60), boxes, torch.tensor([0, 1]), names=NAMES, masks=masks[:1])


def test_unknown_label_and_degenerate_boxes_are_drawn() -> None:
    boxes = torch.tensor([[300.0, 300, 200, 200], [10.0, 10, 10, 10], [-50.0, -50, 900, 900]])
    picture = draw_detections(_grey(500, 600), boxes, torch.tensor([7, 0, 1]), names=NAMES)
    assert _has(picture, class_colour(7)).any()


@pytest.mark.parametrize(
    ("image", "labels", "match"),
    [
        (torch.zeros(3, 10, 10), [0], "uint8"),
        (torch.zeros(1, 10, 10, dtype=torch.uint8), [0], r"\(3, H, W\)"),
        (torch.zeros(3, 10, 10, dtype=torch.uint8), [0, 1], "'boxes': 1, 'labels': 2"),
    ],
)
def test_wrong_input_is_named(image: torch.Tensor, labels: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draw_detections(image, torch.zeros(1, 4), torch.tensor(labels), names=NAMES)


def test_colours_of_a_hundred_classes_differ() -> None:
    colours = [class_colour(label) for label in range(100)]
    assert len(set(colours)) == 100
    first = [np.array(colour, float) for colour in colours[:10]]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(first, 2)) > 60


def test_grid_places_every_picture() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)]
    pictures = [Image.new("RGB", (50 + 10 * k, 40), colour) for k, colour in enumerate(colours)]
    sheet = panel_grid([pictures[:2], pictures[2:]])
    for picture, colour in zip(pictures, colours, strict=True):
        assert _has(sheet, colour).sum() == picture.width * picture.height
    first = [np.nonzero(_has(sheet, colour)) for colour in colours]
    assert first[0][1].max() < first[1][1].min()  # beside
    assert first[0][0].max() < first[2][0].min()  # below
    wide = panel_grid([pictures[:2], pictures[2:]], pairs_per_row=2)
    assert wide.height < sheet.height
    assert all(_has(wide, colour).sum() == p.width * p.height for p, colour in zip(pictures, colours, strict=True))


def test_grid_refuses_rows_that_do_not_fit_the_titles() -> None:
    with pytest.raises(ValueError, match="rows of 2"):
        panel_grid([[Image.new("RGB", (5, 5))]])
    with pytest.raises(ValueError, match="rows of 2"):
        panel_grid([])
