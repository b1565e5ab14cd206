"""Label maps of images against a plain loop: whole, in windows, mirrored and at several sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effvit.errors import ConfigError
from effvit.tasks.segmenters import _inference
from effvit.tasks.segmenters._inference import Inference

CLASSES = 7


@pytest.fixture(scope="module")
def network():
    """Stride 4, with a view beyond one cell, so that windows and borders matter."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 7, 4, 3), nn.Tanh(), nn.Conv2d(8, CLASSES, 3, padding=1)).double().eval()


SIZES = [(40, 61), (33, 48)]
ORIGINAL_SIZES = [(95, 122), (20, 31)]


@pytest.fixture(scope="module")
def images():
    found = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for image, (height, width) in zip(found, SIZES, strict=True):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return found


def label(network, images, align_corners=False, **options):
    with torch.no_grad():
        return Inference(**options).label(network, images, SIZES, ORIGINAL_SIZES, align_corners=align_corners)


def enlarge(logits, size, align_corners=False):
    return F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners)


def whole(network, image, size, original_size, align_corners=False):
    """``EncoderDecoder.whole_inference``: logits at the padded size, cut, at the original size."""
    logits = enlarge(network(image[None]), image.shape[-2:], align_corners)[..., : size[0], : size[1]]
    return enlarge(logits, original_size, align_corners)[0]


