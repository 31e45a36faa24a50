"""Rows with fused halos: borders once per group of blocks, the same answers, and the planner takes them where messages cost."""

from __future__ import annotations

import onnx
import pytest
from edge_plans import of_speed
from onnx_kit import Net
from split_kit import LINK, assert_computes, between_devices, devices, residual

from gkp.converter.graph import Graph
from gkp.edge.divide.chain import blocks
from gkp.edge.divide.draft import Draft, draft
from gkp.edge.divide.fused import fused_rows
from gkp.edge.divide.halos import Halos
from gkp.edge.divide.layouts import World
from gkp.edge.divide.modes import spatial_rows
from gkp.edge.divide.planner import Planner, SplitOptions
from gkp.edge.divide.prepare import prepare
from gkp.edge.plan.schema import Link

SLOW = Link(name="slow", bandwidth=1e9, rtt=0.0, overhead=0.05)
FREE = Link(name="free", bandwidth=1e12, rtt=0.0, overhead=0.0)


def chain_of_convs(count: int = 4, size: int = 24) -> onnx.ModelProto:
    net, x = Net(1, 3, size, size), "x"
    for k in range(count):
        x = net.relu(net.conv3(x, 8 if k else 3, 8))
    return net.model(x)


def fused(model: onnx.ModelProto, link: Link, count: int = 2) -> Draft:
    graph = prepare(model)
    placed, = fused_rows(graph, blocks(graph), World(devices(count), link), prices=[1.0])
    return draft(graph, "spatial", placed, devices(count), LINK)


def test_where_a_message_costs_much_only_the_ends_are_exchanged() -> None:
    """Both devices compute from the image what they need: it is there."""
    made = fused(chain_of_convs(), SLOW)
    assert [(t.source, t.target) for t in made.plan.transfers if t.source != -1 and t.target != -1] == [(1, 0)]
    assert_computes(made, chain_of_convs())


def test_where_messages_cost_nothing_no_row_is_computed_twice() -> None:
    graph = prepare(chain_of_convs())
    placed, = fused_rows(graph, blocks(graph), World(devices(2), FREE), prices=[1.0])
    heights = [node.outputs[0].shape[2] for node in graph.nodes]
    assert [sum(end - first for first, end in placed[n.name].rows) for n in graph.nodes] == heights


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("blocks_per_group", [1, 2, 3, 9])
def test_groups_of_any_depth_compute_the_same(blocks_per_group: int, count: int) -> None:
    """Through strides, shortcuts, pooling and the mean; also where planes have fewer rows than devices."""
    model = residual()
    graph = prepare(model)
    halos = Halos(graph, World(devices(count), SLOW), spatial_rows(graph, count))
    chain, placed = [step for block in blocks(graph) for step in halos.heads(block)], {}
    for k in range(0, len(chain), blocks_per_group):
        placed.update(halos.placed([n for step in chain[k:k + blocks_per_group] for n in step]))
    assert_computes(draft(graph, "spatial", placed, devices(count), LINK), model)


def test_a_device_with_two_borders_gets_fewer_rows() -> None:
    """It computes rows of two neighbours, too: with as many of its own it would end last."""
    graph = prepare(chain_of_convs(4, 48))
    halos = Halos(graph, World(devices(4), SLOW), spatial_rows(graph, 4))
    placed = halos.placed(graph.nodes)
    ends = [end - first for first, end in placed[graph.nodes[-1].name].rows]
    assert ends == [13, 11, 11, 13]
    computed = [sum(rows[k][1] - rows[k][0] for rows in (p.rows for p in placed.values())) for k in range(4)]
    assert max(computed) < 2 * (12 + 14 + 16 + 18)  # a middle one's, of a convolution and its activation, with 12 of its own


def test_borders_are_exchanged_where_a_block_is_narrow() -> None:
    """Behind the convolution that a block begins with, which needs no other rows."""
    net = Net(1, 3, 32, 32)
    x = net.relu(net.conv3("x", 3, 64))
    inner = net.relu(net.conv3(net.relu(net.conv1(x, 64, 16)), 16, 16))
    model = net.model(net.relu(net.op("Add", net.conv1(inner, 16, 64), x)))
    graph = prepare(model)
    halos = Halos(graph, World(devices(2), SLOW), spatial_rows(graph, 2))
    stem, activation, block, end = blocks(graph)
    head, rest = halos.heads(block)
    placed = {**halos.placed([*stem, *activation, *head]), **halos.placed([*rest, *end])}
    made = draft(graph, "spatial", placed, devices(2), LINK)
    values = {v.name: v for v in made.plan.values}
    moved = [values[t.value].shape for t in made.plan.between]
    assert sorted(moved) == [[1, 16, 1, 32], [1, 16, 1, 32], [1, 64, 16, 32]]  # the last one brings the answer together
    assert_computes(made, model)


def test_few_rows_at_the_end_are_left_to_the_fast_device() -> None:
    """A slow one would compute nearly all of them, too."""
    net = Net(1, 3, 64, 64)
    x = net.relu(net.conv3(net.relu(net.conv3("x", 3, 32)), 32, 32))
    x = net.op("MaxPool", x, kernel_shape=[16, 16], strides=[16, 16])
    for _ in range(4):
        x = net.relu(net.conv3(x, 32, 32))
    model, uneven = net.model(x), of_speed(1, 0.3)
    graph = prepare(model)
    world = World(uneven, Link(name="l", bandwidth=1e9, rtt=0.0, overhead=1e-5))
    placed, = fused_rows(graph, blocks(graph), world, [1, 0.3], prices=[1.0])
    kinds = [placed[node.name].kind for node in graph.nodes]
    assert (kinds[0], kinds[-1]) == ("rows", "whole")
    assert_computes(draft(graph, "spatial", placed, devices(2), LINK), model)


def test_large_weights_at_the_end_are_divided_instead_of_rows() -> None:
    """By rows every device would read all of them."""
    net = Net(1, 3, 32, 32)
    x = net.op("MaxPool", net.relu(net.conv3("x", 3, 256)), kernel_shape=[8, 8], strides=[8, 8])
    model = net.model(net.relu(net.conv3(net.relu(net.conv3(x, 256, 256)), 256, 256)))
    graph = prepare(model)
    world = World(devices(2), Link(name="l", bandwidth=1e9, rtt=0.0, overhead=1e-5))
    placed, = fused_rows(graph, blocks(graph), world, prices=[1.0])
    kinds = [placed[node.name].kind for node in graph.nodes]
    assert (kinds[0], kinds[-1]) == ("rows", "channels")
    assert_computes(draft(graph, "spatial", placed, devices(2), LINK), model)


def test_the_planner_takes_fewer_messages_where_these_are_slow() -> None:
    graph: Graph = prepare(chain_of_convs(6, 48))
    many, few = (Planner(graph, SplitOptions(of_speed(1, 1), link, mode="spatial")).plan()[0]
                 for link in (Link(name="f", bandwidth=1e12, rtt=0.0, overhead=0.0), SLOW))
    assert len(few.plan.transfers) < len(many.plan.transfers)
    assert between_devices(few.plan) != between_devices(many.plan)


def test_a_long_chain_has_groups_in_proportion_to_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning a network of hundreds of layers must end."""
    tried, placed = list[int](), Halos.placed
    monkeypatch.setattr(Halos, "placed", lambda self, nodes: tried.append(len(nodes)) or placed(self, nodes))
    for count in (20, 40):
        tried.clear()
        fused(chain_of_convs(count, 8), SLOW)
        assert len(tried) <= 16 * count
