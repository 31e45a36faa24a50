"""Channel movement in front of a convolution goes into its index lists."""

from __future__ import annotations

from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph, Tensor, channels
from gkp.converter.movement import Movement, movement, walk
from gkp.converter.quantiser import Quantiser

_SHORT, _TURNS = 64, 8
"""Movements of more than _SHORT nodes may share nodes, but have at most _TURNS times as many as the graph all in all:
convolutions all along a chain would take the square of its length."""


def run(graph: Graph) -> bool:
    """BranchedConv that reads channels of one other tensor (gathered, split, sliced, shuffled, padded with zeros, in
    any idiom, without strides) reads that tensor itself. The other readers of the moved tensor are not touched. A quantiser
    between the two (it gives zero for zero) quantises that tensor instead."""
    changed = False
    seen: dict[str, Movement | None] = {}
    left = _TURNS * len(graph.nodes)
    for node in list(graph.branched()):
        if branched_node.read(node).is_copy:
            continue
        how = quantiser.of(node.inputs[0])
        x: Tensor = node.inputs[0] if how is None else node.inputs[0].inputs[0].inputs[0]
        if x.name not in seen:
            way = walk(graph, x, most=max(left, _SHORT))
            left -= len(way.nodes) if way is not None and len(way.nodes) > _SHORT else 0
            seen[x.name] = movement(graph, way) if way is not None and len(way.bases) == 1 else None
        found = seen[x.name]
        terms = found.terms if found is not None else ()
        if len(terms) != 1 or max(terms[0].strides, default=1) > 1:
            continue
        base = terms[0].base
        conv = branched_node.read(node).gather_inputs(terms[0].index, channels(base) or 0)
        branched_node.rewrite(graph, node, conv, x=base if how is None else _quantised(graph, base, how))
        changed = True
    if changed:
        graph.cleanup()
    return changed


def _quantised(graph: Graph, tensor: Tensor, how: Quantiser) -> Tensor:
    """The tensor quantised so: itself, what a quantiser gives that is there, or one that is new."""
    if quantiser.of(tensor) == how:
        return tensor
    for reader in tensor.outputs:
        if reader.outputs and quantiser.of(reader.outputs[0]) == how and reader.inputs[0] is tensor:
            return reader.outputs[0]
    made: Tensor = graph.variable("quantised", tensor.dtype, tensor.shape)
    quantiser.write(graph, how, tensor, made)
    return made
