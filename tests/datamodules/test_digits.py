"""The embedded digits: deterministic, cached, and a sound COCO data set."""

from __future__ import annotations

import multiprocessing

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

from effvit.datamodules import _digit_scenes
from effvit.datamodules._digit_scenes import SceneOptions, make_scenes
from effvit.datamodules.digits import HandwrittenDigits
from effvit.datamodules.inspection import inspect_coco
from effvit.errors import ConfigError

SMALL = {"num_train": 24, "num_val": 12, "scene_size": 96, "num_workers": 0}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def scenes(effvit_cache):
    data = HandwrittenDigits(**SMALL, masks=True)
    data.prepare_data()
    assert data.root.parent == effvit_cache
    return data


def test_same_bytes_each_time(scenes, tmp_path):
    again = HandwrittenDigits(str(tmp_path), **SMALL)
    again.prepare_data()
    assert again.root.parent == tmp_path
    first = contents(scenes.root)
    assert len(first) == 24 + 12 + 2
    assert contents(again.root) == first


def test_scenes_do_not_depend_on_their_number(scenes, tmp_path):
    fewer = make_scenes(tmp_path / "few", SceneOptions(3, 2, 96, 0))
    assert contents(fewer / "train").items() <= contents(scenes.root / "train").items()


def test_another_seed_gives_other_scenes(scenes, tmp_path):
    other = make_scenes(tmp_path / "other", SceneOptions(2, 1, 96, 1))
    assert contents(other / "train").items().isdisjoint(contents(scenes.root / "train").items())


def test_made_once(scenes, monkeypatch):
    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr(_digit_scenes, "_write_split", fail)
    data = HandwrittenDigits(**SMALL)
    data.prepare_data()
    data.setup("fit")


def test_an_interrupted_making_leaves_nothing(tmp_path, monkeypatch):
    def fail(root, *_):
        (root / "half.jpg").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(_digit_scenes, "_write_split", fail)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(tmp_path / "digits", SceneOptions(2, 1, 96, 0))
    assert list(tmp_path.iterdir()) == []


def test_processes_may_make_them_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    options = SceneOptions(6, 3, 96, 0)
    makers = [context.Process(target=make_scenes, args=(tmp_path / "digits", options)) for _ in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(60)
    assert [maker.exitcode for maker in makers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert len(contents(tmp_path / "digits")) == 6 + 3 + 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_sound_coco(scenes, split):
    path = scenes.root / "annotations" / f"instances_{split}.json"
    report = inspect_coco(path, scenes.root / split)
    assert report.ok, str(report)
    assert report.num_crowd == 0
    reference = COCO(str(path))
    assert len(reference.anns) == report.num_objects > 0
    for annotation in reference.anns.values():
        mask = reference.annToMask(annotation)
        assert mask.sum() == annotation["area"]
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y, w, h = annotation["bbox"]
        assert (x, y, x + w, y + h) == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert 0.1 * 96 < h < 0.8 * 96
        assert annotation["area"] > 0.08 * w * h


def test_training_and_validation_use_other_digits(monkeypatch, tmp_path):
    used = {}
    compose = _digit_scenes._compose

    def spy(random, digits, labels, grain):
        used.setdefault(len(digits), digits)
        return compose(random, digits, labels, grain)

    monkeypatch.setattr(_digit_scenes, "_compose", spy)
    make_scenes(tmp_path / "digits", SceneOptions(1, 1, 96, 0))
    val, train = (used[number] for number in sorted(used))
    assert len(val) + len(train) == len(load_digits().images) == 1797
    assert not {digit.tobytes() for digit in train} & {digit.tobytes() for digit in val}


def test_batches(scenes):
    assert scenes.categories == {digit: str(digit) for digit in range(10)}
    scenes.setup("fit")
    images, targets = next(iter(scenes.train_dataloader()))
    assert images.shape == (16, 3, 96, 96)
    for image, target in zip(images, targets, strict=True):
        assert target["size"] == target["original_size"] == (96, 96)
        assert target["masks"].shape == (len(target["labels"]), 96, 96)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x0, y0, x1, y1 = (int(value) for value in box)
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            # Ink stands out against the paper right around it.
            inside = image.float().mean(0)[y0:y1, x0:x1]
            ink = mask[y0:y1, x0:x1].bool()
            if (~ink).any():
                assert (inside[ink].mean() - inside[~ink].mean()).abs() > 10
    assert {int(label) for target in targets for label in target["labels"]} <= set(range(10))


def test_every_class_and_size_occurs(scenes):
    scenes.setup("fit")
    targets = [target for _, batch in scenes.train_dataloader() for target in batch]
    assert {int(label) for target in targets for label in target["labels"]} == set(range(10))
    heights = torch.cat([target["boxes"][:, 3] - target["boxes"][:, 1] for target in targets])
    # Sizes reach over most of the range that the scenes are drawn from.
    assert heights.max() / heights.min() > 0.8 * _digit_scenes._LARGEST / _digit_scenes._SMALLEST > 1.5


@pytest.mark.parametrize("option", [{"num_train": 0}, {"num_val": 0}, {"scene_size": 16}])
def test_options_out_of_range(option):
    with pytest.raises(ConfigError, match="must be 1 or more and scene_size 64 or more"):
        HandwrittenDigits(**option)
