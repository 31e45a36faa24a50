"""Mode "hybrid": which way of dividing the work suits each block, by dynamic programming over block x way.

A way is an assignment of the whole network (on one device, by branches, by rows, computed by everyone); changing ways
between two blocks costs what has to be exchanged then. The costs are estimates and block after block; the plan that comes of
it is predicted like every other, and taken only if that is better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gkp.converter.graph import Graph, Node, Tensor, producer
from gkp.edge.divide.chain import LayerMs, element_bytes, part_ms, travelling_bytes
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.placement import Assignment, NodePlacement, tiles_of
from gkp.edge.divide.rules import Branched, rule_of
from gkp.edge.divide.tiles import Tile, cover, union, whole, without
from gkp.edge.forecast.simulate import handling_ms, message_ms
from gkp.edge.plan.schema import COORDINATOR, Device, Link

Parts = list[tuple[int, Tile]]


@dataclass(frozen=True)
class World:
    """What costs depend on besides the network. scale: measured over estimated time, from a profile; layer_ms: estimated
    times of layers in the form that they have wherever they are not divided by channels
    (gkp.edge.divide.single_device.layer_ms); wire: how float32 values travel between devices."""

    devices: Sequence[Device]
    link: Link
    scale: float = 1.0
    layer_ms: Mapping[str, LayerMs] = field(default_factory=dict)
    wire: str = "float32"


class Costs:
    """What blocks of a network cost in the ways given."""

    def __init__(self, graph: Graph, ways: Mapping[str, Assignment], world: World) -> None:
        self.ways, self.world, self.devices, self.link = ways, world, world.devices, world.link
        self._pixels = graph.normalisation is not None
        self.rules = {node.name: rule_of(node) for node in graph.nodes}
        self._made: dict[tuple[str, str], Parts] = {}

    def compute_ms(self, nodes: Sequence[Node], way: str) -> float:
        """Milliseconds of the device that computes longest."""
        load: dict[int, float] = defaultdict(float)
        for node in nodes:
            placement = self.ways[way][node.name]
            parts = self._parts(node, way)
            if _by_input_rows(node, placement):  # each device takes the mean of its rows
                parts = [(d, parts[0][1]) for d in placement.devices]
            for device, tile in parts:
                load[device] += self._part_ms(node, tile, placement) / self.devices[device].speed
        return max(load.values(), default=0.0) * self.world.scale

    def _part_ms(self, node: Node, tile: Tile, placement: NodePlacement) -> float:
        layer = self.world.layer_ms.get(node.name) if placement.kind != "channels" else None
        rule = self.rules[node.name]
        return part_ms(node, tile, layer, rule.branches.conv if isinstance(rule, Branched) else None)

    def exchange_ms(self, nodes: Sequence[Node], before: str | Mapping[str, str], way: str) -> float:
        """Until every device has what it needs for these nodes: of the tensors that they read, each once. before: the way of
        the nodes outside of them, of all or by name."""
        names = {node.name for node in nodes}
        needs: dict[str, dict[int, list[Tile]]] = defaultdict(lambda: defaultdict(list))
        tensors: dict[str, Tensor] = {}
        total = 0.0
        for node in nodes:
            for device, tensor, tile in self._needs(node, way):
                tensors[tensor.name] = tensor
                needs[tensor.name][device].append(tile)
            total += self._means_ms(node, self.ways[way][node.name])
        for name, tensor in tensors.items():
            maker = producer(tensor)
            made = way if maker is None or maker.name in names else before if isinstance(before, str) else before[maker.name]
            total += self._tensor_ms(tensor, made, needs[name])
        return total

    def _means_ms(self, node: Node, placement: NodePlacement) -> float:
        """The means of the rows come together on one device."""
        if not _by_input_rows(node, placement):
            return 0.0
        size = whole(node.outputs[0]).size * element_bytes(node.outputs[0])
        return (len(placement.devices) - 1) * message_ms(self.link, size) + self.link.rtt / 2 * 1e3

    def _parts(self, node: Node, way: str) -> Parts:
        """Who makes which part of the output."""
        key = node.name, way
        if key not in self._made:
            placement = self.ways[way][node.name]
            self._made[key] = ([(placement.devices[0], whole(node.outputs[0]))] if _by_input_rows(node, placement)
                               else tiles_of(node, placement, len(self.devices)))
        return self._made[key]

    def _needs(self, node: Node, way: str) -> list[tuple[int, Tensor, Tile]]:
        """(device, tensor, part) of what has to be there."""
        placement = self.ways[way][node.name]
        if _by_input_rows(node, placement):
            x, pairs = node.inputs[0], zip(placement.devices, placement.rows, strict=True)
            return [(d, x, Tile(whole(x).channels, rows)) for d, rows in pairs]
        return [(device, tensor, need) for device, tile in self._parts(node, way)
                for tensor, need in zip(node.inputs, self.rules[node.name].needs(tile), strict=True) if need is not None]

    def _tensor_ms(self, tensor: Tensor, way: str, needs: Mapping[int, Sequence[Tile]]) -> float:
        """Every device's directions are busy one message after the other; a shared medium carries all of them."""
        maker = producer(tensor)
        owned = {COORDINATOR: whole(tensor)} if maker is None else dict(self._parts(maker, way))
        busy: dict[tuple[str, int], float] = defaultdict(float)
        for device, wanted in needs.items():
            missing = union(wanted)
            if device in owned:
                missing = without(missing, owned[device])
            if not missing:
                continue
            near = sorted((d for d in owned if d != device), key=lambda d: (d - device) % len(self.devices))
            for source, tile in cover(missing, [(d, owned[d]) for d in near]):
                size = self._bytes(tensor, tile, source)
                taken = message_ms(self.link, size) + self._slowness_ms(size, source, device)
                for resource in [("medium", 0)] if self.link.shared else [("out", source), ("in", device)]:
                    busy[resource] += taken
        return max(busy.values()) + self.link.rtt / 2 * 1e3 if busy else 0.0

    def _bytes(self, tensor: Tensor, tile: Tile, source: int) -> int:
        """Of a part of a tensor on its way: the network's input comes as the pixels that it is made of."""
        if source == COORDINATOR:
            return tile.size * element_bytes(tensor) // (4 if self._pixels else 1)
        return travelling_bytes(tensor, tile, self.world.wire)

    def _slowness_ms(self, size: int, *ends: int) -> float:
        """What slow processors add to a message."""
        return handling_ms(self.link, size)[0] * sum(1 / self.devices[d].speed - 1 for d in ends if d != COORDINATOR)


