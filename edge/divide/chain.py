"""The network as a chain of blocks, and what is decided block by block: where to cut a pipeline, and which way of dividing
the work suits each block (the mode "hybrid").

A block ends where a single tensor goes on: residual blocks are one block each (the dominators of the output, networkx).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph, Node, Tensor, is_branched, producer, values
from gkp.edge.divide.costs import conv_ms, node_ms, weights_ms
from gkp.edge.divide.placement import NodePlacement
from gkp.edge.divide.tiles import Tile, whole
from gkp.edge.forecast.simulate import message_ms
from gkp.edge.plan.schema import Device, Link
from gkp.errors import UsageError
from gkp.require import require

_START, _END = "\0start", "\0end"


class LayerMs(NamedTuple):
    """Estimated time of a convolution: what its pixels take, and its weights."""

    pixels: float
    weights: float


def blocks(graph: Graph) -> list[list[Node]]:
    """The nodes of a prepared graph in blocks, in the order of the network."""
    nx = require("networkx", "edge", "planning")
    flow = nx.DiGraph()
    for node in graph.nodes:
        sources = [p.name for t in node.inputs if (p := producer(t)) is not None]
        flow.add_edges_from((source, node.name) for source in sources or [_START])
        if any(any(t is x for x in graph.inputs) for t in node.inputs):
            flow.add_edge(_START, node.name)
        if any(graph.is_output(t) for t in node.outputs):
            flow.add_edge(node.name, _END)
    above = nx.immediate_dominators(flow, _START)
    ends, at = [], above[_END]
    while at != _START:
        ends.append(at)
        at = above[at]
    number: dict[str, int] = {}
    for k, end in enumerate(reversed(ends)):
        for name in {end, *nx.ancestors(flow, end)} - {_START}:
            number.setdefault(name, k)
    found: list[list[Node]] = [[] for _ in ends]
    for node in graph.nodes:
        found[number[node.name]].append(node)
    return found


def part_ms(node: Node, tile: Tile, layer: LayerMs | None = None, conv: BranchedConv | None = None) -> float:
    """Estimated time of a part of a node's output. layer: of all of it in another form than by branches; conv: the node's
    form, where it has been read already."""
    everything = whole(node.outputs[0])
    if layer is not None:
        return layer.pixels * tile.size / max(1, everything.size) + layer.weights
    if not is_branched(node):
        return node_ms(node) * tile.size / max(1, everything.size)
    conv = conv or branched_node.read(node)
    if conv.is_copy:
        return 0.0
    rows = (tile.rows[1] - tile.rows[0]) / max(1, everything.rows[1] - everything.rows[0])
    shape = node.outputs[0].shape
    mine, plane = set(tile.channels), shape[0] * prod(shape[2:]) * rows  # of all images
    counts = [(len(mine.intersection(b.out_index.tolist())), b.in_index.size) for b in conv.branches]
    taps = prod(conv.kernel_shape)
    return sum(conv_ms(o, i, taps * plane) for o, i in counts if o) + weights_ms(taps * sum(o * i for o, i in counts))


def element_bytes(tensor: Tensor) -> int:
    """Bytes of one channel of one row."""
    shape = tensor.shape or [1]
    size = int((tensor.dtype and tensor.dtype.itemsize) or 4)
    return int(shape[0]) * size * prod(int(n) for n in shape[3:])


def travelling_bytes(tensor: Tensor, tile: Tile, wire: str) -> int:
    """Bytes of a part of a tensor on its way between devices."""
    size = tile.size * element_bytes(tensor)
    if tensor.dtype != np.float32:
        return size
    return size // {"float32": 1, "float16": 2, "int8": 4 if quantiser.of(tensor) is not None else 1}[wire]


# ---- pipeline -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Stage:
    """One block, for cutting: milliseconds at speed 1, bytes of weights, bytes of what goes on to the next."""

    ms: float
    weights: int
    out_bytes: int


def stages(chain: Sequence[Sequence[Node]], layer_ms: Mapping[str, LayerMs] | None = None,
           wire: str = "float32") -> list[Stage]:
    """The stage of every block. layer_ms: estimated time of layers in the form they have on one device
    (gkp.edge.divide.single_device.layer_ms), where it is not the one by branches; wire: how values travel."""
    layer_ms = layer_ms or {}
    found = []
    for nodes in chain:
        weights = {id(t): v.nbytes for node in nodes for t in node.inputs if (v := values(t)) is not None}
        last = nodes[-1].outputs[0]
        ms = sum(part_ms(node, whole(node.outputs[0]), layer_ms.get(node.name)) for node in nodes)
        found.append(Stage(ms, sum(weights.values()), travelling_bytes(last, whole(last), wire)))
    return found


def cut(found: Sequence[Stage], devices: Sequence[Device], link: Link, order: Sequence[int],
        by_memory: bool = False) -> list[int] | None:
    """The device of every block: consecutive blocks to the devices in `order`, two of them at least, so that the slowest of
    all stages and messages is as fast as possible (by_memory: the fullest device as empty), then with as few devices as
    possible. None when the weights do not fit, or there is nothing to cut."""
    count = len(found)
    ms, weight = [0.0], [0]
    for stage in found:
        ms.append(ms[-1] + stage.ms)
        weight.append(weight[-1] + stage.weights)

    def cost(device: Device, first: int, end: int) -> float | None:
        """What blocks first to end cost on a device; None where they do not fit, or leave no second stage."""
        kept = weight[end] - weight[first]
        too_large = device.memory_bytes is not None and kept > device.memory_bytes
        if too_large or ((first, end) == (0, count) and len(order) > 1):
            return None
        if by_memory:
            return float(kept)
        sent = message_ms(link, found[end - 1].out_bytes) if end < count else 0.0
        return max((ms[end] - ms[first]) / device.speed, sent)

    best: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, -1)}]  # blocks done -> (worst, devices used, came from)
    for k in order:
        here: dict[int, tuple[float, int, int]] = {}
        for first, (worst, used, _) in best[-1].items():
            for end in range(first, count + 1):
                mine = 0.0 if end == first else cost(devices[k], first, end)
                if mine is not None:
                    option = (max(worst, mine), used + (end > first), -first)  # of equals: the last ones stay idle
                    here[end] = min(here.get(end, option), option)
        best.append(here)
    if count not in best[-1]:
        return None
    owner, at = [0] * count, count
    for step in range(len(order), 0, -1):
        first = -best[step][at][2]
        owner[first:at] = [order[step - 1]] * (at - first)
        at = first
    return owner


def pipelines(chain: Sequence[Sequence[Node]], layer_ms: Mapping[str, LayerMs], devices: Sequence[Device],
              link: Link, shares: Sequence[float], wire: str = "float32") -> list[dict[str, NodePlacement]]:
    """The ways to give consecutive blocks to the devices that have a share, the fastest first: cut so that the slowest stage
    is fastest, and so that the fullest device is emptiest (what the cut knows of memory are the weights, and the arrays may
    be too much for the first). layer_ms, wire: as `stages` takes them. UsageError when there is none."""
    order = sorted((d for d, share in enumerate(shares) if share > 0), key=lambda d: (-devices[d].speed, d))
    found = stages(chain, layer_ms, wire)
    owners = [cut(found, devices, link, order, by_memory) for by_memory in (False, True)]
    kept = [owner for k, owner in enumerate(owners) if owner is not None and owner not in owners[:k]]
    if not kept:
        raise UsageError("the network cannot be cut into consecutive parts that fit")
    return [{n.name: NodePlacement((d,)) for nodes, d in zip(chain, owner, strict=True) for n in nodes} for owner in kept]
