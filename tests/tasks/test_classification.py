"""The classification task: what it trains with which learning rate, what it freezes, mixes, clips and refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from effvit.errors import CheckpointError, ConfigError
from effvit.tasks import Classification
from effvit.tasks._batch_augmentation import BatchAugmentation, erase
from effvit.tasks._clipping import clip_adaptively
from effvit.tasks.schedules import WarmupCosine

CLASSES = {0: "ant", 1: "bee", 2: "cat"}
M0 = "efficientvit_m0"


def small(backbone=M0, **options):
    return Classification(backbone, CLASSES, **options)


def batch(number=4, size=64, labels=None):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(number) % len(CLASSES) if labels is None else torch.tensor(labels)
    names = [f"{index}.jpg" for index in range(number)]
    return images, {"labels": labels, "image_ids": torch.arange(number), "file_names": names}


class Batches(LightningDataModule):
    """The same batches for training and validation."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = batches
        self.batch_size = len(batches[0][0])

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = train_dataloader


def fit(task, data, **options):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **{"max_epochs": 1, **options},
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    return trainer


def rates(task):
    """Learning rate and weight decay of each parameter by name."""
    names = {parameter: name for name, parameter in task.named_parameters()}
    (optimizer,), _ = task.configure_optimizers()
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_vectors_and_attention_biases_are_not_decayed():
    task = small()
    found = rates(task)
    assert found.keys() == dict(task.named_parameters()).keys()
    for name, parameter in task.named_parameters():
        plain = parameter.dim() == 1 or "attention_biases" in name
        assert found[name] == (1e-3, 0.0 if plain else 0.025), name
    assert any("attention_biases" in name for name in found)
    assert set(rates(small(decay_all=True)).values()) == {(1e-3, 0.025)}


def test_layer_decay_slows_each_step_from_the_head_down():
    task = small(layer_decay=0.5)
    found = rates(task)
    steps = task.network.backbone.num_layers
    stem = next(name for name in found if name.startswith("network.backbone.patch_embed"))
    assert found[stem][0] == pytest.approx(1e-3 * 0.5**steps)
    assert found["network.head.linear.weight"][0] == pytest.approx(1e-3)
    assert len({rate for rate, _ in found.values()}) == steps + 1


def test_the_predictors_of_a_dynamic_vit_learn_at_full_rate_and_its_backbone_at_a_share():
    task = small("dynamicvit_tiny", backbone_lr_scale=0.01, frozen_epochs=5)
    for name, (rate, _) in rates(task).items():
        slow = "backbone" in name and "score_predictor" not in name
        assert rate == pytest.approx(1e-5 if slow else 1e-3), name
    frozen = {group["frozen_epochs"] for group in task.parameter_groups() if group["lr_scale"] < 1}
    assert frozen == {5}


def test_the_learning_rate_is_scaled_to_the_real_batch_and_the_arithmetic_is_logged(caplog):
    task = small(
        lr_batch_size=512,
        optimizer=lambda groups: SGD(groups, lr=0.064),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, min_lr=1e-5),
    )
    with caplog.at_level(logging.INFO, "effvit"):
        trainer = fit(task, Batches(*[batch()] * 4), accumulate_grad_batches=2, max_epochs=2)
    base = 0.064 * 4 * 2 / 512
    assert trainer.global_step == 4
    assert task.lr_schedulers().base_lrs[0] == pytest.approx(base)
    # The second of two epochs: half a cosine on the way from 0.001 to 0.00001.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-5 + (base - 1e-5) / 2)
    said = "global batch 8 = 4 images x 1 processes x 2 accumulated; learning rate 0.001 = 0.064 x 8 / 512; 2 steps"
    assert said in caplog.text


@pytest.mark.parametrize("backbone", ["dynamicvit_tiny", "mobilevit_xxs"])
def test_a_linear_probe_sees_the_features_of_the_evaluation(backbone):
    task = small(backbone, freeze="backbone").train()
    images = task.prepare(batch())
    first, second = (task.network.backbone.embed(images) for _ in range(2))
    assert torch.equal(first, second)
    assert task.network.head.training


def test_each_process_draws_its_own_random_numbers(monkeypatch):
    draws = []
    for rank in (0, 1, 2):
        task = small()
        task.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        task.trainer.datamodule = Batches(batch())
        monkeypatch.setattr(type(task.trainer), "global_rank", property(lambda _, rank=rank: rank))
        torch.manual_seed(5)
        task.on_fit_start()
        draws.append(float(torch.rand(())))
    assert len(set(draws)) == 3
    torch.manual_seed(5)
    assert draws[0] == float(torch.rand(()))


def test_a_linear_probe_trains_the_head_alone_and_moves_no_statistics():
    task = small(freeze="backbone")
    assert {name for name, p in task.named_parameters() if p.requires_grad} == {
        name for name, _ in task.named_parameters() if name.startswith("network.head.")
    }
    before = {name: value.clone() for name, value in task.network.backbone.state_dict().items()}
    head = task.network.head.linear.weight.detach().clone()
    fit(task, Batches(batch(), batch()))
    assert all(torch.equal(before[name], value) for name, value in task.network.backbone.state_dict().items())
    assert not torch.equal(head, task.network.head.linear.weight)
    assert task.network.head.bn.num_batches_tracked == 2


