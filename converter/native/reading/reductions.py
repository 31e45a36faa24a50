"""What is computed over whole axes: sums, means and maxima, Softmax, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Node
from gkp.converter.native.program import Softmax
from gkp.converter.native.reading.axes import (
    Oriented,
    bind,
    channels_first,
    combined,
    like,
    mapped,
    normalised,
    oriented,
    per_channel,
    reduced,
    scaled,
    squeezed,
)
from gkp.converter.native.reading.builder import Builder
from gkp.converter.native.reading.moves import Refused, axis_of, constant_ints
from gkp.converter.native.reading.parameters import constant, floats
from gkp.converter.operators import PLANES

Operator = Callable[[Builder, Node], None]
_KINDS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceL2": "sum"}


def _reduce(b: Builder, node: Node) -> None:
    x = oriented(b, node.inputs[0])
    axes = constant_ints(node, 1, "axes")
    if not axes:
        raise Refused("it reduces over the whole batch")
    inner = {axis_of(a, len(x.shape) + 1) for a in axes}
    square = node.op == "ReduceL2"
    result = reduced(b, combined(b, "mul", x, x) if square else x, inner, _KINDS[node.op])
    result = mapped(b, result, "sqrt") if square else result
    bind(b, node.outputs[0], result if node.attrs.get("keepdims", 1) else squeezed(result, inner))


def _global_pool(b: Builder, node: Node) -> None:
    x = oriented(b, node.inputs[0])
    bind(b, node.outputs[0], reduced(b, x, range(1, len(x.shape)), "max" if node.op == "GlobalMaxPool" else "mean"))


def _softmax(b: Builder, node: Node) -> None:
    x = oriented(b, node.inputs[0])
    if not x.shape:
        raise Refused("it is over the batch")
    first = channels_first(b, x, [axis_of(int(node.attrs.get("axis", -1)), len(x.shape) + 1)])
    target = like(b, first.value)
    b.steps.append(Softmax(first.value, target))
    bind(b, node.outputs[0], replace(first, value=target))


# ---- normalisation -----------------------------------------------------------------------------------------------------
Array = npt.NDArray[np.float64]


def _finished(b: Builder, node: Node, x: Oriented, scale: Array | None, shift: Array | None) -> None:
    """node.outputs[0] = x * scale + shift, broadcast."""
    if scale is not None or shift is not None:
        factors, shifts = (floats(node, per_channel(b, x, np.full(1, default) if v is None else v))
                           for v, default in ((scale, 1.0), (shift, 0.0)))
        x = replace(x, value=scaled(b, x.value, factors, shifts))
    bind(b, node.outputs[0], x)


def _layer_norm(b: Builder, node: Node) -> None:
    x, rank = oriented(b, node.inputs[0]), len(b.shape(node.inputs[0])) + 1
    if any(o.outputs for o in node.outputs[1:]):
        raise Refused("its mean or deviation is used")
    axes = range(axis_of(int(node.attrs.get("axis", -1)), rank), rank - 1)
    result = normalised(b, x, axes, float(node.attrs.get("epsilon", 1e-5)))
    _finished(b, node, result, constant(node, 1), constant(node, 2))


def _instance_norm(b: Builder, node: Node) -> None:
    x = oriented(b, node.inputs[0])
    result = normalised(b, x, range(1, len(x.shape)), float(node.attrs.get("epsilon", 1e-5)))
    _finished(b, node, result, *(_column(constant(node, place), len(x.shape)) for place in (1, 2)))


def _group_norm(b: Builder, node: Node) -> None:
    """The scales are one per group (opset 18) or one per channel (opset 21)."""
    x, groups = oriented(b, node.inputs[0]), int(node.attrs["num_groups"])
    if x.order != tuple(range(len(x.shape))) or x.shape[0] % groups:
        raise Refused("its channels are not the first axis")
    split = Oriented(x.value, (groups, x.shape[0] // groups, *x.shape[1:]), (*x.order, len(x.order)))
    result = normalised(b, split, range(1, len(split.shape)), float(node.attrs.get("epsilon", 1e-5)))
    params = []
    for given in (constant(node, 1), constant(node, 2)):
        if given is not None and given.size == groups != x.shape[0]:
            given = np.repeat(given, x.shape[0] // groups)
        params.append(_column(given, len(x.shape)))
    _finished(b, node, replace(result, shape=x.shape, order=x.order), *params)


def _column(array: Array | None, rank: int) -> Array | None:
    """One number per channel, beside as many axes as the tensor has."""
    return None if array is None else array.reshape(-1, *(1,) * (rank - 1))


REDUCTIONS: Mapping[str, Operator] = {
    **dict.fromkeys(_KINDS, _reduce), **dict.fromkeys(PLANES, _global_pool), "Softmax": _softmax,
    "LayerNormalization": _layer_norm, "InstanceNormalization": _instance_norm, "GroupNormalization": _group_norm,
}
"""ONNX operators by name."""
