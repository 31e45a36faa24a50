"""Channel movement: which channels of which tensors make up a tensor, found by running the movement on numbered data.

Grouping reaches ONNX in many idioms: Gather, Split, Slice, channel shuffles (Reshape-Transpose-Reshape), Concat with
zeros, index_add as ScatterElements or ScatterND, Transpose-GatherND-Transpose, ... All of them are *linear movements*:
every output element is one input element or zero (or a sum of those). Instead of matching each idiom by its shape, the
nodes between a tensor and its bases are executed once per base on numbered elements; if the result is exactly
"channel index[j] of the base, every s-th row and column", that is what the nodes compute, whatever they look like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node, Tensor, channels, is_branched, producer, spatial, values
from gkp.converter.operators import MOVES, POOLS, RESHAPES
from gkp.converter.probe import Selection, probe_shape, selections

_MOVES = (MOVES | RESHAPES | {"Identity"}) - {"Flatten"}  # Flatten ends a movement of channels: a matrix is no picture
_DATA_INPUTS = {"Concat": None, "Add": None, "ScatterElements": (0, 2), "ScatterND": (0, 2)}  # None: all of them
_MAX_ELEMENTS = 1 << 26
_MAX_SUM_RUNS = 1 << 12
"""Nodes of a movement with sums, times its bases: each of these is run on its own."""


@dataclass(frozen=True, eq=False)
class Walk:
    """The nodes that move data, in order, between a tensor and the tensors that it is made of."""

    tensor: Tensor
    nodes: tuple[Node, ...]
    bases: tuple[Tensor, ...]
    members: frozenset[int] = field(init=False)
    """The nodes by identity."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", frozenset(id(n) for n in self.nodes))

    def holds_readers(self, tensor: Tensor) -> bool:
        """Do these nodes alone read the tensor?"""
        return all(id(reader) in self.members for reader in tensor.outputs)


@dataclass(frozen=True, eq=False)
class Movement:
    """A tensor as a sum of selections: the nodes of `walk` compute it, `adds` of them add two tensors. `side_outputs`: the
    tensors that they compute besides and that something else reads."""

    walk: Walk
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


def is_end(graph: Graph, tensor: Tensor) -> bool:
    """Is it an output of the graph, or read by something that does not move data on?"""
    if graph.is_output(tensor) or len(tensor.outputs) > 1:
        return True
    return bool(tensor.outputs) and not (is_move(tensor.outputs[0]) or is_add(tensor.outputs[0]))


def walk(graph: Graph, tensor: Tensor, *, through_adds: bool = False, enter: Callable[[Tensor], bool] = lambda _: True,
         most: int | None = None) -> Walk | None:
    """What moves data above the tensor, or None where nothing does, or more than `most` nodes do.

    through_adds: also look through additions. enter: may the walk look behind this tensor (else it is a base)?"""
    nodes: list[Node] = []
    bases: dict[int, Tensor] = {}
    seen: set[int] = set()
    ahead: list[Tensor | Node] = [tensor]  # a node lies below what it reads
    while ahead:
        item = ahead.pop()
        if isinstance(item, gs.Node):
            nodes.append(item)
            continue
        if isinstance(item, gs.Constant):
            continue
        node = producer(item)
        if (node is None or not (item is tensor or enter(item))
                or not (is_move(node) or (through_adds and node.op == "Add"))):
            bases[id(item)] = item
            continue
        if id(node) in seen:
            continue
        seen.add(id(node))
        if most is not None and len(seen) > most:
            graph.budget.steps(most)
            return None
        ahead += [node, *(node.inputs[i] for i in reversed(_data(node)))]
    graph.budget.steps(1 + len(nodes) + len(bases))
    return Walk(tensor, tuple(nodes), tuple(bases.values())) if nodes and bases else None


def movement(graph: Graph, way: Walk | None) -> Movement | None:
    """The walk's tensor as a sum of channel selections of its bases, or None if it is not moved, or not by channels."""
    if way is None or obstacle(way):
        return None
    terms = selections(graph, way.tensor, way.nodes, way.bases, 2 * _sums(way) + 1)
    if terms is None:
        return None
    adds = sum(n.op == "Add" or (n.op.startswith("Scatter") and values(n.inputs[0]) is None) for n in way.nodes)
    side = tuple(o for n in way.nodes for o in n.outputs if o is not way.tensor
                 and (graph.is_output(o) or not way.holds_readers(o)))
    return Movement(way, terms, adds, side)


def obstacle(way: Walk) -> str:
    """Why the nodes are not run, "" where they are."""
    if any(channels(t) is None or spatial(t) is None for t in (way.tensor, *way.bases)):
        return "its channels and rows are not known beforehand"
    if any(prod(probe_shape(t)) > _MAX_ELEMENTS for t in (*way.bases, *(o for n in way.nodes for o in n.outputs))):
        return f"it takes tensors of over {_MAX_ELEMENTS:,} elements"
    if _sums(way) and len(way.nodes) * len(way.bases) > _MAX_SUM_RUNS:
        return f"{len(way.nodes)} nodes move and add up {len(way.bases)} tensors"
    return ""


def _sums(way: Walk) -> int:
    return sum(is_add(n) for n in way.nodes)


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


def absorbable(graph: Graph, base: Tensor, way: Walk) -> Node | None:
    """The BranchedConv that computes `base`, when all readers of it are among the walk's nodes."""
    node = producer(base)
    if node is None or not is_branched(node) or graph.is_output(base):
        return None
    return node if way.holds_readers(base) else None
