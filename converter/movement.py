"""Channel movement: which channels of which tensors make up a tensor, found by running the movement on numbered data.

Grouping reaches ONNX in many idioms: Gather, Split, Slice, channel shuffles (Reshape-Transpose-Reshape), Concat with
zeros, index_add as ScatterElements or ScatterND, Transpose-GatherND-Transpose, ... All of them are *linear movements*:
every output element is one input element or zero (or a sum of those). Instead of matching each idiom by its shape, the
nodes between a tensor and its bases are executed once per base on numbered elements; if the result is exactly
"channel index[j] of the base, every s-th row and column", that is what the nodes compute, whatever they look like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, Tensor, channels, is_branched, producer, spatial, values
from gkp.converter.operators import MOVES, POOLS, RESHAPES
from gkp.converter.quantiser import OWN_OPERATORS
from gkp.types import Array

_MOVES = (MOVES | RESHAPES | {"Identity"}) - {"Flatten"}  # Flatten ends a movement of channels: a matrix is no picture
_DATA_INPUTS = {"Concat": None, "Add": None, "ScatterElements": (0, 2), "ScatterND": (0, 2)}  # None: all of them
FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError,
            onnx.defs.SchemaError)
"""What onnx.reference, and numpy below it, raise for operators that they cannot run."""
_NARROW = tuple(getattr(onnx.TensorProto, t) for t in ("FLOAT", "FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT16", "UINT16"))
_MAX_NODES = 64
_MAX_ELEMENTS = 1 << 26
_PROBE_BATCH = 2
_EXACT_IN_FLOAT32 = 1 << 24
_NARROWEST = 4
"""Bytes of an element of an activation, where probes are charged: those of float16 are probed as float32."""
_COPIES = 3
"""Of the nodes' constants: in the models that are run, and as arrays."""
_ALIVE = 5
"""Tensors of a probe that are there at once, at most, besides the bases: a numbered one, two of the walk, two compared."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Channels of one base tensor: output channel j is channel index[j] of `base` (-1: zeros), every strides-th
    element of each spatial axis."""

    base: Tensor
    index: npt.NDArray[np.int64]
    strides: tuple[int, ...]

    @property
    def is_gather(self) -> bool:
        """Has it neither zero channels nor strides?"""
        return bool((self.index >= 0).all()) and max(self.strides, default=1) == 1

    @property
    def is_identity(self) -> bool:
        return self.is_gather and np.array_equal(self.index, np.arange(channels(self.base) or -1))

    @property
    def repeats(self) -> bool:
        """Does a channel appear twice?"""
        used = self.index[self.index >= 0]
        return bool(np.unique(used).size < used.size)


@dataclass(frozen=True, eq=False)
class Movement:
    """A tensor as a sum of selections: `nodes` compute it, `adds` of them add two tensors. `side_outputs`: the tensors
    that they compute besides and that something else reads."""

    nodes: tuple[Node, ...]
    terms: tuple[Selection, ...]
    adds: int
    side_outputs: tuple[Tensor, ...]


def is_move(node: Node) -> bool:
    """Does the node only move data (its other inputs being constant)?"""
    if node.op in _MOVES and not node.domain:
        if node.op == "Pad" and not _zero_pad(node):
            return False
        if node.op.startswith("Scatter") and node.attrs.get("reduction", "none") not in ("none", "add"):
            return False
        data = _data(node)
        return all(values(t) is not None for i, t in enumerate(node.inputs) if i not in data)
    if node.op in POOLS:
        return (set(node.attrs.get("kernel_shape", (2,))) == {1} and not any(node.attrs.get("pads", ()))
                and len(node.outputs) == 1)
    if node.op == "Mul":
        return any((v := values(t)) is not None and not v.any() for t in node.inputs)
    if is_branched(node):
        return branched_node.read(node).is_copy
    return False


def is_add(node: Node) -> bool:
    """Does the node add up tensors (a residual Add, or a scatter into another tensor)?"""
    return bool(node.op == "Add" or (node.op.startswith("Scatter") and is_move(node)))


