"""DynamicViT against timm's DeiT, and against straightforward pruning and masking written here."""

from __future__ import annotations

import copy
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from effvit.backbones import _deit, create_backbone, create_classifier, list_backbones, load_checkpoint
from effvit.backbones import dynamicvit as module
from effvit.errors import ConfigError

SIZES = ("tiny", "small", "base")
# Of the official code at 0.7 (fvcore, which counts LayerNorm too), and of plain DeiT without it.
PRUNED_GIGA = dict(zip(SIZES, (0.805, 2.988, 11.489), strict=True))
DENSE_MEGA = dict(zip(SIZES, (1254, 4599, 17564), strict=True))


def deit(size, randomise, **options):
    return randomise(timm.create_model(f"deit_{size}_patch16_224", **options))


def save(state, folder, wrapper="model"):
    path = folder / "weights.pth"
    torch.save({wrapper: state} if wrapper else state, path)
    return path


@pytest.fixture(scope="module")
def tiny():
    """A pruning network with scores that differ by far more than rounding; double precision."""
    torch.manual_seed(0)
    network = create_backbone("dynamicvit_tiny").double().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(("score_predictor.", "blocks.")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def pruned_by_hand(network, images):
    """timm's blocks with our weights; tokens are ranked, sorted and picked one image at a time.

    Returns class tokens (B, C), maps (B, C, H, W) and the kept cells of each stage, sets per image.
    """
    peer = timm.create_model("deit_tiny_patch16_224", num_classes=0).double().eval()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("score_predictor.")}
    peer.load_state_dict(state)
    classes, maps, kept_cells = [], [], []
    for image in images:
        x = peer.patch_embed(image[None])
        count = x.shape[1]
        x = torch.cat([peer.cls_token, x], 1) + peer.pos_embed
        cells, last, stages = torch.arange(count), torch.empty(count, x.shape[2], dtype=x.dtype), []
        for depth, block in enumerate(peer.blocks):
            if depth in {3, 6, 9}:
                predictor = network.score_predictor[len(stages)]
                hidden = F.gelu(predictor.in_conv[1](F.layer_norm(x[0, 1:], x.shape[2:], *affine(predictor))))
                half = hidden.shape[1] // 2
                hidden = torch.cat([hidden[:, :half], hidden[:, half:].mean(0).repeat(len(hidden), 1)], 1)
                for index in (0, 2):
                    hidden = F.gelu(predictor.out_conv[index](hidden))
                score = predictor.out_conv[4](hidden).log_softmax(-1)[:, 0]
                best = score.argsort(descending=True)[: int(count * 0.7 ** (len(stages) + 1))]
                last[cells] = x[0, 1:]
                x = torch.cat([x[:, :1], x[:, 1 + best]], 1)
                cells = cells[best]
                stages.append(set(cells.tolist()))
            x = block(x)
        last[cells] = x[0, 1:]
        classes.append(peer.norm(x[0, 0]))
        maps.append(peer.norm(last).t().unflatten(1, (14, 14)))
        kept_cells.append(stages)
    return torch.stack(classes), torch.stack(maps), kept_cells


def affine(predictor):
    norm = predictor.in_conv[0]
    assert norm.eps == 1e-5
    return norm.weight, norm.bias, 1e-5


# ---- dense: DeiT


@pytest.mark.parametrize("size", SIZES)
def test_keeping_everything_is_timms_deit(size, randomise, relative_error, tmp_path):
    peer = deit(size, randomise)
    ours = create_classifier(f"dynamicvit_{size}", keep_ratio=1.0).eval()
    report = load_checkpoint(ours, save(peer.state_dict(), tmp_path))
    assert report.missing == report.unexpected == report.resized == report.mismatched == ()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(ours(images), peer(images)) < 1e-5
        expected = peer.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (14, 14))
        assert relative_error(ours.backbone(images)["c4"], expected) < 1e-5
        if size == "tiny":
            assert relative_error(ours.fuse()(images), peer(images)) < 1e-5


def test_dense_training_step_equals_timm(randomise):
    peer = deit("tiny", randomise).double().train()
    ours = create_classifier("dynamicvit_tiny", keep_ratio=1.0).double().train()
    ours.load_state_dict(
        {key if key.startswith("head.") else f"backbone.{key}": v for key, v in peer.state_dict().items()}
    )
    images = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    for network in (peer, ours):
        network(images).square().sum().backward()
    expected = {key.removeprefix("head."): value.grad for key, value in peer.named_parameters()}
    for name, parameter in ours.named_parameters():
        gradient = expected[name.removeprefix("backbone.").removeprefix("head.")]
        assert torch.allclose(parameter.grad, gradient, rtol=1e-6, atol=1e-9 * float(gradient.abs().max())), name


