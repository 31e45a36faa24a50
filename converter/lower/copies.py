"""Which chosen forms would make the lowered graph copy channels, because these do not lie where the form wants them."""

from __future__ import annotations

from collections.abc import Mapping

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph, Node
from gkp.converter.lower.candidates import Candidate, dense
from gkp.converter.lower.orders import Orders


def copying(graph: Graph, forms: Mapping[str, Candidate]) -> list[str]:
    """Names of the layers, in the order of the network, that `lower` would give a Gather, Slice or Concat."""
    complete = {n.name: forms.get(n.name) or dense(branched_node.read(n)) for n in graph.branched()}
    orders = Orders(graph, complete)
    return [n.name for n in graph.branched() if not complete[n.name].is_dense
            and (complete[n.name].parallel or not _in_place(orders, n))]


def _in_place(orders: Orders, node: Node) -> bool:
    """Every group finds its inputs side by side, and leaves its outputs where the order has them."""
    groups = orders.groups(node.name)
    wanted = list(range(len(groups)))
    return all(Orders.match(orders.of(tensor), groups, side) == wanted
               for tensor, side in ((node.inputs[0], "in_index"), (node.outputs[0], "out_index")))
