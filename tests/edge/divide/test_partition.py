"""Sharding: whatever the assignment, the split network computes the same, and only what is read is sent."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import classifier, networks, tmi_block
from onnx import helper
from onnx_kit import Net, ops
from split_kit import LINK, assert_computes, between_devices, devices, models, random_assignment

from gkp.converter import node as branched_node
from gkp.edge.divide.draft import draft
from gkp.edge.divide.partition import partition, shardable
from gkp.edge.divide.placement import NodePlacement
from gkp.edge.divide.prepare import prepare
from gkp.edge.divide.tiles import Tile, cover, union, whole
from gkp.errors import UnsupportedModelError, UsageError

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


# ---- tiles ----------------------------------------------------------------------------------------------------------
tiles = st.builds(lambda c, a, n: Tile(tuple(sorted(c)), (a, a + n)), st.sets(st.integers(0, 5), min_size=1),
                  st.integers(0, 4), st.integers(1, 4))


def cells(*parts: Tile) -> list[tuple[int, int]]:
    return [(c, r) for part in parts for c in part.channels for r in range(*part.rows)]


@given(tiles, tiles)
def test_common_part_and_rest_make_up_a_region(a: Tile, b: Tile) -> None:
    common = a & b
    rest = a.minus(b)
    assert sorted(cells(*([common] if common else []), *rest)) == sorted(cells(a))
    assert not set(cells(*rest)) & set(cells(b))


@given(st.lists(tiles, max_size=6))
def test_a_union_holds_every_cell_once(parts: list[Tile]) -> None:
    assert sorted(cells(*union(parts))) == sorted(set(cells(*parts)))


@given(st.lists(tiles, min_size=1, max_size=4), st.lists(tiles, max_size=5))
def test_owners_send_every_wanted_cell_once_and_none_that_they_lack(wanted: list[Tile], owned: list[Tile]) -> None:
    owners = list(enumerate([*owned, Tile(tuple(range(6)), (0, 8))]))
    sent = cover(union(wanted), owners)
    assert sorted(cells(*(part for _, part in sent))) == sorted(set(cells(*wanted)))
    for owner, part in sent:
        assert set(cells(part)) <= set(cells(owners[owner][1]))


def test_a_part_that_nobody_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="nobody has"):
        cover([Tile((0, 1), (0, 2))], [(0, Tile((0,), (0, 2)))])


# ---- any assignment ---------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None, suppress_health_check=SLOW)
@given(networks(), st.integers(1, 16), st.integers(0, 2**31))
def test_any_assignment_of_any_network_computes_the_same(model: onnx.ModelProto, n: int, seed: int) -> None:
    graph = prepare(model)
    made = draft(graph, "hybrid", random_assignment(graph, n, seed), devices(n), LINK)
    assert_computes(made, model)


def tmi_net() -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8))
    return net.model(classifier(net, tmi_block(net, tmi_block(net, x, 8), 8, stride=2), 16))


@pytest.mark.parametrize(("n", "seed"), [(8, 6), (8, 101), (4, 35)])
def test_lanes_that_send_together_compute_in_one_segment(n: int, seed: int) -> None:
    """Though only some of them make what is sent, and others something heavy for later."""
    model = tmi_net()
    graph = prepare(model)
    assert_computes(draft(graph, "hybrid", random_assignment(graph, n, seed), devices(n), LINK), model)


def test_a_device_gets_just_the_channels_that_its_filters_read() -> None:
    graph = prepare(tmi_net())
    node = next(n for n in graph.branched() if len(branched_node.read(n).branches) > 1)
    conv = branched_node.read(node)
    mine = tuple(sorted(conv.branches[0].out_index.tolist()))
    rest = tuple(c for c in range(conv.out_channels) if c not in mine)
    placed = {n.name: NodePlacement((0,)) for n in graph.nodes} | {node.name: NodePlacement((1, 0), (mine, rest))}
    plan = draft(graph, "hybrid", placed, devices(2), LINK).plan
    (sent,) = [t for t in plan.transfers if (t.source, t.target) == (0, 1)]
    value = next(v for v in plan.values if v.name == sent.value)
    assert value.channels == sorted(conv.branches[0].in_index.tolist())
    assert sent.bytes == 4 * len(value.channels) * 8 * 8


def test_a_row_needs_its_halo_and_no_more() -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(net.conv3(net.relu(net.conv3("x", 3, 4)), 4, 5))
    graph = prepare(model)
    rows = NodePlacement((0, 1), rows=((0, 3), (3, 8)))
    made = draft(graph, "spatial", {n.name: rows for n in graph.nodes}, devices(2), LINK)
    values = {v.name: v for v in made.plan.values}
    got = {(t.source, t.target): values[t.value].rows for t in made.plan.transfers
           if values[t.value].tensor in ("x", graph.nodes[1].outputs[0].name)}
    assert got == {(-1, 0): (0, 4), (-1, 1): (2, 8), (0, 1): (2, 3), (1, 0): (3, 4)}
    assert_computes(made, model)


def test_overlapping_rows_are_computed_twice_and_not_sent() -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(net.conv3(net.relu(net.conv3("x", 3, 4)), 4, 5))
    graph = prepare(model)
    first, relu, last = (n.name for n in graph.nodes)
    wide = NodePlacement((0, 1), rows=((0, 5), (3, 8)))
    placed = {first: wide, relu: wide, last: NodePlacement((0, 1), rows=((0, 4), (4, 8)))}
    made = draft(graph, "hybrid", placed, devices(2), LINK)
    assert between_devices(made.plan) == 4 * 5 * 4 * 8  # half of the answer: there is no halo to send
    assert_computes(made, model)


def test_a_tensor_that_two_layers_read_comes_once() -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 4))
    model = net.model(net.op("Add", net.conv3(x, 4, 6), net.conv1(x, 4, 6)))
    graph = prepare(model)
    placed = {n.name: NodePlacement((0 if k < 2 else 1,)) for k, n in enumerate(graph.nodes)}
    made = draft(graph, "pipeline", placed, devices(2), LINK)
    assert between_devices(made.plan) == 4 * 4 * 8 * 8
    assert_computes(made, model)


def test_what_nobody_reads_is_not_computed() -> None:
    graph = prepare(tmi_net())
    placed = {n.name: NodePlacement((0, 1, 2)) for n in graph.nodes}
    plan = draft(graph, "hybrid", placed, devices(3), LINK).plan
    assert [s.device for s in plan.segments] == [0]
    assert between_devices(plan) == 0


def test_work_that_no_other_device_waits_for_is_a_segment_of_its_own() -> None:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 4))
    away = net.conv(net.relu(net.conv3(x, 4, 4)), net.weight(4, 4, 3, 3), pads=[1] * 4, name="away")
    model = net.model(net.op("Add", away, net.conv3(net.op("Sigmoid", net.conv3(x, 4, 4)), 4, 4)))
    graph = prepare(model)
    assert any(n.name == "away" for n in graph.nodes)
    placed = {n.name: NodePlacement((int(n.name == "away"),)) for n in graph.nodes}
    made = draft(graph, "hybrid", placed, devices(2), LINK)
    first, second = made.plan.segments[:2]
    assert (first.device, second.device) == (0, 0)
    assert any(t.value in first.outputs and t.target == 1 for t in made.plan.transfers)
    assert not any(t.value in second.outputs for t in made.plan.transfers)
    assert_computes(made, model)


def test_what_cannot_be_divided_is_whole_on_one_device_and_the_notes_say_so() -> None:
    net = Net(1, 4, 8, 8)
    x = net.relu(net.conv3("x", 4, 4))
    model = net.model(net.conv3(net.op("Transpose", x, perm=[0, 1, 3, 2]), 4, 4))
    graph = prepare(model)
    rows = NodePlacement((1, 0), rows=((0, 4), (4, 8)))
    made = draft(graph, "spatial", {n.name: rows for n in graph.nodes}, devices(2), LINK)
    (note,) = [n for n in made.notes if "Transpose" in n]
    assert "rows" in note
    assert "device 1" in note
    assert_computes(made, model)


def test_steps_that_cannot_be_divided_alike_are_one_note() -> None:
    net = Net(1, 4, 8, 8)
    x = net.relu(net.conv3("x", 4, 4))
    for _ in range(3):
        x = net.relu(net.op("Transpose", x, perm=[0, 1, 3, 2]))
    graph = prepare(net.model(net.conv3(x, 4, 4)))
    rows = NodePlacement((1, 0), rows=((0, 4), (4, 8)))
    made = draft(graph, "spatial", {n.name: rows for n in graph.nodes}, devices(2), LINK)
    (note,) = [n for n in made.notes if "Transpose" in n]
    assert note.startswith("3 steps, such as ")


@pytest.mark.parametrize(("placement", "message"), [
    (NodePlacement(()), "name each device once"), (NodePlacement((0, 0)), "name each device once"),
    (NodePlacement((5,)), "there are 2"), (NodePlacement((0, 1), ((0, 1), (2,))), "nobody computes"),
    (NodePlacement((0, 1), ((0, 1), (2, 9))), "lies outside"), (NodePlacement((0, 1), ((1, 0), (2, 3))), "not in order"),
    (NodePlacement((0, 1), ((0, 1, 2, 3),)), "1 parts for 2"), (NodePlacement((0,), rows=((0, 5),)), "nobody computes"),
])
def test_assignments_that_make_no_sense_are_refused(placement: NodePlacement, message: str) -> None:
    net = Net(1, 3, 8, 8)
    graph = prepare(net.model(net.conv3("x", 3, 4)))
    with pytest.raises(UsageError) as caught:
        partition(graph, {n.name: placement for n in graph.nodes}, 2)
    assert message in f"{caught.value.message} {caught.value.hint}"


def test_an_assignment_that_leaves_out_a_node_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves out"):
        partition(prepare(tmi_net()), {}, 2)


def test_sharding_leaves_the_graph_as_it_was() -> None:
    graph = prepare(tmi_net())
    before = graph.to_model().SerializeToString()
    for seed in range(3):
        partition(graph, random_assignment(graph, 3, seed), 3)
    assert graph.to_model().SerializeToString() == before


def test_several_outputs_are_refused() -> None:
    net = Net(1, 3, 8, 8)
    x = net.conv3("x", 3, 4)
    with pytest.raises(UnsupportedModelError, match="2 outputs"):
        prepare(net.model(net.relu(x), x))


def test_lanes_of_a_device_are_convolutions_of_their_own_and_send_together() -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", net.relu(net.conv3("x", 3, 4)))),
                             net.const(net.weight(4, 5))))
    graph = prepare(model)
    lanes = NodePlacement((0, 0), ((0, 2), (1, 3)))
    placed = {n.name: NodePlacement((1,)) if n.op == "Gemm" else lanes for n in graph.nodes}
    made = draft(graph, "branch", placed, devices(2), LINK)
    assert sorted(ops(models(made)[0]).items()) == [("Concat", 1), ("Conv", 2), ("Flatten", 2), ("Gather", 1),
                                                   ("GlobalAveragePool", 2), ("Relu", 2)]
    assert [t.bytes for t in made.plan.transfers if (t.source, t.target) == (0, 1)] == [16]
    assert made.plan.layouts[graph.nodes[0].outputs[0].name].channels == [[0, 1, 2, 3]]
    assert_computes(made, model)


def test_layouts_say_where_tensors_lie() -> None:
    net = Net(1, 3, 8, 8)
    graph = prepare(net.model(net.relu(net.conv3("x", 3, 4))))
    conv, relu = graph.nodes
    placed = {conv.name: NodePlacement((1, 0), ((0, 2), (1, 3))), relu.name: NodePlacement((0, 1))}
    layouts = partition(graph, placed, 2).layouts
    mine = layouts[conv.outputs[0].name]
    assert (mine.kind, mine.devices, mine.channels) == ("channels", [1, 0], [[0, 2], [1, 3]])
    assert layouts[relu.outputs[0].name].kind == "replicated"


# ---- one operator at a time -------------------------------------------------------------------------------------------
def unread(net: Net, x: str) -> str:
    """Maximum pooling whose second output has no name."""
    y = net.name()
    net.nodes.append(helper.make_node("MaxPool", [x], [y, ""], name="pool", kernel_shape=[2, 2]))
    return y


OPERATORS = {
    "max pool": lambda n, x: n.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "max pool, ceil": lambda n, x: n.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "max pool, dilated": lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2], dilations=[2, 2]),
    "average pool": lambda n, x: n.op("AveragePool", x, kernel_shape=[3, 3], strides=[2, 1], pads=[1] * 4),
    "average pool, padded": lambda n, x: n.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "convolution, strided": lambda n, x: n.conv(x, n.weight(6, 4, 3, 3), strides=[2, 2], pads=[1, 1, 0, 0]),
    "convolution, dilated": lambda n, x: n.conv(x, n.weight(6, 4, 3, 3), dilations=[2, 1], pads=[2, 1, 2, 1]),
    "convolution, 1x1 strided": lambda n, x: n.conv1(x, 4, 6, stride=2),
    "convolution, wide padding": lambda n, x: n.conv(x, n.weight(6, 4, 3, 3), pads=[3] * 4),
    "depthwise": lambda n, x: n.conv(x, n.weight(4, 1, 5, 5), bias=n.normal(4), group=4, pads=[2] * 4, strides=[2, 2]),
    "depthwise, valid": lambda n, x: n.conv(x, n.weight(4, 1, 3, 3), group=4, auto_pad="VALID"),
    "two filters per channel": lambda n, x: n.conv(x, n.weight(8, 1, 3, 3), group=4, pads=[1] * 4),
    "same padding": lambda n, x: n.conv(x, n.weight(6, 4, 3, 3), auto_pad="SAME_UPPER"),
    "batch norm": lambda n, x: n.bn(n.op("Abs", x), 4),
    "slope per channel": lambda n, x: n.op("PRelu", x, n.const(n.normal(4, 1, 1))),
    "constant per row": lambda n, x: n.op("Add", x, n.const(n.normal(8, 1))),
    "constant per pixel": lambda n, x: n.op("Mul", x, n.const(n.normal(1, 4, 8, 8))),
    "scaled by its mean": lambda n, x: n.op("Mul", x, n.op("GlobalAveragePool", x)),
    "mean, kept": lambda n, x: n.op("ReduceMean", x, n.ints(2, 3), keepdims=1),
    "mean, dropped": lambda n, x: n.op("ReduceMean", x, n.ints(2, 3), keepdims=0),
    "mean of columns": lambda n, x: n.op("ReduceMean", x, n.ints(3), keepdims=1),
    "maximum": lambda n, x: n.op("GlobalMaxPool", x),
    "flatten": lambda n, x: n.op("Gemm", n.op("Flatten", n.op("MaxPool", x, kernel_shape=[4, 4], strides=[4, 4])),
                                 n.const(n.weight(16, 7)), n.const(n.normal(7))),
    "flatten, output": lambda n, x: n.op("Flatten", n.op("MaxPool", x, kernel_shape=[4, 4], strides=[4, 4])),
    "matrix": lambda n, x: n.op("MatMul", n.op("Flatten", n.op("GlobalAveragePool", x)), n.const(n.weight(4, 7))),
    "matrix, one bias": lambda n, x: n.op("Gemm", n.op("Flatten", n.op("GlobalMaxPool", x)), n.const(n.weight(7, 4)),
                                          n.const(n.normal(1)), transB=1, alpha=0.5),
    "there and back": lambda n, x: n.op("Reshape", n.op("Sigmoid", n.op("Flatten", n.op("GlobalAveragePool", x))),
                                        n.ints(1, 4, 1, 1)),
    "concatenated": lambda n, x: n.concat(n.op("Exp", x), x, n.op("Neg", x)),
    "chosen": lambda n, x: n.op("Abs", n.take(x, [3, 1, 1, -1, 0])),
    "split": lambda n, x: n.op("Add", *n.op("Split", x, n.ints(2, 2), outputs=2, axis=1)),
    "sliced": lambda n, x: n.op("Abs", n.op("Slice", x, n.ints(1), n.ints(4), n.ints(1), n.ints(2))),
    "rows sliced": lambda n, x: n.op("Abs", n.op("Slice", x, n.ints(1), n.ints(-1), n.ints(2))),
    "resized": lambda n, x: n.op("Resize", x, "", n.const(np.float32([1, 1, 2, 2])), mode="nearest"),
    "padded": lambda n, x: n.op("Pad", x, n.ints(0, 0, 1, 1, 0, 0, 2, 2)),
    "softmax": lambda n, x: n.op("Softmax", x, axis=1),
    "two outputs": lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2], outputs=2)[0],
    "one output of two": lambda n, x: unread(n, x),
    "two outputs of rows": lambda n, x: n.op("Mul", *n.op("Split", x, n.ints(4, 4), outputs=2, axis=2)),
    "reshaped": lambda n, x: n.op("Reshape", x, n.ints(1, 2, 2, 8, 8)),
    "of other rank": lambda n, x: n.op("Add", x, n.op("Reshape", n.op("GlobalMaxPool", x), n.ints(4, 1, 1))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_is_divided_rightly(name: str) -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(OPERATORS[name](net, net.conv3("x", 3, 4)))
    graph = prepare(model)
    for seed in range(6):
        n = 2 + seed % 4
        made = draft(graph, "hybrid", random_assignment(graph, n, seed), devices(n), LINK)
        assert_computes(made, model, f"seed {seed}")


@pytest.mark.parametrize("op", ["Gelu", "Swish"])
def test_a_net_with_activations_of_newer_opsets_is_divided(op: str) -> None:
    net = Net(1, 3, 8, 8, opset=24)
    x = net.op(op, net.conv3("x", 3, 8))
    model = net.model(net.op(op, net.conv3(net.op("Add", net.op(op, net.conv3(x, 8, 8, group=2)), x), 8, 4)))
    graph = prepare(model)
    assert all(shardable(n) == {"channels", "rows"} for n in graph.nodes if n.op == op)
    for seed in range(6):
        made = draft(graph, "hybrid", random_assignment(graph, 3, seed), devices(3), LINK)
        assert_computes(made, model, f"seed {seed}")


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 6, 5, 3)])
def test_one_and_three_dimensions_are_divided_too(shape: tuple[int, ...]) -> None:
    net = Net(*shape)
    nd = len(shape) - 2
    y = net.relu(net.conv("x", net.weight(8, 2, *(3,) * nd), group=2, pads=[1] * 2 * nd))
    model = net.model(net.op("MaxPool", net.conv(y, net.weight(4, 4, *(1,) * nd), group=2), kernel_shape=[2] * nd))
    graph = prepare(model)
    for seed in range(8):
        made = draft(graph, "hybrid", random_assignment(graph, 3, seed), devices(3), LINK)
        assert_computes(made, model)


def test_operators_say_how_they_can_be_divided() -> None:
    net = Net(1, 3, 8, 8)
    x = net.conv3("x", 3, 4)
    pool = net.op("GlobalAveragePool", net.op("Softmax", net.relu(x), axis=1))
    graph = prepare(net.model(net.op("Gemm", net.op("Flatten", pool), net.const(net.normal(4, 5)))))
    kinds = {n.op: shardable(n) for n in graph.nodes}
    both = {"channels", "rows"}
    assert kinds == {"BranchedConv": both, "Relu": both, "Softmax": set(), "GlobalAveragePool": both, "Flatten": {"channels"},
                     "Gemm": {"channels"}}
    assert whole(graph.outputs[0]) == Tile(tuple(range(5)), (0, 1))


def test_who_needs_nothing_keeps_nobody_waiting() -> None:
    """Device 0 needs no row of device 1; in one segment, its last layer would come before what device 1 waits for."""
    net, x = Net(1, 3, 32, 32), "x"
    for k in range(3):
        x = net.conv3(x, 8 if k else 3, 8)
    model = net.model(x)
    graph = prepare(model)
    placed = {node.name: NodePlacement((0, 1), rows=((0, 16 - k), (16 - k, 32))) for k, node in enumerate(graph.nodes)}
    made = draft(graph, "spatial", placed, devices(2), LINK)
    layers = {d: [len(s.layers) for s in made.plan.segments if s.device == d and s.macs] for d in (0, 1)}
    assert layers == {0: [1, 1, 1], 1: [1, 1, 1]}
    assert_computes(made, model)