def _by_input_rows(node: Node, placement: NodePlacement) -> bool:
    """A mean over the plane, put together from means of rows: placed by the rows of its input."""
    return placement.kind == "rows" and is_mean(node)


def best_layouts(chain: Sequence[Sequence[Node]], costs: Costs) -> list[str]:
    """The way of every block, so that computing and exchanging, block after block, take least."""
    names = list(costs.ways)
    total: dict[str, float] = {}
    back: list[dict[str, str]] = []
    for k, nodes in enumerate(chain):
        here: dict[str, float] = {}
        came: dict[str, str] = {}
        for way in names:
            options = {old: total.get(old, 0.0) + costs.exchange_ms(nodes, old, way) for old in (names if k else [way])}
            came[way] = min(options, key=lambda old: (options[old], old != way))
            here[way] = options[came[way]] + costs.compute_ms(nodes, way)
        total = here
        back.append(came)
    found = [min(total, key=lambda name: total[name])]
    for came in reversed(back[1:]):
        found.append(came[found[-1]])
    return found[::-1]


def mixed(chain: Sequence[Sequence[Node]], chosen: Sequence[str],
          ways: Mapping[str, Assignment]) -> dict[str, NodePlacement]:
    """The assignment that takes every block from its way."""
    return {node.name: ways[way][node.name] for nodes, way in zip(chain, chosen, strict=True) for node in nodes}


