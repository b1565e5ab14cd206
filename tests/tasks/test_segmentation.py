"""The segmentation task: what it feeds to the network, what it trains, and what it reports."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.optim import SGD, AdamW

from effvit.errors import CheckpointError, ConfigError
from effvit.tasks import Segmentation, segmentation
from effvit.tasks.schedules import Poly

CLASSES = {0: "floor", 4: "disc", 90: "ring"}
FAMILIES = (
    "efficientvit_m0",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "dynamicvit_tiny",
)
SMALL = {"pyramid_channels": 16, "head_channels": 16}


def small(backbone="efficientvit_m0", **options):
    torch.manual_seed(0)
    return Segmentation(backbone, CLASSES, **{**SMALL, **options})


@pytest.fixture(scope="module")
def task():
    return small()


def batch(number=2, size=(64, 64), *, original=False, seed=1):
    """Images padded to a common size; masks of the batch to train on, of the file to evaluate."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (number, 3, *size), dtype=torch.uint8, generator=generator)
    targets = []
    for index in range(number):
        valid = (size[0] - 6 * index, size[1] - 9 * index)
        file_size = (valid[0] * 2, valid[1] + 7)
        images[index, :, valid[0] :] = 0
        images[index, :, :, valid[1] :] = 0
        shape = file_size if original else size
        mask = torch.randint(-1, len(CLASSES), shape, dtype=torch.int16, generator=generator)
        if not original:
            mask[valid[0] :] = -1
            mask[:, valid[1] :] = -1
        targets.append(
            {
                "image_id": index + 1,
                "file_name": f"{index}.jpg",
                "size": valid,
                "original_size": file_size,
                "mask": mask,
            }
        )
    return images, targets


def losses_of(task, data):
    images, _ = task.prepare(data)
    return task.criterion(task.segmenter(images), torch.stack([target["mask"] for target in data[1]]))


class Batches(LightningDataModule):
    """Some batches, in a fixed order."""

    def __init__(self, *batches, batch_size=2, validation=()):
        super().__init__()
        self.batches, self.batch_size, self.validation = list(batches), batch_size, list(validation)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.batches, batch_size=None)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.validation, batch_size=None)


def fit(task, data, ckpt_path=None, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(task, datamodule=data, ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("head", ["semantic_fpn", "deeplabv3"])
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_trains(backbone, head):
    """One backward pass: finite losses, and a finite gradient in every parameter, as distributed training asks."""
    task = small(backbone, head=head, auxiliary_weight=0.4).train()
    losses = losses_of(task, batch())
    assert list(losses) == ["cross_entropy", "auxiliary"]
    assert all(math.isfinite(value.item()) for value in losses.values()), losses
    sum(losses.values()).backward()
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())


def test_label_maps_have_the_size_of_the_files(task):
    task.eval()
    data = batch(original=True)
    with torch.no_grad():
        found = task.segment(data)
        images, _ = task.prepare(data)
        logits = task.segmenter(images)["logits"].float()
    for mask, row, target in zip(found, logits, data[1], strict=True):
        height, width = target["size"]
        pixels = F.interpolate(row[None], (64, 64), mode="bilinear")[..., :height, :width]
        expected = F.interpolate(pixels, target["original_size"], mode="bilinear")[0].argmax(0)
        assert mask.dtype == torch.int16
        assert (mask != expected).sum() <= 2
    predicted = task.predict_step(data, 0)
    assert [list(one) for one in predicted] == [["mask"], ["mask"]]
    assert all(torch.equal(one["mask"], mask) for one, mask in zip(predicted, found, strict=True))


def test_the_evaluator_gets_what_the_callbacks_get(task):
    task.eval()
    data = batch(original=True)
    task.evaluator.reset()
    with torch.no_grad():
        found = task.validation_step(data, 0)["masks"]
    confusion = task.evaluator.compute().confusion
    task.evaluator.reset()
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for mask, target in zip(found, data[1], strict=True):
        for truth in range(3):
            for chosen in range(3):
                expected[truth, chosen] += int(((target["mask"] == truth) & (mask == chosen)).sum())
    assert torch.equal(confusion, expected)


def test_a_fit_logs_miou_of_the_data_set():
    task = small(optimizer=lambda groups: AdamW(groups, lr=1e-3))
    validation = batch(original=True, seed=5)
    trainer = fit(task, Batches(batch(), validation=[validation]))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    assert {"train/loss", "val/mIoU", "val/mAcc", "val/aAcc"} <= set(logged)
    assert logged["val/mIoU"] == pytest.approx(task.result.metrics["mIoU"])
    task.eval()
    with torch.no_grad():
        found = task.segment(validation)
    intersections, unions = torch.zeros(3), torch.zeros(3)
    for mask, target in zip(found, validation[1], strict=True):
        known = target["mask"] >= 0
        for label in range(3):
            truth, chosen = (target["mask"] == label) & known, (mask == label) & known
            intersections[label] += (truth & chosen).sum()
            unions[label] += (truth | chosen).sum()
    assert logged["val/mIoU"] == pytest.approx(float((intersections / unions).mean()))


def test_a_batch_without_a_label_changes_nothing():
    task = small(auxiliary_weight=0.4, dice_weight=1.0, ohem_threshold=0.7).train()
    data = batch()
    for target in data[1]:
        target["mask"].fill_(-1)
    total = sum(losses_of(task, data).values())
    assert float(total.detach()) == 0.0
    total.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in task.parameters())


