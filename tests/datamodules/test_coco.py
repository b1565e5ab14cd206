"""CocoDetection on small data sets: targets, categories, order, shared memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.reduction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from effvit.categories import Categories
from effvit.datamodules._annotations import paint_segmentation
from effvit.datamodules._samplers import ShapeBatches, batched_by_shape
from effvit.datamodules.coco import CocoDetection
from effvit.errors import ConfigError, DatasetError


def load(root, stage="fit", **options):
    data = CocoDetection(str(root), **{"num_workers": 0, "image_size": (192, 128), "flip": 0.0, **options})
    data.setup(stage)
    return data


def samples(loader):
    return {
        target["image_id"]: (image, target)
        for images, targets in loader
        for image, target in zip(images, targets, strict=True)
    }


@pytest.mark.parametrize("ids", [{1: "a", 3: "b", 90: "c"}, {0: "a", 1: "b", 2: "c"}, {1: "a", 2: "b", 3: "c"}])
def test_category_ids_go_to_labels_and_back(tmp_path, make_coco, save_coco, ids):
    boxes = [(7, category_id, (4.0 * n, 4.0, 10.0, 12.0)) for n, category_id in enumerate(reversed(ids))]
    save_coco(tmp_path, make_coco([(7, 96, 64)], boxes, ids), "train")
    save_coco(tmp_path, make_coco([(8, 96, 64)], [], ids), "val")
    data = CocoDetection(str(tmp_path), num_workers=0)
    assert data.categories == ids  # before setup
    assert data.num_classes == 3
    data.setup("fit")
    _, targets = next(iter(data.train_dataloader()))
    assert targets[0]["labels"].tolist() == [2, 1, 0]
    categories = Categories(data.categories)
    assert [categories.id_of(label) for label in targets[0]["labels"].tolist()] == list(reversed(ids))


def test_targets(tmp_path, make_coco, save_coco):
    coco = make_coco([(7, 96, 64)], [(7, 3, (10.0, 20.0, 30.0, 16.0)), (7, 1, (0.0, 0.0, 96.0, 64.0))])
    coco["annotations"][1]["iscrowd"] = 1
    save_coco(tmp_path, coco, "train")
    save_coco(tmp_path, coco, "val")
    for loader in (load(tmp_path).train_dataloader(), load(tmp_path).val_dataloader()):
        images, (target,) = next(iter(loader))
        assert images.shape == (1, 3, 128, 192)
        assert images.dtype == torch.uint8
        assert target["boxes"].tolist() == [[20.0, 40.0, 80.0, 72.0]]  # the crowd region is no target
        assert target["boxes"].dtype == torch.float32
        assert target["labels"].tolist() == [1]
        assert target["labels"].dtype == torch.int64
        assert (target["size"], target["original_size"]) == ((128, 192), (64, 96))
        assert (target["image_id"], target["file_name"]) == (7, "000007.jpg")
        assert "masks" not in target
        assert type(target["boxes"]) is torch.Tensor


def test_images_without_objects(coco_root):
    assert sorted(samples(load(coco_root).train_dataloader())) == [1, 2, 3, 4, 6, 7, 8, 9, 11, 12]
    every = samples(load(coco_root, keep_empty=True).train_dataloader())
    assert sorted(every) == list(range(1, 13))
    assert every[5][1]["boxes"].shape == (0, 4)
    assert every[5][1]["labels"].shape == (0,)
    assert len(samples(load(coco_root).val_dataloader())) == 6  # evaluation keeps all


def test_masks_are_pycocotools_masks(tmp_path, make_coco, save_coco):
    coco = make_coco([(7, 96, 64)], [(7, 3, (10.0, 20.0, 30.0, 16.0)), (7, 1, (50.0, 2.0, 20.0, 40.0))] * 2)
    runs = [[100, 20, 96 * 64 - 120], [0, 5, 96 * 64 - 5]]
    for annotation, counts in zip(coco["annotations"][2:], runs, strict=True):
        annotation["segmentation"] = {"size": [64, 96], "counts": counts}
    save_coco(tmp_path, coco, "train")
    save_coco(tmp_path, coco, "val")
    _, (target,) = next(iter(load(tmp_path, masks=True).train_dataloader()))
    reference = COCO(str(tmp_path / "annotations" / "instances_train.json"))
    expected = np.stack([reference.annToMask(annotation) for annotation in reference.loadAnns([1, 2, 3, 4])])
    assert target["masks"].dtype == torch.uint8
    assert (target["masks"].numpy() == expected).all()


corner = st.tuples(st.floats(-20, 120), st.floats(-20, 90))


@given(st.lists(st.lists(corner, min_size=3, max_size=8), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_painted_polygons_have_pycocotools_pixels(polygons):
    segmentation = [[value for point in polygon for value in point] for polygon in polygons]
    painted = np.zeros((64, 96), dtype=np.uint8)
    paint_segmentation(painted, segmentation)
    assert (painted == mask_api.decode(mask_api.merge(mask_api.frPyObjects(segmentation, 64, 96)))).all()


def test_ground_truth_is_what_pycocotools_loads(coco_root):
    path = coco_root / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    coco["annotations"][0]["iscrowd"] = 1
    for annotation in coco["annotations"][1:]:
        del annotation["area"], annotation["iscrowd"]
    path.write_text(json.dumps(coco))
    truth = CocoDetection(str(coco_root)).ground_truth("validate")
    assert truth["images"] == coco["images"]
    assert [a["iscrowd"] for a in truth["annotations"]] == [1] + [0] * (len(coco["annotations"]) - 1)
    second = truth["annotations"][1]
    assert second["area"] == second["bbox"][2] * second["bbox"][3]
    assert CocoDetection(str(coco_root)).ground_truth("test") == truth  # no test split: the validation split


def test_train_order_and_pixels_do_not_depend_on_workers(coco_root):
    options = {"scale_jitter": (0.5, 1.0), "flip": 0.5, "batch_size": 3}
    alone = list(load(coco_root, **options).train_dataloader())
    torch.manual_seed(5)
    torch.rand(3)
    parallel = list(load(coco_root, **options, num_workers=2).train_dataloader())
    for (a, ta), (b, tb) in zip(alone, parallel, strict=True):
        assert torch.equal(a, b)
        assert [t["image_id"] for t in ta] == [t["image_id"] for t in tb]


def test_loading_leaves_the_global_random_numbers_alone(coco_root):
    data = load(coco_root, scale_jitter=(0.5, 1.0), flip=0.5)
    before = torch.get_rng_state()
    for _ in data.train_dataloader():
        pass
    assert torch.equal(before, torch.get_rng_state())


def pickled_size(value):
    buffer = io.BytesIO()
    multiprocessing.reduction.ForkingPickler(buffer).dump(value)
    return buffer.tell()


def big_and_small(root, make_coco, save_coco, number):
    images = [(i, 96, 64) for i in range(1, number + 1)]
    coco = make_coco(images, [(i, 3, (1.0 * (i % 50), 2.0, 30.0, 20.0)) for i, *_ in images])
    head = {**coco, "images": coco["images"][:2], "annotations": coco["annotations"][:2]}
    save_coco(root, head, "val")
    save_coco(root, head, "train")
    (root / "annotations" / "instances_train.json").write_text(json.dumps(coco))
    for entry in coco["images"][2:]:
        (root / "train" / entry["file_name"]).touch()
    return load(root, masks=True).train_dataloader().dataset


def test_annotations_are_shared_with_workers_not_copied(tmp_path, make_coco, save_coco):
    few = big_and_small(tmp_path / "few", make_coco, save_coco, 2)
    many = big_and_small(tmp_path / "many", make_coco, save_coco, 500)
    columns = [value for value in vars(many.table).values() if isinstance(value, torch.Tensor)]
    assert len(columns) == 7
    assert all(column.is_shared() for column in [*columns, *many.table._segments])
    # What a spawned worker receives does not grow with the data set, and is enough to load from.
    assert pickled_size(many) < pickled_size(few) + 200 < 10_000


@pytest.mark.slow  # a new interpreter imports torch and Lightning
def test_a_spawned_worker_loads_from_what_is_shared(tmp_path, make_coco, save_coco):
    many = big_and_small(tmp_path, make_coco, save_coco, 200)
    loader = DataLoader(many, sampler=[1], num_workers=1, multiprocessing_context="spawn", collate_fn=list)
    ((image, target),) = next(iter(loader))
    assert image.shape == (3, 128, 192)
    assert (target["image_id"], target["boxes"].tolist()) == (2, [[4.0, 4.0, 64.0, 44.0]])


def test_batches_hold_one_orientation():
    is_wide = torch.tensor([i % 3 == 0 for i in range(30)])
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    grouped = batched_by_shape(order, is_wide, 4)
    assert sorted(grouped) == list(range(30))
    batches = [grouped[i : i + 4] for i in range(0, 30, 4)]
    mixed = [batch for batch in batches if len({bool(is_wide[i]) for i in batch}) == 2]
    assert len(mixed) <= 1


def test_ranks_share_the_images(coco_root):
    is_wide = torch.ones(11, dtype=torch.bool)
    shares = [[key for batch in ShapeBatches(is_wide, 2, 0, (3, rank)) for key in batch] for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    indices = [index for share in shares for _, index in share]
    assert set(indices) == set(range(11))
    assert len(indices) == 12  # one image is repeated, so that every process runs as many batches


class FakeTrainer:
    def __init__(self, world_size, rank, device="cpu"):
        self.world_size, self.global_rank = world_size, rank
        self.strategy = SimpleNamespace(root_device=torch.device(device))


@pytest.mark.parametrize(("device", "pinned"), [(None, False), ("cpu", False), ("cuda:0", True)])
def test_memory_is_pinned_for_cuda_devices_only(coco_root, monkeypatch, device, pinned):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = load(coco_root)
    data.trainer = None if device is None else FakeTrainer(1, 0, device)
    assert data.train_dataloader().pin_memory is pinned
    assert data.val_dataloader().pin_memory is pinned


def test_checkpoints_can_read_how_images_are_prepared(coco_root):
    data = load(coco_root, image_size=(256, 192), pad_divisor=64)
    assert (data.image_size, data.pad_divisor) == ((256, 192), 64)
    images, _ = next(iter(data.val_dataloader()))
    assert images.shape[-2] % 64 == images.shape[-1] % 64 == 0


def test_evaluation_gives_every_rank_as_many_batches(coco_root):
    seen, lengths = set(), set()
    for rank in range(4):
        data = load(coco_root, "validate")
        data.trainer = FakeTrainer(4, rank)
        loader = data.val_dataloader()
        lengths.add(len(loader))
        seen |= set(samples(loader))
    assert lengths == {2}
    assert seen == set(range(101, 107))


def test_tiny_boxes_are_no_targets(tmp_path, make_coco, save_coco):
    coco = make_coco([(7, 96, 64)], [(7, 3, (10.0, 20.0, 0.4, 16.0)), (7, 3, (10.0, 20.0, 30.0, 16.0))])
    save_coco(tmp_path, coco, "train")
    save_coco(tmp_path, coco, "val")
    _, (target,) = next(iter(load(tmp_path).train_dataloader()))
    assert len(target["boxes"]) == 1


def test_splits_with_other_categories(coco_root):
    path = coco_root / "annotations" / "instances_val.json"
    coco = json.loads(path.read_text())
    coco["categories"][0]["name"] = "plate"
    path.write_text(json.dumps(coco))
    with pytest.raises(DatasetError, match=r"another split declares.*all splits need the same"):
        load(coco_root)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"faults": "skp"}, "Did you mean 'skip'"),
        ({"batch_size": 0}, "batch_size must be 1 or more, found 0"),
        ({"image_size": (0, 800)}, r"image_size\[0\] must be 1 or more"),
        ({"flip": 2.0}, "flip is a probability"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
        ({"scale_jitter": (1.5, 1.0)}, "scale_jitter must be a range"),
    ],
)
def test_options_out_of_range(coco_root, option, message):
    with pytest.raises(ConfigError, match=message):
        CocoDetection(str(coco_root), **option)
