"""A graph in parts: the native kernels run what they can, ONNX Runtime the rest (--hybrid)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx

from gkp.converter.dynamic import BATCH, free_axes
from gkp.converter.graph import Graph, Node, Tensor, producer, values
from gkp.converter.lower.emit import lower
from gkp.converter.native.program import Program
from gkp.converter.native.reading.frontend import Translation, Unsupported, program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.operators import HEAVY
from gkp.errors import UnsupportedModelError

NATIVE, ONNX = "native", "onnx"


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a graph, or all of it. program: what native kernels compute of it, fused; None: ONNX Runtime runs it
    (`stock_model` makes a model of it). The tensors that cross its border are the graph's inputs and outputs, under their
    own names."""

    graph: Graph
    program: Program | None

    @property
    def kind(self) -> str:
        return ONNX if self.program is None else NATIVE

    @property
    def inputs(self) -> list[str]:
        return [t.name for t in self.graph.inputs]

    @property
    def outputs(self) -> list[str]:
        return [t.name for t in self.graph.outputs]


def parts(graph: Graph, hybrid: bool) -> tuple[Part, ...]:
    """The whole graph as one native part where the kernels can run it, else (hybrid) in parts that are run in order; the
    graph is as `program` wants it. UnsupportedModelError for operators without a kernel (not hybrid), or when no part is
    native; UsageError for dynamic sizes other than the batch."""
    if not hybrid:
        return (Part(graph, fuse(program(graph))),)
    whole = Translation(graph)
    whole.run()
    if whole.complete:
        return (Part(graph, fuse(whole.program())),)
    found = segments(graph, whole.refused)
    if not any(part.program for part in found):
        raise UnsupportedModelError("no part of this model with a convolution or matrix product can run in native kernels",
                                    "use --target ort")
    return tuple(found)


def segments(graph: Graph, refused: Iterable[Unsupported]) -> list[Part]:
    """The graph as parts to be run in order, native and ONNX in turn, as few as the operators without a kernel allow.

    What a part reads is an input of the graph or an output of an earlier part. A native part holds at least one
    convolution or matrix product: less is not worth the way there and back. refused: by the graph's translation."""
    foreign = {u.name for u in refused}
    while True:
        found, misplaced = list[Part](), set[str]()
        for kind, nodes in _groups(graph, foreign):
            part = _part(graph, nodes)
            translated = _translated(part, nodes) if kind == NATIVE else None
            if isinstance(translated, set):
                misplaced |= translated
            else:
                found.append(Part(part, translated))
        if not misplaced:
            return found
        foreign |= misplaced


def stock_model(part: Part, dynamic_batch: bool) -> onnx.ModelProto:
    """An ONNX part as a model of standard operators (its convolutions dense), with a symbolic batch if asked for."""
    model = lower(part.graph, {}).to_model()
    if not dynamic_batch:
        return model
    return free_axes(model, {v.name: {0: BATCH} for v in model.graph.input if v.type.tensor_type.shape.dim})


def _translated(part: Graph, nodes: Sequence[Node]) -> Program | set[str]:
    """The program of a native part, or the nodes that ONNX Runtime must run after all."""
    if not any(n.op in HEAVY for n in nodes):
        return {n.name for n in nodes}
    translation = Translation(part)
    translation.run()
    return {u.name for u in translation.refused} or fuse(translation.program())


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