def test_what_the_loss_is_told_reaches_it():
    data = batch()
    options = {"dice_weight": 2.0, "ohem_threshold": 0.5, "ohem_kept": 7, "class_weights": [1.0, 2.0, 3.0]}
    task = small(auxiliary_weight=0.4, avg_non_ignore=False, **options)
    criterion = task.criterion
    assert (criterion.dice_weight, criterion.ohem_threshold, criterion.ohem_kept) == (2.0, 0.5, 7)
    assert criterion.class_weights.tolist() == [1.0, 2.0, 3.0]
    assert (criterion.auxiliary_weight, criterion.avg_non_ignore) == (0.4, False)
    assert set(losses_of(task.train(), data)) == {"cross_entropy", "dice", "auxiliary"}
    assert "class_weights" not in "".join(task.state_dict())
    assert criterion.align_corners is task.segmenter.align_corners


def test_how_logits_are_enlarged_is_one_setting_of_loss_and_labels(tmp_path):
    task = small(head="deeplabv3", align_corners=True)
    assert task.segmenter.align_corners is task.criterion.align_corners is True
    fit(task, Batches(batch())).save_checkpoint(tmp_path / "a.ckpt")
    again = Segmentation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.segmenter.align_corners is again.criterion.align_corners is True
    assert small().criterion.align_corners is False


def test_what_the_published_weights_tell_is_kept(tmp_path, monkeypatch):
    """Of ml-cvnets' two versions each enlarges in its way, which a run that started from one keeps."""
    torch.save({"seg_head.x": torch.ones(1)}, tmp_path / "a.pth")

    def load(segmenter, state, path):
        segmenter.align_corners = True
        return "loaded"

    monkeypatch.setattr(segmentation, "load_published", load)
    monkeypatch.setattr(segmentation, "backbone_options_in", lambda state, name: {"dropout": 0.1})
    task = small("mobilevit_xxs", head="deeplabv3", checkpoint=str(tmp_path / "a.pth"))
    assert (task.criterion.align_corners, task.hparams["align_corners"]) == (True, True)
    assert task.hparams["backbone_options"] == {"dropout": 0.1}


def test_the_backbones_statistics_can_be_fixed():
    task = small(norm_eval=True).train()
    for prefix, module in task.segmenter.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training is not prefix.startswith("backbone."), prefix
    assert all(module.training for module in small().train().segmenter.modules())


