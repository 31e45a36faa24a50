"""How much a network's activations take, known from its shapes before anything runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import prod

import numpy as np

from gkp.converter.graph import Graph, Node, Tensor, is_branched, spatial, values
from gkp.converter.operators import COPIES, ELEMENTWISE, PLANES, POOLS, RESHAPES
from gkp.errors import FileError, UnsafeFileError, UnsupportedModelError
from gkp.text import clean

_SHRINKING = RESHAPES | COPIES | POOLS | PLANES | {
    "ArgMax", "ArgMin", "Compress", "DequantizeLinear", "GatherElements", "LogSoftmax", "NonZero", "QuantizeLinear",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ScatterElements", "ScatterND", "Slice", "Softmax",
    "Split", "TopK", "Transpose", "Unique"}
"""They give no more elements than they get (NonZero: for each axis)."""
_FREE, _PER_INPUT_BYTE = 256 << 20, 1024
_LARGEST, _INPUTS = 4 << 30, 512 << 20
_HINT = "gkp is made for CNNs; if the size is meant, give a smaller one with --input-shape"
_BATCH = 2
"""What stands for a dynamic axis."""
_UNKNOWN_ITEM = 8


def require_modest(graph: Graph, weights: Collection[str] = ()) -> None:
    """Charge the budget what the activations take that are alive at once, whatever order a runtime takes, and all that is
    computed from constants alone, which runtimes do when they open a model. What folds is to be folded before. weights:
    inputs of the graph that stand for weights in the file: the file's size is their limit.

    UnsafeFileError when an activation is out of proportion to the inputs, or many are alive at once; UnsupportedModelError
    when the size of one cannot be known."""
    sizes = _sizes(graph)
    taken = sum(_bytes(t, _known(t) or 0) for t in graph.inputs)
    name, largest = max(((t.name, sizes[id(t)]) for n in graph.nodes for t in n.outputs), key=lambda pair: pair[1],
                        default=("", 0))
    named = sum(_bytes(t, _known(t) or 0) for t in graph.inputs if t.name not in weights)
    if named > _INPUTS:
        raise UnsafeFileError(f"inputs of the size that the model names take {named:,} bytes", _HINT)
    if largest > min(_LARGEST, _FREE + _PER_INPUT_BYTE * taken):
        raise UnsafeFileError(f"activation {clean(name)} would take {largest:,} bytes, from inputs of {taken:,}", _HINT)
    graph.budget.activation(max(largest, taken))
    needed = _peak(graph, sizes) + _steady(graph, sizes)
    graph.budget.bytes(needed)
    graph.budget.release(needed)


def _known(tensor: Tensor) -> int | None:
    """Elements, where the shape says so."""
    if tensor.shape is None or any(d is None for d in tensor.shape):
        return None
    return prod(d if isinstance(d, int) else _BATCH for d in tensor.shape)


def _bytes(tensor: Tensor, elements: int) -> int:
    try:
        return elements * np.dtype(tensor.dtype).itemsize if tensor.dtype is not None else elements * _UNKNOWN_ITEM
    except TypeError:  # a type that numpy has not
        return elements * _UNKNOWN_ITEM


def _sizes(graph: Graph) -> dict[int, int]:
    """Bytes of every tensor that a node makes, at most, by identity."""
    bounds: dict[int, int] = {}
    sizes: dict[int, int] = {}

    def elements(t: Tensor) -> int:
        value = values(t)
        if value is not None:
            return int(value.size)
        return bounds[id(t)] if id(t) in bounds else _known(t) or 0

    for node in graph.nodes:
        if is_branched(node):
            _check_claim(node)
        for tensor in node.outputs:
            known = _known(tensor)
            bounds[id(tensor)] = known if known is not None else _bound(node, [elements(t) for t in node.inputs])
            sizes[id(tensor)] = _bytes(tensor, bounds[id(tensor)])
    return sizes


def _check_claim(node: Node) -> None:
    """The shape of a BranchedConv's output is what the file claims: FileError when it is another."""
    plane, shape = spatial(node.inputs[0]), node.outputs[0].shape
    if shape is None or any(not isinstance(n, int) for n in shape[1:]):
        return
    try:
        pads, nd = node.attrs["pads"], len(node.attrs["kernel_shape"])
        true = [(n + pads[a] + pads[nd + a] - d * (k - 1) - 1) // s + 1 for a, (n, k, s, d) in enumerate(
            zip(plane or (), node.attrs["kernel_shape"], node.attrs["strides"], node.attrs["dilations"], strict=True))]
        true.insert(0, node.inputs[-1].shape[0])
    except (ArithmeticError, LookupError, TypeError, ValueError):
        true = []
    if plane is None or list(shape[1:]) != true:
        raise FileError(f"the shape of BranchedConv {clean(node.name)} is not what it computes", "make the file again")


def _bound(node: Node, given: list[int]) -> int:
    if node.op in _SHRINKING and given:
        return given[0] * (len(node.inputs[0].shape or ()) or 8 if node.op == "NonZero" else 1)
    if node.op in ELEMENTWISE:
        return prod(n for n in given if n)
    if node.op == "Concat":
        return sum(given)
    if node.op in ("Gather", "GatherND", "MatMul", "Gemm"):
        return prod(given[:2])
    raise UnsupportedModelError(f"how much {clean(node.op)} ({clean(node.name)}) makes is not known before it runs",
                                "export the model with fixed shapes, or give --input-shape")


def _steady(graph: Graph, sizes: Mapping[int, int]) -> int:
    """Bytes of all that does not depend on an input."""
    moving = {id(t) for t in graph.inputs}
    total = 0
    for node in graph.nodes:
        if any(id(t) in moving for t in node.inputs):
            moving |= {id(t) for t in node.outputs}
        else:
            total += sum(sizes[id(t)] for t in node.outputs)
    return total


def _peak(graph: Graph, sizes: Mapping[int, int]) -> int:
    """The most bytes alive at once: in the order of the file, or depth first with a node's inputs from either side."""
    nodes = graph.nodes
    return max(alive_bytes(graph, order, sizes)
               for order in (nodes, _depth_first(graph, lambda inputs: inputs), _depth_first(graph, reversed)))


def _depth_first(graph: Graph, side: Callable[[list[Tensor]], Iterable[Tensor]]) -> list[Node]:
    order: list[Node] = []
    done: set[int] = set()
    stack: list[tuple[Node, bool]] = [(t.inputs[0], False) for t in graph.outputs if t.inputs]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif id(node) not in done:
            done.add(id(node))
            stack.append((node, True))
            stack += [(t.inputs[0], False) for t in side(list(node.inputs)) if t.inputs]
    return order


def alive_bytes(graph: Graph, order: list[Node], sizes: Mapping[int, int]) -> int:
    """The most bytes alive at once in an order of the nodes. sizes: of what they make, and of inputs that count from the
    beginning, by identity."""
    last = {id(t): k for k, node in enumerate(order) for t in (*node.outputs, *node.inputs)}
    last |= {id(t): len(order) for t in graph.outputs}
    dying: dict[int, list[int]] = {}
    for tensor, place in last.items():
        if tensor in sizes:
            dying.setdefault(place, []).append(sizes[tensor])
    alive = peak = sum(sizes.get(id(t), 0) for t in graph.inputs)
    for k, node in enumerate(order):
        alive += sum(sizes[id(t)] for t in node.outputs)
        peak = max(peak, alive)
        alive -= sum(dying.get(k, ()))
    return peak
