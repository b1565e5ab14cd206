"""RetinaNet with MMDetection's weights: losses, gradients, detections."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("detector_pairs", Path(__file__).with_name("detector_pairs.py"))
pairs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pairs)

CLASSES = 5
BATCHES = {
    "one": ([(128, 160)], [6], [(64, 80)]),
    "unequal": ([(128, 100), (60, 150), (96, 64)], [12, 3, 7], [(200, 157), (60, 150), (90, 61)]),
    "empty_first": ([(96, 128), (96, 100)], [0, 5], [(48, 64), (60, 63)]),
    "nothing": ([(64, 90), (96, 64)], [0, 0], [(64, 90), (33, 22)]),
    "crowded": ([(128, 160)], [300], [(61, 80)]),
}
#: Images of different sizes and objects of all sizes say most.
FAST_OR_SLOW = [name if name == "unequal" else pytest.param(name, marks=pytest.mark.slow) for name in BATCHES]


@pytest.fixture(scope="module")
def pair():
    return pairs.make_pair("retinanet", CLASSES)


@pytest.mark.parametrize("batch", FAST_OR_SLOW)
def test_losses_and_gradients_are_equal(pair, batch):
    ours, theirs = pair
    sizes, counts, originals = BATCHES[batch]
    images, targets = pairs.make_batch(sizes, counts, originals, CLASSES, masks=False)
    samples = pairs.samples_of(images, sizes, targets, originals)
    expected, expected_gradients = pairs.seeded_step(theirs, lambda: pairs.loss_of(theirs, images, samples))
    found, gradients = pairs.seeded_step(ours, lambda: ours.loss(images, sizes, targets))
    assert found == pytest.approx(expected, rel=2e-6, abs=1e-9)
    assert found["loss_cls"] > 0
    pairs.assert_same_gradients(gradients, expected_gradients)


@pytest.mark.parametrize(("batch", "rescale"), [pytest.param("one", False, marks=pytest.mark.slow), ("unequal", True)])
def test_detections_are_equal_to_the_last_bit(pair, batch, rescale):
    ours, theirs = pair
    sizes, counts, originals = BATCHES[batch]
    images, _ = pairs.make_batch(sizes, counts, originals, CLASSES, masks=False)
    pairs.assert_same_detections(ours, theirs, images, sizes, originals, rescale=rescale)


@pytest.mark.slow
@pytest.mark.realdata
def test_all_real_images_and_coco_numbers(real_data, tmp_path):
    pairs.check_real("retinanet", real_data, 50, 320, tmp_path)


@pytest.mark.realdata
def test_real_images_and_coco_numbers(real_data, tmp_path):
    pairs.check_real("retinanet", real_data, 4, 160, tmp_path)
