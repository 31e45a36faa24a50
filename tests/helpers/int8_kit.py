"""Networks in int8 by hand: quantisers and integers of our own where NNCF would put them, so that no test waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph, Node, Tensor, is_branched, values
from gkp.converter.lower import qdq
from gkp.converter.lower.emit import lower
from gkp.converter.operators import is_depthwise
from gkp.converter.quantiser import Quantiser
from gkp.converter.recognise import recognise, simplify
from gkp.converter.reference import reference

SMALL = 63
"""Of a weight's integers: processors without VNNI add two products in 16 bits, and saturate there."""


def power(x: Any) -> Any:
    """The next power of two: products and sums of such steps are exact in float32, in any order."""
    return np.exp2(np.ceil(np.log2(np.maximum(x, 1e-3)))).astype(np.float32)


def by_hand(model: onnx.ModelProto, seed: int = 0, largest: int = SMALL) -> Graph:
    """The model in the one form, in int8; see `quantised`."""
    return quantised(simplify(recognise(Graph(model))), seed, largest)


def stock_by_hand(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same in standard operators, dense."""
    return lower(by_hand(model), {}).to_model()


def quantised(graph: Graph, seed: int = 0, largest: int = SMALL) -> Graph:
    """A simplified graph in int8: quantisers in front of convolutions, Gemm, global pooling and residual additions, ranges from
    one random input, scales that are powers of two. `graph` is used up."""
    rng = np.random.default_rng(seed)
    heavy = [n for n in graph.nodes if is_branched(n) or is_depthwise(n) or n.op == "Gemm"]
    summed = [n for n in graph.nodes if n.op == "GlobalAveragePool"
              or (n.op == "Add" and all(values(t) is None for t in n.inputs))]
    found = _observed(graph, [t for n in (*heavy, *summed) for t in n.inputs if values(t) is None], rng)
    made: dict[int, Tensor] = {}
    for node in (*heavy, *summed):
        for place, x in enumerate(node.inputs):
            if id(x) in found:
                if id(x) not in made:
                    made[id(x)] = graph.variable("quantised", x.dtype, x.shape)
                    quantiser.write(graph, range_of(found[id(x)]), x, made[id(x)])
                node.inputs[place] = made[id(x)]
    for node in heavy:
        how = quantiser.of(node.inputs[0])
        assert how is not None
        if is_branched(node):
            branched_node.rewrite(graph, node, integer(branched_node.read(node), how.scale, largest))
        else:
            _stock(graph, node, how.scale, largest)
    graph.cleanup()
    return graph


def range_of(x: Any) -> Quantiser:
    """uint8 where nothing is negative, else int8 or, with a zero point, uint8."""
    low, high = float(x.min()), float(x.max())
    if low >= 0:
        return Quantiser(float(power(high / 255)), 0, "uint8")
    scale = float(power((high - low) / 255))
    if -low > 2 * high or high > -2 * low:
        return Quantiser(scale, int(np.clip(np.rint(-low / scale), 0, 255)), "uint8")
    return Quantiser(float(power(max(high, -low) / 127)), 0, "int8")


def integer(conv: BranchedConv, step: float, largest: int = SMALL) -> BranchedConv:
    """The convolution with integer weights of up to `largest`, and a bias on the grid of its sums. step: of its input."""
    if conv.is_copy:
        return replace(conv, scale=np.ones(conv.out_channels, np.float32))
    dense = np.abs(conv.to_dense()).reshape(conv.out_channels, -1).max(1, initial=0)
    scale = power(dense / largest)
    parts = tuple(replace(b, weight=_rounded(b.weight, scale[b.out_index], largest)) for b in conv.branches)
    unit = scale * np.float32(step)
    return replace(conv, branches=parts, scale=scale, bias=(np.rint(conv.bias / unit) * unit).astype(np.float32))


def _rounded(weight: Any, scale: Any, largest: int) -> Any:
    scale = scale.reshape(-1, *(1,) * (weight.ndim - 1))
    return (np.clip(np.rint(weight / scale), -largest, largest) * scale).astype(np.float32)


def _stock(graph: Graph, node: Node, step: float, largest: int) -> None:
    """Depthwise Conv and Gemm."""
    weight = np.asarray(values(node.inputs[1]))
    axis = 0 if node.op == "Conv" or node.attrs.get("transB", 0) else 1
    scale = power(np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(1) / largest)
    wide = scale.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
    integers = np.clip(np.rint(weight / wide), -largest, largest).astype(np.int8)
    node.inputs[1] = qdq.dequantised(graph, "weight", integers, scale, axis)
    if len(node.inputs) > 2:
        unit = scale * np.float32(step)
        node.inputs[2] = qdq.bias(graph, np.rint(np.asarray(values(node.inputs[2])) / unit) * unit, unit)


def _observed(graph: Graph, tensors: Sequence[Tensor], rng: Any) -> dict[int, Any]:
    """The values of tensors, on one random input."""
    model, feeds = graph.to_model(), {}
    for tensor in graph.inputs:
        feeds[tensor.name] = rng.standard_normal([n if isinstance(n, int) else 2 for n in tensor.shape]).astype(np.float32)
    inner = list(dict.fromkeys(t.name for t in tensors if t.name not in feeds))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in inner)
    named = {**feeds, **dict(zip(inner, reference(model)(feeds), strict=True))}
    return {id(t): named[t.name] for t in tensors}


def integer_layers(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions that a runtime cannot compute in integers: those that read anything but DequantizeLinear, or
    whose result, behind element-wise operators that it fuses, is not quantised. Outputs of the graph may stay floats."""
    makers = {o: n for n in model.graph.node for o in n.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for n in model.graph.node:
        for name in n.input:
            readers.setdefault(name, []).append(n)
    outputs, bad = {o.name for o in model.graph.output}, []
    for n in model.graph.node:
        if n.op_type != "Conv":
            continue
        reads = all(makers[name].op_type == "DequantizeLinear" for name in n.input if name in makers)
        reads = reads and all(name in makers for name in n.input)
        name = n.output[0]
        while len(readers.get(name, [])) == 1 and readers[name][0].op_type in ("Relu", "Clip", "LeakyRelu"):
            name = readers[name][0].output[0]
        ends = name in outputs or {r.op_type for r in readers.get(name, [])} <= {"QuantizeLinear"}
        if not (reads and ends):
            bad.append(n.name)
    return bad
