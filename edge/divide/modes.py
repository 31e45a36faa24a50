"""Who computes what, mode by mode: local, replicas, branch, spatial. (Pipelines: gkp.edge.divide.chain.)

shares: one number per device, how much of the work it should get in proportion; 0: none. By default all get the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from gkp.converter.graph import Graph, Node, values
from gkp.edge.divide.owners import owner_maps
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.partition import shardable
from gkp.edge.divide.placement import NodePlacement
from gkp.edge.divide.rules import CHANNELS, ROWS, Matrix, rule_of
from gkp.edge.divide.tiles import whole
from gkp.edge.plan.schema import MODES
from gkp.errors import UsageError

BIG_MATRIX = 1 << 24
"""Weights from which a fully connected layer is divided by its outputs: below, gathering its input costs more."""


def assign(mode: str, graph: Graph, devices: int, shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """The assignment of a mode by name. UsageError for those that the planner finds: it takes more to know them."""
    known = {"local": local, "replicas": replicas, "branch": branch, "spatial": spatial_rows}
    if mode not in known:
        raise UsageError(f"mode {mode!r} needs the planner" if mode in MODES else f"there is no mode {mode!r}",
                         f"one of {', '.join(known)}")
    return known[mode](graph, devices, shares)


def local(graph: Graph, devices: int, shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """Everything on the device with the largest share (the first of several)."""
    return {node.name: NodePlacement((root(devices, shares),)) for node in graph.nodes}


def replicas(graph: Graph, devices: int, shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """Everything on every device (that has a share): gkp.edge.divide.draft.draft makes one plan for all of it."""
    working = tuple(d for d, share in enumerate(checked(devices, shares)) if share > 0)
    return {node.name: NodePlacement(working) for node in graph.nodes}


def branch(graph: Graph, devices: int, shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """Channels stay where they are made: through convolutions by branch, through everything channel-wise unchanged
    (gkp.edge.divide.owners). What has no channels to divide, and the last layers, are on one device."""
    first = root(devices, shares)
    maps = owner_maps(graph, checked(devices, shares))
    found = {}
    for node in graph.nodes:
        owners = maps.get(node.outputs[0].name)
        rule = rule_of(node)
        if owners is None or CHANNELS not in rule.kinds or (isinstance(rule, Matrix) and _weights(node) < BIG_MATRIX):
            found[node.name] = NodePlacement((first,))
        else:
            found[node.name] = by_owner(owners, devices)
    return found


def by_owner(owners: Sequence[int], devices: int) -> NodePlacement:
    """The placement by an owner map: owners[c] is the device of channel c, or device + k * devices for its k-th lane more
    (gkp.edge.divide.placement)."""
    lists: dict[int, list[int]] = {}
    for channel, lane in enumerate(owners):
        lists.setdefault(lane, []).append(channel)
    if len(lists) == 1:
        return NodePlacement((owners[0] % devices,))
    last = {d: max(lane for lane in lists if lane % devices == d) for d in {lane % devices for lane in lists}}
    lanes = sorted(lane for d, end in last.items() for lane in range(d, end + 1, devices))
    return NodePlacement(tuple(lane % devices for lane in lanes), tuple(tuple(lists.get(lane, ())) for lane in lanes))


def spatial_rows(graph: Graph, devices: int, shares: Sequence[float] | None = None) -> dict[str, NodePlacement]:
    """Every device computes a range of rows of every layer; what lies beyond its border it gets from its neighbours. Global
    averages are put together from averages of the rows. What cannot be divided by rows is on one device."""
    weights, first = checked(devices, shares), root(devices, shares)
    found = {}
    for node in graph.nodes:
        height = whole(node.inputs[0] if is_mean(node) else node.outputs[0]).rows[1]
        ranges = [r for r in _ranges(height, weights) if r[1][0] < r[1][1]]
        if ROWS in shardable(node) and len(ranges) > 1:
            ranges.sort(key=lambda r: r[0] != first)  # the first one puts a mean together
            found[node.name] = NodePlacement(tuple(d for d, _ in ranges), rows=tuple(r for _, r in ranges))
        else:
            found[node.name] = NodePlacement((first,))
    return found


def root(devices: int, shares: Sequence[float] | None) -> int:
    """The device for what cannot be divided: the one with the largest share."""
    weights = checked(devices, shares)
    return max(range(devices), key=lambda d: weights[d])


def checked(devices: int, shares: Sequence[float] | None) -> list[float]:
    """Shares that add up to one. UsageError when they make no sense."""
    if devices < 1:
        raise UsageError(f"{devices} devices", "at least one")
    given = [1.0] * devices if shares is None else [float(s) for s in shares]
    if len(given) != devices or any(not 0 <= s < float("inf") for s in given) or sum(given) <= 0:
        raise UsageError(f"shares {given} for {devices} devices", "one number of 0 or more per device, not all 0")
    return [s / sum(given) for s in given]


def _weights(node: Node) -> int:
    value = values(node.inputs[1]) if len(node.inputs) > 1 else None
    return 0 if value is None else int(value.size)


def _ranges(height: int, weights: Sequence[float]) -> list[tuple[int, tuple[int, int]]]:
    """(device, (first row, end)) in proportion; empty ranges included."""
    ends = [0, *(round(end * height) for end in accumulate(weights))]
    ends[-1] = height
    return [(d, (ends[d], ends[d + 1])) for d in range(len(weights))]
