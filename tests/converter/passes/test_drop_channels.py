"""drop_channels: dead and constant channels go exactly, or they stay."""

import numpy as np
import pytest
from onnx_kit import Net, one_form, ops

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph


def forms(graph: Graph) -> list[BranchedConv]:
    return [branched_node.read(n) for n in graph.branched()]


def with_dead(net: Net, dead: list[int], f: int = 8, bias: bool = True) -> str:
    """3x3 convolution whose filters `dead` are zero (their bias is not)."""
    weight = net.weight(f, 4, 3, 3)
    weight[dead] = 0
    return net.conv("x", weight, bias=net.normal(f) + np.float32(2) if bias else None, pads=[1] * 4)


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "LeakyRelu", "HardSwish", "Exp", ""])
def test_a_constant_channel_goes_into_the_bias_of_a_reader_without_padding(activation: str) -> None:
    net = Net(2, 4, 5, 5)
    y = with_dead(net, [1, 6])
    y = net.op(activation, y) if activation else y
    first, second = forms(one_form(net.model(net.conv(y, net.weight(5, 8, 3, 3)))))
    assert first.out_channels == second.in_channels == 6


def test_a_constant_channel_stays_where_the_reader_pads() -> None:
    net = Net(2, 4, 5, 5)
    first, second = forms(one_form(net.model(net.conv3(net.op("Sigmoid", with_dead(net, [1, 6])), 8, 5))))
    assert first.out_channels == second.in_channels == 8
    assert first.written.sum() == 6


def test_a_zero_channel_goes_even_where_the_reader_pads() -> None:
    net = Net(2, 4, 5, 5)
    y = net.op("Tanh", net.relu(with_dead(net, [1, 6], bias=False)))
    first, second = forms(one_form(net.model(net.conv3(y, 8, 5))))
    assert first.out_channels == second.in_channels == 6


def test_a_negative_constant_behind_relu_is_zero() -> None:
    net = Net(2, 4, 5, 5)
    weight = net.weight(8, 4, 3, 3)
    weight[3] = 0
    y = net.conv("x", weight, bias=np.full(8, -1, np.float32), pads=[1] * 4)
    first, _ = forms(one_form(net.model(net.conv3(net.relu(y), 8, 5))))
    assert first.out_channels == 7


def test_channels_that_nobody_reads_go() -> None:
    net = Net(2, 4, 5, 5)
    weight = net.weight(5, 8, 3, 3)
    weight[:, [0, 5, 7]] = 0
    first, second = forms(one_form(net.model(net.conv(net.relu(net.conv3("x", 4, 8)), weight))))
    assert first.out_channels == second.in_channels == 5


def test_every_reader_counts() -> None:
    net = Net(2, 4, 5, 5)
    one, two = net.weight(5, 8, 1, 1), net.weight(5, 8, 1, 1)
    one[:, :4], two[:, 2:] = 0, 0
    y = net.relu(net.conv3("x", 4, 8))
    graph = one_form(net.model(net.conv(y, one), net.conv(net.op("Tanh", y), two)))
    assert forms(graph)[0].out_channels == 6


@pytest.mark.parametrize("spoil", [
    lambda n, y: [y],  # an output of the model
    lambda n, y: [n.op("GlobalAveragePool", y)],
    lambda n, y: [n.op("Add", y, n.relu("x"))],
])
def test_channels_that_something_else_sees_stay(spoil) -> None:  # type: ignore[no-untyped-def]
    net = Net(2, 4, 5, 5)
    weight = net.weight(5, 4, 1, 1)
    weight[:, 0] = 0
    y = net.conv3("x", 4, 4)
    graph = one_form(net.model(net.conv(y, weight), *spoil(net, y)))
    assert forms(graph)[0].out_channels == 4


def test_the_last_channel_stays() -> None:
    net = Net(2, 4, 5, 5)
    y = net.relu(net.conv3("x", 4, 8))
    first, second = forms(one_form(net.model(net.conv(y, np.zeros((5, 8, 1, 1), np.float32), bias=net.normal(5)))))
    assert first.out_channels == second.in_channels == 1
    assert not second.branches


def test_a_whole_dead_layer_leaves_constants() -> None:
    net = Net(2, 4, 5, 5)
    y = net.relu(with_dead(net, list(range(8))))
    graph = one_form(net.model(net.conv1(net.relu(net.conv1(y, 8, 6)), 6, 5)))
    assert sum(f.params for f in forms(graph)) == 0


def test_zero_batchnorm_scale_makes_a_channel_constant() -> None:
    net = Net(2, 4, 5, 5)
    gamma, beta = np.ones(8, np.float32), np.zeros(8, np.float32)
    gamma[[2, 4]] = 0
    y = net.op("BatchNormalization", net.conv3("x", 4, 8), *[net.const(v) for v in (gamma, beta, beta, gamma + 1)])
    first, _ = forms(one_form(net.model(net.conv3(net.relu(y), 8, 5))))
    assert first.out_channels == 6


def test_gsparsity_bottleneck_shrinks_inside_and_keeps_its_borders() -> None:
    net = Net(2, 8, 6, 6)
    one, two, three = net.weight(6, 8, 1, 1), net.weight(6, 6, 3, 3), net.weight(8, 6, 1, 1)
    one[[0, 3]], two[[1, 2, 5]] = 0, 0
    y = net.relu(net.bn(net.conv("x", one), 6))
    y = net.relu(net.bn(net.conv(y, two, pads=[1] * 4), 6))
    y = net.relu(net.op("Add", net.bn(net.conv(y, three), 8), "x"))
    a, b, c = forms(one_form(net.model(y)))
    assert a.out_channels <= 6  # a filter whose constant is not zero stays in front of the padded 3x3
    assert b.out_channels == c.in_channels == 3  # no padding behind it: exact
    assert c.out_channels == 8


def test_old_operator_sets_are_evaluated_as_they_were_defined() -> None:
    net = Net(2, 4, 5, 5, opset=10)
    y = net.op("Clip", with_dead(net, [1]), min=0.0, max=1.0)
    assert forms(one_form(net.model(net.conv1(y, 8, 5))))[0].out_channels == 7


def test_a_new_operator_set_too() -> None:
    net = Net(2, 4, 5, 5, opset=20)
    y = net.op("Gelu", with_dead(net, [1]))
    assert forms(one_form(net.model(net.conv1(y, 8, 5)), tol=1e-4))[0].out_channels == 7


def test_a_chain_of_dead_channels_ends() -> None:
    net = Net(2, 4, 5, 5)
    y = with_dead(net, [0, 1], bias=False)
    for _ in range(4):
        weight = net.weight(8, 8, 3, 3)
        weight[[0, 1, 7]] = 0
        y = net.conv(net.relu(y), weight, pads=[1] * 4)
    graph = one_form(net.model(y))
    assert [f.out_channels for f in forms(graph)] == [6, 5, 5, 5, 8]
    assert ops(graph)["Relu"] == 4