def slide(network, image, size, original_size, window, stride):
    """``EncoderDecoder.slide_inference``: the mean of the logits of all windows, then the original size.

    But for windows whose sides are no multiples of 32, which mmsegmentation does not pad.
    """
    height, width = size
    total, count = torch.zeros(1, CLASSES, height, width), torch.zeros(1, 1, height, width)
    rows = max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1
    columns = max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1
    for row in range(rows):
        for column in range(columns):
            bottom, right = min(row * stride[0] + window[0], height), min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            crop = image[None, :, top:bottom, left:right]
            tall, wide = (-(-side // 32) * 32 for side in crop.shape[-2:])
            seen = F.pad(crop, (0, wide - crop.shape[-1], 0, tall - crop.shape[-2]))
            logits = enlarge(network(seen), (tall, wide))[..., : bottom - top, : right - left]
            total += F.pad(logits, (left, width - right, top, height - bottom))
            count += F.pad(torch.ones(1, 1, bottom - top, right - left), (left, width - right, top, height - bottom))
    assert count.min() >= 1
    return enlarge(total / count, original_size)[0]


def check(found, scores):
    """The same labels, but for pixels at which the two best scores are as good as equal."""
    for mask, score, size in zip(found, scores, ORIGINAL_SIZES, strict=True):
        assert mask.dtype == torch.int16
        assert tuple(mask.shape) == size
        assert len(mask.unique()) > 3
        first, second = score.topk(2, dim=0).values
        differs = mask != score.argmax(0)
        assert not (differs & (first - second > 1e-5)).any()
        assert differs.sum() <= 2


@pytest.mark.parametrize("align_corners", [False, True])
def test_whole_images_are_enlarged_cut_and_resized(network, images, align_corners):
    found = label(network, images, align_corners)
    with torch.no_grad():
        check(
            found,
            [whole(network, *one, align_corners) for one in zip(images, SIZES, ORIGINAL_SIZES, strict=True)],
        )


@pytest.mark.parametrize(
    ("window", "stride"), [((32, 32), (20, 24)), ((32, 40), (32, 40)), ((64, 32), (64, 7)), ((512, 512), (341, 341))]
)
def test_windows_are_those_of_mmsegmentation(network, images, window, stride):
    found = label(network, images, mode="slide", window=window, stride=stride)
    with torch.no_grad():
        check(
            found,
            [slide(network, *one, window, stride) for one in zip(images, SIZES, ORIGINAL_SIZES, strict=True)],
        )


def test_an_image_smaller_than_the_window_is_seen_whole(images):
    """Cells of a coarse map are as far apart as ever: 40 of 61 pixels are not two of two cells."""
    torch.manual_seed(3)
    coarse = nn.Sequential(nn.AvgPool2d(32), nn.Conv2d(3, CLASSES, 1)).double()
    options = {"mode": "slide", "window": (512, 512), "stride": (341, 341)}
    for one, size, original in zip(images, SIZES, ORIGINAL_SIZES, strict=True):
        with torch.no_grad():
            (found,) = Inference(**options).label(coarse, one[None], [size], [original], align_corners=False)
            (expected,) = Inference().label(coarse, one[None], [size], [original], align_corners=False)
        assert torch.equal(found, expected)


def test_the_last_window_is_moved_back_into_the_image():
    inference = Inference("slide", (32, 32), (24, 24))
    assert inference.windows((32, 32)) == [(0, 0)]
    assert inference.windows((33, 20)) == [(0, 0), (1, 0)]
    assert inference.windows((56, 57)) == [(0, 0), (0, 24), (0, 25), (24, 0), (24, 24), (24, 25)]


def test_views_are_averaged_over_their_probabilities(network, images):
    scales = [0.75, 1.0, 1.5]
    found = label(network, images, flip=True, scales=scales)
    expected = []
    for image, (height, width), original_size in zip(images, SIZES, ORIGINAL_SIZES, strict=True):
        total = torch.zeros(CLASSES, *original_size)
        for scale in scales:
            size = (round(height * scale), round(width * scale))
            inside = image[None, :, :height, :width]
            scaled = F.interpolate(inside, size, mode="bilinear", align_corners=False) if scale != 1 else inside
            for flip in (False, True):
                seen = scaled.flip(-1) if flip else scaled
                # Padded as the batch is: to its 64 pixels, or to what its larger image needs.
                tall, wide = (
                    (64, 64) if scale == 1 else (-(-round(40 * scale) // 32) * 32, -(-round(61 * scale) // 32) * 32)
                )
                seen = F.pad(seen, (0, wide - size[1], 0, tall - size[0]))[0]
                with torch.no_grad():
                    probabilities = whole(network, seen, size, original_size).softmax(0)
                total += probabilities.flip(-1) if flip else probabilities
        expected.append(total)
    check(found, expected)
    assert any((one != other).any() for one, other in zip(found, label(network, images), strict=True))


def test_windows_and_views_go_together(network, images):
    found = label(network, images, mode="slide", window=(32, 32), stride=(16, 16), flip=True)
    expected = []
    for image, (height, width), original_size in zip(images, SIZES, ORIGINAL_SIZES, strict=True):
        inside = image[:, :height, :width]
        with torch.no_grad():
            plain, mirrored = (
                slide(network, seen, (height, width), original_size, (32, 32), (16, 16)).softmax(0)
                for seen in (inside, inside.flip(-1))
            )
        expected.append(plain + mirrored.flip(-1))
    check(found, expected)


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"mode": "slide", "window": (32, 32), "stride": (24, 24)}])
def test_a_few_classes_at_a_time_give_the_same_labels(network, images, options, monkeypatch):
    at_once = label(network, images, **options)
    monkeypatch.setattr(_inference, "_CHUNK", 1)
    for one, other in zip(at_once, label(network, images, **options), strict=True):
        assert (one != other).sum() <= 1  # a sum of exponentials in another order


def test_large_maps_are_never_made_of_all_classes(monkeypatch):
    """150 classes at 2048x1024 would be 1.2 GB."""
    made = []
    interpolate = F.interpolate

    def noted(*arguments, **options):
        result = interpolate(*arguments, **options)
        made.append(result.numel())
        return result

    monkeypatch.setattr(F, "interpolate", noted)
    monkeypatch.setattr(_inference, "_CHUNK", 2**16)
    logits = torch.randn(1, 150, 4, 8)
    (mask,) = Inference().label(
        lambda images: logits, torch.zeros(1, 3, 64, 128), [(64, 128)], [(128, 256)], align_corners=False
    )
    assert mask.shape == (128, 256)
    assert max(made) <= 2**16
    expected = interpolate(interpolate(logits, (64, 128), mode="bilinear"), (128, 256), mode="bilinear")[0].argmax(0)
    assert (mask != expected).sum() <= 2


def test_pixels_whose_numbers_are_not_finite_get_no_label(images):
    logits = torch.zeros(2, CLASSES, 16, 16)
    logits[0, 3] = 1.0
    logits[0, 5, 0, 0] = torch.nan
    logits[1, 2] = torch.inf
    for options in ({}, {"flip": True}):
        first, second = label(lambda seen: logits, images, **options)
        assert first[0, 0] == -1
        assert first[-1, first.shape[1] // 2] == 3
        assert (second == -1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slided"}, "inference must be whole or slide, not 'slided'. Did you mean 'slide'"),
        ({"mode": "slide", "window": (16, 512)}, "window must be 32 pixels or more"),
        ({"mode": "slide", "window": (64, 64), "stride": (32, 65)}, r"at most the window \(64, 64\)"),
        ({"mode": "slide", "window": (64, 64), "stride": (0, 32)}, "window_stride must be 1 or more"),
        ({"scales": ()}, "test_scales must be one or more positive factors"),
        ({"scales": (1.0, -2.0)}, "test_scales must be one or more positive factors"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Inference(**options)
