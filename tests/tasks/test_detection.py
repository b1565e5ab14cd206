"""The detection task: what it feeds to the network, what it trains, and what it reports."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from effvit.errors import CheckpointError, ConfigError
from effvit.tasks import Detection
from effvit.tasks._task import freeze_norm_statistics, normalise

CLASSES = {1: "disc", 3: "bar", 90: "ring"}


def small(**options):
    return Detection("efficientvit_m0", CLASSES, pyramid_channels=16, head_convs=1, **options)


@pytest.fixture(scope="module")
def task():
    return small()


def batch(sizes=((64, 96), (50, 70))):
    targets = [
        {
            "image_id": number,
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]),
            "labels": torch.tensor([number]),
            "size": size,
            "original_size": (size[0] * 2, size[1] * 3),
            "file_name": f"{number}.jpg",
        }
        for number, size in enumerate(sizes)
    ]
    return torch.randint(0, 256, (len(sizes), 3, 64, 96), dtype=torch.uint8), targets


def test_images_are_normalised_and_then_padded_with_zeros():
    images, targets = batch()
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = normalise(images, mean, std, [target["size"] for target in targets])
    mean, std = torch.tensor(mean), torch.tensor(std)
    for number, (height, width) in enumerate(target["size"] for target in targets):
        inside = (images[number].double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        torch.testing.assert_close(
            found[number, :, :height, :width].double(), inside[:, :height, :width], rtol=0, atol=1e-5
        )
        assert not found[number, :, height:].any()
        assert not found[number, :, :, width:].any()
    assert images.dtype == torch.uint8


def test_the_backbones_statistics_stay_fixed_and_its_affine_parameters_train(task):
    task.train()
    norms = [m for m in task.detector.pyramid.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    images, sizes = task.prepare(batch())
    sum(task.detector.loss(images, sizes, batch()[1]).values()).backward()
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert all(norm.weight.requires_grad and norm.weight.grad is not None for norm in norms)
    assert task.detector.training
    task.zero_grad()
    free = small(norm_eval=False).train()
    assert all(m.training for m in free.modules())


def test_frozen_statistics_cover_every_kind_of_batch_norm():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.LayerNorm(2)).train()
    freeze_norm_statistics(network)
    assert [module.training for module in network] == [False, False, False, True]


def test_attention_biases_alone_are_not_decayed(task):
    groups = task.parameter_groups()
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    plain = {names[id(parameter)] for parameter in groups[1]["params"]}
    assert groups[1]["weight_decay"] == 0.0
    assert plain
    assert all(name.endswith("attention_biases") for name in plain)
    assert len(groups[0]["params"]) + len(plain) == len(list(task.parameters()))


def test_the_learning_rate_warms_up_and_then_steps(task):
    optimizers, schedules = task.configure_optimizers()
    assert optimizers[0].defaults["lr"] == 1e-4
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-7)
    assert [schedule["interval"] for schedule in schedules] == ["step"]
    for _ in range(500):
        optimizers[0].step()
        schedules[0]["scheduler"].step()
    assert optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-4)


def test_boxes_are_asked_for_in_pixels_of_the_original_image(task, monkeypatch):
    asked = []

    def predict(images, sizes, original_sizes):
        asked.append((tuple(images.shape), sizes, original_sizes))
        return [{"boxes": torch.zeros(0, 4, requires_grad=True), "rles": []}] * len(sizes)

    monkeypatch.setattr(task.detector, "predict", predict)
    found = task.detect(batch())
    assert asked == [((2, 3, 64, 96), [(64, 96), (50, 70)], [(128, 288), (100, 210)])]
    assert [(one["boxes"].requires_grad, one["rles"]) for one in found] == [(False, []), (False, [])]


def test_weights_of_another_network_are_refused_with_the_reason(task):
    with pytest.raises(CheckpointError, match="does not fit a detection network on 'efficientvit_m0'"):
        task.load_weights(
            Detection("efficientvit_m1", CLASSES, pyramid_channels=16, head_convs=1).state_dict(), "a.ckpt"
        )
    with pytest.raises(
        CheckpointError, match=r"with backbone_options \{'a': 1\}.* --model.backbone_options '\{\"a\": 1\}'"
    ):
        task.load_weights({}, "a.ckpt", {"backbone": "efficientvit_m0", "backbone_options": {"a": 1}})
    other = Detection("efficientvit_m0", {0: "one"}, pyramid_channels=16, head_convs=1).state_dict()
    with pytest.raises(CheckpointError, match=r"a\.ckpt was trained on 1 classes, the data has 3: disc, bar, ring"):
        task.load_weights(other, "a.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"detector": "retina"}, "there is no detector 'retina'. Did you mean 'retinanet'"),
        ({"score_threshold": -0.1}, r"score_threshold must be in \[0, 1\]"),
        ({"nms_threshold": 0.0}, r"nms_threshold must be in \(0, 1\]"),
        ({"pyramid_channels": 0}, "out_channels of a pyramid must be at least 1"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        Detection("efficientvit_m0", CLASSES, **{"pyramid_channels": 16, "head_convs": 1, **options})


def test_a_checkpoint_rebuilds_the_task_without_its_starting_point(tiny_run):
    task = Detection.load_from_checkpoint(tiny_run / "best.ckpt", weights_only=True)
    assert task.hparams["pretrained"] is False
    assert task.categories.names == tuple("0123456789")


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_eight_real_images_are_learnt_by_heart(detector, cli, real_data, tmp_path):
    """AP of at least 0.5, of boxes and of masks, on the eight COCO images that the detector was trained on."""
    source = real_data / "coco_tiny"
    data = json.loads((source / "annotations" / "instances_train2017.json").read_text())
    counts = {image["id"]: 0 for image in data["images"]}
    for annotation in data["annotations"]:
        counts[annotation["image_id"]] += not annotation["iscrowd"]
    chosen = sorted(number for number in counts if 1 <= counts[number] <= 6)[:8]
    data["images"] = [image for image in data["images"] if image["id"] in chosen]
    data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in chosen]
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
        (tmp_path / split).symlink_to(source / "train2017")
    done = cli.run(
        "fit", "-c", "detection/finetune", "--data.root", tmp_path, "--data.image_size", "[256,192]",
        "--data.flip", "0", "--data.num_workers", "0", "--model.pyramid_channels", "64", "--trainer.max_epochs", "250",
        "--model.lr_scheduler.milestones", "[200]", "--model.warmup_steps", "20", "--ema_decay", "0.95",
        "--trainer.check_val_every_n_epoch", "50", "--run_dir", tmp_path / "run", "--model.detector", detector,
        "--model.head_channels", "256", "--model.roi_samples", "128",
    )  # fmt: skip
    assert done.code == 0, done.err
    done = cli.run("validate", "--checkpoint", tmp_path / "run" / "last.ckpt")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "validate" / "metrics.json").read_text())
    assert metrics["val/AP"] >= 0.5
    assert detector == "retinanet" or metrics["val/mask_AP"] >= 0.5
