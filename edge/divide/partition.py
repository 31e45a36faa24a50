"""From "who computes which part of which node" to segments, the values that they make, and what moves between devices.

Every device computes its parts of the nodes. What it needs and has not made itself comes from those who have: each (part of
a) tensor once per device, no more than what is read. The nodes of a device are grouped by level: a node's level is one more
than that of whatever it reads that moves between devices, so that a segment, once it has its inputs, never waits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from gkp.converter import quantiser
from gkp.converter.graph import Graph, Node, Tensor, producer
from gkp.converter.operators import HEAVY
from gkp.edge.device.encoding import wire_dtype
from gkp.edge.divide.builder import part_shape
from gkp.edge.divide.partial_means import add_partial_means, is_mean
from gkp.edge.divide.placement import Assignment, NodePlacement, lanes_of, tiles_of
from gkp.edge.divide.rules import ROWS, Rule, rule_of
from gkp.edge.divide.tiles import Tile, cover, union, whole, without
from gkp.edge.plan.schema import COORDINATOR, Grid, Layout, Transfer, Value
from gkp.errors import UnsupportedModelError, UsageError
from gkp.text import clean, folded

_DTYPES = ("float32", "float16", "int64", "uint8")


@dataclass(frozen=True, eq=False)
class Step:
    """One node's part on one lane of a device (gkp.edge.divide.placement). needs: per input of the node, the part of it that
    is read, or None."""

    node: Node
    rule: Rule
    lane: int
    device: int
    out: Tile
    needs: Sequence[Tile | None]
    level: int = 0

    @property
    def read(self) -> list[tuple[Tensor, Tile]]:
        """The inputs that are read, and what of them."""
        return [(t, r) for t, r in zip(self.node.inputs, self.needs, strict=True) if r is not None]

    @property
    def outputs(self) -> list[Tensor]:
        """Those that have a name: the others nobody reads."""
        return [t for t in self.node.outputs if t.name]

    def made(self, tensor: Tensor) -> Tile:
        """The part of an output that the step makes."""
        return self.out if len(self.node.outputs) == 1 else whole(tensor)


@dataclass(frozen=True)
class Item:
    """Where a device finds a part of a tensor. source: the lane of its own that made it, a lane of the device that it comes
    from (the part may be that of several of its lanes), or COORDINATOR."""

    name: str
    source: int
    tile: Tile
    tensor: Tensor = field(compare=False)


DType = np.dtype[np.generic]


def dtype_of(graph: Graph, item: Item) -> DType:
    """What an item travels as: the network's input as the pixels that it is made of, where there are any."""
    pixels = item.source == COORDINATOR and graph.normalisation is not None
    return np.dtype(np.uint8) if pixels else np.dtype(item.tensor.dtype)


def _grid(tensor: Tensor) -> Grid | None:
    """Of a tensor that a quantiser makes; its integers as bytes without a sign."""
    how = quantiser.of(tensor)
    return None if how is None else Grid(scale=how.scale, zero=how.zero_point + (128 if how.type == "int8" else 0))


@dataclass
class SegmentDraft:
    """A segment before its file is written. reads: value name -> what it holds; writes: the same for what it makes."""

    index: int
    device: int
    steps: list[Step]
    reads: dict[str, Item] = field(default_factory=dict)
    writes: dict[str, Item] = field(default_factory=dict)


@dataclass(frozen=True)
class Partition:
    """The data flow of a split network. supply: (tensor's name, device) -> where the device finds the tensor's parts."""

    graph: Graph
    segments: list[SegmentDraft]
    values: list[Value]
    transfers: list[Transfer]
    layouts: dict[str, Layout]
    supply: Mapping[tuple[str, int], list[Item]]
    notes: list[str]
    input: str
    output: str


def partition(graph: Graph, assignment: Assignment, devices: int, wire: str = "float32") -> Partition:
    """Divide a prepared graph (gkp.edge.divide.prepare; it is not changed). assignment: of every node. What an assignment
    divides in a way that its operator does not allow is computed whole on the first of its devices, and a note says so.
    wire: how float32 values travel between devices. UsageError when an assignment leaves out a node or a part, or
    names a device that there is not."""
    return _Partitioning(graph, assignment, devices, wire).run()


