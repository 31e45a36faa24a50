"""The operators that compute something: each function appends the steps of one node to a Builder.

A Builder's values are those of one image, so the batch is nobody's business here; what cannot be said per image, and
what the kernels do not have, is Refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, inf

import numpy as np

from gkp.converter.graph import Node, is_branched, values, weights
from gkp.converter.native.program import Pool
from gkp.converter.native.reading.activations import ACTIVATIONS, affine, clipping, quantised
from gkp.converter.native.reading.axes import (
    Oriented,
    bind,
    combined,
    is_per_channel,
    mapped,
    oriented,
    per_channel,
    scaled,
)
from gkp.converter.native.reading.builder import Border, Builder, View
from gkp.converter.native.reading.constants import with_constant
from gkp.converter.native.reading.convolutions import conv, gemm
from gkp.converter.native.reading.moves import ZERO, Refused, scattered
from gkp.converter.native.reading.parameters import constant, floats, four, geometry, two
from gkp.converter.native.reading.reductions import REDUCTIONS
from gkp.converter.native.reading.resize import resize
from gkp.converter.native.reading.transposed import conv_transpose
from gkp.converter.operators import POOLS
from gkp.converter.quantiser import is_quantiser

Operator = Callable[[Builder, Node], None]


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
    columns = (1,) * (len(b.shape(node.inputs[0])) - 1)
    affine(b, node, node.inputs[0], scale.reshape(-1, *columns), (beta - mean * scale).reshape(-1, *columns))


_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "max", "Min": "min"}


def _binary(b: Builder, node: Node) -> None:
    given = [values(t) for t in node.inputs]
    if len(given) == 2 and sum(v is not None for v in given) == 1:
        _with_constant(b, node, 0 if given[0] is not None else 1)
        return
    result = oriented(b, node.inputs[0])
    for tensor in node.inputs[1:]:
        result = combined(b, _BINARY.get(node.op, "add"), result, oriented(b, tensor))
    bind(b, node.outputs[0], result)


def _with_constant(b: Builder, node: Node, place: int) -> None:
    given, x = constant(node, place), node.inputs[1 - place]
    rank = 1 + len(b.shape(x))
    assert given is not None
    if given.ndim > rank:
        raise Refused("its constant does not fit its input")
    sizes: tuple[int, ...] = (1,) * (rank - given.ndim) + given.shape
    if any(n not in (1, m) for n, m in zip(sizes, (1, *b.shape(x)), strict=True)):
        raise Refused("its constant does not fit its input")
    v, source = given.reshape(sizes)[0], oriented(b, x)
    if node.op in ("Max", "Min"):
        if v.size != 1:
            raise Refused("only one number for all elements is known")
        affine(b, node, x, 1, 0, clipping(*((v.item(), inf) if node.op == "Max" else (-inf, v.item()))))
    elif not is_per_channel(b, source, v):
        with_constant(b, node, source, v, place == 0)
    elif node.op == "Div" and place == 0:
        inverse = mapped(b, source, "reciprocal")
        factors = floats(node, per_channel(b, inverse, v))
        bind(b, node.outputs[0], replace(inverse, value=scaled(b, inverse.value, factors)))
    elif node.op == "Div":
        if not v.all():
            raise Refused("only a division by constants that are not zero is known")
        affine(b, node, x, 1 / v, 0)
    elif node.op == "Mul":
        affine(b, node, x, v, 0)
    elif node.op == "Sub":
        affine(b, node, x, *((1, -v) if place else (-1, v)))
    else:
        affine(b, node, x, 1, v)


def _scatter_add(b: Builder, node: Node) -> None:
    """x + the updates spread among zeros (index_add as PyTorch exports it)."""
    if node.attrs.get("reduction") != "add":
        raise Refused("only the reduction 'add' is known")
    first = oriented(b, node.inputs[0])
    spread = scattered(node, np.full(first.shape, ZERO), b.elements(node.inputs[2]))
    second = Oriented(b.express(spread, shifts=True), first.shape, tuple(range(len(first.shape))))
    bind(b, node.outputs[0], combined(b, "add", first, second))


# ---- pooling ---------------------------------------------------------------------------------------------------------
def _pool(b: Builder, node: Node) -> None:
    x, maximum = node.inputs[0], node.op == "MaxPool"
    plane = b.shape(x)[1:]
    if len(plane) not in (1, 2) or any(o.outputs for o in node.outputs[1:]):
        raise Refused("it is not over one or two spatial axes, or its indices are used")
    kernel = tuple(int(k) for k in node.attrs.get("kernel_shape", ()))
    strides, dilations, pads = geometry(node, plane, kernel)
    auto, up = str(node.attrs.get("auto_pad", "NOTSET")), bool(node.attrs.get("ceil_mode", 0))
    if auto.startswith("SAME") and max(dilations) > 1:
        raise Refused(f"of auto_pad {auto} beside dilations no two runtimes make the same")
    counts = bool(node.attrs.get("count_include_pad", 0))
    n = len(plane)
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    border: Border = (0, 0, 0, 0)
    if not maximum and (counts or not any(pads)):  # a zero of a Pad node counts in the divisor
        source, border = b.trimmed(x)
        counts = counts or any(border)
    else:
        source = b.number(x)
    out = tuple(_pooled(plane[a], pads[a], pads[n + a], span[a], strides[a], up and auto == "NOTSET") for a in range(n))
    if up and auto == "VALID" and any((plane[a] - span[a]) % strides[a] for a in range(n)):
        raise Refused("of ceil_mode beside auto_pad VALID no two runtimes make the same")
    for a in range(n):
        _check_windows(plane[a], out[a], pads[a], range(0, span[a], dilations[a]), strides[a])
    own = four(pads if n == 2 else (0, pads[0], 0, pads[1]))
    shape = (b.values[source].channels, *out)
    target = b.value(shape, b.values[source].dtype)
    b.steps.append(Pool(source, target, maximum, two(kernel), two(strides),
                        four(tuple(p + e for p, e in zip(own, border, strict=True))), two(dilations),
                        counts and not maximum))
    b.bind(node.outputs[0], View(shape, target))


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


def _dequantised(b: Builder, node: Node) -> None:
    """Constants: whoever reads them looks at them himself."""
    if weights(node.outputs[0]) is None:
        raise Refused("no kernel")


OPERATORS: Mapping[str, Operator] = {
    **ACTIVATIONS, **REDUCTIONS, "Conv": conv, "Gemm": gemm, "MatMul": gemm, "BatchNormalization": _batchnorm,
    **dict.fromkeys((*_BINARY, "Sum"), _binary), "ScatterElements": _scatter_add, **dict.fromkeys(POOLS, _pool),
    "ConvTranspose": conv_transpose, "Resize": resize, "Upsample": resize, "DequantizeLinear": _dequantised,
}
"""ONNX operators by name."""


def operator_of(node: Node) -> Operator:
    """What appends the node's steps. Refused when there is nothing."""
    own = conv if is_branched(node) else quantised if is_quantiser(node) else None
    found = own or (None if node.domain else OPERATORS.get(node.op))
    if found is None:
        raise Refused("no kernel")
    return found
