"""fold_batchnorm: what goes into the weights, and what must stay."""

from collections.abc import Callable

import numpy as np
import pytest
from onnx import numpy_helper
from onnx_kit import Net, assert_close, feeds_of, ops, run_one_form, run_ort

from gkp.converter.graph import Graph
from gkp.converter.passes import fold_batchnorm, fold_constants, lift_convs


def folded(net: Net, *outputs: str) -> Graph:
    """lift + fold_batchnorm, once the result computes the same."""
    model = net.model(*outputs)
    graph, feeds = Graph(model), feeds_of(model)
    fold_constants.run(graph)
    lift_convs.run(graph)
    while fold_batchnorm.run(graph):
        pass
    assert_close(run_one_form(graph.to_model(), feeds), run_ort(model, feeds))
    return graph


def per_channel(net: Net, c: int = 6) -> str:
    return net.const(net.normal(1, c, 1, 1) + np.float32(3))


@pytest.mark.parametrize("after", [
    lambda n, y: n.bn(y, 6),
    lambda n, y: n.bn(n.bn(y, 6), 6),
    lambda n, y: n.op("Mul", y, per_channel(n)),
    lambda n, y: n.op("Mul", per_channel(n), y),
    lambda n, y: n.op("Add", y, n.const(n.normal(6, 1, 1))),
    lambda n, y: n.op("Sub", y, n.const(n.normal(6, 1, 1))),
    lambda n, y: n.op("Div", y, per_channel(n)),
    lambda n, y: n.op("Mul", y, n.const(np.float32(0.5))),
    lambda n, y: n.op("Add", n.op("Mul", n.bn(y, 6), n.const(np.float32([2]))), per_channel(n)),
])
def test_channelwise_affine_goes_into_the_convolution(after: Callable[[Net, str], str]) -> None:
    net = Net(2, 4, 5, 5)
    assert ops(folded(net, after(net, net.conv3("x", 4, 6, group=2, bias=True)))) == {"BranchedConv": 1}


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 4, 5, 3)])
def test_one_and_three_dimensions(shape: tuple[int, ...]) -> None:
    net = Net(*shape)
    y = net.bn(net.conv("x", net.normal(6, 4, *(1,) * (len(shape) - 2))), 6)
    y = net.op("Mul", y, net.const(net.normal(6, *(1,) * (len(shape) - 2))))
    assert ops(folded(net, y)) == {"BranchedConv": 1}


@pytest.mark.parametrize(("after", "stays"), [
    (lambda n, y: n.op("Mul", y, n.const(n.normal(5, 5))), "Mul"),  # per pixel
    (lambda n, y: n.op("Mul", y, n.const(n.normal(5))), "Mul"),  # per column
    (lambda n, y: n.op("Sub", per_channel(n), y), "Sub"),
    (lambda n, y: n.op("Div", per_channel(n), y), "Div"),
    (lambda n, y: n.op("Add", y, n.op("Relu", y)), "Add"),
    (lambda n, y: n.op("Max", n.bn(n.relu(y), 6), y), "BatchNormalization"),
    (lambda n, y: n.op("Mul", y, n.const(np.full((2, 1, 1, 1), 2, np.float32))), "Mul"),  # per image
    (lambda n, y: n.op("Squeeze", n.op("Mul", y, n.const(np.full((1,) * 5, 2, np.float32))), n.ints(0)), "Mul"),
])
def test_anything_else_stays(after: Callable[[Net, str], str], stays: str) -> None:
    net = Net(2, 4, 5, 5)
    assert ops(folded(net, after(net, net.conv3("x", 4, 6, bias=True))))[stays] == 1


def test_a_convolution_that_is_an_output_keeps_its_own_values() -> None:
    net = Net(2, 4, 5, 5)
    y = net.conv3("x", 4, 6)
    assert ops(folded(net, net.bn(y, 6), y)) == {"BranchedConv": 1, "BatchNormalization": 1}


def test_division_by_zero_stays_a_division() -> None:
    net = Net(2, 4, 5, 5)
    y = net.op("Div", net.conv3("x", 4, 6), net.const(np.zeros((6, 1, 1), np.float32)))
    y = net.op("Clip", y, net.const(np.float32(-1)), net.const(np.float32(1)))
    assert ops(folded(net, y))["Div"] == 1


def test_zero_scale_leaves_a_constant_channel() -> None:
    net = Net(2, 4, 5, 5)
    y = net.op("BatchNormalization", net.conv3("x", 4, 6), *[net.const(np.float32(v)) for v in
               ([0] * 6, range(6), [1] * 6, [1] * 6)])
    graph = folded(net, y)
    assert ops(graph) == {"BranchedConv": 1}


@pytest.mark.parametrize("shape", [(2, 3), (5,), (1,), ()])
def test_a_normalisation_whose_numbers_do_not_fit_its_channels_stays(shape: tuple[int, ...]) -> None:
    net = Net(2, 4, 5, 5)
    model = net.model(net.bn(net.conv3("x", 4, 6), 6))
    name = next(n for n in model.graph.node if n.op_type == "BatchNormalization").input[2]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), name))
    graph = Graph(model)
    lift_convs.run(graph)
    assert not fold_batchnorm.run(graph)
    assert ops(graph) == {"BranchedConv": 1, "BatchNormalization": 1}
