"""lift_quantisers: quantised files in the one form compute what they computed, bit for bit, and keep their scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_kit import feeds_of, ops
from quant_kit import QuantNet, assert_equal, placed, random_net, run_reference

from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import candidates
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import left_over, recognise, simplify
from gkp.errors import FileError, GkpError, UnsafeFileError, UnsupportedModelError


def form(model: onnx.ModelProto, x: float = 2.0) -> Graph:
    """recognise + simplify, with the model run before and after every pass that changed it."""
    feeds = {k: v * x for k, v in feeds_of(model, 2).items()}
    want = run_reference(model, feeds)

    def watch(name: str, graph: Graph) -> None:
        assert_equal(run_reference(graph.to_model(), feeds), want, f"after {name}")

    return simplify(recognise(Graph(model), watch), watch)


# ---- the same numbers ------------------------------------------------------------------------------------------------
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20))
def test_random_networks_compute_the_same_in_the_form_and_in_every_lowering(seed: int) -> None:
    model = random_net(seed)
    graph, feeds = form(model), feeds_of(model, 1)
    want = run_reference(model, feeds)
    assert "QuantizeLinear" not in ops(graph)
    convs = [branched_node.read(n) for n in graph.branched()]
    assert all(c.scale is not None or c.is_copy for c in convs)
    rng = np.random.default_rng(seed)
    chosen: dict[str, Any] = {}
    for node in graph.branched():
        options = candidates(branched_node.read(node), 4, (5, 4))
        chosen[node.name] = options[rng.integers(len(options))]
    stock = lower(graph, chosen).to_model()
    assert "gkp" not in {n.domain for n in stock.graph.node}
    assert_equal(run_reference(stock, feeds), want, "lowered")
    again = simplify(recognise(Graph(stock)))
    assert_equal(run_reference(again.to_model(), feeds), want, "opened again")


@pytest.mark.parametrize("place", range(5))
def test_a_gather_is_absorbed_wherever_the_quantiser_stands(place: int) -> None:
    net = QuantNet(1, 8, 4, 4)
    y = placed(net, "x", lambda t: net.take(t, [7, 0, 3, 3, 2, 5]), 2.0**-4, 3, "int8", place)
    graph = form(net.model(net.qconv(y, net.integers(4, 3, 1, 1), net.scales(4), group=2)))
    assert ops(graph) == {"FakeQuantize": 1, "BranchedConv": 1}
    conv = branched_node.read(next(graph.branched()))
    assert [b.in_index.tolist() for b in conv.branches] == [[0, 3, 7], [2, 3, 5]]


def test_movement_behind_a_quantised_activation_goes_into_the_convolution() -> None:
    net = QuantNet(1, 8, 4, 4)
    x = net.pair("x")
    y = net.pair(net.relu(net.qconv(x, net.integers(8, 8, 1, 1))), 2.0**-3, -128)
    y = net.pair(net.op("Add", net.take(y, [3, 1, 0, 2, 7, 6, 5, 4]), x))
    graph = form(net.model(net.qconv(y, net.integers(4, 8, 1, 1))))
    assert ops(graph) == {"FakeQuantize": 3, "BranchedConv": 2, "Relu": 1, "Add": 1}


def test_equally_quantised_branches_become_one_convolution_and_others_stay() -> None:
    for scales, convs in (((2.0**-3, 2.0**-3), 2), ((2.0**-3, 2.0**-4), 3)):
        net = QuantNet(1, 8, 4, 4)
        x = net.pair("x")
        halves = [net.pair(net.relu(net.qconv(net.op("Slice", x, net.ints(4 * k), net.ints(4 * k + 4), net.ints(1)),
                                              net.integers(4, 4, 1, 1))), s) for k, s in enumerate(scales)]
        model = net.model(net.qconv(net.pair(net.concat(*halves), scales[0]), net.integers(4, 8, 1, 1), x_scale=scales[0]))
        graph = form(model)
        assert ops(graph)["BranchedConv"] == convs
        assert [name for name, why in left_over(graph) if "Concat" in why] == ([] if convs == 2 else [next(
            n.name for n in model.graph.node if n.op_type == "Concat")])


def test_weights_of_uint8_around_128_become_int8_with_their_zeros() -> None:
    net = QuantNet(1, 8, 4, 4)
    weight = net.integers(4, 8, 1, 1)
    weight[:2, 4:] = 0
    weight[2:, :4] = 0
    graph = form(net.model(net.qconv(net.pair("x"), weight, 2.0**-5, zero=128)))
    conv = branched_node.read(next(graph.branched()))
    assert [b.in_index.tolist() for b in conv.branches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    np.testing.assert_array_equal(conv.to_dense(), weight * np.float32(2.0**-5))
    assert conv.scale is not None


def test_float_weights_that_are_quantised_in_the_file_become_integers() -> None:
    net = QuantNet(1, 4, 4, 4)
    scale = net.scales(4)
    given = net.normal(4, 4, 3, 3)
    w = net.dq(net.q(net.const(given), scale, np.zeros(4), axis=0), scale, np.zeros(4), axis=-4)
    graph = form(net.model(net.op("Conv", net.pair("x"), w)))
    conv = branched_node.read(next(graph.branched()))
    assert conv.scale is not None
    np.testing.assert_array_equal(np.asarray(conv.scale), scale)
    np.testing.assert_array_equal(conv.to_dense(), np.clip(np.rint(given / scale[:, None, None, None]), -128, 127)
                                  * scale[:, None, None, None])


def test_weights_whose_zero_point_leaves_8_bits_stay_as_they_are() -> None:
    net = QuantNet(1, 4, 4, 4)
    w = net.dq(net.const(np.full((4, 4, 1, 1), 250, np.uint8)), 2.0**-6, 3, "uint8")
    graph = form(net.model(net.op("Conv", net.pair("x"), w)))
    assert ops(graph) == {"FakeQuantize": 1, "DequantizeLinear": 1, "Conv": 1}
    assert "zero point" in left_over(graph)[0][1]


def test_a_bias_of_other_steps_than_the_products_stays_a_float() -> None:
    net = QuantNet(1, 4, 4, 4)
    bias = np.float32([0.3, 1e-3, 0, 5])
    y = net.qconv(net.pair("x"), net.integers(4, 4, 1, 1), bias=False)
    net.nodes[-1].input.append(net.const(bias))
    graph = form(net.model(y))
    stock = lower(graph, {}).to_model()
    (found,) = [numpy_helper.to_array(t) for t in stock.graph.initializer if "bias" in t.name]
    np.testing.assert_array_equal(found, bias)


def test_a_bias_in_steps_of_the_products_is_written_as_int32() -> None:
    net = QuantNet(1, 4, 4, 4)
    stock = lower(form(net.model(net.qconv(net.pair("x"), net.integers(4, 4, 1, 1), net.scales(4)))), {}).to_model()
    assert [t.data_type for t in stock.graph.initializer if "bias" in t.name] == [onnx.TensorProto.INT32]


def test_a_normalisation_behind_integer_weights_stays_so_that_they_do() -> None:
    net = QuantNet(1, 4, 4, 4)
    y = net.bn(net.qconv(net.pair("x"), net.integers(4, 4, 1, 1)), 4)
    graph = recognise(Graph(net.model(net.pair(y))))
    assert ops(graph)["BatchNormalization"] == 1
    assert branched_node.read(next(graph.branched())).scale is not None


def test_integers_that_are_pooled_are_quantised_again_in_front_of_the_convolution() -> None:
    net = QuantNet(1, 4, 5, 5)
    y = net.dq(net.op("MaxPool", net.q("x"), kernel_shape=[2, 2], strides=[2, 2]))
    graph = form(net.model(net.qconv(y, net.integers(4, 4, 1, 1))))
    assert [n.op for n in graph.nodes] == ["FakeQuantize", "MaxPool", "FakeQuantize", "BranchedConv"]


# ---- what stays ------------------------------------------------------------------------------------------------------
def test_integers_that_something_else_reads_keep_their_quantiser() -> None:
    net = QuantNet(1, 4, 4, 4)
    q = net.q("x")
    y = net.qconv(net.dq(q), net.integers(4, 4, 1, 1))
    z = net.op("Cast", q, to=onnx.TensorProto.FLOAT)
    graph = form(net.model(y, z))
    assert ops(graph) == {"FakeQuantize": 1, "QuantizeLinear": 1, "Cast": 1, "BranchedConv": 1}
    assert [why for _, why in left_over(graph)] == ["QuantizeLinear: its integers are read by Cast"]


def test_integers_as_an_input_are_dequantised_before_they_move() -> None:
    net = QuantNet(1, 4, 4, 4, dtype=onnx.TensorProto.INT8)
    net.dtype = onnx.TensorProto.FLOAT
    y = net.dq(net.op("Gather", "x", net.ints(2, 0), axis=1), 2.0**-4, 5)
    model = net.model(net.qconv(y, net.integers(4, 2, 1, 1)))
    feeds = {"x": np.arange(64, dtype=np.int8).reshape(1, 4, 4, 4)}
    graph = recognise(Graph(model))
    assert_equal(run_reference(graph.to_model(), feeds), run_reference(model, feeds))
    assert ops(graph) == {"DequantizeLinear": 1, "BranchedConv": 1}
    assert [why for _, why in left_over(graph)] == ["DequantizeLinear: its integers are an input or constants"]


def test_activations_with_a_scale_for_each_channel_stay_in_their_order() -> None:
    net = QuantNet(1, 4, 4, 4)
    x = net.pair("x")
    y = net.relu(net.qconv(x, net.integers(8, 4, 1, 1)))
    scale, zero = net.scales(8), net.integers(8)
    y = net.dq(net.q(y, scale, zero, axis=1), scale, zero, axis=1)
    model = net.model(net.qconv(y, net.integers(8, 1, 3, 3), net.scales(8), group=8, bias=False))
    graph = form(model)
    assert {why for _, why in left_over(graph)} == {"depthwise", *(f"{op}: one scale for each slice of an axis"
                                                                 for op in ("QuantizeLinear", "DequantizeLinear"))}
    feeds = feeds_of(model)
    assert_equal(run_reference(lower(graph, {}).to_model(), feeds), run_reference(model, feeds))


def test_pairs_with_two_scales_and_computed_ones_stay() -> None:
    net = QuantNet(1, 4, 4, 4)
    y = net.dq(net.q("x", 2.0**-4), 2.0**-5)
    s = net.op("ReduceMax", net.op("Abs", y), keepdims=0)
    z = net.op("DequantizeLinear", net.op("QuantizeLinear", y, s), s)
    graph = form(net.model(z))
    assert "FakeQuantize" not in ops(graph)
    assert len(left_over(graph)) == 4


@pytest.mark.parametrize("attrs", [{"kernel_shape": [1, 1], "pads": [1] * 4}, {"kernel_shape": [2, 2], "ceil_mode": 1}])
def test_pooling_whose_windows_may_hold_nothing_stays_on_integers(attrs: dict[str, Any]) -> None:
    net = QuantNet(1, 4, 5, 5)
    graph = recognise(Graph(net.model(net.dq(net.op("MaxPool", net.q("x"), **attrs)))))
    assert ops(graph) == {"QuantizeLinear": 1, "MaxPool": 1, "DequantizeLinear": 1}


# ---- hostile ---------------------------------------------------------------------------------------------------------
def changed(name: str, array: Any) -> onnx.ModelProto:
    """A quantised convolution, one of whose parameters is another."""
    net = QuantNet(1, 4, 4, 4)
    scale = net.const(np.float32(2.0**-4))
    zero = net.const(np.int8(0))
    y = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", scale, zero), scale, zero)
    weight, scales, zeros = (net.const(v) for v in (net.integers(4, 4, 1, 1), net.scales(4), np.zeros(4, np.int8)))
    model = net.model(net.op("Conv", y, net.op("DequantizeLinear", weight, scales, zeros, axis=0)))
    names = {"scale": scale, "zero": zero, "weight": weight, "scales": scales, "zeros": zeros}
    for tensor in model.graph.initializer:
        if tensor.name == names[name]:
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), tensor.name))
    return model


@pytest.mark.parametrize(("name", "array", "error", "words"), [
    ("scale", np.float32(0), FileError, "not a positive number"),
    ("scale", np.float32(-1), FileError, "not a positive number"),
    ("scale", np.float32("nan"), FileError, "not a positive number"),
    ("scale", np.float32("inf"), FileError, "not a positive number"),
    ("scale", np.float32(3e38), FileError, "not a positive number"),
    ("scale", np.float32(1e-39), FileError, "scale of QuantizeLinear n_t3 is too small"),
    ("scales", np.float32([1, 1, 0, 1]), FileError, "not a positive number"),
    ("scales", np.float32([1, 1, 1]), FileError, "3 scales and 4 zero points"),
    ("zeros", np.int8([0, 0, 0]), FileError, "4 scales and 3 zero points"),
    ("zeros", np.uint8([0, 0, 0, 0]), FileError, "zero point of uint8 for integers of int8"),
    ("zero", np.int16(0), UnsupportedModelError, "int16"),
    ("zero", np.uint16(0), UnsupportedModelError, "uint16"),
    ("zero", np.float32(0), UnsupportedModelError, "float32"),
    ("weight", np.zeros((4, 4, 1, 1), np.int32), FileError, "zero point of int8 for integers of int32"),
])
def test_parameters_that_do_not_fit_are_refused_by_name(name: str, array: Any, error: type[GkpError], words: str) -> None:
    with pytest.raises(error, match=words):
        recognise(Graph(changed(name, array)))


def test_scales_of_another_number_than_slices_are_refused() -> None:
    net = QuantNet(1, 4, 4, 4)
    w = net.op("DequantizeLinear", net.const(net.integers(4, 4, 1, 1)), net.const(net.scales(3)), axis=0)
    with pytest.raises(FileError, match="3 scales for 4 slices"):
        recognise(Graph(_unchecked(net, net.op("Conv", net.pair("x"), w))))


def test_scales_of_blocks_are_refused() -> None:
    net = QuantNet(1, 4, 4, 4, opset=21)
    scales = net.const(np.full((4, 2, 1, 1), 2.0**-5, np.float32))
    w = net.op("DequantizeLinear", net.const(net.integers(4, 4, 1, 1)), scales, axis=1, block_size=2)
    with pytest.raises(UnsupportedModelError, match="a scale for every 2 elements"):
        recognise(Graph(net.model(net.op("Conv", net.pair("x"), w))))


def test_weights_that_many_dequantise_cost_what_they_take() -> None:
    net = QuantNet(1, 1, 1, 1)
    weight = net.const(np.ones((4, 1, 1024, 1024), np.int8))
    ys = [net.op("Conv", "x", net.dq(weight), pads=[512] * 4) for _ in range(50)]
    with pytest.raises(UnsafeFileError, match="bytes"):
        recognise(Graph(net.model(*ys)))


def test_an_own_operator_with_scales_that_are_none_is_refused() -> None:
    net = QuantNet(1, 4, 4, 4)
    model = recognise(Graph(net.model(net.qconv(net.pair("x"), net.integers(4, 4, 1, 1))))).to_model()
    for scale, error in ((-1.0, FileError), (float("nan"), FileError), (2.0**-20, FileError)):
        bad = onnx.ModelProto.FromString(model.SerializeToString())
        attribute = next(a for n in bad.graph.node for a in n.attribute if a.name == "weight_scale")
        attribute.floats[0] = scale
        with pytest.raises(error):
            recognise(Graph(bad))
    for node in model.graph.node:
        if node.op_type == quantiser.OPERATOR:
            next(a for a in node.attribute if a.name == "zero_point").i = 300
    with pytest.raises(UnsupportedModelError):
        recognise(Graph(model))


def _unchecked(net: QuantNet, y: str) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(net.nodes, "net", net.inputs, [onnx.helper.make_tensor_value_info(y, 1, None)], net.constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", net.opset)], ir_version=8)
