"""The dense twin: the network that the pruned one came from, rebuilt at full size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from gkp.branched import Branch, BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, with_channels
from gkp.converter.passes.drop_channels import cone


def dense_twin(graph: Graph, width_of: Mapping[str, str]) -> Graph:
    """A copy of a recognised (not yet simplified) graph in which every BranchedConv is dense at full size, with random
    non-zero weights in the holes, so that no compiler can exploit them. width_of: layers that lost output channels,
    with the layer whose output is as wide as theirs was. Layers that only move channels stay."""
    twin = widened(graph, width_of)
    rng = np.random.default_rng(0)
    for node in list(twin.branched()):
        conv = branched_node.read(node)
        if not conv.is_copy:
            branched_node.rewrite(twin, node, _filled(conv, rng))
    twin.cleanup()
    return twin


def widened(graph: Graph, width_of: Mapping[str, str]) -> Graph:
    """A copy of the graph in which layers that lost output channels have them again, without weights. width_of: see
    dense_twin."""
    wide = graph.copy()
    nodes = {n.name: n for n in wide.branched()}
    for name, other in width_of.items():
        if name in nodes and other in nodes:
            _widen(wide, name, branched_node.read(nodes[other]).out_channels)
            nodes = {n.name: n for n in wide.branched()}
    return wide


def _filled(conv: BranchedConv, rng: np.random.Generator) -> BranchedConv:
    weight = conv.to_dense()
    holes = weight == 0
    present = weight[~holes]
    scale = float(present.std()) if present.size else 0.05
    weight[holes] = (rng.standard_normal(int(holes.sum())) * (scale or 0.05)).astype(weight.dtype)
    branch = Branch(np.arange(conv.in_channels), np.arange(conv.out_channels), weight)
    return replace(conv, branches=(branch,))


def _widen(graph: Graph, name: str, width: int) -> None:
    """Give a layer `width` outputs, if only activations and convolutions read it."""
    node = next(n for n in graph.branched() if n.name == name)
    conv = branched_node.read(node)
    below = cone(graph, node.outputs[0])
    if below is None or width <= conv.out_channels:
        return
    unaries, readers = below
    wider = [(r, branched_node.read(r)) for r in readers]
    branched_node.rewrite(graph, node, conv.take_outputs([*range(conv.out_channels),
                                                          *[-1] * (width - conv.out_channels)]))
    for unary in unaries:
        unary.outputs[0].shape = with_channels(unary.outputs[0].shape, width)
    for reader, inner in wider:
        branched_node.rewrite(graph, reader, inner.gather_inputs(np.arange(conv.out_channels), width))