def shardable(node: Node) -> frozenset[str]:
    """How a node of a prepared graph can be divided: "channels", "rows", both or not at all."""
    return rule_of(node).kinds | ({ROWS} if is_mean(node) else frozenset())


class _Partitioning:
    def __init__(self, graph: Graph, assignment: Assignment, devices: int, wire: str) -> None:
        self.whole: dict[str, list[str]] = {}
        self.graph, self.assignment = add_partial_means(graph, assignment)
        self.count, self.wire = devices, wire
        self.layouts: dict[str, Layout] = {}

    def run(self) -> Partition:
        missing = [n.name for n in self.graph.nodes if n.name not in self.assignment]
        if missing:
            raise UsageError(f"the assignment leaves out {len(missing)} nodes: {clean(missing[0])}, ...", "place every node")
        self._make_output_whole()
        parts = self._parts()
        while True:
            self._flow(parts)
            alive = self._alive()
            if len(alive) == len(parts):
                break
            parts = [step for step in self.steps if id(step) in alive]
        segments = self._segments()
        found, transfers, output = _Wiring(self, segments).run()
        notes = [f"{folded(names)}: {why}" for why, names in self.whole.items()]
        return Partition(self.graph, segments, found, transfers, self.layouts, self.supply, notes, "v0", output)

    def _flow(self, parts: Sequence[Step]) -> None:
        """The steps with their levels, and where each finds what it needs."""
        x = self.graph.inputs[0]
        self.own: dict[str, dict[int, Tile]] = defaultdict(dict)
        self.level: dict[tuple[str, int], int] = {}
        self.needs: dict[tuple[str, int], list[Tile]] = defaultdict(list)
        self.supply: dict[tuple[str, int], list[Item]] = {}
        self.exchanged: dict[str, bool] = {}
        self.readers: dict[str, set[int]] = defaultdict(set)
        self.steps: list[Step] = []
        self.own[x.name][COORDINATOR], self.level[x.name, COORDINATOR] = whole(x), -1
        for step in parts:
            for tensor in step.outputs:
                self.own[tensor.name][step.lane] = step.made(tensor)
            for tensor, tile in step.read:
                self.needs[tensor.name, step.device].append(tile)
                self.readers[tensor.name].add(step.device)
        for step in parts:
            self._take(step)

    def _alive(self) -> set[int]:
        """The steps that lead to the answer: of parts that several devices compute, some may be read by nobody."""
        y, alive = self.graph.outputs[0], set()
        used = {(y.name, self.answerer)}
        for step in reversed(self.steps):
            if any((t.name, step.lane) in used for t in step.outputs):
                alive.add(id(step))
                used |= {maker for item in self.read(step) for maker in self.makers(item)}
        return alive

    def device(self, lane: int) -> int:
        """The device of a lane; the COORDINATOR is its own."""
        return lane if lane == COORDINATOR else lane % self.count

    @property
    def answerer(self) -> int:
        """The lane that makes the answer."""
        y = self.graph.outputs[0]
        return min(d for d, tile in self.own[y.name].items() if tile == whole(y))

    def read(self, step: Step) -> list[Item]:
        """Where a step finds what it needs."""
        return [item for tensor, tile in step.read for item in self.supply[tensor.name, step.device]
                if item.tile & tile]

    def makers(self, item: Item) -> list[tuple[str, int]]:
        """(tensor's name, lane) of those that make a part of the item."""
        device = self.device(item.source)
        return [(item.name, lane) for lane, tile in self.own[item.name].items()
                if self.device(lane) == device and tile & item.tile]

    # ---- who computes what --------------------------------------------------------------------------------------
    def _make_output_whole(self) -> None:
        """The answer lies whole on one device: an Identity puts it together where its producer is divided."""
        y = self.graph.outputs[0]
        node = producer(y)
        assert node is not None
        placement = self.assignment[node.name]
        if placement.kind == "whole" or placement.kind not in rule_of(node).kinds:
            return
        inner = self.graph.variable("inner", y.dtype, y.shape)
        self.graph.redirect(y, inner)
        gather = producer(y)
        assert gather is not None
        node.outputs.append(inner)
        self.graph.rename(gather, "gather")
        most = max(tiles_of(node, placement, self.count), key=lambda part: part[1].size)
        self.assignment[gather.name] = NodePlacement((most[0],))
        self.graph.cleanup()

    def _parts(self) -> list[Step]:
        found: list[Step] = []
        for node in self.graph.nodes:
            rule = rule_of(node)
            placement = self._allowed(node, rule)
            owned = lanes_of(node, placement, self.count)
            found += [Step(node, rule, lane, self.device(lane), tile, rule.needs(tile)) for lane, tile in owned]
            self.layouts.update((clean(t.name), placement.layout()) for t in found[-1].outputs)
        return found

    def _allowed(self, node: Node, rule: Rule) -> NodePlacement:
        placement = self.assignment[node.name]
        if placement.kind == "whole" or placement.kind in rule.kinds:
            return placement
        why = f"{clean(node.op)} cannot be divided by {placement.kind}: computed whole on device {placement.devices[0]}"
        self.whole.setdefault(why, []).append(clean(node.name))
        return NodePlacement(placement.devices[:1])

    # ---- what comes from where ----------------------------------------------------------------------------------
    def _take(self, step: Step) -> None:
        level = 0
        for tensor, tile in step.read:
            later = self._exchanged(tensor)
            for item in self._found(tensor, step.device):
                if item.tile & tile:
                    level = max(level, self.level[tensor.name, item.source] + later)
        for tensor in step.outputs:
            self.level[tensor.name, step.lane] = level
        self.steps.append(replace(step, level=level))

    def _exchanged(self, tensor: Tensor) -> bool:
        """Does a part of it move between devices? Then all that read it are one level later, also who has what it needs: in
        one segment with what comes behind it the others would wait for that, too."""
        if tensor.name not in self.exchanged:
            self.exchanged[tensor.name] = any(self.device(item.source) != device for device in self.readers[tensor.name]
                                              for item in self._found(tensor, device))
        return self.exchanged[tensor.name]

    def _found(self, tensor: Tensor, device: int) -> list[Item]:
        """The items of a device, once all its needs and the levels of their makers are known."""
        key = tensor.name, device
        if key not in self.supply:
            owners = self.own[tensor.name]
            wanted, items = union(self.needs[key]), []
            for lane in owners:
                if self.device(lane) == device:
                    items.append(Item(tensor.name, lane, owners[lane], tensor))
                    wanted = without(wanted, owners[lane])
            if COORDINATOR in owners:
                wanted = union(Tile(owners[COORDINATOR].channels, r.rows) for r in wanted)
            items += [Item(tensor.name, source, tile, tensor)
                      for source, tile in cover(wanted, self._others(tensor.name, device))]
            self.supply[key] = items
        return self.supply[key]

    def _others(self, name: str, device: int) -> list[tuple[int, Tile]]:
        """What other devices have of a tensor, the earliest and nearest first: (lane, part); lanes of one device that make
        theirs at the same time send them together."""
        together: dict[tuple[int, int, tuple[int, int]], list[int]] = defaultdict(list)
        for lane, tile in self.own[name].items():
            if self.device(lane) != device:
                together[self.level[name, lane], self.device(lane), tile.rows].append(lane)
        found = []
        for key in sorted(together, key=lambda k: (k[0], (k[1] - device) % self.count)):
            channels = sorted({c for lane in together[key] for c in self.own[name][lane].channels})
            found.append((min(together[key]), Tile(tuple(channels), key[2])))
        return found

    # ---- segments -----------------------------------------------------------------------------------------------
    def _segments(self) -> list[SegmentDraft]:
        """Segments by device and level; what others wait for comes first, in a segment of its own if the rest is work."""
        sent = {maker for (_, device), items in self.supply.items() for item in items  # all from the segment of its source
                if self.device(item.source) != device for maker in (*self.makers(item), (item.name, item.source))}
        answer = self.graph.outputs[0]
        groups: dict[tuple[int, int, int], list[Step]] = defaultdict(list)
        by_level: dict[tuple[int, int], list[Step]] = defaultdict(list)
        for step in self.steps:
            by_level[step.level, step.device].append(step)
        for (level, device), steps in by_level.items():
            urgent = self._urgent(steps, sent, answer)
            rest = [s for s in steps if id(s) not in urgent]
            if len(rest) < len(steps) and any(s.node.op in HEAVY for s in rest):
                groups[level, 0, device] = [s for s in steps if id(s) in urgent]
                groups[level, 1, device] = rest
            else:
                groups[level, 0, device] = steps
        return [SegmentDraft(k, key[2], groups[key]) for k, key in enumerate(sorted(groups))]

    @staticmethod
    def _urgent(steps: list[Step], sent: set[tuple[str, int]], answer: Tensor) -> set[int]:
        """Those that other devices wait for, and what leads to them."""
        urgent: set[int] = set()
        wanted: set[str] = set()
        for step in reversed(steps):
            names = {t.name for t in step.outputs}
            if names & wanted or answer.name in names or any((n, step.lane) in sent for n in names):
                urgent.add(id(step))
                wanted |= {tensor.name for tensor, _ in step.read}
        return urgent


