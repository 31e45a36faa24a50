"""gkp::FakeQuantize: QuantizeLinear and DequantizeLinear of ONNX as one node, and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net, feeds_of, ops, run_ort

from gkp.converter import quantiser
from gkp.converter.graph import DOMAIN, Graph
from gkp.converter.lower import qdq
from gkp.converter.lower.emit import lower
from gkp.converter.quantiser import OWN_OPERATORS, Quantiser
from gkp.converter.recognise import recognise, simplify
from gkp.converter.reference import reference
from gkp.errors import UnsupportedModelError

TYPES = ("int8", "uint8")


def fake(how: Quantiser, *shape: int, **changes: Any) -> onnx.ModelProto:
    """A model of one FakeQuantize. changes: of its attributes; None: it has none of that name."""
    net = Net(*shape)
    graph = Graph(net.model(net.op("Identity", "x")))
    y = graph.outputs[0]
    graph.remove(graph.nodes[0])
    quantiser.write(graph, how, graph.inputs[0], y)
    model = graph.to_model()
    node = model.graph.node[0]
    kept = [a for a in node.attribute if a.name not in changes]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(k, v) for k, v in changes.items() if v is not None)])
    return model


def stock(how: Quantiser, *shape: int) -> onnx.ModelProto:
    """The pair of standard operators, written here."""
    net = Net(*shape)
    parameters = net.const(np.float32(how.scale)), net.const(np.array(how.zero_point, how.dtype))
    return net.model(net.op("DequantizeLinear", net.op("QuantizeLinear", "x", *parameters), *parameters))


def run(model: onnx.ModelProto, x: Any) -> Any:
    return ReferenceEvaluator(model, new_ops=OWN_OPERATORS).run(None, {"x": x})[0]


@st.composite
def quantisers(draw: st.DrawFn) -> Quantiser:
    kind = draw(st.sampled_from(TYPES))
    info = np.iinfo(kind)
    scale = draw(st.sampled_from([0.5, 0.0625, 0.1, 1 / 3, 3.7, 1e-6, 1e6]) | st.floats(2.0 ** -13, 2.0 ** 13, width=32))
    return Quantiser(float(np.float32(scale)), draw(st.sampled_from([0, info.min, info.max]) | st.integers(info.min, info.max)), kind)


def awkward(how: Quantiser, rng: Any) -> Any:
    """Every step, every tie between two, both neighbours of each tie, far outside, and random numbers."""
    steps = np.arange(-300, 301, dtype=np.float32) * np.float32(how.scale)
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(how.scale)
    near = [np.nextafter(ties, np.float32(way)) for way in (-np.inf, np.inf)]
    far = np.float32([0, -0.0, 1e30, -1e30, 1e-30])
    return np.concatenate([steps, ties, *near, far, rng.standard_normal(2000).astype(np.float32) * np.float32(100 * how.scale)])[None]


@settings(max_examples=60, deadline=None)
@given(quantisers(), st.integers(0, 2**31))
def test_it_is_quantize_linear_and_dequantize_linear_of_onnx_runtime(how: Quantiser, seed: int) -> None:
    x = awkward(how, np.random.default_rng(seed))
    want = run_ort(stock(how, *x.shape), {"x": x})[0]
    got = run(fake(how, *x.shape), x)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(how(x), want)
    np.testing.assert_array_equal(how(want), want)  # what is quantised stays


@settings(max_examples=30, deadline=None)
@given(quantisers(), st.integers(0, 2**31))
def test_the_standard_operators_in_its_place_compute_the_same_and_ours_run_them_in_any_opset(how: Quantiser, seed: int) -> None:
    x = awkward(how, np.random.default_rng(seed))
    model = qdq.expand(Graph(fake(how, *x.shape))).to_model()
    assert [n.op_type for n in model.graph.node] == ["QuantizeLinear", "DequantizeLinear"]
    onnx.checker.check_model(model, full_check=True)
    want = how(x)
    for opset in (13, 18, 21):
        model.opset_import[0].version = opset
        np.testing.assert_array_equal(run(model, x), want)
        np.testing.assert_array_equal(run_ort(model, {"x": x})[0], want)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32])
def test_our_dequantize_linear_is_that_of_onnx_runtime_along_an_axis(axis: int, kind: int) -> None:
    dtype, rng = helper.tensor_dtype_to_np_dtype(kind), np.random.default_rng(axis)
    net = Net(4, 3)
    zero = np.zeros((4, 3)[axis], dtype) if kind == TensorProto.INT32 else rng.integers(0, 9, (4, 3)[axis]).astype(dtype)
    integers = net.const(rng.integers(0, 100, (4, 3)).astype(dtype))
    scales = net.const(rng.uniform(0.1, 2, (4, 3)[axis]).astype(np.float32))
    y = net.op("DequantizeLinear", integers, scales, net.const(zero), axis=axis)
    model = net.model(net.op("Add", "x", y))
    feeds = {"x": np.zeros((4, 3), np.float32)}
    np.testing.assert_array_equal(run(model, feeds["x"]), run_ort(model, feeds)[0])


def test_it_is_written_and_read_and_gives_zero_for_zero() -> None:
    how = Quantiser(0.25, 7, "uint8")
    model = fake(how, 2, 3)
    node = Graph(model).nodes[0]
    assert (node.op, node.domain) == ("FakeQuantize", DOMAIN)
    assert quantiser.is_quantiser(node)
    assert quantiser.read(node) == how
    assert quantiser.of(node.outputs[0]) == how
    assert quantiser.of(node.inputs[0]) is None
    assert not run(model, np.zeros((2, 3), np.float32)).any()


def between(net: Net, y: str) -> Graph:
    """The network up to y, with FakeQuantize in place of every Identity."""
    graph = Graph(net.model(y))
    for node in [n for n in graph.nodes if n.op == "Identity"]:
        given, made = node.inputs[0], node.outputs[0]
        graph.remove(node)
        quantiser.write(graph, Quantiser(0.03125, 5, "uint8"), given, made)
    return graph


def test_passes_move_and_drop_channels_around_it() -> None:
    """One channel between the convolutions is constant, some are not read, one is zero by a Pad; gathers on both sides."""
    net = Net(2, 4, 5, 5)
    weight = net.weight(6, 4, 1, 1)
    weight[0] = 0
    y = net.take(net.conv("x", weight, bias=net.normal(6)), net.rng.permutation(6))
    y = net.op("Identity", net.op("Pad", y, net.ints(0, 1, 0, 0, 0, 0, 0, 0)))
    weight = net.weight(5, 7, 3, 3)
    weight[:, 3] = 0
    model = between(net, net.conv(net.relu(net.take(y, net.rng.permutation(7))), weight, pads=[1] * 4)).to_model()
    want = reference(model)(feeds_of(model))[0]
    graph = simplify(recognise(Graph(model)))
    assert ops(graph) == {"BranchedConv": 2, "FakeQuantize": 1, "Relu": 1}
    np.testing.assert_allclose(reference(graph.to_model())(feeds_of(model))[0], want, atol=1e-5)
    assert next(graph.branched()).outputs[0].shape[1] < 7


def test_of_constants_it_stays_or_is_computed() -> None:
    net = Net(2, 3)
    model = between(net, net.op("Add", "x", net.op("Identity", net.op("Neg", net.const(net.normal(2, 3)))))).to_model()
    feeds = feeds_of(model)
    graph = recognise(Graph(model))
    np.testing.assert_array_equal(reference(graph.to_model())(feeds)[0], reference(model)(feeds)[0])
    np.testing.assert_array_equal(run_ort(lower(graph, {}).to_model(), feeds)[0], reference(model)(feeds)[0])


def test_the_schema_lets_the_checker_know_the_operator() -> None:
    onnx.defs.register_schema(quantiser.schema())
    try:
        onnx.checker.check_model(fake(Quantiser(0.5, 0, "int8"), 2, 3), full_check=True)
        with pytest.raises(onnx.checker.ValidationError, match="zero_point"):
            onnx.checker.check_model(fake(Quantiser(0.5, 0, "int8"), 2, 3, zero_point=None))
    finally:
        onnx.defs.deregister_schema("FakeQuantize", 1, DOMAIN)


BAD: Sequence[dict[str, Any]] = (
    {"scale": 0.0}, {"scale": -1.0}, {"scale": float("nan")}, {"scale": float("inf")}, {"scale": 1e-45}, {"scale": 3e38},
    {"scale": [0.5, 0.5]}, {"scale": "half"}, {"scale": None}, {"zero_point": 128}, {"zero_point": -129}, {"zero_point": 2**62},
    {"zero_point": 0.5}, {"zero_point": None}, {"type": "int4"}, {"type": "float8e4m3fn"}, {"type": 3}, {"type": None})


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_what_no_quantiser_has_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        quantiser.read(Graph(fake(Quantiser(0.5, 0, "int8"), 2, 3, **changes)).nodes[0])
    assert caught.value.hint
