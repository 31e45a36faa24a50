"""Rows of a group of layers: what a device computes for its rows of the group's end (rows of its neighbours, too), and where
the borders between devices lie so that the slowest one is done as early as possible.

A device in the middle has two borders, and few rows cannot be dealt out in proportion: so borders are not at the same height
for all groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from gkp.converter.graph import Graph, Node, Tensor, producer
from gkp.edge.divide.chain import part_ms
from gkp.edge.divide.layouts import World
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.placement import Assignment, NodePlacement
from gkp.edge.divide.rules import ROWS, rule_of
from gkp.edge.divide.tiles import Tile, whole
from gkp.edge.divide.windows import Rows


class Halos:
    """Of one network. rows: who has which rows where nobody needs others (gkp.edge.divide.modes.spatial_rows)."""

    def __init__(self, graph: Graph, world: World, rows: Assignment) -> None:
        self.rows, self.speeds = rows, [d.speed for d in world.devices]
        self.rules = {node.name: rule_of(node) for node in graph.nodes}
        self._read: dict[tuple[str, Rows], list[tuple[Tensor, Rows]]] = {}
        self._ms = {node.name: _per_row(node, world) for node in graph.nodes}

    def heads(self, block: Sequence[Node]) -> list[list[Node]]:
        """A block in two, if it begins with layers that need no other rows than they make: what lies behind them often has
        fewer channels than the block's input, so borders are better exchanged there. Else the block."""
        behind: set[str] = set()
        for node in block:
            makers = [p for p in map(producer, node.inputs) if p is not None]
            window = getattr(self.rules[node.name], "window", None)
            by_row = ROWS in self.rules[node.name].kinds and (window is None or window.span == 1)
            if not by_row or any(p.name in behind for p in makers):
                behind.add(node.name)
        head = [node for node in block if node.name not in behind]
        rest = [node for node in block if node.name in behind]
        return [head, rest] if head and rest else [list(block)]

    def placed(self, nodes: Sequence[Node]) -> dict[str, NodePlacement]:
        """The placements of a group, with the borders that suit it. nodes: in the order of the network."""
        group = _Group(self, nodes)
        return group.extended(group.even()) if group.ends else {node.name: self.rows[node.name] for node in nodes}

    def reads(self, node: Node, mine: Rows) -> list[tuple[Tensor, Rows]]:
        """The tensors, and their rows, that rows of a node's output need (of a mean: placed by the rows of its input)."""
        key = node.name, mine
        if key not in self._read:
            needs = [Tile((), mine)] if is_mean(node) else self.rules[node.name].needs(
                Tile(whole(node.outputs[0]).channels, mine))
            self._read[key] = [(t, need.rows) for t, need in zip(node.inputs, needs, strict=False) if need is not None]
        return self._read[key]

    def longest(self, nodes: Sequence[Node], placed: Assignment) -> float:
        """Milliseconds of the device that computes longest."""
        load = [0.0] * len(self.speeds)
        for node in nodes:
            placement = placed[node.name]
            for k, device in enumerate(placement.devices):
                rows = placement.rows[k] if placement.rows else (0, _height(node))
                load[device] += self.ms(node.name, rows) / self.speeds[device]
        return max(load)

    def ms(self, node: str, rows: Rows) -> float:
        """Of these rows of a node, at speed 1."""
        each, always = self._ms[node]
        return each * (rows[1] - rows[0]) + always