class _Wiring:
    """Names the values: what each segment makes for later segments of its device and for other devices."""

    def __init__(self, sharding: _Partitioning, segments: list[SegmentDraft]) -> None:
        self.s, self.segments = sharding, segments
        self.home = {(t.name, step.lane): segment for segment in segments for step in segment.steps
                     for t in step.outputs}
        self.names: dict[tuple[str, int, Tile], str] = {}
        self.values: list[Value] = []
        self.transfers: list[Transfer] = []

    def run(self) -> tuple[list[Value], list[Transfer], str]:
        x, y = self.s.graph.inputs[0], self.s.graph.outputs[0]
        self._name(Item(x.name, COORDINATOR, whole(x), x))
        pairs = [(segment, item) for segment in self.segments for item in self._read(segment)]
        order = {id(s): s.index for s in self.segments}

        def made(pair: tuple[SegmentDraft, Item]) -> tuple[int, int]:
            maker = self.home.get((pair[1].name, pair[1].source))
            return (-1 if maker is None else order[id(maker)]), pair[0].index

        sent: set[tuple[str, int]] = set()
        for segment, item in sorted(pairs, key=made):
            name = self._name(item)
            segment.reads[name] = item
            source = self.s.device(item.source)
            if source != segment.device and (name, segment.device) not in sent:
                sent.add((name, segment.device))
                self._transfer(name, source, segment.device)
        for segment in self.segments:
            if not segment.reads:
                raise UnsupportedModelError(f"{clean(segment.steps[0].node.name)} reads nothing: a device cannot know when "
                                            "to compute it", "fold the constants of the model")
        output = self._name(Item(y.name, self.s.answerer, whole(y), y))
        self._transfer(output, self.s.device(self.s.answerer), COORDINATOR)
        return self.values, self.transfers, output

    def _read(self, segment: SegmentDraft) -> list[Item]:
        """What the segment's steps need and it does not make itself."""
        items = dict.fromkeys(item for step in segment.steps for item in self.s.read(step))
        return [item for item in items if self.home.get((item.name, item.source)) is not segment]

    def _name(self, item: Item) -> str:
        key = item.name, item.source, item.tile
        if key not in self.names:
            name = self.names[key] = f"v{len(self.names)}"
            maker = self.home.get(key[:2])
            if maker is not None:
                maker.writes[name] = item
            all_of_it, mine = whole(item.tensor), item.tile
            self.values.append(Value(
                name=name, tensor=clean(item.tensor.name), shape=part_shape(item.tensor, mine),
                dtype=dtype_of(self.s.graph, item).name, producer=COORDINATOR if maker is None else maker.index,
                channels=None if mine.channels == all_of_it.channels else list(mine.channels),
                rows=None if mine.rows == all_of_it.rows else mine.rows, grid=_grid(item.tensor)))
        return self.names[key]

    def _transfer(self, name: str, source: int, target: int) -> None:
        value = self.values[int(name[1:])]
        if value.dtype not in _DTYPES:
            raise UnsupportedModelError(f"{value.tensor} is of type {value.dtype}, and would move between devices",
                                        "place the nodes that make and read it on one device")
        between = COORDINATOR not in (source, target)  # what the coordinator sends and gets stays as it is
        size = prod(value.shape) * np.dtype(wire_dtype(value, self.s.wire) if between else value.dtype).itemsize
        self.transfers.append(Transfer(value=name, source=source, target=target, bytes=size))

