"""lift_convs: which convolutions become a BranchedConv, in how many branches, and under which name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_kit import Net, assert_close, feeds_of, ops, run_one_form, run_ort

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.passes import lift_convs
from gkp.errors import UnsupportedModelError


def lifted(net: Net, y: str) -> Graph:
    model = net.model(y)
    graph, feeds = Graph(model), feeds_of(model)
    lift_convs.run(graph)
    assert_close(run_one_form(graph.to_model(), feeds), run_ort(model, feeds))
    return graph


def branches(graph: Graph) -> int:
    return len(branched_node.read(next(graph.branched())).branches)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.sampled_from([1, 2, 3]), st.integers(1, 2), st.integers(1, 2), st.booleans(),
       st.integers(0, 9999))
def test_any_geometry_computes_the_same(nd: int, groups: int, stride: int, dilation: int, bias: bool, seed: int) -> None:
    net = Net(2, 6, *(7, 6, 5)[:nd], seed=seed)
    pads = [int(p) for p in net.rng.integers(0, 3, 2 * nd)]
    y = net.conv("x", net.normal(6, 6 // groups, *(2, 1, 3)[:nd]), group=groups, strides=[stride] * nd, pads=pads,
                 dilations=[dilation] * nd, bias=net.normal(6) if bias else None)
    graph = lifted(net, y)
    assert ops(graph) == {"BranchedConv": 1}
    assert branches(graph) == groups


def test_block_zeros_inside_groups_are_found() -> None:
    net = Net(1, 8, 5, 5)
    weight = net.normal(8, 4, 3, 3)
    weight[:2, 2:] = 0
    weight[2:4, :2] = 0
    weight[7] = 0
    graph = lifted(net, net.conv("x", weight, group=2, bias=net.normal(8)))
    conv = branched_node.read(next(graph.branched()))
    assert [(b.out_index.tolist(), b.in_index.tolist()) for b in conv.branches] == [
        ([0, 1], [0, 1]), ([2, 3], [2, 3]), ([4, 5, 6], [4, 5, 6, 7])]


def test_irregular_zeros_become_one_branch_of_what_lives() -> None:
    net = Net(1, 96, 2, 2)
    weight = net.normal(80, 96, 1, 1) * (net.rng.random((80, 96, 1, 1)) < 0.5)
    weight[:, 5] = 0
    weight[3] = 0
    graph = lifted(net, net.conv("x", weight.astype(np.float32)))
    conv = branched_node.read(next(graph.branched()))
    assert len(conv.branches) == 1
    assert conv.branches[0].weight.shape[:2] == (79, 95)


@pytest.mark.parametrize("filters", [16, 64, 80])
def test_zeros_here_and_there_divide_nothing_whatever_the_width(filters: int) -> None:
    net = Net(1, 64, 2, 2)
    graph = lifted(net, net.conv("x", (net.normal(filters, 64, 1, 1) * (net.rng.random((filters, 64, 1, 1)) < 0.5))))
    assert branches(graph) == 1
    assert not graph.holes


def test_a_zero_kernel_does_not_make_its_filter_a_branch() -> None:
    net = Net(1, 16, 4, 4)
    weight = net.normal(16, 16, 3, 3)
    weight[2, 3] = weight[5, 7] = 0
    graph = lifted(net, net.conv("x", weight))
    assert branches(graph) == 1
    assert not graph.holes


def test_filters_that_share_no_channel_are_branches() -> None:
    net = Net(1, 8, 4, 4)
    graph = lifted(net, net.conv("x", net.normal(8, 8, 3, 3) * np.eye(8, dtype=np.float32)[:, :, None, None]))
    assert branches(graph) == 8
    assert graph.holes


def test_filters_that_only_move_channels_are_not_pruned() -> None:
    net = Net(1, 8, 4, 4)
    graph = lifted(net, net.conv("x", np.eye(8, dtype=np.float32)[net.rng.permutation(8), :, None, None]))
    assert branched_node.read(next(graph.branched())).is_copy
    assert not graph.holes


def test_a_dead_filter_of_a_depthwise_convolution_is_a_hole() -> None:
    net = Net(1, 4, 5, 5)
    weight = net.normal(4, 1, 3, 3)
    weight[2] = 0
    assert lifted(net, net.conv("x", weight, group=4)).holes


def test_many_equal_groups_are_not_irregular() -> None:
    net = Net(1, 256, 2, 2)
    assert branches(lifted(net, net.conv1("x", 256, 256, group=128))) == 128


@pytest.mark.parametrize(("attrs", "weight", "reason"), [
    ({"group": 4}, (4, 1, 3, 3), "depthwise"),
    ({"group": 4}, (8, 1, 3, 3), "depthwise"),
    ({"auto_pad": "SAME_UPPER"}, (4, 4, 3, 3), "auto_pad"),
])
def test_what_stays_stock_says_why(attrs: dict[str, object], weight: tuple[int, ...], reason: str) -> None:
    net = Net(1, 4, 5, 5)
    graph = lifted(net, net.conv("x", net.normal(*weight), name="stays", **attrs))
    assert ops(graph) == {"Conv": 1}
    assert graph.metadata["gkp.left.stays"] == reason


def test_computed_weights_stay_stock() -> None:
    net = Net(1, 4, 5, 5)
    weight = net.op("Expand", net.op("ReduceMean", "x", keepdims=1), net.ints(2, 4, 1, 1))
    assert ops(lifted(net, net.op("Conv", "x", weight)))["Conv"] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_refused(bad: float) -> None:
    net = Net(1, 4, 5, 5)
    weight = net.normal(4, 4, 1, 1)
    weight[1, 2] = bad
    graph = Graph(net.model(net.conv("x", weight)))
    with pytest.raises(UnsupportedModelError, match="NaN or infinity"):
        lift_convs.run(graph)


def test_a_weight_that_does_not_fit_its_input_is_refused() -> None:
    net = Net(1, 4, 5, 5)
    net.nodes.clear()
    y = net.conv("x", net.normal(4, 4, 1, 1))
    model = net.model(y)
    model.graph.node[0].attribute.add(name="group", type=2, i=2)
    del model.graph.value_info[:]
    with pytest.raises(UnsupportedModelError, match="does not fit an input of 4 channels"):
        lift_convs.run(Graph(model))


@pytest.mark.parametrize(("shape", "weight", "group"), [((1, 4, 5), (4, 4, 1, 1), 1), ((1, 4, 5, 5, 5), (4, 4, 1, 1), 1),
                                                        ((1, 0, 5, 5), (4, 0, 1, 1), 0)])
def test_a_weight_of_another_rank_or_for_no_groups_is_refused(shape: tuple[int, ...], weight: tuple[int, ...], group: int) -> None:
    net = Net(1, 4, 5, 5)
    net.nodes.clear()
    model = net.model(net.conv("x", net.normal(*weight)))
    model.graph.node[0].attribute.add(name="group", type=2, i=group)
    del model.graph.value_info[:], model.graph.input[0].type.tensor_type.shape.dim[:]
    for size in shape:
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=size)
    with pytest.raises(UnsupportedModelError, match=f"does not fit an input of {shape[1]} channels and {len(shape)} axes"):
        lift_convs.run(Graph(model))


@pytest.mark.parametrize(("weight", "node", "name"), [
    ("layer1.0.conv1.weight", "/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
    ("onnx::Conv_12", "/layer1/layer1.0/conv1/Conv", "layer1.0.conv1"),
    ("val_3", "node_Conv_7", "node_Conv_7"),
    ("evil\x1b[0m.weight", "c", "evil?[0m"),
])
def test_layers_are_named_after_weight_or_path(weight: str, node: str, name: str) -> None:
    net = Net(1, 4, 5, 5)
    model = net.model(net.conv("x", net.normal(4, 4, 1, 1)))
    model.graph.initializer[0].name = model.graph.node[0].input[1] = weight
    model.graph.node[0].name = node
    graph = Graph(model)
    lift_convs.run(graph)
    assert graph.nodes[0].name == name


def test_two_layers_with_one_weight_keep_different_names() -> None:
    net = Net(1, 4, 5, 5)
    weight = net.const(net.normal(4, 4, 1, 1))
    graph = lifted(net, net.op("Conv", net.op("Conv", "x", weight), weight))
    assert len({n.name for n in graph.branched()}) == 2
