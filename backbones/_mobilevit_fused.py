"""Deploy form of MobileViT's attention block."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effvit.backbones._cvnets_fused import absorb_affine
from effvit.backbones._cvnets_patches import cut_patches, even, merge_patches, resize
from effvit.backbones._fused import accumulate, bias_of, channels_last, frozen

if TYPE_CHECKING:
    from effvit.backbones.mobilevit import MobileViTBlock, TransformerLayer


class FusedLayer(nn.Module):
    """``TransformerLayer``."""

    def __init__(self, layer: TransformerLayer, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.eps = layer.norm1.eps
        qkv, proj, fc1, fc2 = layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2
        self.qkv, self.qkv_bias = map(frozen, absorb_affine(layer.norm1, qkv.weight, qkv.bias))
        self.proj, self.proj_bias = frozen(proj.weight), frozen(proj.bias)
        self.fc1, self.fc1_bias = map(frozen, absorb_affine(layer.norm2, fc1.weight, fc1.bias))
        self.fc2, self.fc2_bias = frozen(fc2.weight), frozen(fc2.bias)

    def forward(self, tokens: Tensor, sequences: int) -> Tensor:
        dim = tokens.shape[1]
        normed = F.layer_norm(tokens, (dim,), eps=self.eps)
        qkv = F.linear(normed, self.qkv, self.qkv_bias).view(sequences, -1, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(-1, dim)
        tokens = accumulate(tokens + self.proj_bias, attended, self.proj.t())
        normed = F.layer_norm(tokens, (dim,), eps=self.eps)
        hidden = F.silu(F.linear(normed, self.fc1, self.fc1_bias), inplace=True)
        return accumulate(tokens + self.fc2_bias, hidden, self.fc2.t())


class FusedMobileViTBlock(nn.Module):
    """``MobileViTBlock``."""

    def __init__(self, block: MobileViTBlock) -> None:
        super().__init__()
        self.local = channels_last(block.conv_kxk.fold())
        self.enter = frozen(block.conv_1x1.weight.flatten(1))
        self.layers = nn.ModuleList(FusedLayer(cast("TransformerLayer", layer), 4) for layer in block.transformer)
        proj = block.conv_proj.fold()
        self.eps = block.norm.eps
        self.leave, self.leave_bias = map(frozen, absorb_affine(block.norm, proj.weight.flatten(1), bias_of(proj)))
        self.fusion = channels_last(block.conv_fusion.fold())

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same."""
        height, width = x.shape[2:]
        full = (even(height), even(width))
        local = resize(F.silu(self.local(x), inplace=True), *full, align_corners=False)
        patches = cut_patches(local.permute(0, 2, 3, 1)).flatten(0, 1)
        tokens = F.linear(patches.view(-1, patches.shape[2]), self.enter)
        for layer in self.layers:
            tokens = layer(tokens, patches.shape[0])
        tokens = F.layer_norm(tokens, tokens.shape[1:], eps=self.eps)
        tokens = F.linear(tokens, self.leave, self.leave_bias).view(patches.shape[0], patches.shape[1], -1)
        attended = resize(merge_patches(tokens, *full).permute(0, 3, 1, 2), height, width, align_corners=False)
        attended = F.silu(attended, inplace=True)
        return F.silu(self.fusion(torch.cat((x, attended), 1)), inplace=True)