class _Group:
    """by_rows: its nodes that are divided; ends: those that no other of them reads; height: of the lowest end; given: the
    borders on it in proportion, from 0 to the height; order: the devices from the first row to the last."""

    def __init__(self, halos: Halos, nodes: Sequence[Node]) -> None:
        self.halos, self.nodes = halos, nodes
        self.by_rows = [node for node in nodes if halos.rows[node.name].kind == "rows"]
        read = {p.name for node in self.by_rows for t in node.inputs if (p := producer(t)) is not None}
        self.ends = [node for node in self.by_rows if node.name not in read]
        if self.ends:
            lowest = min(self.ends, key=_height)
            placement = halos.rows[lowest.name]
            self.height, self.devices = _height(lowest), placement.devices  # the first of them puts a mean together
            self.order = sorted(placement.devices, key=lambda d: placement.rows[placement.devices.index(d)])
            self.given = tuple(sorted({row for rows in placement.rows for row in rows}))
        self._loads: dict[tuple[int, Rows], float] = {}

    def even(self) -> tuple[int, ...]:
        """The borders: from those in proportion on, rows go from the slowest device to others while that helps."""
        cuts = self.given
        now = self._slowest_first(cuts)
        while True:
            best = min(((self._slowest_first(c), c) for c in self._moved(cuts)), default=None)
            if best is None or best[0] >= now:
                return cuts
            now, cuts = best

    def _slowest_first(self, cuts: tuple[int, ...]) -> list[float]:
        return sorted((round(self._load(k, (cuts[k], cuts[k + 1])), 9) for k in range(len(self.order))), reverse=True)

    def _moved(self, cuts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """One row less for the slowest device, one more for another; those between them move by one."""
        count = len(self.order)
        slowest = max(range(count), key=lambda k: self._load(k, (cuts[k], cuts[k + 1])))
        if cuts[slowest + 1] - cuts[slowest] < 2:
            return
        for other in range(count):
            step = 1 if other < slowest else -1
            moving = range(other + 1, slowest + 1) if other < slowest else range(slowest + 1, other + 1)
            if moving:
                yield tuple(cut + step if k in moving else cut for k, cut in enumerate(cuts))

    def _load(self, place: int, rows: Rows) -> float:
        """What the device at this place computes for rows of the group's end."""
        if (place, rows) not in self._loads:
            needed, ms = dict[str, Rows](), 0.0
            for node in reversed(self.by_rows):
                mine = needed.get(node.name) or self._scaled(rows, node)
                ms += self.halos.ms(node.name, mine)
                self._propagate(node, mine, needed)
            self._loads[place, rows] = ms / self.halos.speeds[self.order[place]]
        return self._loads[place, rows]

    def _scaled(self, rows: Rows, node: Node) -> Rows:
        """These rows of an end of another height."""
        return ceil(rows[0] * _height(node) / self.height), ceil(rows[1] * _height(node) / self.height)

    def _propagate(self, node: Node, mine: Rows, needed: dict[str, Rows]) -> None:
        for tensor, rows in self.halos.reads(node, mine):
            if (maker := producer(tensor)) is not None:
                needed[maker.name] = _both(rows, needed.get(maker.name))

    def extended(self, cuts: tuple[int, ...]) -> dict[str, NodePlacement]:
        """The placements: every device computes the rows that its own later part of the group needs."""
        found = {node.name: self.halos.rows[node.name] for node in self.nodes}
        needed: list[dict[str, Rows]] = [{} for _ in self.order]
        for node in reversed(self.by_rows):
            rows = [mine.get(node.name) or self._scaled((cuts[k], cuts[k + 1]), node) for k, mine in enumerate(needed)]
            rows = rows if is_mean(node) else _gapless(rows, _height(node))
            for mine, own in zip(needed, rows, strict=True):
                self._propagate(node, own, mine)
            of = dict(zip(self.order, rows, strict=True))
            found[node.name] = NodePlacement(self.devices, rows=tuple(of[d] for d in self.devices))
        return found


def _height(node: Node) -> int:
    """Rows that a placement divides: of a mean those of its input."""
    return whole(node.inputs[0] if is_mean(node) else node.outputs[0]).rows[1]


def _per_row(node: Node, world: World) -> tuple[float, float]:
    """(milliseconds of a row, and of the weights, however few rows there are)."""
    layer, everything = world.layer_ms.get(node.name), whole(node.outputs[0])
    always = part_ms(node, replace(everything, rows=(0, 0)), layer)
    return (part_ms(node, everything, layer) - always) / max(1, _height(node)), always


def _gapless(rows: Sequence[Rows], height: int) -> list[Rows]:
    """Rows that nobody needs (a stride jumps over them) belong to the device before them."""
    begins = [0, *(begin for begin, _ in rows[1:])]
    return [(begin, max(end, following)) for begin, (_, end), following in
            zip(begins, rows, [*begins[1:], height], strict=True)]


def _both(rows: Rows, other: Rows | None) -> Rows:
    return rows if other is None else (min(rows[0], other[0]), max(rows[1], other[1]))
