"""The official networks that files of OpenMMLab hold, as ``(name, shape)`` of each entry.

Written down from the official code (microsoft/Cream ``EfficientViT/downstream``, snap-research/EfficientFormer
``detection`` and ``segmentation``) and MMDetection's, not derived from ours. Not a test module.
"""

from __future__ import annotations

import torch


def norm(name, channels):
    yield from ((f"{name}.{kind}", (channels,)) for kind in ("weight", "bias", "running_mean", "running_var"))


def layer(name, *shape):
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def microsoft_conv(name, out, into, side=1):
    yield f"{name}.c.weight", (out, into, side, side)
    yield from norm(f"{name}.bn", out)


def microsoft_ffn(name, channels):
    yield from microsoft_conv(f"{name}.m.pw1", 2 * channels, channels)
    yield from microsoft_conv(f"{name}.m.pw2", channels, 2 * channels)


def microsoft_merging(name, channels, out):
    hidden = 4 * channels
    yield from microsoft_conv(f"{name}.conv1", hidden, channels)
    yield from microsoft_conv(f"{name}.conv2", hidden, 1, 3)
    yield from layer(f"{name}.se.fc1", hidden // 4, hidden, 1, 1)
    yield from layer(f"{name}.se.fc2", hidden, hidden // 4, 1, 1)
    yield from microsoft_conv(f"{name}.conv3", out, hidden)


def microsoft_block(name, channels, heads, kernels):
    attention = f"{name}.mixer.m.attn"
    for half in "01":
        yield from microsoft_conv(f"{name}.dw{half}.m", channels, 1, 3)
        yield from microsoft_ffn(f"{name}.ffn{half}", channels)
    for head in range(heads):
        yield from microsoft_conv(f"{attention}.qkvs.{head}", 32 + channels // heads, channels // heads)
        yield from microsoft_conv(f"{attention}.dws.{head}", 16, 1, kernels[head])
    yield from microsoft_conv(f"{attention}.proj.1", channels, channels)
    yield f"{attention}.attention_biases", (heads, 49)
    yield f"{attention}.attention_bias_idxs", (49, 49)


def efficientvit(widths=(128, 256, 384), depths=(1, 2, 3), heads=4, kernels=(7, 5, 3, 3)):
    first = widths[0]
    for index, into, out in ((0, 3, first // 8), (2, first // 8, first // 4), (4, first // 4, first // 2)):
        yield from microsoft_conv(f"patch_embed.{index}", out, into, 3)
    yield from microsoft_conv("patch_embed.6", first, first // 2, 3)
    for stage, (channels, depth) in enumerate(zip(widths, depths, strict=True), 1):
        start = 0
        if stage > 1:
            start, before = 3, widths[stage - 2]
            for part, width in ((0, before), (2, channels)):
                yield from microsoft_conv(f"blocks{stage}.{part}.0.m", width, 1, 3)
                yield from microsoft_ffn(f"blocks{stage}.{part}.1", width)
            yield from microsoft_merging(f"blocks{stage}.1", before, channels)
        for block in range(start, start + depth):
            yield from microsoft_block(f"blocks{stage}.{block}", channels, heads, kernels)


def snap_stem(width):
    for position, into, out in ((0, 3, width // 2), (3, width // 2, width)):
        yield from layer(f"patch_embed.{position}", out, into, 3, 3)
        yield from norm(f"patch_embed.{position + 1}", out)


def snap_tables(name, side, cells, used, queries=None):
    yield f"{name}.attention_biases", (8, cells)
    yield f"{name}.attention_bias_idxs", (queries or cells, cells)
    yield f"{name}.attention_biases_seg", (8, side**2)
    yield f"{name}.attention_bias_idxs_seg", (used, side**2)


def efficientformer(widths=(48, 96, 224, 448), depths=(3, 2, 6, 4), grid=25):
    yield from snap_stem(widths[0])
    for stage, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            yield from layer(f"network.{2 * stage - 1}.proj", channels, widths[stage - 1], 3, 3)
            yield from norm(f"network.{2 * stage - 1}.norm", channels)
        for block in range(depth - (stage == 3)):
            name = f"network.{2 * stage}.{block}"
            yield from layer(f"{name}.mlp.fc1", 4 * channels, channels, 1, 1)
            yield from layer(f"{name}.mlp.fc2", channels, 4 * channels, 1, 1)
            yield from norm(f"{name}.mlp.norm1", 4 * channels)
            yield from norm(f"{name}.mlp.norm2", channels)
            yield from ((f"{name}.layer_scale_{k}", (channels,)) for k in (1, 2))
        yield from layer(f"norm{2 * stage}", channels)
    name = f"network.6.{depths[3]}"  # a layer without weights, which flattens the map, is before it
    for part in ("norm1", "norm2"):
        yield from layer(f"{name}.{part}", channels)
    yield from layer(f"{name}.token_mixer.qkv", 1536, channels)
    yield from layer(f"{name}.token_mixer.proj", channels, 1024)
    yield from snap_tables(f"{name}.token_mixer", grid, 49, grid**2)
    yield from layer(f"{name}.mlp.fc1", 4 * channels, channels)
    yield from layer(f"{name}.mlp.fc2", channels, 4 * channels)
    yield from ((f"{name}.layer_scale_{k}", (channels,)) for k in (1, 2))


def snap_conv(name, out, into, side=1):
    yield from layer(f"{name}.0", out, into, side, side)
    yield from norm(f"{name}.1", out)


def snap_mlp(name, channels, hidden):
    for part, shape in (
        ("fc1", (hidden, channels, 1, 1)),
        ("mid", (hidden, 1, 3, 3)),
        ("fc2", (channels, hidden, 1, 1)),
    ):
        yield from layer(f"{name}.{part}", *shape)
    for part, width in (("norm1", hidden), ("mid_norm", hidden), ("norm2", channels)):
        yield from norm(f"{name}.{part}", width)


def snap_attention(name, channels, strided, grid):
    if strided:
        yield from snap_conv(f"{name}.stride_conv", channels, 1, 3)
    for part, width in (("q", 256), ("k", 256), ("v", 1024)):
        yield from snap_conv(f"{name}.{part}", width, channels)
    yield from snap_conv(f"{name}.v_local", 1024, 1, 3)
    yield from layer(f"{name}.talking_head1", 8, 8, 1, 1)
    yield from layer(f"{name}.talking_head2", 8, 8, 1, 1)
    yield from layer(f"{name}.proj.1", channels, 1024, 1, 1)
    yield from norm(f"{name}.proj.2", channels)
    yield from snap_tables(name, grid, 49, grid**2)


def snap_downsampling(name, channels, out, grid):
    yield from layer(f"{name}.conv", out, channels, 3, 3)
    yield from norm(f"{name}.bn", out)
    yield from layer(f"{name}.attn.q.local.0", channels, 1, 3, 3)
    yield from snap_conv(f"{name}.attn.q.proj", 128, channels)
    yield from snap_conv(f"{name}.attn.k", 128, channels)
    yield from snap_conv(f"{name}.attn.v", 512, channels)
    yield from snap_conv(f"{name}.attn.v_local", 512, 1, 3)
    yield from layer(f"{name}.attn.proj.1", out, 512, 1, 1)
    yield from norm(f"{name}.attn.proj.2", out)
    yield from snap_tables(f"{name}.attn", 2 * grid, 196, grid**2, queries=49)


S0_WIDTHS, S0_RATIOS = (32, 48, 96, 176), ((4,) * 2, (4,) * 2, (4, 3, 3, 3, 4, 4), (4, 3, 3, 4))
S2_WIDTHS, S2_RATIOS = (
    (32, 64, 144, 288),
    (
        (4,) * 4,
        (4,) * 4,
        (4, 4, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4),
        (4, 4, 3, 3, 3, 3, 4, 4),
    ),
)


def efficientformerv2(widths, ratios, attentions, grid=25):
    yield from snap_stem(widths[0])
    for stage, (channels, expansions) in enumerate(zip(widths, ratios, strict=True)):
        if stage in (1, 2):
            yield from layer(f"network.{2 * stage - 1}.proj", channels, widths[stage - 1], 3, 3)
            yield from norm(f"network.{2 * stage - 1}.norm", channels)
        elif stage:
            yield from snap_downsampling("network.5", widths[2], channels, grid)
        for block, ratio in enumerate(expansions):
            name = f"network.{2 * stage}.{block}"
            yield from snap_mlp(f"{name}.mlp", channels, ratio * channels)
            yield f"{name}.layer_scale_2", (channels, 1, 1)
            if stage > 1 and block >= len(expansions) - attentions:
                yield from snap_attention(f"{name}.token_mixer", channels, strided=stage == 2, grid=grid)
                yield f"{name}.layer_scale_1", (channels, 1, 1)


def fpn_layers(levels, inputs, channels=256, own="pyramid"):
    for index, (level, width) in enumerate(zip(levels, inputs, strict=True)):
        yield f"{own}.laterals.{level}", f"neck.lateral_convs.{index}.conv", (channels, width, 1, 1)
        yield f"{own}.outputs.{level}", f"neck.fpn_convs.{index}.conv", (channels, channels, 3, 3)


def random_entry(name, shape):
    if "bias_idxs" in name:
        return torch.zeros(1, dtype=torch.long).expand(shape)
    drawn = (shape[0], 1) if len(shape) == 2 and "attention" not in name else shape  # a constant row is stored once
    value = (torch.randn(drawn) / max(1, sum(shape[1:])) ** 0.5).expand(shape)
    return value.abs() + 0.5 if name.endswith("running_var") else value
