"""Quantised layers as the runtimes fuse them: QuantizeLinear right behind what computes, channels moved as integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gkp.converter import quantiser
from gkp.converter.graph import Graph, Node, Tensor, producer, values, weights
from gkp.converter.operators import UNARY
from gkp.converter.quantiser import Quantiser, is_quantiser
from gkp.errors import UnsupportedModelError
from gkp.types import Array

_MOVES = ("Concat", "Gather", "Slice")
"""What lowering adds to move channels; all along axis 1."""
_ROUNDING = 2.0**-21
"""Relative, of a product in float32."""


def expand(graph: Graph) -> Graph:
    """QuantizeLinear and DequantizeLinear in the place of every FakeQuantize. Changes `graph` in place, which is lowered
    (or holds only gkp operators besides what the file had)."""
    if not any(is_quantiser(n) for n in graph.nodes):
        return graph
    graph.cleanup()
    _sink(graph)
    graph.cleanup()
    integers: dict[int, tuple[Tensor, Quantiser]] = {}
    for node in graph.nodes:
        if is_quantiser(node):
            _pair(graph, node, integers)
        elif node.op in _MOVES and not node.domain:
            _move_integers(graph, node, integers)
    graph.cleanup()
    return graph


def weight(graph: Graph, array: Array, scale: Array, axis: int = 0) -> Tensor:
    """A constant that is dequantised: array is integers times the scale of each slice along the axis. UnsupportedModelError
    where it is not."""
    shape = [1] * array.ndim
    shape[axis] = -1
    integers = _integers(array, scale.reshape(shape), np.int8)
    if integers is None:
        raise UnsupportedModelError("the weights of a quantised layer are no integers of 8 bits times its scales",
                                    "make the file again")
    return dequantised(graph, "weight", integers, scale, axis)


def bias(graph: Graph, array: Array, scale: Array) -> Tensor:
    """A bias as int32 integers times input's scale x weight's scale, which is how integer kernels add it; as it is, where it
    is no such numbers."""
    scale = np.asarray(scale, np.float32)
    integers = _integers(array, scale, np.int32)
    return graph.constant("bias", array) if integers is None else dequantised(graph, "bias", integers, scale, 0)


def _integers(array: Array, scale: Array, dtype: Any) -> Array | None:
    """What times the scale is the array, but for the rounding of that product in float32."""
    info = np.iinfo(dtype)
    steps = np.rint(array.astype(np.float64) / scale if info.bits > 24 else array / scale)
    fits = bool(steps.min(initial=0) >= info.min and steps.max(initial=0) <= info.max)
    made = steps * scale
    same = fits and (np.array_equal(made, array) or bool((np.abs(made - array) <= _ROUNDING * np.abs(array)).all()))
    return steps.astype(dtype) if same else None


def float_biases(graph: Graph) -> Graph:
    """Biases as float32 constants, for runtimes that dequantise no int32. Changes `graph` in place."""
    for node in graph.nodes:
        if node.op == "DequantizeLinear" and not node.domain and (x := values(node.inputs[0])) is not None \
                and x.dtype == np.int32:
            value = weights(node.outputs[0])
            assert value is not None
            graph.redirect(node.outputs[0], graph.constant("bias", value))
            graph.remove(node)
    return graph


def dequantised(graph: Graph, hint: str, integers: Array, scale: Array, axis: int) -> Tensor:
    """The product of DequantizeLinear on constants, one scale for each slice of the axis."""
    made = graph.variable(hint, np.float32, integers.shape)
    inputs = [graph.constant(hint, integers), graph.constant("scale", np.asarray(scale, np.float32)),
              graph.constant("zero_point", np.zeros(len(scale), integers.dtype))]
    graph.add("DequantizeLinear", inputs, [made], attrs={"axis": axis})
    return made


# ---- quantise before moving ------------------------------------------------------------------------------------------
def _sink(graph: Graph) -> None:
    """move(a, b) -> f -> FakeQuantize becomes move(FakeQuantize(f(a)), ...): the runtimes quantise in a convolution only
    what is quantised right behind it. The last move first, so that what stands in front of it meets its chain."""
    for node in reversed(graph.nodes):
        if node.op in _MOVES and not node.domain and node.outputs:
            chain = _chain(graph, node.outputs[0])
            inputs = [t for t in node.inputs if values(t) is None]
            if chain and all(graph.sole_consumer(t) is node for t in inputs):
                _swap(graph, node, inputs, chain)


def _chain(graph: Graph, tensor: Tensor) -> list[Node]:
    """The element-wise nodes behind the tensor, down to a FakeQuantize; none, where there is no such way."""
    found: list[Node] = []
    while True:
        reader = graph.sole_consumer(tensor)
        if reader is None or reader.op not in UNARY or any(values(t) is None for t in reader.inputs[1:]):
            return []
        found.append(reader)
        if is_quantiser(reader):
            return found
        tensor = reader.outputs[0]


def _swap(graph: Graph, move: Node, inputs: Sequence[Tensor], chain: Sequence[Node]) -> None:
    result = chain[-1].outputs[0]
    steps = [(n.op, n.domain, dict(n.attrs), list(n.inputs[1:]), n.outputs[0].dtype) for n in chain]
    op, attrs, given, old = move.op, dict(move.attrs), list(move.inputs), move.outputs[0]
    for node in (*chain, move):
        graph.remove(node)
    fresh: dict[int, Tensor] = {}
    for tensor in inputs:
        x = tensor
        for step, domain, own, rest, dtype in steps:
            y = graph.variable("part", dtype, tensor.shape)
            graph.add(step, [x, *rest], [y], attrs=dict(own), domain=domain)
            x = y
        fresh[id(tensor)] = x
    result.shape = old.shape
    graph.add(op, [fresh.get(id(t), t) for t in given], [result], attrs=attrs)


# ---- pairs -----------------------------------------------------------------------------------------------------------
def _pair(graph: Graph, node: Node, integers: dict[int, tuple[Tensor, Quantiser]]) -> None:
    how, x, y = quantiser.read(node), node.inputs[0], node.outputs[0]
    graph.remove(node)
    q = graph.variable("quantised", how.dtype, x.shape)
    graph.add("QuantizeLinear", [x, *_parameters(graph, how)], [q])
    graph.add("DequantizeLinear", [q, *_parameters(graph, how)], [y])
    integers[id(y)] = q, how


def _parameters(graph: Graph, how: Quantiser) -> list[Tensor]:
    return [graph.constant("scale", np.array(how.scale, np.float32)),
            graph.constant("zero_point", np.array(how.zero_point, how.dtype))]


def _move_integers(graph: Graph, node: Node, integers: dict[int, tuple[Tensor, Quantiser]]) -> None:
    """Of equally quantised tensors the integers are moved."""
    data = [t for t in node.inputs if values(t) is None]
    known = [integers.get(id(t)) for t in data]
    if not known or any(k is None for k in known) or len({k[1] for k in known if k}) > 1:
        return
    place = {id(t): k for t, k in zip(data, known, strict=True) if k}
    how, y, op, attrs = place[id(data[0])][1], node.outputs[0], node.op, dict(node.attrs)
    inputs = [place[id(t)][0] if id(t) in place else t for t in node.inputs]
    graph.remove(node)
    q = graph.variable("quantised", how.dtype, y.shape)
    graph.add(op, inputs, [q], attrs=attrs)
    graph.add("DequantizeLinear", [q, *_parameters(graph, how)], [y])
    integers[id(y)] = q, how


def quantised_input(tensor: Tensor) -> Quantiser | None:
    """How a tensor was quantised, through movement of its channels."""
    node = producer(tensor)
    while node is not None and node.op in _MOVES and not node.domain:
        tensor = node.inputs[0]
        node = producer(tensor)
    return quantiser.of(tensor)