def test_the_first_steps_of_a_backbone_can_be_frozen_with_their_statistics():
    task = small(freeze=2)
    task.train()
    backbone = task.network.backbone
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (backbone.layer_of(name) >= 2), name
    for name, module in backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (backbone.layer_of(f"{name}.weight") >= 2), name
    with pytest.raises(ConfigError, match=r"freeze must be 0 to \d+, the steps of efficientvit_m0, not 99"):
        small(freeze=99)


def test_frozen_steps_drop_nothing():
    options = {"dropout": 0.5, "classifier_dropout": 0.5}
    backbone = small("mobilevit_xxs", freeze=8, backbone_options=options).train().network.backbone
    for name, module in backbone.named_modules():
        depths = {backbone.layer_of(f"{name}.{inner}") for inner, _ in module.named_parameters()}
        if name and depths:
            assert module.training == (max(depths) >= 8), name


def test_parameters_can_be_frozen_by_name():
    task = small("dynamicvit_tiny", freeze=["cls_token", "pos_embed"])
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert frozen == {"network.backbone.cls_token", "network.backbone.pos_embed"}
    with pytest.raises(ConfigError, match=r"begins with 'pos_embd' \(freeze\)\. Did you mean 'pos_embed'"):
        small("dynamicvit_tiny", freeze=["pos_embd"])


def test_fixed_statistics_leave_the_affine_parameters_to_train():
    task = small(norm_eval=True).train()
    norms = [module for module in task.modules() if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("shape", [(8,), (6, 5), (4, 3, 2, 2)])
def test_adaptive_clipping_equals_timms(shape):
    from timm.utils.agc import adaptive_clip_grad

    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(shape)) for _ in range(2))
    theirs.data.copy_(ours.data)
    gradient = torch.randn(shape) * torch.logspace(-4, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    clip_adaptively([ours, nn.Parameter(torch.zeros(1))], 0.02)
    adaptive_clip_grad(theirs, clip_factor=0.02)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not torch.equal(ours.grad, gradient)


def test_every_parameter_is_clipped_as_in_the_official_engines(monkeypatch):
    clipped = []
    monkeypatch.setattr(
        "effvit.tasks.classification.clip_adaptively", lambda some, factor: clipped.append((list(some), factor))
    )
    task = small(clip_adaptive=0.02)
    fit(task, Batches(batch()))
    ((parameters, factor),) = clipped
    assert factor == 0.02
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in task.parameters()}


def test_mixup_mixes_images_and_labels_by_the_same_share():
    torch.manual_seed(1)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    mixed, target = BatchAugmentation(3, mixup=0.8)(images, labels)
    share = float(target[1, 1])
    assert 0 < share < 1
    torch.testing.assert_close(mixed[1], share * images[1] + (1 - share) * images[0])
    torch.testing.assert_close(target[1], torch.tensor([1 - share, share, 0.0]))


def test_cutmix_labels_by_the_area_that_was_pasted():
    torch.manual_seed(0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32)
    mixed, target = BatchAugmentation(3, cutmix=1.0)(images, torch.tensor([0, 1, 2, 0]))
    kept = (mixed[1] == 1).float().mean()
    assert 0 < kept < 1
    torch.testing.assert_close(target[1], torch.tensor([1 - float(kept), float(kept), 0.0]))


def test_the_shares_of_mixing_are_kept():
    torch.manual_seed(0)
    augment = BatchAugmentation(3, mixup=0.8, cutmix=1.0, mix_probability=0.5, switch_probability=0.25)
    images, labels = torch.arange(2.0).view(2, 1, 1, 1).expand(2, 3, 8, 8), torch.tensor([0, 1])
    kinds = {"none": 0, "mixup": 0, "cutmix": 0}
    for _ in range(400):
        mixed, target = augment(images, labels)
        if target is labels:
            kinds["none"] += 1
        else:
            kinds["cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup"] += 1
    assert kinds["none"] == pytest.approx(200, abs=40)
    assert kinds["cutmix"] == pytest.approx(50, abs=25)


def test_one_image_has_nothing_to_be_mixed_with():
    images, labels = torch.rand(1, 3, 8, 8), torch.tensor([2])
    mixed, target = BatchAugmentation(3, mixup=0.8, cutmix=1.0)(images, labels)
    assert torch.equal(mixed, images)
    assert torch.equal(target, labels)


def test_erasing_fills_a_rectangle_with_noise():
    torch.manual_seed(0)
    erased, _ = BatchAugmentation(3, random_erasing=1.0)(torch.zeros(8, 3, 64, 64), torch.zeros(8, dtype=torch.long))
    for image in erased:
        hit = image[0] != 0
        assert 0.015 < float(hit.float().mean()) < 0.4
        rows, columns = hit.any(1).nonzero().flatten(), hit.any(0).nonzero().flatten()
        assert hit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert float(erased[erased != 0].std()) == pytest.approx(1, abs=0.05)


