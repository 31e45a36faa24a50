"""The operators that TorchScript code may call: what inference of a vision CNN uses, and nothing that reaches files,
processes, devices' settings, gradients, raw memory, text for the terminal or other machines. An operator that is not here is
refused by its name.

TORCH: `torch.<name>` or `ops.aten.<name>`; PRIM: `ops.prim.<name>`; BUILTINS: names without a module; LISTS: those of TORCH
whose result is a list.
"""

from __future__ import annotations

_CONVOLUTION_AND_POOLING = """
    _convolution _convolution_mode conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear
    addmm addbmm baddbmm bmm mm mv matmul einsum dot outer tensordot avg_pool1d avg_pool2d avg_pool3d
    max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d im2col col2im pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle grid_sampler grid_sampler_2d affine_grid_generator
    upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_lanczos2d_aa __upsample __upsample_nearest
    __upsample_bilinear __interpolate pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d
"""
_NORMALISATION_AND_ACTIVATION = """
    _weight_norm batch_norm native_batch_norm layer_norm native_layer_norm group_norm native_group_norm
    instance_norm rms_norm norm linalg_norm linalg_vector_norm frobenius_norm
    cosine_similarity dropout feature_dropout alpha_dropout feature_alpha_dropout
    relu relu6 leaky_relu prelu rrelu elu celu selu gelu silu mish glu sigmoid log_sigmoid hardsigmoid hardswish
    hardtanh hardshrink softshrink softplus tanh threshold softmax log_softmax _softmax
    _log_softmax logsumexp scaled_dot_product_attention one_hot
"""
_ELEMENTWISE = """
    abs absolute acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil clamp clamp_max clamp_min clip copysign cos cosh deg2rad div divide eq erf erfc erfinv exp exp2
    expm1 fix float_power floor floor_divide floordiv fmax fmin fmod frac ge greater greater_equal gt hypot isclose
    isfinite isinf isnan ldexp le lerp less less_equal log log10 log1p log2 logaddexp logical_and logical_not
    logical_or logical_xor logit lt masked_fill maximum minimum mul multiply nan_to_num ne neg negative not_equal
    positive pow rad2deg reciprocal remainder round rsqrt rsub sgn sign sin sinc sinh sqrt square sub
    subtract tan true_divide trunc where xlogy __and__ __or__ __xor__ __lshift__ __rshift__ __not__ __is__ __isnot__
    __contains__ __round_to_zero_floordiv __derive_index __range_length __getitem__ mathremainder
"""
_REDUCTION_AND_ORDER = """
    all allclose amax amin aminmax any argmax argmin argsort count_nonzero cumprod cumsum diff equal
    max mean median min nanmean nansum prod sort std std_mean sum topk var var_mean
"""
_SHAPE_AND_INDEX = """
    alias broadcast_tensors broadcast_to cat chunk clone column_stack
    concat concatenate contiguous detach diag diagonal dim dstack expand expand_as
    flatten flip fliplr flipud gather hsplit hstack index index_add index_copy index_fill index_put
    index_select is_complex is_contiguous is_floating_point is_nonzero item len masked_select
    meshgrid movedim moveaxis mT narrow nonzero numel numpy_T permute ravel repeat repeat_interleave
    reshape reshape_as resolve_conj resolve_neg roll rot90 scatter scatter_add scatter_reduce select select_scatter
    size slice slice_scatter split split_with_sizes squeeze stack stride swapaxes swapdims t
    take_along_dim tensor_split tile transpose tril triu unbind unflatten unsafe_chunk unsafe_split unsqueeze view
    view_as vsplit vstack
"""
_CREATION_AND_CONVERSION = """
    arange empty empty_like eye full full_like linspace new_empty new_full
    new_ones new_zeros ones ones_like scalar_tensor tensor
    as_tensor zeros zeros_like tril_indices triu_indices to to_dense type_as cpu Bool Float Int FloatImplicit IntImplicit
    ScalarImplicit lift_fresh lift_fresh_copy result_type can_cast promote_types device
"""
_CONTAINERS_AND_TEXT = "append extend insert pop clear list sorted format warn"
_STATE = "is_grad_enabled is_autocast_enabled is_autocast_cpu_enabled is_scripting _get_tracing_state"

# What works in place. Networks are full of it; what is not here would be a way to change what is not the network's.
_IN_PLACE = """
    relu_ relu6_ leaky_relu_ rrelu_ elu_ celu_ selu_ silu_ mish_ sigmoid_ hardsigmoid_ hardswish_ hardtanh_ tanh_ threshold_
    dropout_ feature_dropout_ alpha_dropout_ feature_alpha_dropout_
    add_ sub_ mul_ div_ pow_ neg_ abs_ exp_ log_ sqrt_ rsqrt_ floor_ ceil_ round_ clamp_ clamp_min_ clamp_max_ addcmul_
    addcdiv_ masked_fill_ index_add_ index_copy_ index_fill_ index_put_ scatter_ scatter_add_ copy_ fill_ zero_
    squeeze_ unsqueeze_ transpose_ _set_item
"""

_LISTS = """
    broadcast_tensors chunk hsplit meshgrid size sorted list split split_with_sizes stride tensor_split unbind unsafe_chunk
    unsafe_split vsplit where
"""
_PRIM = """
    NumToTensor RaiseException min max abs device dtype layout is_cpu is_cuda is_meta is_quantized is_sparse is_mkldnn
    is_nested is_mps requires_grad unchecked_unwrap_optional data
"""
_BUILTINS = "annotate unchecked_cast uninitialized getattr isinstance range int float bool"
_TORCH = (_CONVOLUTION_AND_POOLING, _NORMALISATION_AND_ACTIVATION, _ELEMENTWISE, _REDUCTION_AND_ORDER, _SHAPE_AND_INDEX,
          _CREATION_AND_CONVERSION, _CONTAINERS_AND_TEXT, _STATE, _IN_PLACE)

TORCH = frozenset(" ".join(_TORCH).split())
LISTS = frozenset(_LISTS.split())
PRIM = frozenset(_PRIM.split())
BUILTINS = frozenset(_BUILTINS.split())
