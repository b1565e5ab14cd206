"""The parts of DeiT (arXiv:2012.12877) that DynamicViT is made of, with attention that can leave tokens out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._layers import DropPath, gelu
from effvit.backbones._windows import TableOfShape, side_of

PATCH = 16
EPSILON = 1e-6


def masked_attention(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    """Attention to the kept tokens and to oneself (paper §3.3).

    As in the official code, every weight has EPSILON / N added before the row is divided by its sum: gradients reach
    decisions whose tokens no query attends to, and a dropped token leaks at most a millionth into the others.

    Unlike there, scores are relative to the best one of a kept token, and a dropped token that scores higher counts as
    that much. Else, where attention is sharp, the best token alone would be dropped, all that is left would vanish
    beside EPSILON, and the decision's gradient would be up to 1 / EPSILON times as large, which keeps it from learning.

    Args:
        query: ``(B, heads, N, C)``.
        key: The same shape.
        value: The same shape.
        keep: ``(B, N)``, 1 or 0, with gradient.

    Returns:
        ``(B, heads, N, C)``.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if scores.dtype in {torch.float16, torch.bfloat16}:
        scores, keep = scores.float(), keep.float()
    count = keep.shape[1]
    keys = keep[:, None, None]
    allowed = keys + (1 - keys) * torch.eye(count, dtype=keep.dtype, device=keep.device)
    best = scores.detach().masked_fill(allowed.detach() < 0.5, -torch.inf).amax(-1, keepdim=True)
    weights = (scores - best).clamp(max=0).exp() * allowed
    weights = (weights + EPSILON / count) / (weights.sum(-1, keepdim=True) + EPSILON)
    out: Tensor = weights.to(value.dtype) @ value
    return out


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, channels * 3)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """``(B, N, C)`` to the same; see ``Block``."""
        # Views of one product, which the fused attention reads as they lie.
        batch, count, _ = x.shape
        query, key, value = self.qkv(x).view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        if keep is None:
            mixed = F.scaled_dot_product_attention(query, key, value)
        else:
            mixed = masked_attention(query, key, value, keep)
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels * 4)
        self.fc2 = nn.Linear(channels * 4, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to the same."""
        out: Tensor = self.fc2(gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Transformer block: attention and feed-forward, each on normalised tokens and residual.

    Args:
        channels: Length of a token.
        heads: Attention heads.
        drop_path: Share of samples that skip a branch in training.
    """

    def __init__(self, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = Mlp(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mixes.

        Args:
            x: Tokens ``(B, N, C)``.
            keep: Which of them the others attend to, ``(B, N)``; all by default.

        Returns:
            The same shape.
        """
        x = x + self.drop_path(self.attn(self.norm1(x), keep))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class PatchEmbed(nn.Module):
    """Linear embedding of 16x16 patches, kept as the convolution that checkpoints hold."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, ceil(H / 16), ceil(W / 16), C)``, zeros where the image ends."""
        bottom, right = -images.shape[2] % PATCH, -images.shape[3] % PATCH
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        # Without overlap a convolution is a product with the patches, up to twice as fast on CPUs.
        batch, _, height, width = images.shape
        cut = images.reshape(batch, 3, height // PATCH, PATCH, width // PATCH, PATCH)
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class PositionEmbedding(TableOfShape):
    """The position embedding resized to a grid."""

    def _expand(self, table: Tensor, height: int, width: int) -> Tensor:
        return resize_position_embedding(table, height, width)


def resize_position_embedding(table: Tensor, height: int, width: int) -> Tensor:
    """Resizes the embedding of a square grid as DeiT's fine-tuning does: bicubic, corners not aligned.

    Args:
        table: ``(1, 1 + R * R, C)``, the class token first.
        height: Rows wanted.
        width: Columns wanted.

    Returns:
        ``(1, 1 + height * width, C)``.
    """
    side = side_of(table[:, 1:])
    if (side, side) == (height, width):
        return table
    image = table[:, 1:].transpose(1, 2).reshape(1, -1, side, side).float()
    resized = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2).to(table.dtype)], 1)
