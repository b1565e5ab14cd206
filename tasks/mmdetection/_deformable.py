# ruff: noqa: ARG001, N803 - names and number of the arguments are those of mmcv's compiled functions
"""mmcv's compiled operators that sample maps at learned places: deformable convolutions and deformable attention.

Signatures are those of ``mmcv/ops/csrc/pytorch/pybind.cpp``; most functions write into tensors that the caller made.
torchvision reads the numbers of groups off the shapes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import Tensor
from torchvision import ops

from effvit.tasks.mmdetection._operators import Pair, gradients_of, wide, write


def _deform(x: Tensor, offset: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    result: Tensor = ops.deform_conv2d(x, offset, weight, None, stride, padding, dilation)
    return result


def deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution (arXiv:1703.06211) of ``x`` ``(B, C, H, W)``."""
    result = _deform(wide(x), wide(offset), wide(weight), (dH, dW), (padH, padW), (dilationH, dilationW))
    output.copy_(result)


def deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Writes the gradients of the map and of the offsets."""

    def run(x: Tensor, offset: Tensor) -> Tensor:
        return _deform(x, offset, wide(weight), (dH, dW), (padH, padW), (dilationH, dilationW))

    write(gradients_of(run, (x, offset), grad_output), (grad_input, grad_offset))


def deform_conv_backward_parameters(
    x: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Adds ``scale`` times the gradient of the weight to `grad_weight`."""

    def run(weight: Tensor) -> Tensor:
        return _deform(wide(x), wide(offset), weight, (dH, dW), (padH, padW), (dilationH, dilationW))

    # The gradient does not depend on the weight, which is not handed over: any tensor of its shape will do.
    (gradient,) = gradients_of(run, (grad_weight,), grad_output)
    grad_weight.add_(gradient.to(grad_weight), alpha=scale)


def modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution with a weight for each sample (DCNv2, arXiv:1811.11168)."""
    tensors = [wide(tensor) for tensor in (x, offset, mask, weight, *([bias] if with_bias else []))]
    output.copy_(_modulated((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))(*tensors))


def modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Writes all gradients, see `modulated_deform_conv_forward`."""
    inputs, buffers = [x, offset, mask, weight], [grad_input, grad_offset, grad_mask, grad_weight]
    if with_bias:
        inputs, buffers = [*inputs, bias], [*buffers, grad_bias]
    run = _modulated((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w))
    write(gradients_of(run, inputs, grad_output), buffers)


def _modulated(stride: Pair, padding: Pair, dilation: Pair) -> Callable[..., Tensor]:
    def run(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
        return result

    return run


def _attend(shapes: Tensor) -> Callable[..., Tensor]:
    """Mmcv's own form in plain torch, which it uses itself where there is no GPU."""
    plain = importlib.import_module("mmcv.ops.multi_scale_deform_attn").multi_scale_deformable_attn_pytorch
    sizes = shapes.tolist()

    def run(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        result: Tensor = plain(value, sizes, locations, weights)
        return result

    return run


def ms_deform_attn_forward(
    value: Tensor, shapes: Tensor, level_start: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """Deformable attention over several maps (arXiv:2010.04159).

    Args:
        value: ``(B, cells of all maps, heads, channels)``.
        shapes: ``(maps, 2)``, height and width of each map.
        level_start: Index of each map's first cell; follows from `shapes`.
        locations: ``(B, queries, heads, maps, points, 2)``, x and y in ``[0, 1]``.
        weights: ``(B, queries, heads, maps, points)``.
        im2col_step: Batch of the compiled kernel; of no meaning here.

    Returns:
        ``(B, queries, heads * channels)``.
    """
    return _attend(shapes)(wide(value), wide(locations), wide(weights)).to(value)


def ms_deform_attn_backward(
    value: Tensor,
    shapes: Tensor,
    level_start: Tensor,
    locations: Tensor,
    weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_locations: Tensor,
    grad_weights: Tensor,
    im2col_step: int,
) -> None:
    """Writes the gradients of the values, the locations and the weights, see `ms_deform_attn_forward`."""
    gradients = gradients_of(_attend(shapes), (value, locations, weights), grad_output)
    write(gradients, (grad_value, grad_locations, grad_weights))
