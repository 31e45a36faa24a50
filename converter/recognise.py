"""From any ONNX graph to the one form: every convolution a gkp::BranchedConv, with the channel movement around it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from gkp.converter.extent import require_modest
from gkp.converter.graph import Graph, Node, Tensor, is_branched, values
from gkp.converter.linear import is_dequantise, is_quantise, why_left
from gkp.converter.movement import Movement, is_move, movement, obstacle, walk
from gkp.converter.operators import COPIES, RESHAPES
from gkp.converter.passes import (
    absorb_inputs,
    absorb_outputs,
    drop_channels,
    fold_batchnorm,
    fold_constants,
    hoist_activations,
    lift_convs,
    lift_quantisers,
)
from gkp.errors import GkpError
from gkp.text import clean

RECOGNISE: tuple[ModuleType, ...] = (fold_batchnorm, absorb_inputs, absorb_outputs, hoist_activations)
SIMPLIFY: tuple[ModuleType, ...] = (fold_batchnorm, drop_channels)
_MAX_ROUNDS = 200
_MAX_SHAPES = 64
_ELSEWHERE = "its channels come from or go to something other than one convolution"

Watch = Callable[[str, Graph], None]
"""Called with a pass's name after it changed the graph."""


def recognise(graph: Graph, watch: Watch = lambda name, graph: None) -> Graph:
    """The graph in the one form, nothing dropped yet. `graph` is used up."""
    with graph.budget.running():
        settle(graph)
        watch("fold_constants", graph)
        if lift_quantisers.run(graph):
            watch("lift_quantisers", graph)
        if lift_convs.run(graph):
            watch("lift_convs", graph)
        require_modest(graph)
        _to_fixpoint(graph, RECOGNISE, watch)
    return graph


def settle(graph: Graph) -> None:
    """Fold what is constant, and infer the shapes that come of it, from which more may become constant (a chain of slices
    whose bounds are computed from the shape of what they cut). Changes `graph` in place."""
    fold_constants.run(graph)
    for _ in range(_MAX_SHAPES):
        graph.infer()  # shapes that were computed are constants now
        if not fold_constants.run(graph):
            return


def simplify(graph: Graph, watch: Watch = lambda name, graph: None) -> Graph:
    """Fold and drop what the function does not need. Changes `graph` in place."""
    with graph.budget.running():
        _to_fixpoint(graph, SIMPLIFY, watch)
    return graph


def left_over(graph: Graph) -> list[tuple[str, str]]:
    """(node, reason) of every convolution and channel movement that did not become part of a BranchedConv, and of every
    QuantizeLinear and DequantizeLinear of activations."""
    notes = [(clean(key.removeprefix("gkp.left.")), reason) for key, reason in graph.metadata.items()
             if key.startswith("gkp.left.")]
    left = [n for n in graph.nodes if n.op not in RESHAPES | COPIES and not is_branched(n) and is_move(n)]
    with graph.budget.running():
        reasons = _reasons(graph, left)
    notes += [(clean(n.name), f"{n.op}: {reasons.get(id(n), _ELSEWHERE)}") for n in left]
    return notes + [(clean(n.name), f"{n.op}: {why_left(n)}") for n in graph.nodes
                    if is_quantise(n) or (is_dequantise(n) and values(n.inputs[0]) is None)]


def _reasons(graph: Graph, left: list[Node]) -> dict[int, str]:
    """Why nodes that move data are still there, by identity: what moves a tensor to its reader has one reason."""
    reasons: dict[int, str] = {}

    def enter(t: Tensor) -> bool:
        return graph.sole_consumer(t) is not None

    for node in left:
        for tensor in node.outputs:
            reader = graph.sole_consumer(tensor)
            way = walk(graph, tensor, enter=enter) if reader is None or not is_move(reader) else None
            if way is not None:
                why = obstacle(way) or _reason(movement(graph, way))
                for member in way.members:
                    reasons.setdefault(member, why)
    return reasons


def _reason(found: Movement | None) -> str:
    if found is None:
        return "it does not move whole channels of the same image"
    if len(found.terms) > 1:
        return f"its channels come from {len(found.terms)} tensors"
    return "it leaves out rows and columns" if max(found.terms[0].strides, default=1) > 1 else _ELSEWHERE


def _to_fixpoint(graph: Graph, passes: tuple[ModuleType, ...], watch: Watch) -> None:
    for _ in range(_MAX_ROUNDS):
        changed = False
        for module in passes:
            if module.run(graph):
                watch(module.__name__.rsplit(".", 1)[-1], graph)
                changed = True
        if not changed:
            return
    raise GkpError(f"the passes did not come to an end in {_MAX_ROUNDS} rounds", "please report this model")