def movement(graph: Graph, tensor: Tensor, *, through_adds: bool = False,
             enter: Callable[[Tensor], bool] = lambda _: True) -> Movement | None:
    """The tensor as a sum of channel selections of its bases, or None if it is not moved, or not by channels.

    through_adds: also look through additions. enter: may the walk look behind this tensor (else it is a base)?
    """
    graph.budget.steps(_MAX_NODES)
    nodes: list[Node] = []
    bases: dict[int, Tensor] = {}
    if not _collect(tensor, nodes, bases, through_adds, enter, top=True) or not nodes or not bases:
        return None
    if any(channels(t) is None or spatial(t) is None for t in (tensor, *bases.values())):
        return None
    if any(prod(_probe_shape(t)) > _MAX_ELEMENTS for t in (*bases.values(), *(o for n in nodes for o in n.outputs))):
        return None
    terms = _probe(tensor, nodes, list(bases.values()), graph)
    if terms is None:
        return None
    adds = sum(n.op == "Add" or (n.op.startswith("Scatter") and values(n.inputs[0]) is None) for n in nodes)
    side = tuple(o for n in nodes for o in n.outputs if o is not tensor
                 and (graph.is_output(o) or any(all(r is not n for n in nodes) for r in o.outputs)))
    return Movement(tuple(nodes), terms, adds, side)


