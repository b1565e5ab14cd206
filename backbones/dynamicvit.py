"""DynamicViT on DeiT-T/S/B (Tsinghua).

Paper: "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021, arXiv:2106.02034.
Official code: github.com/raoyongming/DynamicViT. The trunk is DeiT: arXiv:2012.12877, github.com/facebookresearch/deit.

Before blocks 3, 6 and 9 a small network scores the tokens, and only a share of them goes on: ``keep_ratio``, its square
and its cube of the first count. In inference the others are really gone, chosen by rank. In training all stay, each
with a random decision that gradients pass through (Gumbel-softmax), and attention leaves the dropped ones out; the
class token always stays. Parameters carry the official names, which for the trunk are timm's (``deit_*_patch16_224``).
``keep_ratio=1.0`` is DeiT itself, without predictors. What differs:

* Any image size. Images are padded with zeros at the bottom and right to whole patches of 16x16, the position
  embedding is resized to the grid (bicubic, as DeiT's fine-tuning does), and the counts follow the grid: 137, 96 and 67
  of 196 tokens at 224x224, where the official code knows no other size. At least one token stays.
* A dense map (the T-PAMI version has one, but its code was not released): a token that is dropped keeps the features
  that it had then and goes back to its place on the grid. The final LayerNorm is applied to every token: those that
  left after 3, 6 or 9 blocks and those that stayed are of different scale, and a pyramid could not tell which is which.
* The fused attention of torch wherever nothing is masked. In training the official code masks with "all kept" in the
  first three blocks too, which differs by its epsilon of 1e-6 alone.
* In training, attention that only a dropped token would have got neither spreads over all tokens nor makes gradients
  explode, see ``masked_attention``.
* A mean over no tokens, where every token of an image is dropped in training, is zero instead of NaN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._contract import Backbone, FeatureMap, VariantInfo
from effvit.backbones._deit import PATCH, Block, PatchEmbed, PositionEmbedding, resize_position_embedding
from effvit.backbones._dynamicvit_fused import FusedBlock, FusedScorePredictor
from effvit.backbones._layers import drop_paths, make_head
from effvit.backbones._registry import register
from effvit.backbones._windows import side_of
from effvit.errors import ConfigError

GRID = 14  # of the published position embeddings: 224 / 16
DEPTH = 12
PRUNE_BEFORE = (3, 6, 9)


def decide(logits: Tensor, previous: Tensor) -> Tensor:
    """Random hard decisions with the gradient of soft ones (Gumbel-softmax of temperature 1).

    Args:
        logits: ``(B, N, 2)``, for keeping and for dropping.
        previous: The decisions before ``(B, N)``; what was dropped stays dropped.

    Returns:
        ``(B, N)``, 1 or 0 but for rounding.
    """
    # In float32, since the noise of half precision can be infinite.
    logits = logits.float() if logits.dtype in {torch.float16, torch.bfloat16} else logits
    return F.gumbel_softmax(logits.log_softmax(-1), hard=True)[..., 0].to(previous.dtype) * previous


class ScorePredictor(nn.Module):
    """Says for each token whether to keep it, from its own features and the mean of all (paper §3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_conv = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(channels, channels // 2),
            nn.GELU(),
            nn.Linear(channels // 2, channels // 4),
            nn.GELU(),
            nn.Linear(channels // 4, 2),
        )

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores.

        Args:
            tokens: ``(B, N, C)``, without the class token.
            keep: Which of them count in the mean, ``(B, N)``; all by default.

        Returns:
            Logits ``(B, N, 2)`` for keeping and for dropping.
        """
        local, overall = self.in_conv(tokens).chunk(2, -1)
        if keep is None:
            mean = overall.mean(1, keepdim=True)
        else:
            weights = keep[..., None]
            mean = (overall * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=0.5)
        logits: Tensor = self.out_conv(torch.cat([local, mean.expand_as(local)], -1))
        return logits

    def rank(self, x: Tensor) -> Tensor:
        """What the tokens of ``(B, 1 + N, C)`` are ranked by, ``(B, N)``; the first, the class token, is not ranked.

        The difference of the two logits, which orders as the probability of keeping does.
        """
        logits: Tensor = self(x[:, 1:])
        return logits[..., 0] - logits[..., 1]


@dataclass(frozen=True)
class DynamicTokens:
    """Everything that the network knows about a batch; what the sparsification losses are made of.

    Attributes:
        class_token: ``(B, C)`` after the final LayerNorm.
        tokens: ``(B, N, C)`` after it, row by row of the grid; a dropped one as it was when it was dropped.
        last: The same, but in training a dropped one as it left the last block. Token distillation reads the kept ones,
            whose gradient here reaches the decisions through attention alone, as in the official code.
        decisions: For each predictor ``(B, N)``, 1 for kept tokens and 0 for others. In training with gradient, and 1
            only but for rounding. Empty for a keep ratio of 1.
        grid: Rows and columns.
    """

    class_token: Tensor
    tokens: Tensor
    last: Tensor
    decisions: tuple[Tensor, ...]
    grid: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DynamicViTVariant(VariantInfo):
    """One DeiT with the published figures at a keep ratio of 0.7.

    Attributes:
        channels: Length of a token.
        heads: Attention heads.
        dense: The figures and the weights at a keep ratio of 1.
        other_top1: Published top-1 at other ratios.
    """

    channels: int
    heads: int
    dense: VariantInfo
    other_top1: tuple[tuple[float, float], ...] = ()


class DynamicViT(Backbone):
    """The network; its one map ``"c4"`` has stride 16.

    Args:
        variant: Its row of the table.
        keep_ratio: Share of the tokens that each predictor lets pass, in (0, 1]; 1 is DeiT, without predictors.
        drop_path_rate: Share of samples that skip a branch of the last block in training; it grows linearly from 0.
            The authors train DeiT-B with 0.2 and the others without.

    Raises:
        ConfigError: `keep_ratio` or `drop_path_rate` is out of range.
    """

    fresh_allowed = ("score_predictor.",)

    def __init__(self, variant: DynamicViTVariant, *, keep_ratio: float = 0.7, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        if not isinstance(keep_ratio, (int, float)) or not 0 < keep_ratio <= 1:
            raise ConfigError(f"keep_ratio of {variant.name} is a number above 0 and at most 1, not {keep_ratio!r}")
        self.info = info_at(variant, keep_ratio)
        self.keep_ratio = keep_ratio
        self.fused = False
        channels = variant.channels
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, channels))
        self.patch_embed = PatchEmbed(channels)
        self.blocks = nn.ModuleList(
            Block(channels, variant.heads, drop_path) for drop_path in drop_paths(drop_path_rate, DEPTH)
        )
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        stages = len(PRUNE_BEFORE) if keep_ratio < 1 else 0
        self.score_predictor = nn.ModuleList(ScorePredictor(channels) for _ in range(stages))
        self.position = PositionEmbedding()
        self.feature_maps = (FeatureMap("c4", channels, PATCH),)
        self.num_features = channels
        self.num_layers = 1 + DEPTH
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map ``{"c4"}`` of normalised images ``(B, 3, H, W)``; see ``Backbone.forward``."""
        found = self.forward_tokens(images)
        rows, columns = found.grid
        return {"c4": found.tokens.view(images.shape[0], rows, columns, -1).permute(0, 3, 1, 2)}

    def forward_tokens(self, images: Tensor) -> DynamicTokens:
        """Class token, tokens on the grid and all decisions, from normalised images ``(B, 3, H, W)``.

        In training mode the decisions are random, in eval mode they are the ranks'.
        """
        x, grid = self._enter(images)
        if self.training and self.score_predictor and not self.fused:
            x, tokens, decisions = self._masked(x)
            x = self.norm(x)
            return DynamicTokens(x[:, 0], self.norm(tokens), x[:, 1:], decisions, grid)
        class_token, tokens, decisions = self._gathered(x)
        tokens = self.norm(tokens)
        return DynamicTokens(self.norm(class_token), tokens, tokens, decisions, grid)

    def embed(self, images: Tensor) -> Tensor:
        """The class token after the final LayerNorm, ``(B, num_features)``."""
        if self.training:
            return self.forward_tokens(images).class_token
        x, _ = self._enter(images)
        count = x.shape[1] - 1
        for depth, block in enumerate(self.blocks):
            if depth in PRUNE_BEFORE and self.score_predictor:
                x = _take(x, self._choose(PRUNE_BEFORE.index(depth), x, count))
            x = self.run(block, x)
        out: Tensor = self.norm(x[:, 0])
        return out

    def tokens_kept(self, count: int) -> tuple[int, ...]:
        """How many of `count` tokens are left after each predictor in inference."""
        return tuple(
            max(1, int(count * self.keep_ratio**power)) for power, _ in enumerate(self.score_predictor, start=1)
        )

    def _enter(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with positions ``(B, 1 + N, C)``, the class token first, and the grid."""
        patches = self.patch_embed(images)
        grid = (patches.shape[1], patches.shape[2])
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches.flatten(1, 2)], 1)
        return x.add_(self.position(self.pos_embed, *grid)), grid

    def _choose(self, stage: int, x: Tensor, count: int) -> Tensor:
        """The tokens that stay, ``(B, kept)``, as numbers among those of ``(B, 1 + N, C)`` without the class token."""
        predictor: ScorePredictor = self.score_predictor[stage]  # type: ignore[assignment]
        # Attention does not care about the order.
        return _rank(predictor, x, self.norm.weight.dtype).topk(self.tokens_kept(count)[stage], 1, sorted=False).indices

    def _gathered(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Inference: class token, tokens back on the grid, decisions. Dropped tokens are gone until the end."""
        batch, count = x.shape[0], x.shape[1] - 1
        places = torch.arange(batch * count, device=x.device).view(batch, count)
        held: Tensor | None = None
        decisions = []
        for depth, block in enumerate(self.blocks):
            if depth in PRUNE_BEFORE and self.score_predictor:
                held = _put_back(held, places, x)
                kept = self._choose(PRUNE_BEFORE.index(depth), x, count)
                places = places.gather(1, kept)
                decisions.append(x.new_zeros(batch * count).index_fill_(0, places.flatten(), 1).view(batch, count))
                x = _take(x, kept)
            x = self.run(block, x)
        return x[:, 0], _put_back(held, places, x).view(batch, count, -1), tuple(decisions)

    def _masked(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Training: everything behind the last block ``(B, 1 + N, C)``, tokens on the grid and decisions.

        The decisions are random, and each weighs on the result with a gradient. All tokens go through all blocks; none
        attends to a dropped one.
        """
        keep = x.new_ones(x.shape[0], x.shape[1] - 1)
        policy: Tensor | None = None
        decided: list[tuple[Tensor, Tensor]] = []  # decisions, and the tokens they were about
        for depth, block in enumerate(self.blocks):
            if depth in PRUNE_BEFORE:
                predictor = self.score_predictor[PRUNE_BEFORE.index(depth)]
                keep = decide(predictor(x[:, 1:], keep), keep)
                policy = F.pad(keep, (1, 0), value=1.0)  # the class token
                decided.append((keep, x[:, 1:]))
            x = self.run(block, x, policy)
        tokens = x[:, 1:]
        for decision, before in reversed(decided):
            # Not `where`: its derivative tells a decision what the token would have become.
            tokens = torch.lerp(before, tokens, decision[..., None].to(tokens.dtype))
        return x, tokens, tuple(decision for decision, _ in decided)

    def make_classifier(self, num_classes: int) -> nn.Linear:
        """One linear layer."""
        return make_head(self.num_features, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Class token and position embedding, as in the official optimizer."""
        return {"cls_token", "pos_embed"}

    def layer_of(self, parameter_name: str) -> int:
        """Embeddings 0, then each block one more; a predictor with its next block, the norm with the last."""
        if parameter_name.startswith(("patch_embed.", "cls_token", "pos_embed")):
            return 0
        if parameter_name.startswith("norm."):
            return DEPTH
        found = re.match(r"(blocks|score_predictor)\.(\d+)\.", parameter_name)
        if found is None:
            return self.num_layers
        number = int(found[2])
        return 1 + (number if found[1] == "blocks" else PRUNE_BEFORE[number])

    def resize_table(self, name: str, table: Tensor, shape: torch.Size) -> Tensor | None:
        """Bicubic, see ``Backbone.resize_table``."""
        if name != "pos_embed" or table.ndim != 3 or table.shape[2] != shape[2]:
            return None
        if side_of(table[:, 1:]) ** 2 != table.shape[1] - 1:
            return None
        return resize_position_embedding(table, GRID, GRID)

    def fuse(self) -> DynamicViT:
        """See ``Backbone.fuse``; the deploy form is in ``_dynamicvit_fused``. There is no BatchNorm to fold."""
        if not self.fused:
            self.blocks = nn.ModuleList(FusedBlock(block) for block in self.blocks)  # type: ignore[arg-type]
            self.score_predictor = nn.ModuleList(
                FusedScorePredictor(predictor)  # type: ignore[arg-type]
                for predictor in self.score_predictor
            )
            self.requires_grad_(requires_grad=False)
            self.fused = True
        return self

    @classmethod
    def convert_key(cls, key: str) -> str | None:
        """The official names are ours, and timm's."""
        return key


def _rank(predictor: ScorePredictor, x: Tensor, kind: torch.dtype) -> Tensor:
    """``predictor.rank(x)`` in the type of its weights under autocast too: with 8 bits many tokens would be equal."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return predictor.rank(x.to(kind))
    return predictor.rank(x)


def _take(x: Tensor, kept: Tensor) -> Tensor:
    """The class token and the kept tokens.

    Args:
        x: ``(B, 1 + N, C)``.
        kept: ``(B, K)``, numbers from 0 to N - 1.

    Returns:
        ``(B, 1 + K, C)``, contiguous.
    """
    batch, total, channels = x.shape
    starts = torch.arange(0, batch * total, total, device=x.device)[:, None]
    rows = torch.cat([starts, kept + (starts + 1)], 1)
    return x.reshape(-1, channels).index_select(0, rows.flatten()).view(batch, -1, channels)


def _put_back(held: Tensor | None, places: Tensor, x: Tensor) -> Tensor:
    """The grid ``(B * N, C)`` with the tokens that are left in their present form.

    Args:
        held: The grid before; ``None`` while all tokens are left, in their first order.
        places: Where each token belongs, ``(B, K)``.
        x: ``(B, 1 + K, C)``, the class token first.
    """
    tokens = x[:, 1:].flatten(0, 1)
    return tokens if held is None else held.index_copy(0, places.flatten(), tokens)


def count_macs(channels: int, keep_ratio: float) -> int:
    """Multiply-accumulates of one 224x224 image through the network and its 1000-class head."""
    tokens = GRID * GRID
    total = tokens * 3 * PATCH * PATCH * channels + channels * 1000
    for depth in range(DEPTH):
        if keep_ratio < 1 and depth in PRUNE_BEFORE:
            total += tokens * (channels * channels * 13 // 8 + channels // 2)
            tokens = max(1, int(GRID * GRID * keep_ratio ** (PRUNE_BEFORE.index(depth) + 1)))
        total += 12 * (tokens + 1) * channels * channels + 2 * (tokens + 1) ** 2 * channels
    return total


def info_at(variant: DynamicViTVariant, keep_ratio: float) -> VariantInfo:
    """What is published about a variant at a keep ratio."""
    if keep_ratio == 1:
        return variant.dense
    if keep_ratio == 0.7:
        return variant
    macs = count_macs(variant.channels, keep_ratio)
    return replace(variant, macs=macs, top1=dict(variant.other_top1).get(keep_ratio), top5=None)


_DEIT_PAGE = "https://github.com/facebookresearch/deit/blob/main/README_deit.md"


def _row(
    name: str,
    size: tuple[int, int],
    published: tuple[int, float | None, float | None],
    dense: tuple[int, float, float, str],
    other_top1: tuple[tuple[float, float], ...] = (),
) -> DynamicViTVariant:
    channels, heads = size
    params, top1, top5 = published
    dense_params, dense_top1, dense_top5, digits = dense
    return DynamicViTVariant(
        name=f"dynamicvit_{name}",
        family="DynamicViT",
        params=params,
        macs=count_macs(channels, 0.7),
        top1=top1,
        top5=top5,
        paper="2106.02034",
        source="github.com/raoyongming/DynamicViT, README.md, and the paper's Table 1 (accuracy); parameters and MACs "
        "counted, without the norms, which the published GFLOPs include",
        licence="MIT" if top1 else "Apache-2.0 (DeiT)",
        origin="the authors' Google Drive" if top1 else "none were published; DeiT's fit",
        url=None,
        page="https://github.com/raoyongming/DynamicViT" if top1 else _DEIT_PAGE,
        instead="keep_ratio=1.0 downloads DeiT, and a file of DeiT loads at any ratio, with fresh predictors.",
        channels=channels,
        heads=heads,
        other_top1=other_top1,
        dense=VariantInfo(
            name=f"dynamicvit_{name}",
            family="DynamicViT",
            params=dense_params,
            macs=count_macs(channels, 1.0),
            top1=dense_top1,
            top5=dense_top5,
            paper="2012.12877",
            source="github.com/facebookresearch/deit, README_deit.md (accuracy); parameters and MACs counted",
            licence="Apache-2.0",
            origin="the DeiT authors' download server",
            url=f"https://dl.fbaipublicfiles.com/deit/deit_{name}_patch16_224-{digits}.pth",
            sha256=digits,  # torch.hub's convention: the file's name ends in the first digits of its hash
        ),
    )


# name, (channels, heads), (parameters, top-1, top-5) at 0.7, (parameters, top-1, top-5, hash) of DeiT, top-1 elsewhere
VARIANTS = (
    _row("tiny", (192, 3), (5_899_582, None, None), (5_717_416, 72.2, 91.1, "a1311bcf")),
    _row(
        "small",
        (384, 6),
        (22_774_414, 79.3, 94.7),
        (22_050_664, 79.9, 95.0, "cd65a155"),
        ((0.9, 79.8), (0.8, 79.6)),
    ),
    _row("base", (768, 12), (89_452_846, 81.4, 95.5), (86_567_656, 81.8, 95.6, "b5f2ef4d")),
)

register(DynamicViT, VARIANTS)
