"""Faster and Mask R-CNN with MMDetection's weights: losses, gradients, detections, masks, COCO's numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

_SPEC = importlib.util.spec_from_file_location("detector_pairs", Path(__file__).with_name("detector_pairs.py"))
pairs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pairs)

CLASSES = 5
BATCHES = {
    "one": ([(96, 128)], [6], [(48, 64)]),
    "unequal": ([(128, 100), (60, 150), (96, 64)], [12, 3, 7], [(200, 157), (60, 150), (90, 61)]),
    "empty_first": ([(96, 128), (96, 100)], [0, 5], [(48, 64), (60, 63)]),
    "empty_last": ([(96, 128), (96, 100)], [5, 0], [(48, 64), (60, 63)]),
    "nothing": ([(64, 90), (96, 64)], [0, 0], [(64, 90), (33, 22)]),
    "crowded": ([(128, 160)], [300], [(61, 80)]),
}
#: Images of different sizes and objects of all sizes say most.
FAST_OR_SLOW = [name if name == "unequal" else pytest.param(name, marks=pytest.mark.slow) for name in BATCHES]


@pytest.fixture(scope="module", params=["faster_rcnn", "mask_rcnn"])
def pair(request):
    return (request.param, *pairs.make_pair(request.param, CLASSES))


@pytest.mark.parametrize("batch", FAST_OR_SLOW)
def test_losses_and_gradients_are_equal(pair, batch):
    kind, ours, theirs = pair
    sizes, counts, originals = BATCHES[batch]
    images, targets = pairs.make_batch(sizes, counts, originals, CLASSES, masks=kind == "mask_rcnn")
    expected, expected_gradients = pairs.seeded_step(
        theirs, lambda: pairs.loss_of(theirs, images, pairs.samples_of(images, sizes, targets, originals))
    )
    found, gradients = pairs.seeded_step(ours, lambda: ours.loss(images, sizes, targets))
    assert found.keys() == expected.keys()
    assert len(found) == (5 if kind == "mask_rcnn" else 4)
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-9)
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}  # DDP: none is left out
    pairs.assert_same_gradients(gradients, expected_gradients)
    if sum(counts):
        assert min(found.values()) > 0


@pytest.mark.parametrize(("batch", "rescale"), [pytest.param("one", False, marks=pytest.mark.slow), ("unequal", True)])
def test_detections_are_equal_to_the_last_bit(pair, batch, rescale):
    _, ours, theirs = pair
    sizes, counts, originals = BATCHES[batch]
    images, _ = pairs.make_batch(sizes, counts, originals, CLASSES, masks=False)
    pairs.assert_same_detections(ours, theirs, images, sizes, originals, rescale=rescale)


@pytest.mark.slow
def test_thresholds_and_limits_are_the_same():
    options = {"score_threshold": 0.3, "nms_threshold": 0.2, "detections_per_image": 9}
    ours, theirs = pairs.make_pair("mask_rcnn", CLASSES, seed=1, **options)
    sizes, counts, originals = BATCHES["unequal"]
    images, _ = pairs.make_batch(sizes, counts, originals, CLASSES, masks=False)
    with torch.no_grad():
        expected = theirs.eval().predict(images, pairs.samples_of(images, sizes, None, originals))
        found = ours.eval().predict(images, sizes, originals)
    for own, sample in zip(found, expected, strict=True):
        assert 0 < len(own["scores"]) <= 9
        assert torch.equal(own["boxes"], sample.pred_instances.bboxes)
        assert own["rles"] == pairs.encoded(sample.pred_instances.masks)


@pytest.mark.realdata
def test_real_images_and_coco_numbers(real_data, tmp_path):
    pairs.check_real("mask_rcnn", real_data, 4, 160, tmp_path)


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_all_real_images_and_coco_numbers(real_data, tmp_path, kind):
    least = 0.001 if kind == "mask_rcnn" else 0.01  # of random masks so few match in all the images
    pairs.check_real(kind, real_data, 50, 320, tmp_path, least)


@pytest.mark.slow
@pytest.mark.realdata
def test_losses_on_real_images_and_masks(real_data):
    ours, theirs = pairs.make_pair("mask_rcnn", 1)
    truth, batches = pairs.real_batches(real_data, 4, 192)
    images, sizes, originals, ids = batches[0]
    targets = pairs.real_targets(truth, ids, sizes, originals)
    expected, _ = pairs.seeded_step(
        theirs, lambda: pairs.loss_of(theirs, images, pairs.samples_of(images, sizes, targets, originals))
    )
    found, _ = pairs.seeded_step(ours, lambda: ours.loss(images, sizes, targets))
    assert found == pytest.approx(expected, rel=2e-6)
    assert min(found.values()) > 0
