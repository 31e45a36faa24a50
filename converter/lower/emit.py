"""Write a graph in the one form as stock ONNX, for a choice of candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer, values, with_channels
from gkp.converter.lower import qdq
from gkp.converter.lower.candidates import PAD, Candidate, Group, Index, dense
from gkp.converter.lower.orders import Orders, takes_any_order
from gkp.converter.operators import is_batchnorm, is_depthwise
from gkp.types import Array


def lower(graph: Graph, chosen: Mapping[str, Candidate]) -> Graph:
    """A copy of the graph without gkp::BranchedConv: each layer in its chosen form (dense where `chosen` has none),
    weights permuted so that channels lie where grouped convolutions want them, a Gather where that is impossible."""
    graph = graph.copy()
    complete = {n.name: chosen.get(n.name) or dense(branched_node.read(n)) for n in graph.branched()}
    orders = Orders(graph, complete)
    places = {id(t): orders.of(t) for node in graph.nodes for t in (*node.inputs, *node.outputs)
              if values(t) is None and not orders.is_original(t)}
    for node in graph.nodes:
        if is_branched(node):
            _Emission(graph, node, orders, complete[node.name]).run()
        else:
            _follow(graph, node, places)
    for node in graph.nodes:
        for tensor in node.outputs:
            if id(tensor) in places:
                tensor.shape = with_channels(tensor.shape, places[id(tensor)].size)
    graph.cleanup()
    return qdq.expand(graph)


def _follow(graph: Graph, node: Node, places: Mapping[int, Index]) -> None:
    """Permute (and pad) the parameters of a channel-wise node or a Gemm to the order of its input."""
    order = places.get(id(node.inputs[0])) if node.inputs else None
    if order is None:
        return
    if is_batchnorm(node):
        for place, filler in zip(range(1, 5), (1.0, 0.0, 0.0, 1.0), strict=True):
            node.inputs[place] = graph.constant("bn", _taken(_value(node.inputs[place]), order, 0, filler))
    elif is_depthwise(node):
        for place in range(1, len(node.inputs)):
            node.inputs[place] = _permuted(graph, node.inputs[place], order, 0)
        node.attrs["group"] = int(order.size)
    elif node.op == "Reshape":  # its constant shape holds the old number of channels
        replaced = node.inputs[0], node.outputs[0]
        graph.remove(node)
        graph.add("Flatten", replaced[:1], replaced[1:], attrs={"axis": 1})
    elif takes_any_order(node):
        axis = 1 if node.attrs.get("transB", 0) else 0
        node.inputs[1] = _permuted(graph, node.inputs[1], order, axis)


def _permuted(graph: Graph, tensor: Tensor, order: Index, axis: int) -> Tensor:
    """A constant, or one that is dequantised, in the order of an axis."""
    source = producer(tensor)
    if source is None or source.op != "DequantizeLinear":
        return graph.constant("permuted", _taken(_value(tensor), order, axis))
    made = graph.variable("permuted", tensor.dtype)
    integers, *scales = source.inputs
    if axis == source.attrs.get("axis", 1):
        scales = [graph.constant("scale", _taken(_value(t), order, 0, filler)) if _value(t).size > 1 else t
                  for t, filler in zip(scales, (1.0, 0.0), strict=False)]
    graph.add("DequantizeLinear", [graph.constant("permuted", _taken(_value(integers), order, axis)), *scales], [made],
              attrs=dict(source.attrs))
    return made


def _value(tensor: Tensor) -> Array:
    value = values(tensor)
    assert value is not None
    return value


def _taken(array: Array, order: Index, axis: int, filler: float = 0.0) -> Array:
    """array[order] along an axis, with `filler` where order is PAD."""
    out = np.take(array, np.maximum(order, 0), axis=axis)
    if (order == PAD).any():
        cut: list[Any] = [slice(None)] * array.ndim
        cut[axis] = order == PAD
        out[tuple(cut)] = filler
    return out


class _Emission:
    """The stock nodes of one layer."""

    def __init__(self, graph: Graph, node: Node, orders: Orders, candidate: Candidate) -> None:
        self.graph, self.node, self.candidate = graph, node, candidate
        self.conv: BranchedConv = branched_node.read(node)
        self.x, self.y, self.name = node.inputs[0], node.outputs[0], node.name
        self.x_order, self.y_order = orders.of(self.x), orders.of(self.y)
        self.groups = candidate.groups if candidate.is_dense else orders.groups(node.name)

    def run(self) -> None:
        self.graph.remove(self.node)
        if self.candidate.is_dense:
            self._dense()
        elif self.candidate.parallel:
            self._parallel()
        else:
            self._grouped()

    def _dense(self) -> None:
        weight = _taken(_taken(self.groups[0].weight(), self.y_order, 0), self.x_order, 1)
        self._conv(self.x, weight, self.y_order, self.y, 1, self.name)

    def _grouped(self) -> None:
        wanted = np.concatenate([g.in_index for g in self.groups])
        x, order = self.x, self.x_order
        if not self._in_place(order, "in_index"):
            x, order = self._gather(x, order, wanted), wanted
        natural = np.concatenate([g.out_index for g in self.groups])
        in_place = self._in_place(self.y_order, "out_index")
        out_order = self.y_order if in_place else natural
        n = len(self.groups)
        blocks = [_fit(g, i, o) for g, i, o in zip(self.groups, order.reshape(n, -1), out_order.reshape(n, -1),
                                                   strict=True)]
        y = self.y if in_place else self._inner(natural.size)
        self._conv(x, np.concatenate(blocks), out_order, y, n, self.name)
        if not in_place:
            self._gather_out(y, natural)

    def _parallel(self) -> None:
        parts = []
        for k, g in enumerate(self.groups):
            part = self._inner(g.out_index.size)
            self._conv(self._gather(self.x, self.x_order, g.in_index), g.weight(), g.out_index, part, 1,
                       f"{self.name}/{k}")
            parts.append(part)
        natural = np.concatenate([g.out_index for g in self.groups])
        in_place = np.array_equal(natural, self.y_order)
        y = self.y if in_place else self._inner(natural.size)
        self.graph.add("Concat", parts, [y], name=f"{self.name}/concat", attrs={"axis": 1})
        if not in_place:
            self._gather_out(y, natural)

    def _in_place(self, layout: Index, side: str) -> bool:
        order = Orders.match(layout, self.groups, side)
        return order == list(range(len(self.groups)))

    def _inner(self, n: int) -> Tensor:
        return self.graph.variable("part", self.y.dtype, with_channels(self.y.shape, n))

    def _gather(self, x: Tensor, layout: Index, wanted: Index) -> Tensor:
        """Channels `wanted` (original numbers; PAD: any) of x."""
        place = np.zeros(int(max(layout.max(), wanted.max(), 0)) + 1, np.int64)
        place[layout[layout >= 0]] = np.flatnonzero(layout >= 0)
        index = np.where(wanted >= 0, place[np.maximum(wanted, 0)], 0)
        if np.array_equal(index, np.arange(layout.size)):
            return x
        return self.graph.take(x, index.tolist(), 1, "gathered")

    def _gather_out(self, part: Tensor, natural: Index) -> None:
        place = np.zeros(int(natural.max()) + 1, np.int64)
        place[natural[natural >= 0]] = np.flatnonzero(natural >= 0)
        index = np.where(self.y_order >= 0, place[np.maximum(self.y_order, 0)], 0)
        self.graph.add("Gather", [part, self.graph.constant("index", index)], [self.y], attrs={"axis": 1})

    def _conv(self, x: Tensor, weight: Array, order: Index, y: Tensor, groups: int, name: str) -> None:
        """order: the channels that it writes."""
        c = self.conv
        attrs = {"kernel_shape": list(c.kernel_shape), "strides": list(c.strides), "pads": list(c.pads),
                 "dilations": list(c.dilations), "group": groups}
        bias = _taken(np.asarray(c.bias, c.dtype), order, 0)
        inputs = [x, self._weight(weight, order)]
        if bias.any():
            inputs.append(self._bias(bias, order))
        y.shape = with_channels(y.shape, weight.shape[0])
        self.graph.add("Conv", inputs, [y], name=name, attrs=attrs)

    def _weight(self, weight: Array, order: Index) -> Tensor:
        if self.conv.scale is None:
            return self.graph.constant("weight", weight)
        return qdq.weight(self.graph, weight, _taken(np.asarray(self.conv.scale), order, 0, 1.0))

    def _bias(self, bias: Array, order: Index) -> Tensor:
        given = qdq.quantised_input(self.x)
        if self.conv.scale is None or given is None:
            return self.graph.constant("bias", bias)
        return qdq.bias(self.graph, bias, _taken(np.asarray(self.conv.scale), order, 0, 1.0) * np.float32(given.scale))


def _fit(group: Group, in_order: Index, out_order: Index) -> Array:
    """The group's weight for channels that lie in the given orders (any superset of its channels)."""
    given = group.weight()
    weight = np.zeros((out_order.size, in_order.size, *given.shape[2:]), given.dtype)
    rows = {int(c): k for k, c in enumerate(group.out_index) if c != PAD}
    cols = {int(c): k for k, c in enumerate(group.in_index) if c != PAD}
    to_r, from_r = _pairs(out_order, rows)
    to_c, from_c = _pairs(in_order, cols)
    weight[np.ix_(to_r, to_c)] = given[np.ix_(from_r, from_c)]
    return weight


def _pairs(order: Index, place: Mapping[int, int]) -> tuple[list[int], list[int]]:
    found = [(k, place[int(c)]) for k, c in enumerate(order) if int(c) in place]
    return [k for k, _ in found], [p for _, p in found]

