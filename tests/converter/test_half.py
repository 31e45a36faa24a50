"""Half precision: what is cast, what stays in float32, and that the network still computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_kit import Net, assert_close, checked, feeds_of, ops, run_one_form, run_ort
from onnx_kit import with_batch as at_batch

from gkp.converter.half import overflowing, to_half
from gkp.errors import BackendMissingError, UnsupportedModelError, UsageError

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return {**found, **{t.name: t.data_type for t in graph.initializer}}


def computes_in(model: onnx.ModelProto, node: str) -> set[int]:
    """Types of the floats that a node reads."""
    types = types_of(model)
    return {types[i] for n in model.graph.node if n.name == node for i in n.input if types.get(i) in (HALF, FLOAT)}


def two_convs() -> tuple[onnx.ModelProto, list[str]]:
    """conv -> relu -> conv, the two sharing a weight; names of the nodes."""
    net = Net(2, 4, 6, 6)
    weight = net.const(net.weight(4, 4, 3, 3))
    x = "x"
    for _ in range(2):
        x = net.relu(net.op("Conv", x, weight, pads=[1] * 4))
    return net.model(x), [n.name for n in net.nodes]


SMOOTH = ("conv", "grouped", "relu", "bn", "add", "mul", "clip", "pool", "gather", "constant", "fill", "sigmoid", "resize")


@st.composite
def networks(draw: st.DrawFn, steps: tuple[str, ...] = SMOOTH) -> tuple[onnx.ModelProto, list[str]]:
    """Random networks of the operators that CNNs are made of; names of their nodes."""
    net = Net(2, 4, 6, 6, seed=draw(st.integers(0, 1000)), opset=draw(st.sampled_from([14, 17, 18, 21, 23])))
    scale = net.const(net.rng.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32))  # shared by all that want it
    tensors = ["x"]
    for step in draw(st.lists(st.sampled_from(steps), min_size=1, max_size=7)):
        x = draw(st.sampled_from(tensors))
        if step in ("conv", "grouped"):
            y = net.conv3(x, 4, 4, group=2 if step == "grouped" else 1, bias=draw(st.booleans()))
        elif step == "bn":
            y = net.bn(x, 4)
        elif step in ("add", "mul"):
            y = net.op("Add" if step == "add" else "Mul", x, draw(st.sampled_from([*tensors, scale])))
        elif step == "clip":
            y = net.op("Clip", x, net.const(np.float32(-1)), net.const(np.float32(3.4e38)))
        elif step == "cast":
            y = net.op("Cast", net.op("Less", x, net.const(np.float32(1e4))), to=FLOAT)
        elif step == "pool":
            y = net.op("AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4)
        elif step == "gather":
            y = net.take(x, [2, 0, 3, 1])
        elif step == "constant":
            y = net.op("Sub", x, net.op("Constant", value_float=draw(st.sampled_from([0.5, -1.0]))))
        elif step == "fill":
            value = {"value": numpy_helper.from_array(np.array([0.25], np.float32))} if draw(st.booleans()) else {}
            y = net.op("Sum", x, net.op("ConstantOfShape", net.op("Shape", x), **value))
        elif step == "resize":
            scales = net.const(np.array([1, 1, 1, 1], np.float32))
            y = net.op("Resize", x, "", scales, mode="nearest")
        else:
            y = net.op("Relu" if step == "relu" else "Sigmoid", x)
        tensors.append(y)
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=2, unique=True))
    return net.model(*{*outputs, tensors[-1]}), [n.name for n in net.nodes]


# ---- any network ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(networks((*SMOOTH, "cast")), st.data())
def test_any_part_of_a_network_may_stay_in_float32(drawn: tuple[onnx.ModelProto, list[str]], data: st.DataObject) -> None:
    model, names = drawn
    keep = data.draw(st.sets(st.sampled_from(names)))
    io = data.draw(st.sampled_from(["fp32", "fp16"]))
    before = model.SerializeToString(deterministic=True)
    half = checked(to_half(model, keep, io))
    assert model.SerializeToString(deterministic=True) == before, "the given model is left as it is"
    assert [i.name for i in half.graph.input] == ["x"]
    assert [o.name for o in half.graph.output] == [o.name for o in model.graph.output]
    assert {v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)} == {HALF if io == "fp16" else FLOAT}
    for name in keep:
        assert computes_in(half, name) <= {FLOAT}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Relu", "Add", "BatchNormalization", "AveragePool") and node.name not in keep:
            assert computes_in(half, node.name) == {HALF}
    casts = [(n.input[0], n.attribute[0].i) for n in half.graph.node if n.op_type == "Cast"]
    assert len(casts) == len(set(casts)), "nothing is cast twice"
    feeds = feeds_of(model)
    given_to_half = {k: x.astype(np.float16) for k, x in feeds.items()} if io == "fp16" else feeds
    want = run_ort(model, {k: x.astype(np.float16).astype(np.float32) for k, x in feeds.items()})
    assert_close([y.astype(np.float32) for y in run_ort(half, given_to_half)], want, tol=1e-2)


@settings(max_examples=40, deadline=None)
@given(networks(), st.integers(-9, 9))
def test_a_network_whose_overflowing_nodes_are_kept_computes_the_same(drawn: tuple[onnx.ModelProto, list[str]],
                                                                      power: int) -> None:
    """Every network, on inputs of any size; in onnx.reference, since ONNX Runtime computes in float32 on the CPU."""
    model = onnx.ModelProto.FromString(drawn[0].SerializeToString())
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            node.input[k] = "scaled" if name == "x" else name
    model.graph.initializer.append(numpy_helper.from_array(np.array(10.0 ** power, np.float32), "factor"))
    model.graph.node.insert(0, helper.make_node("Mul", ["x", "factor"], ["scaled"], "scale"))
    feeds = feeds_of(model)
    half = checked(to_half(model, overflowing(model, [feeds])))
    assert_close(run_one_form(half, feeds), run_ort(model, feeds), tol=5e-2)


# ---- borders and constants ------------------------------------------------------------------------------------------
def test_a_weight_of_kept_and_half_nodes_is_there_once_in_each_precision() -> None:
    model, names = two_convs()
    half = to_half(model, [names[0]])
    weights = [t for t in half.graph.initializer if list(t.dims) == [4, 4, 3, 3]]
    assert sorted(t.data_type for t in weights) == [FLOAT, HALF]
    np.testing.assert_array_equal(numpy_helper.to_array(next(t for t in weights if t.data_type == FLOAT)),
                                  numpy_helper.to_array(model.graph.initializer[0]))


@pytest.mark.parametrize(("kept", "casts"), [((), 2), ((0,), 2), ((0, 1), 2), ((0, 1, 2, 3), 0), ((1,), 4), ((0, 3), 2)])
def test_casts_stand_at_borders_only(kept: tuple[int, ...], casts: int) -> None:
    """conv relu conv relu between float32 inputs and outputs."""
    model, names = two_convs()
    assert ops(to_half(model, [names[k] for k in kept]))["Cast"] == casts


def test_two_readers_share_a_cast() -> None:
    net = Net(1, 4, 6, 6)
    x = net.relu("x")
    model = net.model(net.op("Add", net.op("Sigmoid", x), net.op("Tanh", x)))
    names = [n.name for n in net.nodes]
    assert ops(to_half(model, names[1:3], "fp16"))["Cast"] == 1 + 2, "one down to both, one up from each"


@pytest.mark.parametrize("io", ["fp32", "fp16"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_tensor_that_is_output_and_read_on_keeps_its_name(io: str, keep: bool) -> None:
    net = Net(1, 3, 8, 8)
    y = net.relu(net.conv3("x", 3, 4))
    model = net.model(y, net.op("Sigmoid", y))
    half = checked(to_half(model, [n.name for n in net.nodes] if keep else [], io))
    dtype = np.float16 if io == "fp16" else np.float32
    got = run_ort(half, {k: v.astype(dtype) for k, v in feeds_of(model).items()})
    assert [g.dtype for g in got] == [dtype] * 2
    assert_close([g.astype(np.float32) for g in got], run_ort(model, feeds_of(model)), tol=1e-2)


@pytest.mark.parametrize("io", ["fp32", "fp16"])
def test_an_output_may_be_a_constant(io: str) -> None:
    net = Net(1, 4)
    constant = net.const(np.array([0.5, 1, 2, 3], np.float32))
    model = net.model(net.op("Add", "x", constant))
    model.graph.output.append(helper.make_tensor_value_info(constant, FLOAT, [4]))
    half = checked(to_half(model, (), io))
    got = run_ort(half, {"x": np.zeros((1, 4), np.float16 if io == "fp16" else np.float32)})
    assert [g.tolist() for g in got] == [[[0.5, 1, 2, 3]], [0.5, 1, 2, 3]]


def test_initializers_listed_as_inputs_are_constants() -> None:
    model, _ = two_convs()
    weight = model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info(weight.name, FLOAT, list(weight.dims)))
    half = checked(to_half(model))
    assert [i.name for i in half.graph.input] == ["x"]


def test_nodes_without_names_are_kept_by_their_output() -> None:
    model, _ = two_convs()
    label = model.graph.node[1].output[0]
    for node in model.graph.node:
        node.name = ""
    assert ops(to_half(model, [label]))["Cast"] == 4
    huge = {"x": feeds_of(model)["x"] * 1e6}
    assert set(overflowing(model, [huge])) == {n.output[0] for n in model.graph.node}


def test_names_that_are_taken_are_not_used_again() -> None:
    net = Net(1, 4)
    y = net.relu("x")
    z = net.op("Neg", y)
    model = net.model(z)
    for node in model.graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = {y: "x_fp16"}.get(name, name)
    del model.graph.value_info[:]
    assert_close(run_ort(checked(to_half(model)), feeds_of(model)), run_ort(model, feeds_of(model)), tol=1e-2)


# ---- operators with types of their own ------------------------------------------------------------------------------
def test_shapes_are_computed_in_float32() -> None:
    """A plane of 301 times 4/3 has another size when 4/3 is rounded to half precision."""
    net = Net(1, 2, 301, 7)
    size = net.op("Cast", net.op("Shape", "x"), to=FLOAT)
    scales = net.op("Div", net.op("Mul", size, net.const(np.array([1, 1, 4 / 3, 1], np.float32))), size)
    model = net.model(net.op("Resize", net.relu("x"), "", scales, mode="nearest"))
    half = checked(to_half(model))
    feeds = feeds_of(model)
    assert_close(run_ort(half, feeds), run_ort(model, feeds), tol=1e-2)
    assert computes_in(half, net.nodes[3].name) == {FLOAT}
    assert ops(half)["Cast"] == 3, "those of input and output, and the one that was there"


def test_large_integers_become_floats_in_float32_where_they_are_kept() -> None:
    net = Net(1, 4)
    big = net.op("Cast", net.op("Mul", net.op("Cast", "x", to=TensorProto.INT64), net.ints(100_000)), to=FLOAT)
    model = net.model(net.op("Mul", big, net.const(np.float32(1e-4))))
    feeds = {"x": np.array([[1, 2, 3, 4]], np.float32)}
    assert np.isinf(run_one_form(to_half(model), feeds)[0]).all()
    found = overflowing(model, [feeds])
    assert set(found) == {net.nodes[2].name, net.nodes[3].name}
    assert "reaches 4e+05" in found[net.nodes[2].name]
    assert_close(run_one_form(checked(to_half(model, found)), feeds), [np.array([[10, 20, 30, 40]])], tol=1e-3)


def test_an_open_limit_of_clip_is_rounded_to_the_end_of_the_range() -> None:
    net = Net(1, 4)
    model = net.model(net.op("Clip", "x", net.const(np.float32(0)), net.const(np.float32(3.4e38))))
    assert overflowing(model, [feeds_of(model)]) == {}
    assert_close(run_ort(checked(to_half(model)), {"x": np.array([[-1, 0, 1, 500]], np.float32)}), [np.array([[0, 0, 1, 500]])])


def test_infinite_constants_stay_infinite() -> None:
    net = Net(1, 4)
    y = net.op("Max", "x", net.const(np.array([-np.inf, 0, -np.inf, 0], np.float32)))
    model = net.model(y)
    assert_close(run_ort(checked(to_half(model)), {"x": np.full((1, 4), -1, np.float32)}), [np.array([[-1, 0, -1, 0]])])


def test_what_is_float16_already_stays_so() -> None:
    net = Net(1, 4)
    y = net.op("Add", net.op("Cast", "x", to=HALF), net.const(np.array([1, 2, 3, 4], np.float16)))
    model = net.model(net.op("Relu", net.op("Cast", y, to=FLOAT)))
    assert_close(run_ort(checked(to_half(model)), feeds_of(model)), run_ort(model, feeds_of(model)), tol=1e-2)


# ---- quantised networks ---------------------------------------------------------------------------------------------
def quantised(opset: int, scale: float = 0.05) -> tuple[onnx.ModelProto, Net]:
    """Q -> DQ -> conv with a quantised weight -> relu."""
    net = Net(1, 4, 6, 6, opset=opset)
    s, zero = net.const(np.float32(scale)), net.const(np.int8(0))
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", "x", s, zero), s, zero)
    values = net.const(net.rng.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8))
    weight = net.op("DequantizeLinear", values, net.const(np.full(8, 0.004, np.float32)), net.const(np.zeros(8, np.int8)), axis=0)
    return net.model(net.relu(net.op("Conv", x, weight))), net


@pytest.mark.parametrize("opset", [13, 17, 18, 19, 21, 23])
def test_quantised_operators_stay_with_float16_scales(opset: int) -> None:
    model, _ = quantised(opset)
    half = checked(to_half(model))
    assert half.opset_import[0].version == max(19, opset)
    count, types = ops(half), types_of(half)
    assert (count["QuantizeLinear"], count["DequantizeLinear"], count["Cast"]) == (1, 2, 2)
    for node in half.graph.node:
        if node.op_type == "DequantizeLinear":
            assert types[node.input[1]] == types[node.output[0]] == HALF
    assert computes_in(half, next(n.name for n in half.graph.node if n.op_type == "Conv")) == {HALF}
    assert_close(run_ort(half, feeds_of(model)), run_ort(model, feeds_of(model)), tol=1e-2)


def test_quantised_operators_with_vanishing_scales_stay_in_float32() -> None:
    model, net = quantised(21, scale=1e-9)
    feeds = {k: x * 1e-8 for k, x in feeds_of(model).items()}
    found = overflowing(model, [feeds])
    names = {n.op_type: n.name for n in net.nodes}
    assert names["QuantizeLinear"] in found
    assert names["Conv"] not in found
    assert_close(run_ort(checked(to_half(model, found)), feeds), run_ort(model, feeds), tol=1e-2)


def test_a_quantised_network_that_cannot_reach_the_opset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any, version: int) -> Any:
        raise RuntimeError("no adapter")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    with pytest.raises(UnsupportedModelError, match="opset 19"):
        to_half(quantised(13)[0])


# ---- what is refused, what is found ---------------------------------------------------------------------------------
def test_a_weight_beyond_the_range_is_refused_unless_its_node_is_kept() -> None:
    net = Net(1, 4)
    model = net.model(net.op("Mul", net.op("Mul", "x", net.const(np.float32(1e6))), net.const(np.float32(1e-3))))
    with pytest.raises(UnsupportedModelError, match="does not fit"):
        to_half(model)
    found = overflowing(model, [feeds_of(model)])
    assert "holds 1e+06" in found[net.nodes[0].name]
    assert_close(run_ort(checked(to_half(model, found)), feeds_of(model)), run_ort(model, feeds_of(model)), tol=1e-2)


@pytest.mark.parametrize(("value", "found"), [(32_000, False), (33_000, True), (1e-7, False), (1e-9, True), (0, False)])
def test_weights_are_kept_beyond_half_the_range_or_when_they_vanish(value: float, found: bool) -> None:
    net = Net(1, 4, 2, 2)
    weight = np.zeros((4, 4, 1, 1), np.float32)
    weight[0, 0] = value
    model = net.model(net.conv("x", weight, name="it"))
    feeds = {"x": np.full((1, 4, 2, 2), 1e-3, np.float32)}
    assert ("it" in overflowing(model, [feeds])) is found


def test_a_weight_of_which_some_vanishes_is_not_kept() -> None:
    net = Net(1, 4, 2, 2)
    weight = np.full((4, 4, 1, 1), 1e-12, np.float32)
    weight[0, 0] = 1
    model = net.model(net.conv("x", weight, name="it"))
    assert overflowing(model, [feeds_of(model)]) == {}


def test_values_of_every_given_input_count() -> None:
    model, names = two_convs()
    small, large = feeds_of(model), {"x": feeds_of(model)["x"] * 1e5}
    assert overflowing(model, [small]) == {}
    assert overflowing(model, []) == {}
    found = overflowing(model, [small, large])
    assert "x reaches" in found[names[0]]
    assert list(found) == [n for n in names if n in found], "in the order of the network"
    assert_close(run_one_form(to_half(model, found), large), run_ort(model, large), tol=1e-2)


def test_a_network_of_another_batch_is_measured_too() -> None:
    model, _ = two_convs()
    assert overflowing(at_batch(model, 5), [feeds_of(at_batch(model, 5))]) == {}


def test_a_value_that_is_no_number_is_kept() -> None:
    net = Net(1, 4)
    model = net.model(net.relu(net.op("Log", "x")))
    found = overflowing(model, [{"x": np.array([[-1, 1, 1, 1]], np.float32)}])
    assert set(found) == {n.name for n in net.nodes}


def test_a_node_that_is_not_there_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="no node 'nowhere'"):
        to_half(two_convs()[0], ["nowhere"])


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value_float=1.0)], "b", [],
                               [helper.make_tensor_value_info("c", FLOAT, [])])
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("flag", TensorProto.BOOL, [])],
                              [helper.make_tensor_value_info("y", FLOAT, [])])
    with pytest.raises(UnsupportedModelError, match="control flow"):
        to_half(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_a_tensor_of_unknown_type_is_refused() -> None:
    graph = helper.make_graph([helper.make_node("Odd", ["x"], ["y"], domain="nobody"), helper.make_node("Relu", ["y"], ["z"])],
                              "g", [helper.make_tensor_value_info("x", FLOAT, [1])], [helper.make_tensor_value_info("z", FLOAT, [1])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("nobody", 1)], ir_version=8)
    with pytest.raises(UnsupportedModelError, match="type of tensor y"):
        to_half(model)
    model.graph.value_info.append(helper.make_tensor_value_info("y", FLOAT, [1]))
    half = to_half(model)
    assert [n.op_type for n in half.graph.node] == ["Odd", "Cast", "Relu", "Cast"], "what ONNX does not know stays in fp32"


# ---- the strictest reader -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["plain", "kept", "quantised", "fp16 inputs"])
def test_a_strongly_typed_builder_takes_it(case: str) -> None:
    """TensorRT for RTX mixes no types: a missing Cast fails there."""
    trt_package = pytest.importorskip("gkp.runtime.trt_package")
    try:
        package = trt_package.trt_package("tensorrt_rtx")
    except BackendMissingError as e:
        pytest.skip(e.message)
    model, names = two_convs()
    if case == "quantised":
        model = quantised(17)[0]
    half = to_half(model, [names[0], names[3]] if case == "kept" else [], "fp16" if case == "fp16 inputs" else "fp32")
    with trt_package.listening() as log:
        builder, network, _parser = package.loaders.network_from_onnx_bytes(half.SerializeToString())
        config = package.config_class(compute_capabilities=[(8, 9)])(builder, network)
        assert builder.build_serialized_network(network, config) is not None, log.errors
    assert log.errors == []
    kinds = {network.get_layer(k).get_output(0).dtype for k in range(network.num_layers)
             if network.get_layer(k).type == package.trt.LayerType.CONVOLUTION}
    assert kinds == ({package.trt.float16, package.trt.float32} if case == "kept" else {package.trt.float16})
