"""Convolutions and matrix products."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gkp.branched import Branch, BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Node, is_branched
from gkp.converter.native.program import Conv, Depthwise
from gkp.converter.native.reading.axes import Oriented, bind, channels_first, oriented
from gkp.converter.native.reading.builder import Builder, View
from gkp.converter.native.reading.moves import Refused
from gkp.converter.native.reading.parameters import constant, floats, four, geometry, layer, scale_of, two
from gkp.types import Floats


def conv(b: Builder, node: Node) -> None:
    """BranchedConv and Conv with constant weights, 1-D and 2-D; zeros that a Pad puts around the input become pads."""
    x = node.inputs[0]
    plane = b.shape(x)[1:]
    if len(plane) not in (1, 2):
        raise Refused(f"a convolution of {len(plane)} spatial axes")
    form, depthwise = (branched_node.read(node), None) if is_branched(node) else _stock_conv(node, plane, b.shape(x)[0])
    source, border = b.trimmed(x)
    value = b.values[source]
    if len(plane) != len(form.kernel_shape) or form.in_channels != value.channels:
        raise Refused("its weights do not fit its input")
    form = _flat(form)
    form = replace(form, pads=tuple(p + extra for p, extra in zip(form.pads, border, strict=True)))
    out = form.out_shape((value.height, value.width))
    if min(out) < 1:
        raise Refused("its kernel is larger than its input")
    (rows, above, below), (columns, before, after) = (
        _seen(form, a, (value.height, value.width)[a], out[a]) for a in (0, 1))
    if depthwise is not None:
        depthwise = depthwise.reshape(len(depthwise), *form.kernel_shape)[:, rows, columns]
    branches = tuple(replace(b, weight=b.weight[:, :, rows, columns]) for b in form.branches)
    form = replace(form, branches=branches, kernel_shape=(rows.stop - rows.start, columns.stop - columns.start),
                   pads=(above, before, below, after))
    shape = (form.out_channels, *out[2 - len(plane):])
    target = b.value(shape)
    if depthwise is not None:
        b.steps.append(Depthwise(source, target, np.ascontiguousarray(depthwise), np.asarray(form.bias, np.float32),
                                 two(form.strides), four(form.pads), two(form.dilations), layer=layer(node),
                                 scale=form.scale))
    else:
        b.steps.append(Conv(source, target, form, layer=layer(node)))
    b.bind(node.outputs[0], View(shape, target))


def _seen(form: BranchedConv, axis: int, size: int, outputs: int) -> tuple[slice, int, int]:
    """(taps, pad before, pad after): of the window along one axis of the input, what lies inside the input for some output.
    A dilation wider than the plane leaves one tap of three, and no pads that would have to be kept zero."""
    kernel, stride, dilation = form.kernel_shape[axis], form.strides[axis], form.dilations[axis]
    before, after = form.pads[axis], form.pads[2 + axis]
    starts = range(-before, -before + outputs * stride, stride)
    inside = [k for k in range(kernel) if any(0 <= start + k * dilation < size for start in starts)] or [0, kernel - 1]
    low, high = min(inside[0], before // dilation), max(inside[-1] + 1, kernel - after // dilation)
    return slice(low, high), before - low * dilation, after - (kernel - high) * dilation


def _stock_conv(node: Node, plane: tuple[int, ...], in_channels: int) -> tuple[BranchedConv, Floats | None]:
    """(the convolution, its weight [F, 1, *kernel] when it is depthwise: the convolution has no branches then)."""
    given, bias = constant(node, 1), constant(node, 2)
    groups = int(node.attrs.get("group", 1))
    if given is None or given.ndim != 2 + len(plane) or groups < 1 or given.shape[0] % groups \
            or given.shape[1] * groups != in_channels or (bias is not None and bias.shape != given.shape[:1]):
        raise Refused("its weights do not fit its input")
    weight, kernel, scale = floats(node, given), given.shape[2:], scale_of(node, 1, 0, len(given))
    flat_bias = np.zeros(len(weight), np.float32) if bias is None else floats(node, bias)
    strides, dilations, pads = geometry(node, plane, kernel)
    if groups > 1 and weight.shape[1] == 1:
        form = BranchedConv(in_channels, len(weight), (), flat_bias, tuple(kernel), strides, pads, dilations, scale)
        return form, weight
    return BranchedConv.from_grouped(weight, groups, flat_bias, strides=strides, pads=pads, dilations=dilations,
                                     scale=scale), None


def _flat(conv: BranchedConv) -> BranchedConv:
    """A 1-D convolution as a 2-D one of height 1."""
    if len(conv.kernel_shape) != 1:
        return conv
    (k,), (s,), (d,), (begin, end) = conv.kernel_shape, conv.strides, conv.dilations, conv.pads
    branches = tuple(Branch(b.in_index, b.out_index, b.weight[:, :, None]) for b in conv.branches)
    return replace(conv, branches=branches, kernel_shape=(1, k), strides=(1, s), dilations=(1, d),
                   pads=(0, begin, 0, end))


def gemm(b: Builder, node: Node) -> None:
    """Gemm or MatMul with a constant matrix: a 1x1 convolution, its channels on the last axis."""
    weight = constant(node, 1)
    x = oriented(b, node.inputs[0])
    if weight is None or weight.ndim != 2 or node.attrs.get("transA", 0) or not x.shape:
        raise Refused("it is no product of a vector with a constant matrix")
    matrix = weight if node.attrs.get("transB", 0) else weight.T  # [M, K]
    first = channels_first(b, x, [len(x.shape) - 1])
    value = b.values[first.value]
    m, k = matrix.shape
    bias = constant(node, 2) if node.op == "Gemm" else None
    bias = np.zeros(1) if bias is None else bias * float(node.attrs.get("beta", 1.0))
    if bias.ndim == 2 and (bias == bias[:1]).all():
        bias = bias[0]
    if value.channels != k or bias.ndim > 1 or bias.size not in (1, m):
        raise Refused("its weights do not fit its input")
    alpha = float(node.attrs.get("alpha", 1.0))
    scaled = floats(node, matrix * alpha)
    scale = scale_of(node, 1, 0 if node.attrs.get("transB", 0) else 1, m) if alpha == 1 else None
    branch = Branch(np.arange(k), np.arange(m), scaled[:, :, None, None])
    conv = BranchedConv(k, m, (branch,), floats(node, np.broadcast_to(bias, m)), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1),
                        scale)
    target = b.value((m, value.height, value.width))
    b.steps.append(Conv(first.value, target, conv, layer=layer(node)))
    bind(b, node.outputs[0], Oriented(target, (*x.shape[:-1], m), first.order))