@pytest.mark.parametrize("size", [(64, 400), (250, 225)])
def test_other_sizes_are_a_deit_of_that_size_with_the_embedding_resized(size, randomise, relative_error):
    ours = randomise(create_backbone("dynamicvit_tiny", keep_ratio=1.0))
    grid = tuple(-(-side // 16) for side in size)
    peer = timm.create_model("deit_tiny_patch16_224", num_classes=0, img_size=tuple(16 * side for side in grid)).eval()
    state = ours.state_dict()
    image = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (14, 14))
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    peer.load_state_dict(state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], resized], 1)})
    images = torch.randn(2, 3, *size)
    padded = torch.zeros(2, 3, 16 * grid[0], 16 * grid[1])
    padded[:, :, : size[0], : size[1]] = images
    with torch.no_grad():
        expected = peer.forward_features(padded)
        assert relative_error(ours(images)["c4"], expected[:, 1:].transpose(1, 2).unflatten(2, grid)) < 1e-5
        assert relative_error(ours.embed(images), expected[:, 0]) < 1e-5


def test_resized_embedding_is_kept_and_never_stale():
    network = create_backbone("dynamicvit_tiny", keep_ratio=1.0).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first = network(images)["c4"]
        assert network.position(network.pos_embed, 4, 4) is network.position(network.pos_embed, 4, 4)
        network.pos_embed.mul_(-3)
        second = network(images)["c4"]
        assert torch.equal(second, copy.deepcopy(network)(images)["c4"])
    assert not torch.allclose(first, second)
    assert torch.equal(network(images)["c4"], second)  # with gradients nothing is kept


# ---- pruned in inference


def test_pruned_network_equals_the_one_written_here(tiny, relative_error):
    images = torch.randn(3, 3, 224, 224, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        classes, maps, cells = pruned_by_hand(tiny, images)
        assert [[len(stage) for stage in image] for image in cells] == [[137, 96, 67]] * 3
        for network in (tiny, copy.deepcopy(tiny).fuse()):
            assert relative_error(network.embed(images), classes) < 1e-9
            assert relative_error(network(images)["c4"], maps) < 1e-9
            found = network.forward_tokens(images)
            assert relative_error(found.class_token, classes) < 1e-9
            assert found.grid == (14, 14)
            for stage, decision in enumerate(found.decisions):
                assert [set(row.nonzero().flatten().tolist()) for row in decision] == [image[stage] for image in cells]
                assert decision.unique().tolist() == [0, 1]


def test_fused_predictor_ranks_by_the_same_numbers_but_for_a_constant(tiny, relative_error):
    fused = copy.deepcopy(tiny).fuse()
    x = torch.randn(2, 50, 192, dtype=torch.float64)
    with torch.no_grad():
        for plain, quick in zip(tiny.score_predictor, fused.score_predictor, strict=True):
            bias = plain.out_conv[4].bias
            assert relative_error(quick.rank(x) + bias[0] - bias[1], plain.rank(x)) < 1e-11


@pytest.mark.parametrize("fused", [False, True])
def test_dropped_tokens_are_gone(fused, monkeypatch):
    network = create_backbone("dynamicvit_tiny").eval()
    if fused:
        network.fuse()
    lengths = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v: lengths.append(q.shape[2]) or attend(q, k, v)
    )
    with torch.no_grad():
        for size, first in (((224, 224), (196, 137, 96, 67)), ((112, 250), (112, 78, 54, 38))):
            for run in (network, network.embed):
                lengths.clear()
                run(torch.randn(1, 3, *size))
                assert lengths == [1 + count for count in first for _ in range(3)]


