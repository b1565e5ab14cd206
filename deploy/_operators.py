"""Which kind of work an operator of torch does, as data."""

from __future__ import annotations

import re
from functools import cache

#: Kinds of work in the order of tables and pictures: those that compute, those that wait for memory, the others.
WORK = (
    "convolution",
    "matrix",
    "normalisation",
    "elementwise",
    "reshape",
    "activation",
    "pooling",
    "selection",
    "other",
)

#: Patterns of whole names, without ``aten::`` and the like before them and ``_`` around them; the first kind that fits
#: counts. Attention in one operator is matrix work; softmax on its own reads and writes a whole map for a few sums and
#: exponentials, which is elementwise. What only makes room or a view costs nothing but the call and goes to reshape.
_PATTERNS = {
    "convolution": (
        r"(slow_|thnn_|mkldnn_|cudnn_|miopen_)?conv(olution)?(_?[123]d|_transpose[123]d|_depthwise[23]d|_dilated[23]d)?"
        r"(_forward|_relu|_add_relu|_pointwise)*|_?conv_depthwise[23]d|nnpack_(available|spatial_convolution)"
    ),
    "matrix": (
        r"linear|(mkldnn|cudnn)_linear|linear_pointwise|mkl_linear|addmm|addmv|addbmm|baddbmm|bmm|mm|mv|dot|matmul"
        r"|einsum|bilinear|addmm_activation|scaled_mm|.*scaled_dot_product.*attention.*|.*(flash|efficient)_attention.*"
        r"|native_multi_head_attention"
    ),
    "normalisation": (
        r"(native_|cudnn_|miopen_|fused_)*(batch|layer|group|instance|rms)_norm(_legit|_no_training|_impl_index|_elemt)*"
        r"|linalg_vector_norm|norm|normalize"
    ),
    "activation": (
        r"(hard)?(swish|sigmoid|tanh)|log_sigmoid(_forward)?|relu6?|leaky_relu|prelu|gelu|silu|mish|elu|celu|selu|glu"
        r"|softplus|clamp(_min|_max)?|threshold|dropout|native_dropout|feature_dropout|alpha_dropout|bernoulli"
    ),
    "pooling": (
        r"(adaptive_|mkldnn_|cudnn_|quantized_)*(avg|max)_pool[123]d(_with_indices)?|upsample_.*|interpolate"
        r"|grid_sampler(_[23]d)?|(ps_)?roi_(align|pool)|deform_conv2d|pixel_(un)?shuffle|affine_grid(_generator)?"
    ),
    "selection": (
        r"nms|sort|argsort|topk|kthvalue|msort|unique|unique2|unique_dim|unique_consecutive|bincount|searchsorted"
        r"|bucketize|nonzero(_numpy|_static)?|masked_select|where|argm(ax|in)|multinomial|cumsum|cumprod|histc|any|all"
        r"|item|local_scalar_dense|is_nonzero|equal"
    ),
    "reshape": (
        r"(un)?safe_view|view(_as.*)?|reshape(_alias|_as)?|(un)?flatten|permute|movedim|transpose|t|numpy_T|swapaxes"
        r"|expand(_as)?|as_strided|select(_scatter)?|slice(_scatter)?|narrow|(un)?squeeze|split(_with_sizes)?|chunk"
        r"|tensor_split|unbind|unfold|fold|im2col|col2im|unsafe_(split|chunk)(_with_sizes)?|alias|detach|lift(_fresh)?"
        r"|resolve_(conj|neg)|real|contiguous|clone|copy|to|_?to_copy|to_(dense|mkldnn)|type_as|cat|concat(enate)?"
        r"|[hvd]?stack|repeat(_interleave)?|tile|roll|flip|rot90|index(_select|_put|_put_impl|_copy|_add|_fill)?"
        r"|gather|take(_along_dim)?|scatter(_add|_reduce)?|embedding|pad|constant_pad_nd|(reflection|replication)_pad[123]d"
        r"|_?pad_(enum|circular)|empty(_like|_strided|_permuted)?|new_(empty|full|zeros|ones)(_strided)?|resize(_as)?"
        r"|set|zeros(_like)?|ones(_like)?|full(_like)?|scalar_tensor|fill|zero|arange|linspace|meshgrid|one_hot|eye"
        r"|channel_shuffle|(native_)?channel_shuffle|result_type|cuda(Malloc|Memcpy|Memset).*|has_same_storage_numel"
        r"|nested_tensor.*|pin_memory|is_pinned|broadcast_(to|tensors)|squeeze_copy|tril|triu"
    ),
    "elementwise": (
        r"(log_)?softmax|safe_softmax|masked_softmax|add|sub|rsub|mul|div|true_divide|floor_divide|remainder|fmod|neg"
        r"|reciprocal|addc(mul|div)|foreach_.*|lerp|pow|square|r?sqrt|exp|exp2|expm1|log|log1p|log2|log10|abs|sgn|sign"
        r"|floor|ceil|round|trunc|sin|cos|atan2?|erf|maximum|minimum|fmax|fmin|max|min|amax|amin|aminmax|sum|mean|var"
        r"|std|var_mean|std_mean|prod|logsumexp|(special_)?logit|(special_)?expit|eq|ne|lt|le|gt|ge|logical_.*|bitwise_.*|i?(and|or|xor)|invert"
        r"|isinf|isnan|isfinite|nan_to_num|masked_(fill|scatter)|complex|fft_.*|fft_[rc]2[rc]"
    ),
}
_COMPILED = {kind: re.compile(pattern) for kind, pattern in _PATTERNS.items()}


@cache
def kind_of(operator: str) -> str | None:
    """Kind of work of an operator such as ``aten::add_``, one of `WORK`; ``None`` where none is known."""
    name = operator.rpartition("::")[2].strip("_")
    return next((kind for kind, pattern in _COMPILED.items() if pattern.fullmatch(name)), None)
