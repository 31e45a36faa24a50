"""The operators that compute something: each function appends the steps of one node to a Builder.

A Builder's values are those of one image, so the batch is nobody's business here; what cannot be said per image, and
what the kernels do not have, is Refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, prod
from typing import Any

import numpy as np

from gkp.converter.graph import Node, Tensor, is_branched, values
from gkp.converter.native.program import Activation, Affine, Binary, Pool, Softmax
from gkp.converter.native.reading.builder import Border, Builder, View
from gkp.converter.native.reading.constants import with_constant
from gkp.converter.native.reading.convolutions import conv, gemm
from gkp.converter.native.reading.moves import ZERO, Refused, axis_of, constant_ints, scattered
from gkp.converter.native.reading.parameters import constant, floats, four, geometry, two
from gkp.converter.native.reading.resize import resize
from gkp.converter.native.reading.transposed import conv_transpose
from gkp.converter.operators import PLANES, POOLS

Operator = Callable[[Builder, Node], None]
_TOLERANCE = 1e-6


# ---- helpers ---------------------------------------------------------------------------------------------------------
def _affine(b: Builder, node: Node, x: Tensor, scale: Any, shift: Any, activation: Activation = Activation.NONE) -> None:
    """node.outputs[0] = activation(x * scale + shift), scale and shift per channel or one number."""
    source = b.number(x)
    target = b.value(b.shape(x))
    n = b.values[target].channels
    scale, shift = (floats(node, np.broadcast_to(np.asarray(v, np.float64), n)) for v in (scale, shift))
    b.steps.append(Affine(source, target, scale, shift, activation))
    b.bind(node.outputs[0], View(b.shape(x), target))


def _activate(kind: Activation) -> Operator:
    def operator(b: Builder, node: Node) -> None:
        _affine(b, node, node.inputs[0], 1, 0, kind)

    return operator


# ---- activations -----------------------------------------------------------------------------------------------------
def _clip(b: Builder, node: Node) -> None:
    low, high = constant(node, 1), constant(node, 2)
    if low is None or low.size != 1 or low.any() or (high is not None and (high.size != 1 or high.item() != 6)):
        raise Refused("only clipping to [0, 6] or [0, infinity) is known")
    _affine(b, node, node.inputs[0], 1, 0, Activation.RELU if high is None else Activation.RELU6)


def _hardsigmoid(b: Builder, node: Node) -> None:
    """Any slope a and offset b: hardsigmoid(x) = clip(x / 6 + 1/2), so clip(a x + b) = hardsigmoid(6 a x + 6 (b - 1/2))."""
    scale = 6 * float(node.attrs.get("alpha", 0.2))
    shift = 6 * (float(node.attrs.get("beta", 0.5)) - 0.5)
    _affine(b, node, node.inputs[0], 1 if abs(scale - 1) < _TOLERANCE else scale, shift, Activation.HARDSIGMOID)


def _swish(b: Builder, node: Node) -> None:
    if float(node.attrs.get("alpha", 1.0)) != 1:
        raise Refused("only x * sigmoid(x) is known")
    _affine(b, node, node.inputs[0], 1, 0, Activation.SILU)


# ---- element by element ----------------------------------------------------------------------------------------------
def _batchnorm(b: Builder, node: Node) -> None:
    params = [constant(node, place) for place in range(1, 5)]
    if any(p is None for p in params) or node.attrs.get("training_mode", 0) or not b.shape(node.inputs[0]):
        raise Refused("it is in training mode, or its parameters are not constant")
    gamma, beta, mean, var = (p for p in params if p is not None)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = gamma / np.sqrt(var + float(node.attrs.get("epsilon", 1e-5)))
    if {p.shape for p in (gamma, beta, mean, var)} != {b.shape(node.inputs[0])[:1]}:
        raise Refused("its parameters do not fit its input")
    _affine(b, node, node.inputs[0], scale, beta - mean * scale)


def _binary(b: Builder, node: Node) -> None:
    given = [values(t) for t in node.inputs]
    if len(given) == 2 and sum(v is not None for v in given) == 1:
        _with_constant(b, node, 0 if given[0] is not None else 1)
        return
    number, shape = b.number(node.inputs[0]), b.shape(node.inputs[0])
    for tensor in node.inputs[1:]:
        number, shape = _combined(b, node.op, (number, shape), (b.number(tensor), b.shape(tensor)))
    b.bind(node.outputs[0], View(shape, number))


def _with_constant(b: Builder, node: Node, place: int) -> None:
    given, x = constant(node, place), node.inputs[1 - place]
    shape = b.shape(x)
    channels, rank = (shape[0] if shape else 1), 1 + len(shape)
    assert given is not None
    if given.ndim > rank:
        raise Refused("its constant does not fit its input")
    sizes: tuple[int, ...] = (1,) * (rank - given.ndim) + given.shape
    if any(n not in (1, m) for n, m in zip(sizes, (1, *shape), strict=True)):
        raise Refused("its constant does not fit its input")
    per_channel = given.reshape(sizes[1] if shape else 1, -1)
    if not (per_channel == per_channel[:, :1]).all():
        with_constant(b, node, x, given.reshape(sizes[1:]), place == 0)
        return
    v = np.broadcast_to(per_channel[:, 0], channels)
    if node.op == "Div":
        if place == 0 or not v.all():
            raise Refused("only a division by constants that are not zero is known")
        scale, shift = 1 / v, 0 * v
    elif node.op == "Mul":
        scale, shift = v, 0 * v
    elif node.op == "Sub":
        scale, shift = (1 + 0 * v, -v) if place else (-1 + 0 * v, v)
    else:
        scale, shift = 1 + 0 * v, v
    _affine(b, node, x, scale, shift)


Operand = tuple[int, tuple[int, ...]]


def _combined(b: Builder, op: str, first: Operand, second: Operand) -> Operand:
    """A Binary step; the operand that is broadcast becomes the second one."""
    kind = {"Add": "add", "Sum": "add", "Mul": "mul", "Sub": "sub", "Div": "div"}[op]
    if len(first[1]) != len(second[1]):
        raise Refused("it broadcasts over the batch or the channels")
    shape = tuple(max(m, n) for m, n in zip(first[1], second[1], strict=True))
    if first[1] != shape:
        if second[1] != shape:
            raise Refused("both of its operands are broadcast")
        if kind == "div":
            raise Refused("the operand that is divided is broadcast")
        if kind == "sub":  # a - b = -b + a
            n = b.values[second[0]].channels
            negative = b.value(shape)
            b.steps.append(Affine(second[0], negative, np.full(n, -1, np.float32), np.zeros(n, np.float32)))
            kind, second = "add", (negative, shape)
        first, second = second, first
    target = b.value(shape)
    b.steps.append(Binary(first[0], second[0], target, kind))
    return target, shape


def _scatter_add(b: Builder, node: Node) -> None:
    """x + the updates spread among zeros (index_add as PyTorch exports it)."""
    if node.attrs.get("reduction") != "add":
        raise Refused("only the reduction 'add' is known")
    x = node.inputs[0]
    shape = b.shape(x)
    first = b.number(x), shape
    spread = scattered(node, np.full(shape, ZERO), b.elements(node.inputs[2]))
    target, _ = _combined(b, "Add", first, (b.express(spread, shifts=True), shape))
    b.bind(node.outputs[0], View(shape, target))


def _softmax(b: Builder, node: Node) -> None:
    """Over the channels; another axis is moved there and back."""
    x = node.inputs[0]
    shape = b.shape(x)
    axis = axis_of(int(node.attrs.get("axis", -1)), len(shape) + 1)
    moved = np.moveaxis(b.elements(x), axis, 0) if axis else None
    source = b.number(x) if moved is None else b.express(moved)
    target = b.value(shape if moved is None else moved.shape)
    b.steps.append(Softmax(source, target))
    if moved is None:
        b.bind(node.outputs[0], View(shape, target))
    else:
        b.bind(node.outputs[0], View(shape, None, np.moveaxis(b.numbers(target).reshape(moved.shape), 0, axis)))


# ---- pooling ---------------------------------------------------------------------------------------------------------
def _pool(b: Builder, node: Node) -> None:
    x, maximum = node.inputs[0], node.op == "MaxPool"
    plane = b.shape(x)[1:]
    if len(plane) not in (1, 2) or any(o.outputs for o in node.outputs[1:]):
        raise Refused("it is not over one or two spatial axes, or its indices are used")
    kernel = tuple(int(k) for k in node.attrs.get("kernel_shape", ()))
    strides, dilations, pads = geometry(node, plane, kernel)
    counts = bool(node.attrs.get("count_include_pad", 0))
    n = len(plane)
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    border: Border = (0, 0, 0, 0)
    if not maximum and (counts or not any(pads)):  # a zero of a Pad node counts in the divisor
        source, border = b.trimmed(x)
        counts = counts or any(border)
    else:
        source = b.number(x)
    up = bool(node.attrs.get("ceil_mode", 0)) and node.attrs.get("auto_pad", "NOTSET") == "NOTSET"
    out = tuple(_pooled(plane[a], pads[a], pads[n + a], span[a], strides[a], up) for a in range(n))
    for a in range(n):
        _check_windows(plane[a], out[a], pads[a], range(0, span[a], dilations[a]), strides[a])
    own = four(pads if n == 2 else (0, pads[0], 0, pads[1]))
    _append_pool(b, node, source, out, Pool(source, 0, maximum, two(kernel), two(strides),
                                            four(tuple(p + e for p, e in zip(own, border, strict=True))),
                                            two(dilations), counts and not maximum))


def _pooled(size: int, begin: int, end: int, span: int, stride: int, up: bool) -> int:
    """Outputs along one axis. A window that ceil_mode adds must begin inside the input or its pads (ONNX: MaxPool)."""
    room = size + begin + end - span
    if room < 0:
        raise Refused("its kernel is larger than its input")
    out = (ceil(room / stride) if up else room // stride) + 1
    return out - 1 if up and (out - 1) * stride >= size + begin else out


def _check_windows(size: int, outputs: int, begin: int, taps: range, stride: int) -> None:
    """Refused when a window along an axis sees nothing but pads: runtimes differ about what it gives."""
    starts = range(-begin, outputs * stride - begin, stride)
    edges = (*starts[:ceil(begin / stride)], *starts[max(0, (size - taps[-1] + begin) // stride):])
    if any(not 0 <= start + -(min(start, 0) // taps.step) * taps.step <= min(size - 1, start + taps[-1]) for start in edges):
        raise Refused("a window lies in the pads altogether")


def _append_pool(b: Builder, node: Node, source: int, plane: tuple[int, ...], pool: Pool,
                 shape: tuple[int, ...] | None = None) -> None:
    target = b.value((b.values[source].channels, *plane), b.values[source].dtype)
    b.steps.append(replace(pool, target=target))
    if shape is None or shape == (b.values[source].channels, *plane):
        b.bind(node.outputs[0], View((b.values[source].channels, *plane), target))
    else:
        elements = b.numbers(target).reshape(shape)
        b.bind(node.outputs[0], View(shape, None, elements))


def _global_pool(b: Builder, node: Node) -> None:
    shape = b.shape(node.inputs[0])
    _reduce_axes(b, node, tuple(range(1, len(shape))), node.op == "GlobalMaxPool", True)


def _reduce(b: Builder, node: Node) -> None:
    shape = b.shape(node.inputs[0])
    axes = constant_ints(node, 1, "axes")
    if not axes:
        raise Refused("it reduces over the whole batch")
    inner = tuple(sorted({axis_of(a, len(shape) + 1) for a in axes}))
    _reduce_axes(b, node, inner, node.op == "ReduceMax", bool(node.attrs.get("keepdims", 1)))
    if node.op == "ReduceSum":  # the mean, times the number of elements
        _affine(b, node, node.outputs[0], prod(shape[a] for a in inner), 0)


def _reduce_axes(b: Builder, node: Node, axes: tuple[int, ...], maximum: bool, keep: bool) -> None:
    """A pool over whole spatial axes. axes: without the batch."""
    x = node.inputs[0]
    shape = b.shape(x)
    if not axes or 0 in axes or len(shape) not in (2, 3):
        raise Refused("it does not reduce over spatial axes")
    source = b.number(x)
    kernel = tuple(shape[a] if a in axes else 1 for a in range(1, len(shape)))
    plane = tuple(1 if a in axes else shape[a] for a in range(1, len(shape)))
    dropped = tuple(n for a, n in enumerate(shape) if a not in axes)
    assert prod(dropped) == shape[0] * prod(plane)
    _append_pool(b, node, source, plane, Pool(source, 0, maximum, two(kernel), (1, 1), (0, 0, 0, 0)),
                 None if keep else dropped)


OPERATORS: Mapping[str, Operator] = {
    "Conv": conv, "Gemm": gemm, "MatMul": gemm, "BatchNormalization": _batchnorm, "Softmax": _softmax,
    "Add": _binary, "Sub": _binary, "Mul": _binary, "Div": _binary, "Sum": _binary,
    "ScatterElements": _scatter_add,
    **dict.fromkeys(POOLS, _pool), **dict.fromkeys(PLANES, _global_pool),
    "ReduceMean": _reduce, "ReduceMax": _reduce, "ReduceSum": _reduce,
    "ConvTranspose": conv_transpose, "Resize": resize, "Upsample": resize,
    "Relu": _activate(Activation.RELU), "Sigmoid": _activate(Activation.SIGMOID), "Clip": _clip,
    "HardSigmoid": _hardsigmoid, "HardSwish": _activate(Activation.HARDSWISH), "Swish": _swish,
}
"""ONNX operators by name."""


def operator_of(node: Node) -> Operator:
    """What appends the node's steps. Refused when there is nothing."""
    found = conv if is_branched(node) else None if node.domain else OPERATORS.get(node.op)
    if found is None:
        raise Refused("no kernel")
    return found
