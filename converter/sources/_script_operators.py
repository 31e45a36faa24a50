"""The operators that TorchScript code may call: what inference of a vision CNN uses, and nothing that reaches files,
processes, devices' settings, raw memory or other machines. An operator that is not here is refused by its name.

TORCH: `torch.<name>` or `ops.aten.<name>`; PRIM: `ops.prim.<name>`; BUILTINS: names without a module. Whatever has an
in-place form (`relu_`) is allowed in that form too.
"""

from __future__ import annotations

_CONVOLUTION_AND_POOLING = """
    _convolution _convolution_mode conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear
    bilinear addmm addbmm baddbmm bmm mm mv matmul einsum dot outer tensordot avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d lp_pool1d lp_pool2d max_unpool2d max_unpool3d fractional_max_pool2d unfold im2col col2im
    fold pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle grid_sampler grid_sampler_2d
    grid_sampler_3d affine_grid_generator upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa __upsample
    __upsample_nearest __upsample_bilinear __interpolate pad constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
"""
_NORMALISATION_AND_ACTIVATION = """
    _weight_norm batch_norm native_batch_norm layer_norm native_layer_norm group_norm native_group_norm
    instance_norm rms_norm local_response_norm normalize norm linalg_norm linalg_vector_norm linalg_matrix_norm
    frobenius_norm cosine_similarity pairwise_distance dropout feature_dropout alpha_dropout feature_alpha_dropout
    relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish glu sigmoid log_sigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink softplus softsign tanh tanhshrink threshold softmax softmin log_softmax _softmax
    _log_softmax logsumexp scaled_dot_product_attention multi_head_attention_forward embedding one_hot
"""
_ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad div divide eq erf erfc erfinv exp exp2
    expm1 fix float_power floor floor_divide floordiv fmax fmin fmod frac ge greater greater_equal gt hypot isclose
    isfinite isinf isnan ldexp le lerp less less_equal lgamma log log10 log1p log2 logaddexp logical_and logical_not
    logical_or logical_xor logit lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal
    positive pow rad2deg reciprocal remainder round rsqrt rsub sgn sign signbit sin sinc sinh sqrt square sub
    subtract tan true_divide trunc where xlogy __and__ __or__ __xor__ __lshift__ __rshift__ __not__ __is__ __isnot__
    __contains__ __round_to_zero_floordiv __derive_index __range_length __getitem__ mathremainder
"""
_REDUCTION_AND_ORDER = """
    all allclose amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum diff equal
    max mean median min mode nanmean nansum prod quantile sort std std_mean sum topk var var_mean bincount histc
    kthvalue searchsorted bucketize trace
"""
_SHAPE_AND_INDEX = """
    alias atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors broadcast_to cat chunk clone column_stack
    concat concatenate contiguous copy crop detach diag diag_embed diagonal dim dstack expand expand_as fill
    fill_diagonal flatten flip fliplr flipud gather hsplit hstack index index_add index_copy index_fill index_put
    index_select is_complex is_contiguous is_floating_point is_nonzero isin item len masked_scatter masked_select
    meshgrid movedim moveaxis mT narrow ndim nonzero numel numpy_T permute put ravel repeat repeat_interleave
    reshape reshape_as resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce select select_scatter
    size slice slice_scatter split split_with_sizes squeeze stack storage_offset stride swapaxes swapdims t take
    take_along_dim tensor_split tile transpose tril triu unbind unflatten unsafe_chunk unsafe_split unsqueeze view
    view_as vsplit vstack where zero unique_consecutive unique_dim broadcast_shapes
"""
_CREATION_AND_CONVERSION = """
    arange bernoulli empty empty_like empty_permuted eye full full_like linspace logspace new_empty new_full
    new_ones new_zeros normal ones ones_like rand rand_like randint randn randn_like randperm scalar_tensor tensor
    as_tensor zeros zeros_like tril_indices triu_indices uniform to to_dense type_as cpu cuda float double half bool
    int long Bool Float Int Complex FloatImplicit IntImplicit ScalarImplicit lift_fresh lift_fresh_copy result_type
    can_cast promote_types device finfo view_as_real view_as_complex real imag is_signed
"""
_CONTAINERS_AND_TEXT = """
    append extend insert pop remove reverse clear list dict keys values items get update setdefault popitem count
    sorted format percentFormat str ord chr hex join split strip lstrip rstrip lower upper startswith endswith
    replace find _set_item Delete hash warn
"""
_AUTOGRAD_STATE = """
    is_grad_enabled set_grad_enabled requires_grad is_autocast_enabled is_autocast_cpu_enabled is_inference
    is_scripting _get_tracing_state requires_grad_ is_leaf
"""


def _with_in_place(*groups: str) -> frozenset[str]:
    names = {name for group in groups for name in group.split()}
    return frozenset(names | {f"{name}_" for name in names})


TORCH = _with_in_place(
    _CONVOLUTION_AND_POOLING,
    _NORMALISATION_AND_ACTIVATION,
    _ELEMENTWISE,
    _REDUCTION_AND_ORDER,
    _SHAPE_AND_INDEX,
    _CREATION_AND_CONVERSION,
    _CONTAINERS_AND_TEXT,
    _AUTOGRAD_STATE,
)

_PRIM = """
    NumToTensor RaiseException TupleIndex TupleUnpack ListUnpack ConstantChunk ChunkSizes Uninitialized
    ModuleContainerIndex StringIndex IfThenElse min max abs device dtype layout index is_cpu is_cuda is_meta is_mps
    is_quantized is_sparse is_mkldnn is_nested is_xla is_xpu is_vulkan requires_grad itemsize nbytes rangelist
    unchecked_cast unchecked_unwrap_optional data type name tolist
"""

_BUILTINS = """
    annotate unchecked_cast uninitialized getattr isinstance print range len int float bool str complex tuple list
    dict min max abs sum all any round sorted enumerate zip reversed ord chr
"""
PRIM = frozenset(_PRIM.split())
BUILTINS = frozenset(_BUILTINS.split())