@settings(max_examples=12, deadline=None)
@given(height=st.integers(32, 200), width=st.integers(32, 200), keep_ratio=st.floats(0.01, 1.0))
def test_counts_follow_size_and_ratio(height, width, keep_ratio):
    network = create_backbone("dynamicvit_tiny", keep_ratio=keep_ratio).eval()
    count = -(-height // 16) * -(-width // 16)
    with torch.no_grad():
        found = network.forward_tokens(torch.randn(2, 3, height, width))
    expected = [max(1, int(count * keep_ratio**power)) for power in (1, 2, 3)] if keep_ratio < 1 else []
    assert [decision.sum(1).tolist() for decision in found.decisions] == [[kept, kept] for kept in expected]
    assert list(network.tokens_kept(count)) == expected
    for before, after in zip(found.decisions, found.decisions[1:], strict=False):
        assert (after <= before).all()
    assert found.tokens.shape == (2, count, 192)


def test_an_image_is_pruned_whatever_its_neighbours(tiny, relative_error):
    images = torch.randn(3, 3, 80, 130, dtype=torch.float64)
    with torch.no_grad():
        together = tiny(images)["c4"]
        assert relative_error(torch.cat([tiny(image[None])["c4"] for image in images]), together) < 1e-10
        assert torch.equal(tiny(images)["c4"], together)  # nothing was changed in place


# ---- masked in training


def gathered_by_hand(network, images, decisions):
    """The network with the given decisions, each image on its own, dropped tokens removed."""
    classes, tokens = [], []
    for number, image in enumerate(images):
        x, _ = network._enter(image[None])
        last = x[0, 1:].clone()
        cells = torch.arange(len(last))
        for depth, block in enumerate(network.blocks):
            if depth in {3, 6, 9}:
                left = decisions[depth // 3 - 1][number][cells] > 0.5
                last[cells] = x[0, 1:]
                x, cells = torch.cat([x[:, :1], x[:, 1:][:, left]], 1), cells[left]
            x = block(x)
        last[cells] = x[0, 1:]
        classes.append(network.norm(x[0, 0]))
        tokens.append(network.norm(last))
    return torch.stack(classes), torch.stack(tokens)


@pytest.mark.parametrize(("epsilon", "tolerance"), [(0.0, 1e-11), (1e-6, 1e-4)])
def test_masked_softmax_equals_gathered_computation(tiny, relative_error, monkeypatch, epsilon, tolerance):
    # The official epsilon gives each dropped token about a millionth of every query's attention, more where all keys
    # that are left score far below the best. That is all the difference there is: without it, rounding alone is left.
    monkeypatch.setattr(_deit, "EPSILON", epsilon)
    network = copy.deepcopy(tiny).train()
    images = torch.randn(2, 3, 96, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    with torch.no_grad():
        found = network.forward_tokens(images)
        counts = [decision.sum(1).round().tolist() for decision in found.decisions]
        assert all(42 > first > second > third > 0 for first, second, third in zip(*counts, strict=True)), counts
        classes, tokens = gathered_by_hand(network, images, found.decisions)
    assert relative_error(found.class_token, classes) < tolerance
    assert relative_error(found.tokens, tokens) < tolerance


def test_training_and_inference_agree_on_the_same_decisions(tiny, relative_error, monkeypatch):
    def best(logits, previous):
        """Keeps what inference keeps: the best of those that are left."""
        count = int(previous.shape[1] * 0.7 ** (3 - missing.pop()))
        scores = (logits[..., 0] - logits[..., 1]).masked_fill(previous < 0.5, -torch.inf)
        return torch.zeros_like(previous).scatter_(1, scores.topk(count, 1).indices, 1)

    missing = [0, 1, 2]
    monkeypatch.setattr(module, "decide", best)
    monkeypatch.setattr(_deit, "EPSILON", 0.0)
    images = torch.randn(2, 3, 96, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        expected = tiny.forward_tokens(images)
        found = copy.deepcopy(tiny).train().forward_tokens(images)
    assert not missing
    for decision, other in zip(found.decisions, expected.decisions, strict=True):
        assert torch.equal(decision, other)
    assert relative_error(found.class_token, expected.class_token) < 1e-11
    assert relative_error(found.tokens, expected.tokens) < 1e-11


def test_masked_softmax_is_the_official_formula_from_the_best_kept_token(relative_error):
    query, key, value = torch.randn(3, 2, 3, 7, 4, dtype=torch.float64)
    keep = (torch.rand(2, 7) > 0.4).double()
    expected = torch.empty_like(value)
    for image in range(2):
        for head in range(3):
            for i in range(7):
                scores = key[image, head] @ query[image, head, i] / 2
                left = [j == i or bool(keep[image, j]) for j in range(7)]
                weights = (scores - scores[left].max()).exp() * torch.tensor(left)
                weights = (weights + 1e-6 / 7) / (weights.sum() + 1e-6)
                expected[image, head, i] = weights @ value[image, head]
    assert relative_error(_deit.masked_attention(query, key, value, keep), expected) < 1e-12


def test_a_dropped_token_that_all_attend_to_leaves_bounded_gradients():
    # The first token scores 40 above the others, and is dropped: they attend to each other and to nothing else.
    query, key, value = torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    key[:, :, 0] = 20.0
    keep = torch.tensor([[0.0, 1, 1, 1, 1]], requires_grad=True)
    out = _deit.masked_attention(query, key, value, keep)
    assert torch.allclose(out[0, 0, 1:], value[0, 0, 1:].mean(0).expand(4, 4), atol=1e-5)
    out.sum().backward()
    assert 0 < keep.grad.abs().max() < 100


def test_decisions_are_hard_final_and_carry_soft_gradients():
    logits = torch.randn(4, 50, 2, requires_grad=True)
    previous = (torch.rand(4, 50) > 0.5).float()
    torch.manual_seed(1)
    decision = module.decide(logits, previous)
    assert ((decision.detach() - decision.detach().round()).abs() < 1e-6).all()
    assert (decision[previous == 0] == 0).all()
    assert 0 < decision[previous == 1].mean() < 1
    torch.manual_seed(1)
    soft = F.gumbel_softmax(logits.log_softmax(-1))[..., 0] * previous  # temperature 1
    assert torch.equal((soft > 0.5).float(), decision.detach().round())
    weights = torch.randn(4, 50)
    (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
    (found,) = torch.autograd.grad((decision * weights).sum(), logits)
    assert torch.allclose(found, expected, atol=1e-6)


def test_predictors_mean_counts_kept_tokens_only(tiny, relative_error):
    predictor = tiny.score_predictor[0]
    tokens, keep = torch.randn(2, 9, 192, dtype=torch.float64), torch.zeros(2, 9, dtype=torch.float64)
    keep[0, :4], keep[1, 2:] = 1, 1
    with torch.no_grad():
        masked = predictor(tokens, keep)
        assert relative_error(masked[:1, :4], predictor(tokens[:1, :4])) < 1e-12
        assert relative_error(masked[1:, 2:], predictor(tokens[1:, 2:])) < 1e-12
        assert predictor(tokens, torch.zeros_like(keep)).isfinite().all()


def test_decisions_learn_from_a_dense_loss(tiny):
    # A dropped token changes no other, so its decision learns from what its own cell would have become.
    network = copy.deepcopy(tiny).train()
    torch.manual_seed(7)
    found = network.forward_tokens(torch.randn(2, 3, 96, 96, dtype=torch.float64))
    _, second, third = found.decisions
    dropped_last = (second > 0.5) & (third < 0.5)
    assert dropped_last.any(1).all()
    own = (found.tokens * torch.randn_like(found.tokens))[dropped_last].sum()
    (gradient,) = torch.autograd.grad(own, third, retain_graph=True)
    assert torch.equal(gradient != 0, dropped_last)
    # A token that is still there is attended to as well.
    gradients = torch.autograd.grad((found.tokens * torch.randn_like(found.tokens)).sum(), found.decisions)
    alive = torch.ones_like(third)
    for decision, gradient in zip(found.decisions, gradients, strict=True):
        assert gradient.isfinite().all()
        assert (gradient[alive > 0.5] != 0).all()
        alive = decision


def test_training_is_random_and_evaluation_is_not(tiny):
    network = copy.deepcopy(tiny)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(network(images)["c4"], network(images)["c4"])
        network.train()
        assert not torch.equal(network(images)["c4"], network(images)["c4"])
        assert torch.equal(network.fuse()(images)["c4"], network(images)["c4"])  # fused is inference, whatever the mode


# ---- weights and figures


def test_official_file(tmp_path, tiny, relative_error):
    network = create_classifier("dynamicvit_tiny").eval()
    state = {
        key.removeprefix("backbone."): torch.randn_like(value) * 0.05 for key, value in network.state_dict().items()
    }
    for name in (
        "cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.11.attn.qkv.bias", "blocks.0.mlp.fc2.weight",
        "norm.weight", "head.bias", "score_predictor.2.in_conv.0.weight", "score_predictor.0.in_conv.1.bias",
        "score_predictor.1.out_conv.0.weight", "score_predictor.1.out_conv.2.weight",
        "score_predictor.1.out_conv.4.bias",
    ):  # fmt: skip
        assert name in state
    report = load_checkpoint(network, save(state, tmp_path))
    assert (len(report.matched), report.missing, report.unexpected) == (len(state), (), ())
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key.removeprefix("backbone.")]), key


def test_deits_file_leaves_the_predictors_fresh_and_says_so(randomise, tmp_path, caplog):
    peer = deit("tiny", randomise)
    path = save(peer.state_dict(), tmp_path)
    with caplog.at_level(logging.WARNING):
        network = create_backbone("dynamicvit_tiny", pretrained=path)
    assert "score_predictor." in caplog.text
    assert torch.equal(network.blocks[5].mlp.fc1.weight, peer.blocks[5].mlp.fc1.weight)


def test_a_pruned_networks_file_loads_into_the_dense_one(tiny, tmp_path):
    dense = create_backbone("dynamicvit_tiny", keep_ratio=1.0)
    report = load_checkpoint(dense, save(tiny.state_dict(), tmp_path))
    assert report.missing == ()
    assert all(name.startswith("score_predictor.") for name in report.unexpected)


def test_embedding_of_another_grid_is_resized_at_load(randomise, tmp_path, relative_error):
    peer = deit("tiny", randomise, img_size=384, num_classes=0)
    network = create_backbone("dynamicvit_tiny", keep_ratio=1.0)
    report = load_checkpoint(network, save(peer.state_dict(), tmp_path))
    assert report.resized == ("pos_embed",)
    image = peer.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (24, 24))
    expected = F.interpolate(image, size=(14, 14), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert relative_error(network.pos_embed[:, 1:], expected) < 1e-6
    assert torch.equal(network.pos_embed[:, :1], peer.pos_embed[:, :1])
    no_grid = save(peer.state_dict() | {"pos_embed": torch.zeros(1, 100, 192)}, tmp_path)  # 99 is no square
    assert load_checkpoint(network, no_grid, strict=False).mismatched == ("pos_embed",)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keep_ratio", [0.5, 0.7, 0.9, 1.0])
def test_figures_are_those_of_the_instance(size, keep_ratio):
    with torch.device("meta"):
        network = create_classifier(f"dynamicvit_{size}", keep_ratio=keep_ratio).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 224, 224))
    info = network.backbone.info
    assert counter.get_total_flops() == 2 * info.macs
    assert sum(parameter.numel() for parameter in network.parameters()) == info.params
    if keep_ratio == 0.7:
        assert info.macs == pytest.approx(PRUNED_GIGA[size] * 1e9, rel=5e-3)
        assert info.macs < PRUNED_GIGA[size] * 1e9
    if keep_ratio == 1:
        assert info.macs == pytest.approx(DENSE_MEGA[size] * 1e6, abs=0.5e6)
    top1 = {"small": {0.7: 79.3, 0.9: 79.8, 1.0: 79.9}, "base": {0.7: 81.4, 1.0: 81.8}, "tiny": {1.0: 72.2}}
    assert info.top1 == top1[size].get(keep_ratio)
    assert (info.url is not None) == (keep_ratio == 1)
    if info.url:
        assert info.url.endswith(f"deit_{size}_patch16_224-{info.sha256}.pth")


@pytest.mark.parametrize("keep_ratio", [0, 1.5, -1, "0.5", None, float("nan")])
def test_ratios_out_of_range_are_refused(keep_ratio):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        create_backbone("dynamicvit_tiny", keep_ratio=keep_ratio)


def test_optimizer_groups():
    network = create_backbone("dynamicvit_small")
    assert network.no_weight_decay() == {"cls_token", "pos_embed"}
    depths = {
        "patch_embed.proj.weight": 0, "pos_embed": 0, "blocks.0.norm1.weight": 1, "score_predictor.0.in_conv.0.bias": 4,
        "blocks.3.attn.qkv.weight": 4, "score_predictor.2.out_conv.4.bias": 10, "blocks.11.mlp.fc2.bias": 12,
        "norm.weight": 12, "head.weight": 13,
    }  # fmt: skip
    assert {name: network.layer_of(name) for name in depths} == depths
    assert list_backbones("dynamicvit_*") == ["dynamicvit_base", "dynamicvit_small", "dynamicvit_tiny"]


@pytest.mark.parametrize("fused", [False, True])
def test_autocast_chooses_the_same_tokens(randomise, fused):
    torch.manual_seed(0)
    network = randomise(create_backbone("dynamicvit_tiny"))
    if fused:
        network.fuse()
    images = torch.randn(2, 3, 96, 112, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = network.forward_tokens(images).decisions
        with torch.autocast("cpu", torch.bfloat16):
            found = network.forward_tokens(images).decisions
    # The blocks before are in 8 bits, so a few tokens that are as good as others may change places with them. If the
    # ranks were in 8 bits too, four in ten would.
    for decision, other in zip(found, expected, strict=True):
        assert (decision.float() != other).float().mean() < 0.1
