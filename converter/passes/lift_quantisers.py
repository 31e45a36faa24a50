"""QuantizeLinear and DequantizeLinear of a file become gkp::FakeQuantize, and weights of 8 bits with zero points of 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import DOMAIN, Graph, Node, Tensor, is_branched, producer, values
from gkp.converter.linear import Linear, is_dequantise, is_quantise, linear, spread
from gkp.converter.operators import MOVES, RESHAPES
from gkp.converter.quantiser import Quantiser, is_quantiser
from gkp.errors import FileError, UsageError
from gkp.text import clean

_MOVED = (MOVES | RESHAPES | {"Identity", "MaxPool"}) - {"Pad", "ScatterElements", "ScatterND"}
"""What gives integers that it was given. Dequantising keeps their order, so that the largest stays the largest."""
_CHANNELS = ("Concat", "Gather", "Slice")
"""Behind these an equal quantiser does nothing, and is nothing that a runtime looks for (as it does behind a pooling)."""
_ROUNDING = 2.0**-21
"""Relative, of a float32 product."""


def run(graph: Graph) -> bool:
    """1. Constants that are quantised become integers; weights of int8 or uint8 whose zero point leaves them within int8
       become int8 with zero points of 0.
    2. DequantizeLinear behind movement of integers (of any kind but scatters and Pad, and MaxPool) goes in front of it.
    3. QuantizeLinear and DequantizeLinear of one constant scale and zero point become FakeQuantize. Whoever else reads the
       integers keeps its QuantizeLinear.
    4. FakeQuantize of what is quantised equally already, directly or through movement of channels, vanishes.

    Scales for each slice of an axis stay, but for weights. FileError and UnsupportedModelError as of
    gkp.converter.linear, and for gkp's own operators whose numbers do not fit."""
    check(graph)
    pairs = [n for n in graph.nodes if is_quantise(n) or is_dequantise(n)]
    changed = any([_constant(graph, n) for n in pairs if is_quantise(n)])
    changed |= any([_symmetric(graph, n) for n in pairs if is_dequantise(n)])
    changed |= _raise(graph)
    changed |= _pair(graph)
    changed |= _once(graph)
    if changed:
        graph.cleanup()
    return changed


def check(graph: Graph) -> None:
    """Have all that quantise and that are quantised numbers that fit? Errors: see `run`."""
    for node in graph.nodes:
        if is_quantise(node) or is_dequantise(node):
            linear(node)
        elif is_quantiser(node):
            quantiser.read(node)
        elif is_branched(node) and "weight_scale" in node.attrs:
            try:
                conv = branched_node.read(node)
            except UsageError as e:
                raise FileError(f"BranchedConv {clean(node.name)}: {e.message}", "make the file again") from e
            for b in conv.branches:
                scale = spread(np.asarray(conv.scale)[b.out_index], 0, b.weight.ndim)
                steps = np.rint(b.weight / scale)
                fits = steps.min(initial=0) >= -128 and steps.max(initial=0) <= 127
                if not fits or not np.allclose(steps * scale, b.weight, _ROUNDING, 0):
                    raise FileError(f"the weights of BranchedConv {clean(node.name)} are not integers of 8 bits times its "
                                    "scales", "make the file again")


# ---- constants -------------------------------------------------------------------------------------------------------
def _constant(graph: Graph, node: Node) -> bool:
    value, how = values(node.inputs[0]), linear(node)
    if value is None or how is None or value.dtype != np.float32 or not np.isfinite(value).all():
        return False
    graph.budget.bytes(value.nbytes * 3)
    info = np.iinfo(how.zero.dtype)
    steps = np.rint(value / spread(how.scale, how.axis, value.ndim)) + spread(how.zero, how.axis, value.ndim)
    integers = np.clip(steps, info.min, info.max).astype(how.zero.dtype)
    graph.redirect(node.outputs[0], graph.constant("integers", integers))
    graph.remove(node)
    graph.budget.release(value.nbytes * 3 - integers.nbytes)
    return True


def _symmetric(graph: Graph, node: Node) -> bool:
    """In the form that lowering and the passes read: a zero point of 0 that is there, and an axis that is not negative."""
    integers, how = values(node.inputs[0]), linear(node)
    if integers is None or how is None:
        return False
    if how.axis is not None:
        node.attrs["axis"] = how.axis
    if integers.dtype != np.int32 and (integers.dtype != np.int8 or how.zero.any()):
        graph.budget.bytes(integers.size * 3)
        steps = integers.astype(np.int16) - spread(how.zero.astype(np.int16), how.axis, integers.ndim)
        graph.budget.release(integers.size * 2)
        if steps.min(initial=0) < -128 or steps.max(initial=0) > 127:
            return False
        node.inputs[0] = graph.constant("integers", steps.astype(np.int8))
    scale, stored = np.asarray(values(node.inputs[1])), np.asarray(values(node.inputs[0]))
    made = graph.constant("zero_point", np.zeros(scale.shape, stored.dtype))
    if len(node.inputs) > 2:
        node.inputs[2] = made
    else:
        node.inputs.append(made)
    return True


