"""Splitting small networks in memory and running all devices in this process; random assignments for property tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from net_blocks import classifier
from onnx_kit import Net, assert_close, feeds_of, run_ort

from gkp.branched import BranchedConv
from gkp.converter.graph import Graph, Node
from gkp.converter.sources import GroupedModel, OpenOptions, open_any
from gkp.edge.device.in_process import InProcessExecutor
from gkp.edge.divide.chain import blocks, pipelines
from gkp.edge.divide.decide import candidate, decide
from gkp.edge.divide.draft import Draft, draft
from gkp.edge.divide.modes import assign, checked
from gkp.edge.divide.partial_means import is_mean
from gkp.edge.divide.partition import shardable
from gkp.edge.divide.placement import Assignment, NodePlacement
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.tiles import whole
from gkp.edge.divide.write import TOLERANCE, write
from gkp.edge.plan.schema import COORDINATOR, Device, Link, Plan
from gkp.manifest import sha256
from gkp.runtime.runners import OrtRunner
from gkp.text import clean

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared" / "checkpoints"
LINK = Link(name="test", bandwidth=1e8, rtt=1e-3)
MODES = ("local", "replicas", "branch", "spatial", "pipeline")


def devices(n: int) -> list[Device]:
    return [Device(name=f"device-{k}") for k in range(n)]


def drafted(model: onnx.ModelProto, mode: str, n: int, shares: Sequence[float] | None = None) -> Draft:
    """The model split over n devices in a mode."""
    graph = prepare(model)
    return draft(graph, mode, placed(mode, graph, n, shares), devices(n), LINK)


def placed(mode: str, graph: Graph, n: int, shares: Sequence[float] | None = None) -> Assignment:
    """Who computes what in a mode, unplanned. Pipelines are cut where messages cost nothing."""
    if mode != "pipeline":
        return assign(mode, graph, n, shares)
    given = checked(n, shares)
    speeds = [Device(name=f"device-{k}", speed=s or 1e-6) for k, s in enumerate(given)]
    return pipelines(blocks(graph), {}, speeds, msgspec.structs.replace(LINK, bandwidth=1e15, overhead=0.0), given)[0]


def written(opened: GroupedModel, made: Draft, out: Path, **options: Any) -> Plan:
    """Written and verified, the only candidate of its mode."""
    return write(opened, made, decide([candidate(made.plan)], "latency", made.plan.mode), out, **options)


def split_model(source: Path, devices: Sequence[Device], link: Link, out: Path, mode: str = "local", options: OpenOptions | None = None,
                force: bool = False) -> Plan:
    """Open a model, split it in a mode, unplanned, and write it."""
    opened = open_any(source, options or OpenOptions())
    graph = prepare(opened.model)
    made = draft(graph, mode, placed(mode, graph, len(devices)), devices, link)
    return written(opened, made, out, model=clean(source.name), sha256=sha256(source), force=force)


def models(made: Draft) -> list[onnx.ModelProto]:
    """The segments as stock ONNX."""
    return [subgraph.model() for subgraph in made.subgraphs]


def executor(made: Draft) -> InProcessExecutor:
    found = models(made)
    return InProcessExecutor(made.plan, lambda s: OrtRunner(found[s.index].SerializeToString(), 1))


def assert_computes(made: Draft, model: onnx.ModelProto, where: str = "") -> None:
    """The split model computes what the model does, hands over what the plan says, and is made of standard operators."""
    check_wiring(made.plan)
    for piece in models(made):
        onnx.checker.check_model(piece, full_check=True)
        assert_standard(piece)
    feeds = feeds_of(model)
    (x,) = feeds.values()
    want = run_ort(model, feeds)[0]
    run = executor(made)
    assert (len(made.plan.replicas) > 1) == (made.plan.mode == "replicas" and len({s.device for s in made.plan.segments}) > 1)
    for replica, group in enumerate(made.plan.replicas):
        assert_close([run.run(x, replica)], [want], f"{where} {made.plan.mode} {group}", TOLERANCE)
        expected = [t for t in made.plan.transfers if {t.source, t.target} & set(group)]
        key = lambda t: (t.value, t.source, t.target)  # noqa: E731
        assert sorted(run.moved, key=key) == sorted(expected, key=key)
    run.close()


def check_wiring(plan: Plan) -> None:
    """Every value that a segment reads is made by an earlier segment or the coordinator, and reaches the segment's device
    once; nothing is sent to those who do not read it."""
    values = {v.name: v for v in plan.values}
    received = Counter((t.value, t.target) for t in plan.transfers
                       if plan.mode != "replicas" or t.target != COORDINATOR)
    assert max(received.values()) == 1
    reads = {(name, s.device) for s in plan.segments for name in s.inputs}
    for name, target in received:
        assert target == COORDINATOR or (name, target) in reads
    for segment in plan.segments:
        assert segment.outputs
        for name in segment.inputs:
            source = values[name].producer
            if plan.mode == "replicas":
                continue
            if source == COORDINATOR or plan.segments[source].device != segment.device:
                assert (name, segment.device) in received
            assert source < segment.index
            if source != COORDINATOR:
                assert name in plan.segments[source].outputs
    for transfer in plan.transfers:
        assert transfer.bytes == values[transfer.value].bytes
        assert transfer.source != transfer.target
    assert [s.index for s in plan.segments] == list(range(len(plan.segments)))


def assert_standard(model: onnx.ModelProto) -> None:
    """Convolutions without groups, but for true depthwise ones."""
    weights = {t.name: t.dims for t in model.graph.initializer}
    for node in model.graph.node:
        assert node.domain == ""
        if node.op_type == "Conv":
            group = next((a.i for a in node.attribute if a.name == "group"), 1)
            assert group == 1 or weights[node.input[1]][1] == 1, node.name


def between_devices(plan: Plan) -> int:
    """Bytes that devices send to each other."""
    return sum(t.bytes for t in plan.transfers if COORDINATOR not in (t.source, t.target))


# ---- random assignments -----------------------------------------------------------------------------------------------
def random_assignment(graph: Graph, n: int, seed: int) -> dict[str, NodePlacement]:
    """Every node divided in its own random way: by channels, by rows, whole, on several devices; parts may overlap,
    devices may be idle, or have several lanes."""
    rng = np.random.default_rng(seed)
    return {node.name: _random_placement(node, n, rng) for node in graph.nodes}


def _random_placement(node: Node, n: int, rng: np.random.Generator) -> NodePlacement:
    kind = str(rng.choice(["channels", "rows", "whole", "copies"]))
    order = tuple(int(d) for d in rng.permutation(n)[:rng.integers(1, n + 1)])
    if kind in ("channels", "rows") and kind not in shardable(node):
        kind = "whole"
    if kind == "whole":
        return NodePlacement(order[:1])
    if kind == "copies":
        return NodePlacement(order[:2])
    tile = whole(node.inputs[0] if kind == "rows" and is_mean(node) else node.outputs[0])
    extra = rng.random() < 0.3 and not is_mean(node)
    if kind == "channels":
        order = (*order, *rng.choice(order, rng.integers(0, 3)).tolist())
        owner = rng.integers(0, len(order), len(tile.channels))
        lists = [set(np.flatnonzero(owner == k).tolist()) for k in range(len(order))]
        if extra and len(set(order)) == len(order):
            lists[0] |= set(rng.permutation(len(tile.channels))[:2].tolist())
        return NodePlacement(order, tuple(tuple(sorted(c)) for c in lists))
    height = tile.rows[1]
    cuts = [0, *np.sort(rng.integers(0, height + 1, len(order) - 1)).tolist(), height]
    rows = list(pairwise(cuts))
    if extra and rows[0][1] < height:
        rows[0] = rows[0][0], rows[0][1] + 1
    return NodePlacement(order, rows=tuple(rows))


# ---- a network that is aligned from stem to head ----------------------------------------------------------------------
def aligned_net(groups: int = 4, width: int = 16, size: int = 8, shuffled: bool = True, seed: int = 0,
                blocks: int = 3) -> onnx.ModelProto:
    """Bottleneck blocks whose convolutions are all grouped, 1x1 ones too: group g reads and writes group g only. The
    channels of every tensor are in a random order of their own (shuffled), as after pruning."""
    net = Net(1, 3, size, size, seed=seed)
    x, c = net.relu(net.bn(net.conv3("x", 3, width), width)), width
    place = _places(net, c, shuffled)
    for block in range(blocks):
        stride, wide = (2, c * 2) if block == 1 else (1, c)
        a, b = _places(net, c, shuffled), _places(net, c, shuffled)
        end = _places(net, wide, shuffled) if wide != c else place
        y = net.relu(_block_conv(net, x, place, a, groups, 1))
        y = net.relu(_block_conv(net, y, a, b, groups, 3, stride))
        y = _block_conv(net, y, b, end, groups, 1)
        short = x if wide == c else _block_conv(net, x, place, end, groups, 1, stride)
        x, c, place = net.relu(net.op("Add", y, short)), wide, end
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.const(net.normal(5, c)), net.const(net.normal(5)), transB=1))


def _places(net: Net, c: int, shuffled: bool) -> Any:
    return net.rng.permutation(c) if shuffled else np.arange(c)


def _block_conv(net: Net, x: str, ins: Any, outs: Any, groups: int, kernel: int, stride: int = 1) -> str:
    triples = []
    for i, o in zip(np.array_split(ins, groups), np.array_split(outs, groups), strict=True):
        triples.append((np.sort(i), np.sort(o), net.weight(len(o), len(i), kernel, kernel)))
    conv = BranchedConv.build(len(ins), len(outs), triples, kernel_shape=(kernel, kernel))
    return net.bn(net.conv(x, conv.to_dense(), pads=[kernel // 2] * 4, strides=[stride] * 2), len(outs))


def residual(c: int = 16, size: int = 8) -> onnx.ModelProto:
    """Stem, one residual block, head."""
    net = Net(1, 3, size, size)
    x = net.relu(net.conv3("x", 3, c))
    x = net.relu(net.op("Add", net.conv3(net.relu(net.conv3(x, c, c)), c, c), x))
    return net.model(classifier(net, x, c))
