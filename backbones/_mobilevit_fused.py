"""Deploy form of MobileViT's attention block: the same operations, with what the layout does not need left out.

Maps stay in channels-last memory, where pointwise convolutions are products on the cells, and the products that end in
a residual accumulate onto it. The norms keep their scale and shift: on CPUs LayerNorm is faster with them than without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._cvnets_fused import FusedConv, add_product
from effvit.backbones._cvnets_patches import cut_patches, even, merge_patches, resize
from effvit.backbones._fused import bias_of, frozen

if TYPE_CHECKING:
    from effvit.backbones.mobilevit import MobileViTBlock, TransformerLayer


class FusedTransformerLayer(nn.Module):
    """``TransformerLayer``, which it leaves as it is but for the residuals."""

    def __init__(self, layer: TransformerLayer, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = layer.norm1, layer.attn.qkv, layer.attn.proj
        self.norm2, self.fc1, self.fc2 = layer.norm2, layer.mlp.fc1, layer.mlp.fc2
        self.requires_grad_(requires_grad=False)

    def forward(self, tokens: Tensor, sequences: int) -> Tensor:
        """``(sequences * N, dim)``, the caller's own, to the same."""
        dim = tokens.shape[1]
        qkv = self.qkv(self.norm1(tokens)).view(sequences, -1, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        tokens = add_product(tokens, self.proj.bias, attended.reshape(-1, dim), self.proj.weight)
        hidden = F.silu(self.fc1(self.norm2(tokens)), inplace=True)
        return add_product(tokens, self.fc2.bias, hidden, self.fc2.weight)


class FusedMobileViTBlock(nn.Module):
    """``MobileViTBlock``."""

    def __init__(self, block: MobileViTBlock, heads: int) -> None:
        super().__init__()
        self.local = FusedConv(block.conv_kxk.fold())
        self.enter = frozen(block.conv_1x1.weight.flatten(1))
        layers = (FusedTransformerLayer(cast("TransformerLayer", layer), heads) for layer in block.transformer)
        self.layers = nn.ModuleList(layers)
        self.norm = block.norm.requires_grad_(requires_grad=False)
        project = block.conv_proj.fold()
        self.leave, self.leave_bias = frozen(project.weight.flatten(1)), frozen(bias_of(project))
        self.fusion = FusedConv(block.conv_fusion.fold())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        height, width = x.shape[2:]
        full = (even(height), even(width))
        local = resize(self.local(x), *full, align_corners=False)
        patches = cut_patches(local.permute(0, 2, 3, 1)).flatten(0, 1)
        sequences, count, channels = patches.shape
        tokens = F.linear(patches.view(-1, channels), self.enter)
        for layer in self.layers:
            tokens = layer(tokens, sequences)
        patches = F.linear(self.norm(tokens), self.leave, self.leave_bias).view(sequences, count, channels)
        attended = resize(merge_patches(patches, *full).permute(0, 3, 1, 2), height, width, align_corners=False)
        out: Tensor = self.fusion(torch.cat((x, F.silu(attended, inplace=True)), 1))
        return out
