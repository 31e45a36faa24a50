"""Quantised networks become programs of integers, which compute what the Q/DQ graph says, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from int8_kit import by_hand
from interpret import interpret
from native_kit import native_runs
from net_blocks import classifier, depthwise, dsp_block, networks, shuffle, tmi_block
from onnx import helper, numpy_helper
from onnx_kit import Net, feeds_of, run_ort
from program_kit import check_program, kinds

from gkp.branched import BranchedConv
from gkp.converter.graph import Graph
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import Activation, Conv, Depthwise, Dequantise, Grid, Port, Program, Quantise, Value
from gkp.converter.native.reading.frontend import program
from gkp.converter.native.reading.fuse import fuse
from gkp.converter.recognise import recognise, simplify
from gkp.converter.reference import reference
from gkp.errors import UnsupportedModelError


def resnet() -> onnx.ModelProto:
    net = Net(1, 3, 12, 12)
    x = tmi_block(net, dsp_block(net, net.relu(net.conv3("x", 3, 8, bias=True)), 8), 8)
    x = net.relu(net.op("Add", net.conv3(x, 8, 8, bias=True), x))
    return net.model(classifier(net, net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), 8))


def mobilenet() -> onnx.ModelProto:
    net = Net(1, 3, 12, 12)
    x = net.relu(net.conv3("x", 3, 24, stride=2, bias=True))
    x = net.op("Clip", depthwise(net, x, 24), net.const(np.float32(0)), net.const(np.float32(6)))
    y = net.conv1(x, 24, 24)
    return net.model(classifier(net, net.op("Add", y, x), 24))


def shuffled() -> onnx.ModelProto:
    """Integers go through a channel shuffle and a Concat."""
    net = Net(1, 8, 6, 6)
    x = net.relu(net.conv3("x", 8, 8, group=2))
    y = net.conv1(shuffle(net, x, (1, 8, 6, 6)), 8, 8, group=2)
    return net.model(net.conv1(net.concat(net.relu(y), x), 16, 5))


def shifted() -> onnx.ModelProto:
    """Zero points other than 0 in pads."""
    net = Net(1, 3, 7, 9)
    x = net.op("LeakyRelu", net.conv3("x", 3, 8, bias=True), alpha=0.3)
    return net.model(net.conv3(net.op("HardSwish", net.conv3(x, 8, 8)), 8, 4))


NETWORKS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet": resnet, "mobilenet": mobilenet, "shuffled": shuffled, "shifted": shifted}


def fused(graph: Graph) -> Program:
    made = fuse(program(graph.copy()))
    check_program(made)
    return made


def wanted(graph: Graph, x: Any) -> Any:
    run, name = reference(graph.to_model()), graph.inputs[0].name
    return np.concatenate([run({name: one[None]})[0] for one in x])


@pytest.mark.parametrize("name", NETWORKS)
def test_native_gives_what_the_graph_says(name: str) -> None:
    """Steps of scales are powers of two here, so that nothing is rounded but by quantisers. Twice, with other images, on
    several threads: halos keep their zero points."""
    graph = by_hand(NETWORKS[name]())
    made = fused(graph)
    x = [feeds_of(graph.to_model(), seed=seed)["x"] for seed in range(5)]
    images = np.concatenate(x)
    runs = [({"x": images}, 2), ({"x": images[::-1]}, 1)]
    (first,), (second,) = native_runs(make_plan(made, host_cpu()), runs, shared=True, together=True)
    np.testing.assert_allclose(first, wanted(graph, images), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(second, first[::-1])


@pytest.mark.parametrize(("name", "convolutions"), [("resnet", 7), ("mobilenet", 4)])
def test_nothing_is_left_in_floats(name: str, convolutions: int) -> None:
    made = fused(by_hand(NETWORKS[name]()))
    found = kinds(made)
    assert not found["Quantise"]
    assert not found["Dequantise"]
    assert not found["Binary"], "residuals are added by the convolutions"
    assert found["Conv"] + found["Depthwise"] == convolutions
    outputs = {port.value for port in made.outputs}
    assert all(made.values[s.target].grid for s in made.steps if s.target not in outputs)
    assert made.values[made.inputs[0].value].grid, "the input is quantised on the way in"


@settings(max_examples=15, deadline=None)
@given(networks(most=3))
def test_programs_of_integers_compute_what_those_of_pairs_do(model: onnx.ModelProto) -> None:
    graph = by_hand(model)
    plain, made = program(graph.copy()), fused(graph)
    x = [np.random.default_rng(0).standard_normal((2, *port.shape)) for port in made.inputs]
    for got, want in zip(interpret(made, x, double=True), interpret(plain, x, double=True), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


# ---- from grid to grid --------------------------------------------------------------------------------------------------
Then = Callable[[Net, str], str]
_FIRST, _COARSE, _LAST = (0.0625, 3), (0.5, 128), (0.03125, 40)


def paired(net: Net, x: str, how: tuple[float, int]) -> str:
    """x, quantised and back. how: scale and zero point of uint8."""
    scale, zero = net.const(np.float32(how[0])), net.const(np.uint8(how[1]))
    return str(net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, zero), scale, zero))


def _layer(net: Net, x: str) -> str:
    weight = net.op("DequantizeLinear", net.const(net.rng.integers(-9, 10, (4, 4, 3, 3)).astype(np.int8)), net.const(np.float32(0.125)),
                    net.const(np.int8(0)))
    return net.relu(net.op("Conv", x, weight, pads=[1] * 4))


BETWEEN: dict[str, Then] = {
    "nothing": lambda n, x: x,
    "a convolution": _layer,
    "a shuffle": lambda n, x: n.take(x, [2, 0, 3, 1]),
    "a maximum": lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2]),
    "a concatenation": lambda n, x: n.concat(x, x),
    "two grids side by side": lambda n, x: n.concat(paired(n, x, _COARSE), x),
    "a rectifier": lambda n, x: n.relu(x),
}


@pytest.mark.parametrize("last", BETWEEN)
@pytest.mark.parametrize("first", BETWEEN)
def test_what_is_rounded_to_one_grid_and_then_to_another_is_rounded_twice(first: str, last: str) -> None:
    """No step leaves the coarse one out, whichever stands before and behind it. Scales are powers of two: all sums are exact."""
    net = Net(2, 4, 4, 5)
    before = BETWEEN[first](net, paired(net, "x", _FIRST))
    y = before if first == "two grids side by side" else paired(net, before, _COARSE)
    z = y if last == "a convolution" and first in ("a concatenation", "two grids side by side") else BETWEEN[last](net, y)
    model = net.model(paired(net, z, _LAST), *([before] if first == "a maximum" else []))
    made = fused(simplify(recognise(Graph(model))))
    x = 2 * feeds_of(model)["x"]
    for got, want in zip(interpret(made, [x]), run_ort(model, {"x": x}), strict=True):
        np.testing.assert_array_equal(got, want)


def test_words_of_an_input_that_is_quantised_twice_are_made_of_its_integers() -> None:
    """Few channels, and an activation between the two: no step can read the caller's numbers."""
    net = Net(2, 1, 3, 6)
    y = net.op("DequantizeLinear", net.const(np.full((8, 1, 3, 3), 3, np.int8)), net.const(np.float32(0.25)), net.const(np.int8(0)))
    y = net.op("Conv", paired(net, net.relu(paired(net, "x", _FIRST)), _COARSE), y, pads=[1] * 4)
    model = net.model(paired(net, y, _LAST))
    x = 2 * feeds_of(model)["x"]
    made = make_plan(fused(simplify(recognise(Graph(model)))), host_cpu())
    np.testing.assert_array_equal(native_runs(made, [({"x": x}, 1)])[0][0], run_ort(model, {"x": x})[0])


