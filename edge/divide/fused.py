"""Rows with fused halos: borders are exchanged once per group of layers, and rows inside a group that a neighbour has, too,
are computed by both (fused tile partition: DeepThings, Zhao et al. 2018; AOFL, Zhou et al. 2019).

Which layers make a group is found by dynamic programming: more of them, fewer messages, more rows that are computed twice.
From some block on, where planes have few rows and layers many weights (of which every device reads all for its rows), output
channels are divided instead, or one device does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

from gkp.converter.graph import Graph, Node, producer
from gkp.converter.operators import UNARY
from gkp.edge.divide.halos import Halos
from gkp.edge.divide.layouts import Costs, World
from gkp.edge.divide.modes import branch, local, spatial_rows
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.placement import Assignment, NodePlacement

PRICES = 1.0, 1.6
"""Lower ones make more segments, whose copies at their borders the model does not know."""
_TAILS = _CHANNELS, _REST = "channels", "rest"
_LONGEST = 16
"""Steps in a group, at most: longer ones compute most rows twice, and there are as many of them as the network has steps."""


def fused_rows(graph: Graph, chain: Sequence[Sequence[Node]], world: World, shares: Sequence[float] | None = None,
               prices: Sequence[float] = PRICES) -> list[dict[str, NodePlacement]]:
    """The assignments that the cost model likes best, one for each price (each once). chain: the graph's blocks
    (gkp.edge.divide.chain.blocks); shares: as of gkp.edge.divide.modes; prices: of messages, over what they take by the
    model. It adds up layers and messages group by group; which price suits the whole is for a simulation to say."""
    search = _Search(graph, chain, world, shares)
    found = [search.best(price) for price in prices]
    return [made for k, made in enumerate(found) if made not in found[:k]]


class _Search:
    def __init__(self, graph: Graph, chain: Sequence[Sequence[Node]], world: World, shares: Sequence[float] | None) -> None:
        devices = len(world.devices)
        self.halos = Halos(graph, world, spatial_rows(graph, devices, shares))
        self.steps = _steps(chain, self.halos)
        self.step = {node.name: k for k, step in enumerate(self.steps) for node in step}
        self.ways: dict[str, Assignment] = {_REST: local(graph, devices, shares), _CHANNELS: branch(graph, devices, shares)}
        self.ways |= {f"{i}-{k}": self.halos.placed(self._nodes(i, k)) for k in range(len(self.steps)) for i in _begins(k)}
        self.costs = Costs(graph, self.ways, world)
        self.scale = world.scale
        self._known: dict[tuple[str, ...], tuple[float, float]] = {}

    def _nodes(self, first: int, last: int) -> list[Node]:
        return [node for step in self.steps[first:last + 1] for node in step]

    def best(self, price: float) -> dict[str, NodePlacement]:
        """By dynamic programming over the last step of a group."""
        count = len(self.steps)
        best: list[tuple[float, list[str]]] = [(0.0, [])]  # of the steps before k: milliseconds, the way of each
        for k in range(count):
            options = [(i, f"{i}-{k}", *best[i]) for i in _begins(k)]
            best.append(min((ms + self._ms(i, k, way, before, price), [*before, *[way] * (k + 1 - i)])
                            for i, way, ms, before in options))
        ends = [best[-1], *((ms + self._ms(k, count - 1, tail, before, price), [*before, *[tail] * (count - k)])
                            for k, (ms, before) in enumerate(best[:-1]) if k for tail in _TAILS)]
        chosen = zip(self.steps, min(ends)[1], strict=True)
        return {node.name: self.ways[way][node.name] for step, way in chosen for node in step}

    def _ms(self, first: int, last: int, way: str, before: Sequence[str], price: float) -> float:
        """Of the steps from first to last in this way. before: the ways of the steps before."""
        nodes = self._nodes(first, last)
        makers = [p.name for node in nodes for t in node.inputs if (p := producer(t)) is not None]
        made = {name: before[self.step[name]] for name in makers if self.step[name] < first}
        key = way, str(first), *made.values()
        if key not in self._known:
            placed = self.ways[way]
            if way in _TAILS:
                computing, reading = self.costs.compute_ms(nodes, way), nodes
            else:  # what the group needs it makes itself
                computing = self.halos.longest(nodes, placed) * self.scale
                reading = [n for n in nodes if placed[n.name].kind != "rows" or is_mean(n)
                           or any((p := producer(t)) is None or p.name in made for t in n.inputs)]
            self._known[key] = computing, self.costs.exchange_ms(reading, {**made, **dict.fromkeys(
                (n.name for n in nodes), way)}, way)
        computing, exchanging = self._known[key]
        return computing + price * exchanging


def _begins(end: int) -> range:
    """Where a group may begin that ends with this step."""
    return range(max(0, end + 1 - _LONGEST), end + 1)


def _steps(chain: Sequence[Sequence[Node]], halos: Halos) -> list[list[Node]]:
    """Blocks, with the activations behind them: a runtime computes those together."""
    found: list[list[Node]] = []
    for block in chain:
        if found and all(node.op in UNARY for node in block):
            found[-1] += block
        else:
            found += halos.heads(block)
    return found
