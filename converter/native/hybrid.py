"""A graph in segments: the native kernels run what they can, ONNX Runtime the rest (--hybrid)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from gkp.converter.dynamic import BATCH, free_axes
from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer, values
from gkp.converter.lower.emit import lower
from gkp.converter.native.frontend import unsupported
from gkp.errors import UnsupportedModelError

NATIVE, ONNX = "native", "onnx"
_HEAVY = frozenset({"Conv", "Gemm", "MatMul"})


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a graph. kind: NATIVE (gkp.converter.native.frontend.program takes the graph) or ONNX (`stock_model`
    makes a model of it). The tensors that cross its border are the graph's inputs and outputs, under their own names."""

    kind: str
    graph: Graph

    @property
    def inputs(self) -> list[str]:
        return [t.name for t in self.graph.inputs]

    @property
    def outputs(self) -> list[str]:
        return [t.name for t in self.graph.outputs]


def segments(graph: Graph) -> list[Segment]:
    """The graph as segments to be run in order, native and ONNX in turn, as few as the operators without a kernel allow.

    What a segment reads is an input of the graph or an output of an earlier segment. A native segment holds at least one
    convolution or matrix product: less is not worth the way there and back. UsageError for dynamic sizes other than the
    batch."""
    graph.cleanup()
    if any(values(t) is not None for t in graph.outputs):
        raise UnsupportedModelError("an output of the model does not depend on its input",
                                    "leave it out of the model, or use --target ort")
    foreign = {u.name for u in unsupported(graph)}
    while True:
        groups = _groups(graph, foreign)
        parts = [Segment(kind, _part(graph, nodes)) for kind, nodes in groups]
        more = {name for part, (_, nodes) in zip(parts, groups, strict=True) if part.kind == NATIVE
                for name in _misplaced(part.graph, nodes)}
        if not more:
            return parts
        foreign |= more


def stock_model(segment: Segment, dynamic_batch: bool) -> onnx.ModelProto:
    """An ONNX segment as a model of standard operators (its convolutions dense), with a symbolic batch if asked for."""
    model = lower(segment.graph, {}).to_model()
    if not dynamic_batch:
        return model
    return free_axes(model, {v.name: {0: BATCH} for v in model.graph.input if v.type.tensor_type.shape.dim})


def _misplaced(part: Graph, nodes: Sequence[Node]) -> set[str]:
    """The nodes of a native segment that ONNX Runtime must run after all."""
    if not any(is_branched(n) or n.op in _HEAVY for n in nodes):
        return {n.name for n in nodes}
    return {u.name for u in unsupported(part)}


def _groups(graph: Graph, foreign: set[str]) -> list[tuple[str, list[Node]]]:
    """The nodes by level: as early as possible, native ones on even levels, foreign ones on odd levels. An edge never
    leads to a lower level, so the levels can run one after the other."""
    level: dict[str, int] = {}
    for node in graph.nodes:
        parity = int(node.name in foreign)
        above = [level[p.name] for t in node.inputs if (p := producer(t)) is not None]
        least = max(above, default=parity)
        level[node.name] = least + (least % 2 != parity)
    groups: dict[int, list[Node]] = {}
    for node in graph.nodes:
        groups.setdefault(level[node.name], []).append(node)
    return [(ONNX if k % 2 else NATIVE, groups[k]) for k in sorted(groups)]


def _part(graph: Graph, nodes: Sequence[Node]) -> Graph:
    """A graph of some of the nodes."""
    inside = {n.name for n in nodes}
    made = {t.name: t for n in nodes for t in n.outputs if t.name}
    read = {t.name: t for n in nodes for t in n.inputs if t.name and values(t) is None and t.name not in made}
    ends = [t.name for t in made.values() if graph.is_output(t) or any(c.name not in inside for c in t.outputs)]
    part = graph.copy()
    tensors: dict[str, Tensor] = part.gs.tensors()
    part.gs.inputs = [tensors[name] for name in read]
    part.gs.outputs = [tensors[name] for name in ends]
    for tensor in part.gs.inputs:
        tensor.inputs.clear()
    part.cleanup()
    return part