def test_the_share_and_the_shapes_of_erased_rectangles():
    torch.manual_seed(0)
    images = torch.zeros(2000, 1, 40, 60)
    hit = erase(images, 0.25)[:, 0] != 0
    assert not images.any()
    erased = hit[hit.flatten(1).any(1)]
    assert len(erased) == pytest.approx(500, abs=60)
    areas = erased.flatten(1).float().mean(1)
    # Uniform from 0.02 to a third, less the oblong ones that do not fit.
    assert float(areas.min()) < 0.03
    assert float(areas.max()) > 0.3
    assert float(areas.mean()) == pytest.approx(0.17, abs=0.02)
    ratios = erased.any(2).sum(1) / erased.any(1).sum(1)
    assert 0.25 < float(ratios.min()) < 0.4
    assert 2.2 < float(ratios.max()) < 3.8


def test_a_batch_of_one_is_refused_where_batchnorm_needs_more():
    with pytest.raises(ConfigError, match=r"batch_size 1 leaves BatchNorm .* set --data.batch_size to 2 or more"):
        fit(small(), Batches(batch(1)))
    fit(small(norm_eval=True), Batches(batch(1)))
    with pytest.raises(ConfigError, match="mixup and cutmix mix the images of a batch"):
        fit(small("dynamicvit_tiny", mixup=0.8), Batches(batch(1)))


def test_images_that_could_not_be_read_do_not_count():
    task = small()
    task.setup("fit")
    task.eval()
    images, targets = batch(4, labels=[0, -1, 2, -1])
    task.log_dict = lambda logs, batch_size: None
    loss = task.training_step((images, targets), 0)
    alone = task.training_step((images[::2], {"labels": targets["labels"][::2]}), 0)
    torch.testing.assert_close(loss, alone)


def test_validation_is_of_the_whole_data_set():
    task = small().eval()
    first, second = batch(4), batch(3, labels=[1, 1, -1])
    second[1]["image_ids"] += 4
    trainer = fit(task, Batches(first, second), limit_train_batches=0)
    trainer.validate(task, datamodule=Batches(first, second), verbose=False)
    task.eval()
    with torch.no_grad():
        guesses = torch.cat([task.network(task.prepare(part)).argmax(1) for part in (first, second)])
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    assert float(trainer.callback_metrics["val/top1"]) == pytest.approx(float((guesses[:6] == labels).float().mean()))
    assert int(task.result.confusion.sum()) == 6


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({}, 1),
        ({"teacher": "efficientvit_m1", "teacher_pretrained": False}, 2),
        ({"backbone": "efficientformer_l1"}, 1),
        ({"backbone": "dynamicvit_tiny", "teacher": "dynamicvit_tiny", "teacher_pretrained": False}, 1),
        ({"distilled": True}, 2),
    ],
)
def test_a_second_head_is_there_for_a_teacher(options, heads):
    task = small(**options)
    assert (task.network.head_dist is not None) == (heads == 2)
    content = {"hyper_parameters": dict(task.hparams)}
    task.on_save_checkpoint(content)
    assert content["hyper_parameters"]["distilled"] == (heads == 2)
    assert not any("teacher" in name for name in task.state_dict())


def test_weights_of_other_classes_or_another_network_are_refused_with_the_reason():
    task = small()
    with pytest.raises(CheckpointError, match=r"a\.ckpt was trained on 2 classes, the data has 3: ant, bee, cat"):
        task.load_weights(Classification(M0, {0: "ant", 1: "bee"}).state_dict(), "a.ckpt")
    with pytest.raises(CheckpointError, match="does not fit a classification network on 'efficientvit_m0'"):
        task.load_weights(small("efficientvit_m1").state_dict(), "a.ckpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "efficientvit_m9"}, "Did you mean 'efficientvit_m"),
        ({"mixup": -1}, "mixup and cutmix must be 0"),
        ({"random_erasing": 2}, "random_erasing is a probability"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), not 1.0"),
        ({"freeze": True}, "freeze must be 'backbone', a number of steps or a list"),
        ({"layer_decay": 0}, "layer_decay must be above 0"),
        ({"clip_adaptive": 0}, "clip_adaptive must be positive"),
        ({"ratio_weight": -1}, "ratio_weight must not be negative"),
        ({"freeze": "stem"}, "freeze must be 'backbone', a number of steps or a list"),
        ({"lr_batch_size": 0}, "lr_batch_size must be 1 or more"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_a_checkpoint_of_other_classes_of_the_same_number_is_refused(tmp_path):
    other = Classification(M0, {0: "dog", 1: "bee", 2: "cat"})
    content = {"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match="was trained on other classes, dog, bee, cat; the data has ant, bee, cat"
    ):
        small(checkpoint=str(tmp_path / "a.ckpt"))


def test_a_cosine_needs_an_end():
    task = small(optimizer=AdamW, lr_scheduler=WarmupCosine)
    with pytest.raises(ConfigError, match=r"set trainer\.max_epochs to 1 or more"):
        fit(task, Batches(batch()), max_epochs=-1, max_steps=1)
