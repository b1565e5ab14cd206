"""What EfficientFormer's published detection backbone computes, with our weights: the baseline at detection size.

It is a baseline of cost, so each step is done as there: maps in NCHW memory, BatchNorm and layer scales unfolded,
tokens in a layout of their own, attention in plain products, and the bias matrix of the nominal grid resized to the
image's in every forward. (In evaluation the gathered matrix of the nominal grid is kept, there as here.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from effvit.backbones.efficientformer import Attention, AttentionBlock, EfficientFormer, PoolBlock


class OfficialEfficientFormer(nn.Module):
    """Runs the weights of ``create_backbone("efficientformer_l*", official_grid=...)`` as the authors' code does.

    Args:
        network: Not fused.
    """

    def __init__(self, network: EfficientFormer) -> None:
        super().__init__()
        assert network.official_grid is not None
        self.network = network
        y, x = torch.meshgrid(torch.arange(network.official_grid), torch.arange(network.official_grid), indexing="ij")
        y, x = y.flatten(), x.flatten()
        offsets = (y[:, None] - y).abs() * network.official_grid + (x[:, None] - x).abs()
        self.matrices = {
            name: module.table.detach()[:, offsets]
            for name, module in network.named_modules()
            if hasattr(module, "table_name")
        }

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 4, 8, 16 and 32 of ``(B, 3, H, W)``, after their GroupNorms."""
        stem = self.network.stem
        x = F.relu(stem.norm1(stem.conv1(images)))
        x = F.relu(stem.norm2(stem.conv2(x)))
        maps = []
        for position, stage in enumerate(self.network.stages):
            if position:
                x = stage.downsample.norm(stage.downsample.conv(x))
            height, width = x.shape[2:]
            for index, block in enumerate(stage.blocks):
                if isinstance(block, nn.Identity):
                    x = x.flatten(2).transpose(1, 2)
                elif x.ndim == 4:
                    x = _pool_block(block, x)
                else:
                    matrix = self.matrices[f"stages.{position}.blocks.{index}.token_mixer"]
                    x = _attention_block(block, x, matrix)
            if x.ndim == 3:
                x = x.transpose(1, 2).reshape(x.shape[0], -1, height, width)
            maps.append(self.network.get_submodule(f"norm{2 * position}")(x))
        return maps


def _pool_block(block: PoolBlock, x: Tensor) -> Tensor:
    pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = x + block.ls1.gamma[:, None, None] * (pooled - x)
    hidden = F.gelu(block.mlp.norm1(block.mlp.fc1(x)))
    return x + block.ls2.gamma[:, None, None] * block.mlp.norm2(block.mlp.fc2(hidden))


def _attention_block(block: AttentionBlock, tokens: Tensor, matrix: Tensor) -> Tensor:
    tokens = tokens + block.ls1.gamma * _attention(block.token_mixer, block.norm1(tokens), matrix)
    hidden = F.gelu(block.mlp.fc1(block.norm2(tokens)))
    return tokens + block.ls2.gamma * block.mlp.fc2(hidden)


def _attention(mixer: Attention, tokens: Tensor, matrix: Tensor) -> Tensor:
    batch, count, _ = tokens.shape
    heads = mixer.qkv(tokens).reshape(batch, count, len(matrix), -1).permute(0, 2, 1, 3)
    query, key, value = heads.split(mixer.split, -1)
    scores = (query @ key.transpose(-2, -1)) * mixer.scale
    scores = scores + F.interpolate(matrix[None], size=(count, count), mode="bicubic")
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, count, -1)
    return mixer.proj(mixed)


def check_equal(network: EfficientFormer, images: Tensor, *, tolerance: float = 1e-4) -> None:
    """Stops the benchmark unless the network and its official computation give the same maps."""
    for found, expected in zip(network(images).values(), OfficialEfficientFormer(network)(images), strict=True):
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        if error > tolerance:
            raise SystemExit(f"{network.info.name} differs from the official computation by {error:.1e} of the largest")