# ---- by hand ------------------------------------------------------------------------------------------------------------
HALF, EIGHTH = Grid(0.5, 128), Grid(0.125, 0)


def quantised(weight: float, bias: float = 0.0, kernel: int = 3) -> BranchedConv:
    conv = BranchedConv.from_dense(np.full((4, 4, kernel, kernel), weight, np.float32), np.full(4, bias, np.float32),
                                   pads=(kernel // 2,) * 4)
    return replace(conv, scale=np.ones(4, np.float32))


def pair(conv: BranchedConv, grid: Grid = HALF) -> Program:
    """x - quantise - dequantise - conv - y."""
    x, c = Value(conv.in_channels, 5, 5), conv.in_channels
    values = (x, Value(c, 5, 5, UINT8, grid), x, x)
    steps = (Quantise(0, 1), Dequantise(1, 2), Conv(2, 3, conv, layer="stage.conv"))
    return Program(values, steps, (Port("x", 0, (c, 5, 5)),), (Port("y", 3, (c, 5, 5)),))


def test_a_layer_without_integer_weights_stays_in_floats() -> None:
    made = fuse(pair(replace(quantised(0.3), scale=None)))
    assert kinds(made) == {"Dequantise": 1, "Conv": 1}
    assert made.values[made.inputs[0].value].grid == HALF


@pytest.mark.parametrize("conv", [quantised(127, kernel=151), quantised(1, bias=2.0**31)], ids=["sum", "bias"])
def test_sums_that_may_not_fit_are_refused_with_the_layers_name(conv: BranchedConv) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layer stage\.conv .* 32 bits"):
        fuse(pair(conv))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_that_fit_are_taken_and_one_more_is_not(sign: int) -> None:
    """255 * 127 * 66,311 + 1,912 = 2^31 - 1."""
    for bias, fits in ((1912, True), (1913, False)):
        weight = np.full((1, 66_311, 1, 1), 127 * sign, np.float32)
        conv = replace(BranchedConv.from_dense(weight, np.full(1, bias * sign, np.float32)), scale=np.ones(1, np.float32))
        values = (Value(66_311, 1, 1), Value(66_311, 1, 1, UINT8, Grid(1.0, 0)), Value(66_311, 1, 1), Value(1, 1, 1))
        found = Program(values, (Quantise(0, 1), Dequantise(1, 2), Conv(2, 3, conv, layer="stage.conv")),
                        (Port("x", 0, (66_311, 1, 1)),), (Port("y", 3, (1, 1, 1)),))
        if fits:
            assert kinds(fuse(found)) == {"Conv": 1}
        else:
            with pytest.raises(UnsupportedModelError, match=r"layer stage\.conv .* 32 bits"):
                fuse(found)


def test_a_tensor_that_is_an_output_too_stays_an_output() -> None:
    """Both its integers' readers and the caller get it."""
    base = pair(quantised(1))
    values = (*base.values, Value(4, 5, 5, UINT8, EIGHTH), Value(4, 5, 5), Value(4, 5, 5))
    steps = (*base.steps, Quantise(3, 4), Dequantise(4, 5), Conv(5, 6, quantised(-1), Activation.RELU))
    both = Program(values, steps, base.inputs, (*base.outputs, Port("z", 6, (4, 5, 5))))
    made = fuse(both)
    check_program(made)
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 5))
    for got, want in zip(interpret(made, [x], double=True), interpret(both, [x], double=True), strict=True):
        np.testing.assert_array_equal(got, want)