def test_the_head_learns_faster_and_decay_follows_the_recipe():
    task = small(head_lr_scale=10.0, optimizer=lambda groups: SGD(groups, lr=0.1, weight_decay=0.01))
    names = {parameter: name for name, parameter in task.named_parameters()}
    (optimizer,), _ = task.configure_optimizers()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            inside = names[parameter].startswith("segmenter.backbone.")
            assert group["lr"] == pytest.approx(0.1 if inside else 1.0)
            assert group["weight_decay"] == 0.01
    task = small(decay_all=False, optimizer=lambda groups: SGD(groups, lr=0.1, weight_decay=0.01))
    (optimizer,), _ = task.configure_optimizers()
    names = {parameter: name for name, parameter in task.named_parameters()}
    plain = {names[p] for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert plain == {
        name for name, parameter in task.named_parameters() if parameter.dim() <= 1 or "attention_biases" in name
    }


def test_poly_follows_a_training_that_ends_by_steps():
    seen = []

    class Noting(Batches):
        def on_before_batch_transfer(self, given, dataloader_idx):
            if self.trainer.training:
                seen.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return given

    task = small(optimizer=lambda groups: SGD(groups, lr=0.1), lr_scheduler=lambda one: Poly(one, power=0.5))
    fit(task, Noting(batch(), batch(seed=2)), max_epochs=-1, max_steps=5)
    assert seen[:5] == pytest.approx([0.1 * (1 - step / 5) ** 0.5 for step in range(5)])


def test_a_training_by_steps_resumes_where_it_was(tmp_path):
    """Cut off in the second epoch of three: the same weights as of a training that was not."""

    def made():
        return small(optimizer=lambda groups: SGD(groups, lr=0.05, momentum=0.9), lr_scheduler=Poly, dropout=0.0)

    data = Batches(batch(), batch(seed=2))
    whole = made()
    fit(whole, data, max_epochs=-1, max_steps=6)

    class Stopping(Segmentation):
        def on_train_batch_end(self, *_):
            if self.trainer.global_step == 4:
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    torch.manual_seed(0)
    cut = Stopping(
        "efficientvit_m0", CLASSES, **SMALL, dropout=0.0,
        optimizer=lambda groups: SGD(groups, lr=0.05, momentum=0.9), lr_scheduler=Poly,
    )  # fmt: skip
    fit(cut, data, max_epochs=-1, max_steps=6)
    resumed = made()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    trainer = fit(resumed, data, ckpt_path=tmp_path / "a.ckpt", max_epochs=-1, max_steps=6)
    assert trainer.global_step == 6
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_single_image_under_deeplabv3_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match=r"a batch of 1 .* set --data\.batch_size to 2 or more"):
        fit(small(head="deeplabv3"), Batches(batch(1), batch_size=1))
    with pytest.raises(ConfigError, match=r"--model\.head semantic_fpn"):
        fit(small(head="deeplabv3"), Batches(batch(1)))
    fit(small("mobilevit_xxs"), Batches(batch(1), batch_size=1))
    across_processes = nn.SyncBatchNorm.convert_sync_batchnorm(small(head="deeplabv3"))
    across_processes._check_batch(1)


def test_a_single_class_is_refused_in_training():
    task = Segmentation("efficientvit_m0", {1: "thing"}, **SMALL)
    with pytest.raises(ConfigError, match="the only class is 'thing', and every pixel would be it: declare"):
        fit(task, Batches(batch()))


def test_a_network_that_has_diverged_labels_nothing(caplog):
    task = small().eval()
    nn.init.constant_(next(task.segmenter.parameters()), torch.nan)
    with torch.no_grad():
        found = task.validation_step(batch(original=True), 0)["masks"]
    assert all((mask == -1).all() for mask in found)
    result = task.evaluator.compute()
    assert result.not_finite > 0
    assert result.metrics["mIoU"] == 0.0
    assert "the network has diverged" in caplog.text


