"""Rows with fused halos: borders are exchanged once per group of blocks, and rows inside a group that a neighbour has, too,
are computed by both (fused tile partition: DeepThings, Zhao et al. 2018; AOFL, Zhou et al. 2019).

Which blocks make a group is found by dynamic programming: more of them, fewer messages, more rows that are computed twice.
From some block on, where planes have few rows and layers many weights (of which every device reads all for its rows), output
channels are divided instead, or one device does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gkp.converter.graph import Graph, Node, Tensor, producer
from gkp.converter.operators import UNARY
from gkp.edge.divide.layouts import Costs, World
from gkp.edge.divide.modes import branch, local, spatial_rows
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.placement import Assignment, NodePlacement
from gkp.edge.divide.rules import Rule, rule_of
from gkp.edge.divide.tiles import Tile, whole

_TAILS = _CHANNELS, _REST = "channels", "rest"
_LONGEST = 16
"""Steps in a group, at most: longer ones compute most rows twice, and there are as many of them as the network has steps."""


def fused_rows(graph: Graph, chain: Sequence[Sequence[Node]], world: World,
               shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """The assignment that the cost model likes best. chain: the graph's blocks (gkp.edge.divide.chain.blocks); shares: as of
    gkp.edge.divide.modes."""
    devices = len(world.devices)
    rows = spatial_rows(graph, devices, shares)
    steps = _steps(chain)
    ways: dict[str, Assignment] = {_REST: local(graph, devices, shares), _CHANNELS: branch(graph, devices, shares)}
    rules = {node.name: rule_of(node) for node in graph.nodes}
    groups = {(i, k): f"{i}-{k}" for k in range(len(steps)) for i in _begins(k)}
    ways |= {name: extended(_joined(steps[i:k + 1]), rows, rules) for (i, k), name in groups.items()}
    costs = Costs(graph, ways, world)

    def spent(nodes: Sequence[Node], way: str, before: Sequence[str]) -> float:
        return costs.exchange_ms(nodes, before[-1] if before else way, way) + costs.compute_ms(nodes, way)

    best: list[tuple[float, list[str]]] = [(0.0, [])]  # of the steps before k: milliseconds, the way of each
    for k in range(len(steps)):
        best.append(min((best[i][0] + spent(_joined(steps[i:k + 1]), way := groups[i, k], best[i][1]),
                         [*best[i][1], *[way] * (k + 1 - i)]) for i in _begins(k)))
    ends = [(ms + (spent(_joined(steps[k:]), tail, before) if k < len(steps) else 0.0),
             [*before, *[tail] * (len(steps) - k)]) for k, (ms, before) in enumerate(best) if k for tail in _TAILS]
    return {node.name: ways[way][node.name] for step, way in zip(steps, min(ends)[1], strict=True) for node in step}


def _begins(end: int) -> range:
    """Where a group may begin that ends with this step."""
    return range(max(0, end + 1 - _LONGEST), end + 1)


def _steps(chain: Sequence[Sequence[Node]]) -> list[list[Node]]:
    """Blocks, with the activations behind them: a runtime computes those together."""
    found: list[list[Node]] = []
    for block in chain:
        if found and all(node.op in UNARY for node in block):
            found[-1] += block
        else:
            found.append(list(block))
    return found


def _joined(steps: Sequence[Sequence[Node]]) -> list[Node]:
    return [node for step in steps for node in step]


def extended(nodes: Sequence[Node], rows: Assignment, rules: Mapping[str, Rule]) -> dict[str, NodePlacement]:
    """The placements of a group, in which every device also computes the rows that its own later part of the group needs.
    nodes: in the order of the network; rows: who has which rows at the group's end; rules: of all nodes."""
    found = {node.name: rows[node.name] for node in nodes}
    needed: dict[tuple[str, int], tuple[int, int]] = {}  # (node, device) -> rows of its output
    for node in reversed(nodes):
        placement = found[node.name]
        if placement.kind != "rows":
            continue
        if not is_mean(node):
            own = zip(placement.devices, placement.rows, strict=True)
            placement = replace(placement, rows=tuple(_both(mine, needed.get((node.name, d))) for d, mine in own))
            found[node.name] = placement
        for device, mine in zip(placement.devices, placement.rows, strict=True):
            for tensor, read in _reads(node, mine, rules):
                maker = producer(tensor)
                if maker is not None and maker.name in found:
                    key = maker.name, device
                    needed[key] = _both(read, needed.get(key))
    return found


def _reads(node: Node, mine: tuple[int, int], rules: Mapping[str, Rule]) -> list[tuple[Tensor, tuple[int, int]]]:
    """The tensors, and their rows, that rows of a node's output need (of a mean: placed by the rows of its input)."""
    if is_mean(node):
        return [(node.inputs[0], mine)]
    needs = rules[node.name].needs(Tile(whole(node.outputs[0]).channels, mine))
    return [(tensor, need.rows) for tensor, need in zip(node.inputs, needs, strict=True) if need is not None]


def _both(rows: tuple[int, int], other: tuple[int, int] | None) -> tuple[int, int]:
    return rows if other is None else (min(rows[0], other[0]), max(rows[1], other[1]))