def _probe_shape(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape with a small batch in the place of a dynamic one."""
    return tuple(n if isinstance(n, int) else _PROBE_BATCH for n in tensor.shape or ())


def _collect(tensor: Tensor, nodes: list[Node], bases: dict[int, Tensor], through_adds: bool,
             enter: Callable[[Tensor], bool], top: bool = False, depth: int = 0) -> bool:
    """Post-order list of the movement nodes above `tensor`; False when there are too many."""
    if depth > _MAX_NODES:
        return False
    if isinstance(tensor, gs.Constant):
        return True
    node = producer(tensor)
    if node is None or not (top or enter(tensor)) or not (is_move(node) or (through_adds and node.op == "Add")):
        bases[id(tensor)] = tensor
        return True
    if any(n is node for n in nodes):
        return True
    for i in _data(node):
        if not _collect(node.inputs[i], nodes, bases, through_adds, enter, depth=depth + 1):
            return False
    nodes.append(node)
    return len(nodes) <= _MAX_NODES


def _data(node: Node) -> tuple[int, ...]:
    """Which inputs carry data; the others are indices and shapes."""
    if node.op == "Mul":
        return tuple(i for i, t in enumerate(node.inputs) if values(t) is None)
    places = _DATA_INPUTS.get(node.op, (0,))
    return tuple(range(len(node.inputs))) if places is None else places


def _zero_pad(node: Node) -> bool:
    if node.attrs.get("mode", "constant") != "constant":
        return False
    value = values(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2].name else np.zeros(1)
    pads = values(node.inputs[1]) if len(node.inputs) > 1 else None
    return value is not None and not value.any() and pads is not None and bool((pads >= 0).all())


def _probe(tensor: Tensor, nodes: list[Node], bases: list[Tensor], graph: Graph) -> tuple[Selection, ...] | None:
    """Run the nodes on zeros and, for each base, on its channels numbered and its positions (batch and plane) numbered."""
    sizes = [prod(_probe_shape(t)) for t in (*bases, *(o for n in nodes for o in n.outputs))]
    summands = 2 * sum(is_add(n) for n in nodes) + 1
    dtype = np.dtype(np.float32 if max(sizes) * summands < _EXACT_IN_FLOAT32 else np.float64)
    constants = sum(v.nbytes for n in nodes for t in n.inputs if (v := values(t)) is not None)
    room = dtype.itemsize * (sum(sizes[:len(bases)]) + _ALIVE * max(sizes)) + _COPIES * constants
    graph.budget.activation(max(sizes) * _NARROWEST)
    graph.budget.bytes(room)
    try:
        run = _Chain(nodes, bases, tensor, graph.opset, dtype)
        zeros = {b.name: np.zeros(_probe_shape(b), dtype) for b in bases}
        if np.any(run(zeros)):  # a constant of its own
            return None
        terms = [_term(run, zeros, base) for base in bases]
        return None if None in terms else tuple(t for t in terms if t is not None)
    except FAILURES:  # the nodes do not even run: whoever wants to know why will run the whole model
        return None
    finally:
        graph.budget.release(room)


def _term(run: _Chain, zeros: dict[str, Array], base: Tensor) -> Selection | None:
    """What the nodes select of one base, the others being zero."""
    blank = zeros[base.name]
    per_channel = (1, -1, *(1,) * (blank.ndim - 2))
    numbers = np.arange(1, blank.shape[1] + 1, dtype=blank.dtype).reshape(per_channel)
    found = _channels(run({**zeros, base.name: blank + numbers}), blank.shape)
    if found is None:
        return None
    planes = np.arange(1, blank[:, :1].size + 1, dtype=blank.dtype).reshape(blank[:, :1].shape)
    by_position = run({**zeros, base.name: blank + planes})
    numbers, strides = found
    every: tuple[Any, ...] = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    if not np.array_equal(by_position, planes[every] * (numbers > 0)):
        return None
    return Selection(base, numbers.reshape(-1).astype(np.int64) - 1, strides)


def _channels(by_channel: Array, shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]] | None:
    """Read off the outcome of numbering the channels of a base of this shape: (the number of each output channel, or 0,
    shaped [1, C, 1, ...]; the strides), None where that is not what the outcome is."""
    if by_channel.ndim != len(shape) or by_channel.shape[0] != shape[0]:
        return None
    strides = tuple(-(-i // o) if o else 0 for i, o in zip(shape[2:], by_channel.shape[2:], strict=True))
    if any(s < 1 for s in strides) or any(-(-i // s) != o for i, s, o in zip(shape[2:], strides, by_channel.shape[2:],
                                                                          strict=True)):
        return None
    corner: tuple[Any, ...] = (slice(0, 1), slice(None), *(slice(0, 1),) * (len(shape) - 2))
    numbers = by_channel[corner]
    return (numbers, strides) if np.array_equal(by_channel, np.broadcast_to(numbers, by_channel.shape)) else None


class _Chain:
    """Nodes under the reference implementation of ONNX, one at a time, so that no result is kept longer than it is read.
    Numbers of narrow types become those of `dtype`: they must stay exact, and float16 counts to 2048 only."""

    def __init__(self, nodes: list[Node], bases: list[Tensor], result: Tensor, opset: int, dtype: np.dtype[Any]) -> None:
        self._result = result.name
        self._constants: dict[str, Array] = {}
        self._steps: list[tuple[list[str], list[str], ReferenceEvaluator]] = []
        for node in nodes:
            model = _standalone([node], [t for t in node.inputs if t.name and values(t) is None], list(node.outputs), opset)
            for constant in model.graph.initializer:
                if constant.data_type in _NARROW:
                    constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant).astype(dtype),
                                                                   constant.name))
            names = [i.name for i in model.graph.input]
            self._steps.append((names, [o.name for o in node.outputs],
                                ReferenceEvaluator(model, new_ops=OWN_OPERATORS)))
        self._last = {name: k for k, (names, _, _) in enumerate(self._steps) for name in names}

    def __call__(self, feeds: dict[str, Array]) -> Array:
        known = dict(feeds)
        for k, (names, results, evaluator) in enumerate(self._steps):
            known.update(zip(results, evaluator.run(None, {name: known[name] for name in names}), strict=True))
            for name in {*names, *results}:
                if name != self._result and self._last.get(name, -1) <= k:
                    del known[name]
        return np.asarray(known[self._result])


def run_nodes(nodes: list[Node], inputs: list[Tensor], outputs: list[Tensor], feeds: dict[str, Array],
              opset: int) -> list[Array]:
    """Execute a few nodes with the reference implementation of ONNX."""
    evaluator = ReferenceEvaluator(_standalone(nodes, inputs, outputs, opset), new_ops=OWN_OPERATORS)
    return [np.asarray(v) for v in evaluator.run(None, feeds)]


def _standalone(nodes: list[Node], inputs: list[Tensor], outputs: list[Tensor], opset: int) -> onnx.ModelProto:
    graph = gs.Graph(nodes=list(nodes), inputs=list(inputs), outputs=list(outputs), opset=opset)
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("gkp", 1)]
    return gs.export_onnx(graph, do_type_check=False, opset_imports=imports)


def absorbable(graph: Graph, base: Tensor, nodes: tuple[Node, ...]) -> Node | None:
    """The BranchedConv that computes `base`, when all readers of it are among `nodes`."""
    node = producer(base)
    if node is None or not is_branched(node) or graph.is_output(base):
        return None
    return node if all(any(r is n for n in nodes) for r in base.outputs) else None
