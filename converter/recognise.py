"""From any ONNX graph to the one form: every convolution a gkp::BranchedConv, with the channel movement around it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from gkp.converter.extent import require_modest
from gkp.converter.graph import Graph, is_branched, values
from gkp.converter.linear import is_dequantise, is_quantise, why_left
from gkp.converter.movement import is_move
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
    """Fold what is constant, and infer the shapes that come of it. Changes `graph` in place."""
    fold_constants.run(graph)
    graph.infer()  # shapes that were computed are constants now
    fold_constants.run(graph)


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
    for node in graph.nodes:
        if node.op not in RESHAPES | COPIES and not is_branched(node) and is_move(node):
            notes.append((clean(node.name), f"{node.op}: its channels come from or go to something other than one "
                                            "convolution"))
        elif is_quantise(node) or (is_dequantise(node) and values(node.inputs[0]) is None):
            notes.append((clean(node.name), f"{node.op}: {why_left(node)}"))
    return notes


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
