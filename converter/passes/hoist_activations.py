"""Activations move behind channel movement, so that convolutions meet it."""

from __future__ import annotations

from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer
from gkp.converter.movement import Walk, is_end, is_move, movement, walk
from gkp.converter.operators import UNARY, ZERO_PRESERVING

_PART = 64
"""Nodes of a movement that is part of another one, at most: looking at every part of a long chain would take the square of
its length."""


def run(graph: Graph) -> bool:
    """move(f(a), f(b), ...) -> f(move(a, b, ...)) for one elementwise f that all movement inputs share, when each of
    them comes from a BranchedConv (through other elementwise ones) and has no other reader, no channel is repeated, and
    f(0) = 0 wherever the movement puts zeros."""
    changed = False
    for node in graph.nodes:
        if node.outputs and is_move(node):  # a node that an earlier hoist removed has no outputs
            changed |= any([_hoist(graph, tensor) for tensor in list(node.outputs)])
    if changed:
        graph.cleanup()
    return changed


def _hoist(graph: Graph, tensor: Tensor) -> bool:
    def enter(t: Tensor) -> bool:
        return graph.sole_consumer(t) is not None

    way = walk(graph, tensor, enter=enter, most=None if is_end(graph, tensor) else _PART)
    unaries = _unaries(graph, way) if way is not None else []
    found = movement(graph, way) if unaries else None
    if found is None or found.adds or found.side_outputs or any(t.repeats or max(t.strides) > 1 for t in found.terms):
        return False
    covered = sum((t.index >= 0).astype(int) for t in found.terms)
    if not (covered == 1).all() and (unaries[0].op not in ZERO_PRESERVING or (covered > 1).any()):  # type: ignore[union-attr]
        return False
    _swap(graph, tensor, unaries)
    return True


def _unaries(graph: Graph, way: Walk) -> list[Node]:
    """The activations, one function all, that make the bases out of BranchedConvs for these nodes alone; else nothing."""
    unaries: list[Node] = []
    for base in way.bases:
        unary = producer(base)
        if unary is None or unary.op not in UNARY or not (_same(unary, unaries[0]) if unaries else True):
            return []
        if not _is_activation(graph, unary):
            return []
        if graph.is_output(base) or not way.holds_readers(base):
            return []
        unaries.append(unary)
    return unaries


def _is_activation(graph: Graph, unary: Node) -> bool:
    """Does it, alone, read a BranchedConv, through others of its kind?"""
    while unary.op in UNARY and graph.sole_consumer(unary.inputs[0]) is not None:
        source = producer(unary.inputs[0])
        if source is None or is_branched(source):
            return source is not None
        unary = source
    return False


def _same(a: Node, b: Node) -> bool:
    return bool(a.op == b.op and a.domain == b.domain and a.attrs == b.attrs
                and [t.name for t in a.inputs[1:]] == [t.name for t in b.inputs[1:]])


def _swap(graph: Graph, tensor: Tensor, unaries: list[Node]) -> None:
    first = unaries[0]
    op, domain, attrs, rest = first.op, first.domain, dict(first.attrs), list(first.inputs[1:])
    for unary in unaries:
        graph.redirect(unary.outputs[0], unary.inputs[0])
        graph.remove(unary)
    moved = graph.variable("moved", tensor.dtype, tensor.shape)
    last = tensor.inputs[0]
    last.outputs[next(i for i, t in enumerate(last.outputs) if t is tensor)] = moved
    graph.add(op, [moved, *rest], [tensor], attrs=attrs, domain=domain)