def test_weights_of_another_network_are_refused_with_the_reason(task):
    other = Segmentation("efficientvit_m0", {0: "one", 1: "two"}, **SMALL).state_dict()
    with pytest.raises(CheckpointError, match=r"a\.ckpt was trained on 2 classes, the data has 3: floor, disc, ring"):
        task.load_weights(other, "a.ckpt")
    with pytest.raises(CheckpointError, match="of a network with head 'deeplabv3', and this one has 'semantic_fpn'"):
        task.load_weights({}, "a.ckpt", {"head": "deeplabv3"})
    with pytest.raises(CheckpointError, match="does not fit a segmentation network on 'efficientvit_m0'"):
        task.load_weights({}, "a.ckpt")


def test_a_run_is_a_starting_point_and_rebuilds_itself(tmp_path):
    task = small(head="deeplabv3", rates=[2, 3, 4], window=(64, 96), test_scales=[0.5, 1.0])
    trainer = fit(task, Batches(batch()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = Segmentation.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    started = small(head="deeplabv3", rates=[2, 3, 4], checkpoint=str(tmp_path / "a.ckpt"))
    for other in (again, started):
        assert all(
            torch.equal(one, two)
            for one, two in zip(task.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert (again.hparams["head"], again.hparams["rates"]) == ("deeplabv3", [2, 3, 4])
    assert again.inference == task.inference
    assert again.categories == task.categories
    with pytest.raises(CheckpointError, match="was trained on other classes, floor, disc, ring; the data has a, b, c"):
        Segmentation(
            "efficientvit_m0", {1: "a", 2: "b", 3: "c"}, **SMALL, head="deeplabv3", checkpoint=str(tmp_path / "a.ckpt")
        )


def test_what_weights_do_not_tell_is_taken_from_their_run(tmp_path, caplog):
    options = {"head": "deeplabv3", "backbone_options": {"channel_order": "bgr"}}
    task = small("mobilevit_xxs", **options, rates=[2, 3, 4], align_corners=True, output_stride=32)
    fit(task, Batches(batch())).save_checkpoint(tmp_path / "a.ckpt")
    started = small("mobilevit_xxs", head="deeplabv3", checkpoint=str(tmp_path / "a.ckpt"))
    for name in ("rates", "align_corners", "output_stride", "backbone_options"):
        assert started.hparams[name] == task.hparams[name], name
    images = batch(original=True)
    with torch.no_grad():
        for one, other in zip(task.eval().segment(images), started.eval().segment(images), strict=True):
            assert torch.equal(one, other)
    assert "mean something else" not in caplog.text
    other = small("mobilevit_xxs", head="deeplabv3", align_corners=False, checkpoint=str(tmp_path / "a.ckpt"))
    assert (other.segmenter.align_corners, other.hparams["rates"]) == (False, [2, 3, 4])
    assert "was trained with align_corners True, and this network has False" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "deeplab"}, "there is no segmentation head 'deeplab'. Did you mean 'deeplabv3'"),
        ({"head_lr_scale": 0.0}, "head_lr_scale must be positive and finite, not 0.0"),
        ({"head_lr_scale": float("inf")}, "head_lr_scale must be positive and finite, not inf"),
        ({"head_channels": 0}, "head_channels"),
        ({"head": "deeplabv3", "output_stride": 0}, "output_stride"),
        ({"inference": "sliding"}, "inference must be whole or slide, not 'sliding'"),
        ({"ohem_threshold": 2.0}, r"ohem_threshold must be in \(0, 1\]"),
        ({"class_weights": [1.0]}, "class_weights has 1 numbers, and the data has 3 classes"),
        ({"test_scales": []}, "test_scales must be one or more positive factors"),
        ({"lr_batch_size": 0}, "lr_batch_size must be 1 or more"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_what_a_head_does_not_read_is_said(caplog):
    small(output_stride=8)
    assert "the head semantic_fpn does not read output_stride" in caplog.text


def test_a_warm_up_that_a_schedule_overrides_is_said(caplog):
    small(lr_scheduler=Poly, warmup_steps=10).configure_optimizers()
    assert "model.warmup_steps has no effect: Poly has a warm-up of its own" in caplog.text
