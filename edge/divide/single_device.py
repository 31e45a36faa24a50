"""Layers that one device computes whole, by the best means there: what every split is compared with.

A device that holds all groups of a layer may compute them as one grouped convolution, which is often faster than the n
standard convolutions that mode branch gives to n devices. Comparing a split with the slower form would book that difference
as a gain of distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.cost import PEAK_MACS_PER_MS, estimate_ms
from gkp.converter.graph import Graph, spatial
from gkp.converter.lower.candidates import Candidate, candidates, dense, grouped, split
from gkp.edge.divide.chain import LayerMs, blocks
from gkp.edge.divide.costs import BLOCK, efficiency, estimate, weights_ms
from gkp.edge.divide.modes import assign
from gkp.edge.divide.partition import partition
from gkp.edge.divide.subgraph import Subgraph, build

Forms = Mapping[str, str]
"""Layer -> name of a candidate of gkp.converter.lower.candidates, "" for the subgraph's own."""


class OneDevice:
    """A prepared network on one device, and what is asked of it again and again while ways to divide it are tried. chain:
    its blocks (gkp.edge.divide.chain)."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.chain = graph, blocks(graph)

    @cached_property
    def subgraph(self) -> Subgraph:
        """All of it."""
        parts = partition(self.graph, assign("local", self.graph, 1), 1)
        return build(parts, parts.segments[0])

    @cached_property
    def forms(self) -> Forms:
        """The best of its layers."""
        return best_forms(self.subgraph)

    @cached_property
    def layer_ms(self) -> dict[str, LayerMs]:
        """Of its convolutions in these forms."""
        return layer_ms(in_forms(self.subgraph, self.forms))


def best_forms(subgraph: Subgraph) -> Forms:
    """What the cost model likes best for the whole network on one device: the forms that it has, for each layer the best of
    the dense, grouped and split forms, or the exact grouped form of every layer."""
    own: dict[str, str] = {}
    cheapest: dict[str, str] = {}
    exact: dict[str, str] = {}
    for node in subgraph.graph.branched():
        conv, plane = branched_node.read(node), spatial(node.outputs[0]) or (1,)
        costs = {c.name: estimate_ms(conv, c, plane, BLOCK) for c in candidates(conv, BLOCK, plane)}
        own[node.name], cheapest[node.name] = "", min(costs, key=lambda name: costs[name])
        name = f"grouped-{len(conv.branches)}"
        exact[node.name] = name if name in costs else cheapest[node.name]
    return min((own, cheapest, exact), key=lambda forms: estimate(in_forms(subgraph, forms).lowered()).ms)


def layer_ms(subgraph: Subgraph) -> dict[str, LayerMs]:
    """Estimated milliseconds at speed 1 of every convolution of the whole network, in the forms that the subgraph has."""
    found: dict[str, LayerMs] = {}
    for node in subgraph.graph.branched():
        if (form := subgraph.forms.get(node.name)) is not None:
            outputs, inputs = form.groups[0].shape[:2]
            count = 1 if form.parallel else len(form.groups)
            filled = efficiency(outputs * count, inputs, count)
            macs = form.macs(spatial(node.outputs[0]) or (1,)) * int(node.outputs[0].shape[0])
            weights = weights_ms(form.macs((1,)))
            found[node.name] = LayerMs(macs / (PEAK_MACS_PER_MS * filled), weights)
    return found


def in_forms(subgraph: Subgraph, forms: Forms) -> Subgraph:
    """The subgraph with these forms of layers that it holds with all their channels (or rows of them)."""
    made = {}
    for node in subgraph.graph.branched():
        found = _named(branched_node.read(node), forms.get(node.name, ""))
        if node.name in subgraph.forms or found is not None:
            made[node.name] = found or subgraph.forms[node.name]
    return replace(subgraph, forms=made)


def _named(conv: BranchedConv, name: str) -> Candidate | None:
    kind, _, rest = name.partition("-")
    count, _, padded = rest.partition("-")
    if kind == "dense":
        return dense(conv)
    if not count.isdigit():
        return None
    return grouped(conv, int(count), BLOCK if padded else 1) if kind == "grouped" else split(conv, int(count))
