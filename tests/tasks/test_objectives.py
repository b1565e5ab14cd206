"""Objectives: which one a network calls for, what it adds up, and teachers from everywhere."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F

from effvit.backbones import InputSpec, create_classifier
from effvit.errors import CheckpointError, ConfigError
from effvit.tasks.objectives import (
    Distilled,
    Sparsified,
    Supervised,
    Teacher,
    build_teacher,
    make_objective,
)

IMAGENET = InputSpec()
PLAIN = InputSpec(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def images():
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target():
    return torch.tensor([0, 3, -1, 2])


def classifier(name, seed=1, **options):
    torch.manual_seed(seed)
    return create_classifier(name, num_classes=5, **options)


@pytest.fixture(scope="module")
def deit():
    """DeiT-Tiny with weights that make its logits differ."""
    network = classifier("dynamicvit_tiny", keep_ratio=1.0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "bias" not in name and "norm" not in name:
                parameter.mul_(3)
    return network


def pruned(deit):
    """The network of `deit` with predictors."""
    network = classifier("dynamicvit_tiny")
    network.load_state_dict(deit.state_dict(), strict=False)
    return network.train()


def save_run(network, path, backbone, options=None, classes=5):
    """What a run of ours leaves behind."""
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    settings = {"backbone": backbone, "backbone_options": options, "categories": dict.fromkeys(range(classes), "x")}
    torch.save({"state_dict": state, "hyper_parameters": settings}, path)
    return str(path)


# ---- supervised


def test_supervised_is_cross_entropy_of_the_labelled_images(images, target):
    network = classifier("mobilevit_xxs").train()
    objective = make_objective(network, label_smoothing=0.1)
    assert isinstance(objective, Supervised)
    found = objective(copy.deepcopy(network), images, target)
    known = target >= 0
    expected = F.cross_entropy(network(images)[known], target[known], label_smoothing=0.1)
    assert found.losses.keys() == {"cross_entropy"}
    assert found.losses["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.logs == {}


def test_supervised_trains_both_heads_together(images, target):
    network = classifier("efficientformerv2_s0").eval()
    logits, distilled = network.forward_heads(images)
    assert torch.allclose(network(images), (logits + distilled) / 2)
    make_objective(network)(network, images, target).losses["cross_entropy"].backward()
    assert torch.allclose(network.head.weight.grad, network.head_dist.weight.grad)


# ---- distilled


@pytest.mark.parametrize(("kind", "tau"), [("hard", 1.0), ("soft", 3.0)])
def test_distillation_trains_each_head_with_its_own_label(images, target, kind, tau, deit):
    # BatchNorm in training would tie the heads' losses to more than their logits.
    network = classifier("efficientvit_m0", distilled=True).eval()
    teacher = Teacher(copy.deepcopy(deit), network.backbone.input_spec)
    objective = make_objective(
        network,
        label_smoothing=0.1,
        teacher=teacher,
        distillation=kind,
        distillation_alpha=0.3,
        distillation_tau=tau,
    )
    assert isinstance(objective, Distilled)
    found = objective(network, images, target)
    known = target >= 0
    logits, distilled = (head[known] for head in network.forward_heads(images))
    with torch.no_grad():
        expected = deit.eval()(images)[known]
    if kind == "hard":
        taught = F.cross_entropy(distilled, expected.argmax(1))
    else:
        divergence = (expected / tau).softmax(1) * ((expected / tau).log_softmax(1) - (distilled / tau).log_softmax(1))
        taught = tau**2 * divergence.sum() / divergence.numel()
    supervised = F.cross_entropy(logits, target[known], label_smoothing=0.1)
    assert found.losses["cross_entropy"].item() == pytest.approx(0.7 * supervised.item(), rel=1e-4)
    assert found.losses["distillation"].item() == pytest.approx(0.3 * taught.item(), rel=1e-3)
    found.losses["distillation"].backward()
    assert network.head.linear.weight.grad is None
    assert network.head_dist.linear.weight.grad.abs().sum() > 0


def test_one_head_learns_from_labels_and_teacher(images, target, deit):
    network = classifier("mobilevit_xxs").eval()
    teacher = Teacher(copy.deepcopy(deit), network.backbone.input_spec)
    found = make_objective(network, teacher=teacher)(network, images, target)
    known = target >= 0
    decided = teacher.logits(images)[known].argmax(1)
    taught = F.cross_entropy(network(images)[known], decided)
    assert found.losses["distillation"].item() == pytest.approx(0.5 * taught.item(), rel=1e-4)


def test_mixed_labels_are_learned(images, deit):
    network = classifier("mobilevit_xxs").eval()
    mixed = torch.rand(4, 5).softmax(1)
    teacher = Teacher(copy.deepcopy(deit), network.backbone.input_spec)
    for objective in (make_objective(network), make_objective(network, teacher=teacher, distillation_alpha=0.0)):
        found = objective(network, images, mixed).losses
        expected = -(mixed * network(images).log_softmax(1)).sum(1).mean()
        assert sum(found.values()).item() == pytest.approx(expected.item(), rel=1e-5)


# ---- sparsified


def test_sparsification_adds_up_the_papers_terms(images, target, deit):
    network = pruned(deit)
    teacher = Teacher(copy.deepcopy(deit), IMAGENET)
    objective = make_objective(network, teacher=teacher, ratio_weight=3.0, token_weight=0.25, kl_weight=0.75)
    assert isinstance(objective, Sparsified)
    torch.manual_seed(2)
    found = objective(network, images, target)
    torch.manual_seed(2)
    tokens = network.backbone.forward_tokens(images)
    logits = network.head(tokens.class_token)
    whole = deit.eval().backbone.forward_tokens(images)
    expected = deit.head(whole.class_token)
    known = [0, 1, 3]
    ratio = token = kept = divergence = 0.0
    for image in known:
        for decision, share in zip(tokens.decisions, (0.7, 0.49, 0.343), strict=True):
            ratio += (decision[image].sum().item() / 16 - share) ** 2 / 3 / len(known)
        for cell in range(16):
            if tokens.decisions[-1][image, cell] > 0.5:
                token += (tokens.last[image, cell] - whole.tokens[image, cell]).square().sum().item() / 192
                kept += 1
        p, q = expected[image].softmax(0), logits[image].softmax(0)
        divergence += (p * (p / q).log()).sum().item() / len(known)
    assert kept > 0
    assert found.losses.keys() == {"cross_entropy", "ratio", "token", "kl"}
    assert found.losses["ratio"].item() == pytest.approx(3.0 * ratio, rel=1e-4)
    assert found.losses["token"].item() == pytest.approx(0.25 * token / kept, rel=1e-4)
    assert found.losses["kl"].item() == pytest.approx(0.75 * divergence, rel=1e-3)
    supervised = F.cross_entropy(logits[known], target[known])
    assert found.losses["cross_entropy"].item() == pytest.approx(supervised.item(), rel=1e-5)
    assert found.logs.keys() == {"kept_1", "kept_2", "kept_3"}
    for stage, decision in enumerate(tokens.decisions, start=1):
        assert found.logs[f"kept_{stage}"].item() == pytest.approx(decision.mean().item(), abs=1e-6)
        assert not found.logs[f"kept_{stage}"].requires_grad


def test_token_distillation_reaches_decisions_through_attention_alone(images, deit, monkeypatch):
    # All decisions of the last stage are 1 and nothing attends after it, so there is no way left to its predictor.
    network = pruned(deit)
    teacher = Teacher(copy.deepcopy(deit), IMAGENET)
    for block in network.backbone.blocks[9:]:
        monkeypatch.setattr(block.attn, "forward", lambda x, keep: torch.zeros_like(x))
    objective = make_objective(network, teacher=teacher)
    objective(network, images, torch.zeros(4, dtype=torch.long)).losses["token"].backward()
    gradients = [parameter.grad for parameter in network.backbone.score_predictor[2].parameters()]
    assert all(gradient is None or gradient.abs().sum() == 0 for gradient in gradients)
    assert network.backbone.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_every_parameter_of_a_pruning_network_is_trained(images, deit):
    network = pruned(deit)
    objective = make_objective(network, teacher=Teacher(copy.deepcopy(deit), IMAGENET))
    sum(objective(network, images, torch.tensor([0, 1, 2, 3])).losses.values()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_without_a_teacher_only_shares_and_labels_count(images, target, deit):
    found = make_objective(pruned(deit))(pruned(deit), images, target)
    assert found.losses.keys() == {"cross_entropy", "ratio"}


def test_a_teacher_of_another_kind_has_no_tokens_to_copy(images, target, deit, caplog):
    network = pruned(deit)
    teacher = Teacher(classifier("mobilevit_xxs"), IMAGENET)
    with caplog.at_level(logging.WARNING):
        objective = make_objective(network, teacher=teacher)
    assert "mobilevit_xxs has no tokens like those of dynamicvit_tiny" in caplog.text
    assert objective(network, images, target).losses.keys() == {"cross_entropy", "ratio", "kl"}


def test_keeping_every_token_is_an_ordinary_network(deit):
    assert isinstance(make_objective(deit), Supervised)
    assert isinstance(make_objective(deit, teacher=Teacher(copy.deepcopy(deit), IMAGENET)), Distilled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), not 1.0"),
        ({"distillation": "harsh"}, "no distillation 'harsh'.*'hard'"),
        ({"distillation_alpha": 1.5}, "distillation_alpha must be in"),
        ({"distillation_tau": 0.0}, "distillation_tau must be above 0"),
        ({"ratio_weight": -1.0}, "ratio_weight must not be negative"),
    ],
)
def test_values_out_of_range_are_refused(options, message, deit):
    with pytest.raises(ConfigError, match=message):
        make_objective(deit, **options)


def test_a_pruning_network_has_one_head():
    with pytest.raises(ConfigError, match="with its one head"):
        make_objective(classifier("dynamicvit_tiny", distilled=True))


# ---- teachers


def test_a_teacher_is_no_part_of_what_is_trained_or_saved(images, target, deit):
    network = classifier("mobilevit_xxs").train()
    given = copy.deepcopy(deit).train()
    objective = make_objective(network, teacher=Teacher(given, network.backbone.input_spec)).train()
    assert objective.state_dict() == {}
    assert list(objective.parameters()) == []
    assert not given.training
    assert not any(parameter.requires_grad for parameter in given.parameters())
    before = copy.deepcopy(given.state_dict())
    sum(objective(network, images, target).losses.values()).backward()
    assert not given.training
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


def test_images_are_normalised_anew_for_the_teacher(images, deit):
    pixels = images.sigmoid()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET.mean, IMAGENET.std))
    with torch.no_grad():
        expected = deit.eval()((pixels - mean) / std)
    assert torch.allclose(Teacher(copy.deepcopy(deit), PLAIN).logits(pixels), expected, atol=1e-4)
    same = Teacher(copy.deepcopy(deit), IMAGENET)
    assert torch.allclose(same.logits((pixels - mean) / std), expected, atol=1e-4)


def test_a_teacher_follows_the_images_type(images, deit):
    teacher = Teacher(copy.deepcopy(deit), PLAIN)
    expected = teacher.logits(images)
    assert teacher.logits(images.bfloat16()).dtype == torch.bfloat16
    again = teacher.logits(images)
    assert again.dtype == torch.float32
    assert (again - expected).abs().max() < 0.1 * expected.abs().max()  # its weights were rounded


@pytest.mark.parametrize(
    ("name", "options"),
    [("dynamicvit_tiny", {"keep_ratio": 1.0}), ("efficientformerv2_s0", None), ("mobilevit_xxs", {})],
)
def test_a_run_of_ours_teaches(name, options, images, tmp_path):
    network = classifier(name, **(options or {})).eval()
    path = save_run(network, tmp_path / "best.ckpt", name, options)
    teacher = build_teacher(path, num_classes=5, student_spec=network.backbone.input_spec)
    with torch.no_grad():
        assert torch.allclose(teacher.logits(images), network(images), atol=1e-5)
    assert (teacher.network.head_dist is None) == (name != "efficientformerv2_s0")


def test_a_named_teacher_takes_a_file(images, deit, tmp_path):
    torch.save(
        {"model": {name.removeprefix("backbone."): value for name, value in deit.state_dict().items()}},
        tmp_path / "deit.pth",
    )
    teacher = build_teacher(
        "dynamicvit_tiny",
        num_classes=5,
        pretrained=str(tmp_path / "deit.pth"),
        options={"keep_ratio": 1.0},
        student_spec=IMAGENET,
    )
    with torch.no_grad():
        assert torch.allclose(teacher.logits(images), deit.eval()(images), atol=1e-5)
    assert teacher.has_tokens_for(classifier("dynamicvit_tiny").backbone)
    assert torch.allclose(teacher.tokens(images)[1], deit.backbone.forward_tokens(images).tokens, atol=1e-5)


def test_a_network_of_timm_teaches(images, tmp_path):
    import timm

    peer = timm.create_model("regnety_002", num_classes=5).eval()
    torch.save(peer.state_dict(), tmp_path / "regnet.pth")
    teacher = build_teacher(
        "timm/regnety_002", num_classes=5, pretrained=str(tmp_path / "regnet.pth"), student_spec=IMAGENET
    )
    with torch.no_grad():
        assert torch.allclose(teacher.logits(images), peer(images), atol=1e-4)


def test_a_teacher_of_other_classes_is_refused(deit, tmp_path):
    path = save_run(deit, tmp_path / "best.ckpt", "dynamicvit_tiny", {"keep_ratio": 1.0})
    for name, options in ((path, None), ("dynamicvit_tiny", {"keep_ratio": 1.0})):
        with pytest.raises(CheckpointError, match=r"teacher cannot teach 7 classes: .*best.ckpt has no head of 7"):
            build_teacher(name, num_classes=7, pretrained=path, options=options, student_spec=IMAGENET)


def test_what_is_no_run_cannot_be_named_as_a_teacher(deit, tmp_path):
    torch.save({"state_dict": deit.state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"teacher cannot teach.*is not a checkpoint of a run"):
        build_teacher(str(tmp_path / "weights.pth"), num_classes=5, student_spec=IMAGENET)
    with pytest.raises(CheckpointError, match="there is no checkpoint file"):
        build_teacher(str(tmp_path / "nothing.ckpt"), num_classes=5, student_spec=IMAGENET)
    with pytest.raises(ConfigError, match="there is no backbone 'dynamicvit_tinny'"):
        build_teacher("dynamicvit_tinny", num_classes=5, student_spec=IMAGENET)


def test_a_teacher_with_random_weights_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        build_teacher("mobilevit_xxs", num_classes=5, pretrained=False, student_spec=IMAGENET)
    assert "mobilevit_xxs has random weights" in caplog.text