def test_depthwise_sums_that_floats_do_not_hold_stay_in_floats() -> None:
    weight = np.full((4, 7, 7), 127, np.float32)
    x = Value(4, 9, 9)
    values = (x, Value(4, 9, 9, UINT8, HALF), x, x, Value(4, 9, 9, UINT8, HALF), x)
    for bias, integers in ((0.0, True), (2.0**24, False)):
        step = Depthwise(2, 3, weight, np.full(4, bias, np.float32), (1, 1), (3, 3, 3, 3), (1, 1), scale=np.ones(4, np.float32))
        steps = (Quantise(0, 1), Dequantise(1, 2), step, Quantise(3, 4), Dequantise(4, 5))
        made = fuse(Program(values, steps, (Port("x", 0, (4, 9, 9)),), (Port("y", 5, (4, 9, 9)),)))
        (found,) = [s for s in made.steps if isinstance(s, Depthwise)]
        assert (made.values[found.source].grid is not None) == integers


# ---- files of others ------------------------------------------------------------------------------------------------
def matrix(weight: Any) -> onnx.ModelProto:
    """x - Q/DQ - MatMul with a dequantised weight."""
    constants = {"s": np.float32(0.02), "z": np.uint8(128), "w": weight, "ws": np.float32(0.01), "wz": weight.dtype.type(0)}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
             helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"]), helper.make_node("MatMul", ["d", "wf"], ["y"])]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 16])],
                              [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 8])],
                              [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize(("dtype", "integers"), [(np.int8, True), (np.uint8, False)])
def test_weights_that_int8_does_not_hold_stay_in_floats(dtype: Any, integers: bool) -> None:
    rng = np.random.default_rng(0)
    info = np.iinfo(dtype)
    model = matrix(rng.integers(info.min, info.max + 1, (16, 8)).astype(dtype))
    made = fused(simplify(recognise(Graph(model))))
    (conv,) = [s for s in made.steps if isinstance(s, Conv)]
    assert (made.values[conv.source].grid is not None) == integers
    x = rng.standard_normal((3, 16)).astype(np.float32)
    got = interpret(made, [x], double=True)[0]
    np.testing.assert_allclose(got, np.concatenate([reference(model)({"x": one[None]})[0] for one in x]), atol=1e-4)


def test_dilated_depthwise_layers_read_no_place_past_their_window() -> None:
    """Four neighbours at once would: they lie as far apart as the dilation says, and buffers have less to spare."""
    x = Value(256, 9, 9, UINT8, HALF)
    values = (Value(256, 9, 9), x, x, Value(256, 9, 9))
    for dilation in (1, 4):
        step = Depthwise(1, 2, np.ones((256, 3, 3), np.float32), np.zeros(256, np.float32), (1, 1), (dilation,) * 4,
                         (dilation, dilation), scale=np.ones(256, np.float32))
        made = Program(values, (Quantise(0, 1), step, Dequantise(2, 3)), (Port("x", 0, (256, 9, 9)),), (Port("y", 3, (256, 9, 9)),))
        sources = [call.kernel.source for call in make_plan(fuse(made), CPUS["x86-64-v4-vnni"]).calls]
        assert any("neighbours(" in source for source in sources) == (dilation == 1)
