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
    nodes: list[Node] = []
    bases: dict[int, Tensor] = {}
    if not _collect(tensor, nodes, bases, through_adds, enter, top=True) or not nodes or not bases:
        return None
    if any(channels(t) is None or spatial(t) is None for t in (tensor, *bases.values())):
        return None
    if any(prod(_probe_shape(t)) > _MAX_ELEMENTS for t in (*bases.values(), *(o for n in nodes for o in n.outputs))):
        return None
    terms = _probe(tensor, nodes, list(bases.values()), graph.opset)
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


def _probe(tensor: Tensor, nodes: list[Node], bases: list[Tensor], opset: int) -> tuple[Selection, ...] | None:
    zeros = {b.name: np.zeros(_probe_shape(b)) for b in bases}
    model, terms = _standalone(nodes, bases, [tensor], opset), []
    for constant in model.graph.initializer:  # numbers must stay exact, and float16 counts to 2048 only
        if constant.data_type in _NARROW:
            constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant).astype(np.float64),
                                                           constant.name))
    try:
        run = ReferenceEvaluator(model, new_ops=[branched_node.BranchedConvOp]).run
        if np.any(run(None, zeros)[0]):  # a constant of its own
            return None
    except FAILURES:  # the nodes do not even run: whoever wants to know why will run the whole model
        return None
    for base in bases:
        blank = zeros[base.name]
        per_channel = (1, -1, *(1,) * (blank.ndim - 2))
        by_channel = blank + np.arange(1, blank.shape[1] + 1, dtype=blank.dtype).reshape(per_channel)
        planes = np.arange(1, blank[:, :1].size + 1, dtype=blank.dtype).reshape(blank[:, :1].shape)
        try:
            got = [np.asarray(run(None, {**zeros, base.name: numbers})[0]) for numbers in (by_channel, blank + planes)]
        except FAILURES:
            return None
        term = _selection(base, planes, *got)
        if term is None:
            return None
        terms.append(term)
    return tuple(terms)


def _selection(base: Tensor, planes: Array, by_channel: Array,
               by_position: Array) -> Selection | None:
    """Read the selection off the outcome of numbering channels, and of numbering positions (batch and plane)."""
    if by_channel.ndim != planes.ndim or by_channel.shape[0] != planes.shape[0]:
        return None
    strides = tuple(-(-i // o) if o else 0 for i, o in zip(planes.shape[2:], by_channel.shape[2:], strict=True))
    if any(s < 1 for s in strides):
        return None
    every: tuple[Any, ...] = (slice(None), slice(None), *(slice(None, None, s) for s in strides))
    strided = planes[every]
    if strided.shape[2:] != by_channel.shape[2:]:
        return None
    corner: tuple[Any, ...] = (0, slice(None), *(0,) * (planes.ndim - 2))
    first = by_channel[corner]
    index = first.astype(np.int64) - 1
    numbers = first.reshape(1, -1, *(1,) * (planes.ndim - 2))
    if not np.array_equal(by_channel, np.broadcast_to(numbers, by_channel.shape)):
        return None
    return Selection(base, index, strides) if np.array_equal(by_position, strided * (numbers > 0)) else None


def run_nodes(nodes: list[Node], inputs: list[Tensor], outputs: list[Tensor], feeds: dict[str, Array],
              opset: int) -> list[Array]:
    """Execute a few nodes with the reference implementation of ONNX."""
    evaluator = ReferenceEvaluator(_standalone(nodes, inputs, outputs, opset), new_ops=[branched_node.BranchedConvOp])
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