# ---- movement of integers --------------------------------------------------------------------------------------------
def _raise(graph: Graph) -> bool:
    changed = False
    made: dict[tuple[int, Quantiser], Tensor] = {}
    work = [n for n in graph.nodes if is_dequantise(n)]
    while work:
        node = work.pop()
        how, moved = _activation(node), node.inputs[0]
        maker = producer(moved)
        if how is None or maker is None or not _moves(maker):
            continue
        if (id(moved), how) not in made:
            outputs = _behind(graph, maker, node, how, made, work)
            made.update({(id(t), how): y for t, y in zip(maker.outputs, outputs, strict=True)})
        graph.redirect(node.outputs[0], made[id(moved), how])
        graph.remove(node)
        changed = True
    return changed


def _activation(node: Node) -> Quantiser | None:
    """Of a pair for a whole tensor."""
    found: Linear | None = linear(node)
    return None if found is None else found.quantiser


def _moves(node: Node) -> bool:
    if node.op not in _MOVED or node.domain:
        return False
    if node.op != "MaxPool":
        return True
    kernel = node.attrs.get("kernel_shape", ())  # a window of padding alone has no largest element
    pads, nd = node.attrs.get("pads", (0,) * 2 * len(kernel)), len(kernel)
    return (len(node.outputs) == 1 and not node.attrs.get("ceil_mode", 0) and len(pads) == 2 * nd
            and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and set(node.attrs.get("dilations", (1,))) == {1}
            and all(max(pads[a], pads[nd + a]) < kernel[a] for a in range(nd)))


def _behind(graph: Graph, maker: Node, like: Node, how: Quantiser, made: dict[tuple[int, Quantiser], Tensor],
            work: list[Node]) -> Sequence[Tensor]:
    """The same movement of dequantised tensors. like: has the parameters; work: gets the new DequantizeLinear."""
    places = range(len(maker.inputs)) if maker.op == "Concat" else (0,)
    inputs = list(maker.inputs)
    for place in places:
        x = inputs[place]
        if (id(x), how) not in made:
            y = graph.variable("dequantised", np.float32, x.shape)
            work.append(graph.add("DequantizeLinear", [x, *like.inputs[1:]], [y]))
            inputs[place] = y
        else:
            inputs[place] = made[id(x), how]
    outputs = [graph.variable("moved", np.float32, t.shape) for t in maker.outputs]
    graph.add(maker.op, inputs, outputs, attrs=dict(maker.attrs))
    if maker.op in _CHANNELS:
        return outputs
    again = [graph.variable("quantised", np.float32, t.shape) for t in maker.outputs]
    for x, y in zip(outputs, again, strict=True):  # changes nothing, and stands right before what computes
        quantiser.write(graph, how, x, y)
    return again


# ---- pairs -----------------------------------------------------------------------------------------------------------
def _pair(graph: Graph) -> bool:
    changed = False
    made: dict[tuple[int, Quantiser], Tensor] = {}
    for node in graph.nodes:
        source = producer(node.inputs[0]) if is_dequantise(node) else None
        if source is None or not is_quantise(source) or source.inputs[0].dtype != np.float32:
            continue
        x, how = source.inputs[0], _activation(node)
        if how is None or _activation(source) != how:
            continue
        if (id(x), how) not in made:
            made[id(x), how] = graph.variable("quantised", np.float32, x.shape)
            quantiser.write(graph, how, x, made[id(x), how])
        graph.redirect(node.outputs[0], made[id(x), how])
        graph.remove(node)
        changed = True
    return changed


def _once(graph: Graph) -> bool:
    changed = False
    graph.cleanup()
    for node in graph.nodes:
        if is_quantiser(node) and node.domain == DOMAIN and _is_quantised(graph, node.inputs[0], quantiser.read(node)):
            graph.redirect(node.outputs[0], node.inputs[0])
            graph.remove(node)
            changed = True
    return changed


def _is_quantised(graph: Graph, tensor: Tensor, how: Quantiser) -> bool:
    """Is every element of it given by such a quantiser?"""
    seen: set[int] = set()
    stack = [tensor]
    while stack:
        t = stack.pop()
        if id(t) in seen:
            continue
        seen.add(id(t))
        graph.budget.steps()
        node = producer(t)
        if node is not None and node.op in _CHANNELS and not node.domain:
            stack += node.inputs if node.op == "Concat" else node.inputs[:1]
        elif quantiser.of(t) != how:
            return False
    return True
