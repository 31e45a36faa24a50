"""fold_constants: what is constant is computed once, and nothing that is not constant vanishes."""

import time
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_kit import Net, assert_close, feeds_of, ops, run_ort

from gkp.converter.graph import Graph, values
from gkp.converter.passes import fold_constants
from gkp.errors import UnsupportedModelError


def folded(model: onnx.ModelProto, batch: int = 2) -> Graph:
    """fold_constants, once the result computes the same."""
    graph = Graph(model)
    fold_constants.run(graph)
    feeds = feeds_of(model, batch)
    assert_close(run_ort(graph.to_model(), feeds), run_ort(model, feeds))
    return graph


def test_shape_arithmetic_of_a_static_input_disappears() -> None:
    net = Net(2, 6, 4, 4)
    shape = net.op("Shape", "x")
    n = net.op("Gather", shape, net.const(np.int64(0)))
    half = net.op("Div", net.op("Gather", shape, net.const(np.int64(1))), net.const(np.int64(2)))
    shape = net.op("Concat", *(net.op("Unsqueeze", v, net.ints(0)) for v in (n, half)), net.ints(8, 4), axis=0)
    graph = folded(net.model(net.op("Reshape", "x", shape)))
    assert ops(graph) == {"Reshape": 1}
    assert values(graph.nodes[0].inputs[1]).tolist() == [2, 3, 8, 4]


def test_zero_dimensional_results_stay_zero_dimensional() -> None:
    net = Net(2, 3, 4, 4)
    zero = net.op("Gather", net.const(np.float32([0, 6])), net.const(np.int64(0)))
    one = net.op("Constant", value=numpy_helper.from_array(np.float32(1)))
    graph = folded(net.model(net.op("Clip", "x", zero, one)))
    assert ops(graph) == {"Clip": 1}
    assert [values(t).shape for t in graph.nodes[0].inputs[1:]] == [(), ()]


@pytest.mark.parametrize(("attrs", "want"), [
    ({"value_float": 2.5}, np.float32(2.5)), ({"value_floats": [1.0, 2.0]}, np.float32([1, 2])),
    ({"value_int": 3}, np.int64(3)), ({"value_ints": [3, 4]}, np.int64([3, 4])),
])
def test_constants_of_every_attribute_keep_type_and_shape(attrs: dict[str, object], want: np.ndarray) -> None:
    net = Net(1, 2)
    graph = Graph(net.model(net.op("Cast", net.op("Constant", **attrs), to=TensorProto.FLOAT), net.relu("x")))
    fold_constants.run(graph)
    constant = next(t for n in graph.nodes for t in n.inputs if values(t) is not None)
    assert values(constant).dtype in (want.dtype, np.float32)
    assert np.array_equal(values(constant), want)
    assert values(constant).shape == want.shape


@pytest.mark.parametrize("build", [
    lambda n: n.op("Identity", "x"),
    lambda n: n.op("Dropout", "x"),
    lambda n: n.op("Dropout", "x", n.const(np.float32(0.5)), n.const(np.bool_(False))),
    lambda n: n.op("Cast", "x", to=TensorProto.FLOAT),
    lambda n: n.op("Expand", "x", n.ints(2, 3, 4, 4)),
    lambda n: n.op("Slice", "x", n.ints(0), n.ints(99), n.ints(1)),
])
def test_what_does_nothing_vanishes(build: Callable[[Net], str]) -> None:
    net = Net(2, 3, 4, 4)
    assert ops(folded(net.model(net.relu(build(net))))) == {"Relu": 1}


@pytest.mark.parametrize(("build", "stays"), [
    (lambda n: n.op("Cast", n.op("Cast", "x", to=TensorProto.INT32), to=TensorProto.FLOAT), "Cast"),
    (lambda n: n.op("Expand", "x", n.ints(2, 2, 3, 4, 4)), "Expand"),
    (lambda n: n.op("Slice", "x", n.ints(-1), n.ints(-99), n.ints(1), n.ints(-1)), "Slice"),
    (lambda n: n.op("Slice", "x", n.ints(1), n.ints(3), n.ints(1)), "Slice"),
])
def test_what_does_something_stays(build: Callable[[Net], str], stays: str) -> None:
    net = Net(2, 3, 4, 4)
    assert ops(folded(net.model(net.op("Abs", build(net)))))[stays] >= 1


@pytest.mark.parametrize("batch", ["N", None])
def test_a_slice_of_a_dynamic_batch_stays(batch: str | None) -> None:
    net = Net(batch, 3, 4, 4)
    y = net.op("Slice", net.relu("x"), net.ints(1), net.ints(99), net.ints(0))
    assert ops(folded(net.model(net.op("Abs", y)), batch=3))["Slice"] == 1


def test_dropout_in_training_mode_or_with_a_mask_that_is_read_stays() -> None:
    net = Net(2, 3, 4, 4)
    y = net.op("Dropout", "x", net.const(np.float32(0.5)), net.const(np.bool_(True)))
    graph = Graph(net.model(y))
    fold_constants.run(graph)
    assert ops(graph) == {"Dropout": 1}
    net = Net(2, 3, 4, 4)
    y, mask = net.op("Dropout", "x", outputs=2)
    assert ops(folded(net.model(y, net.op("Cast", mask, to=TensorProto.FLOAT))))["Dropout"] == 1


def test_a_constant_that_is_an_output_stays() -> None:
    net = Net(1, 2)
    model = net.model(net.relu("x"), net.op("Neg", net.const(np.float32([1, 2]))))
    assert len(folded(model).to_model().graph.output) == 2


def test_older_split_and_squeeze_keep_their_attributes() -> None:
    net = Net(1, 3, 4, 4, opset=11)
    value = net.const(np.arange(8, dtype=np.float32).reshape(1, 8, 1))
    a, _ = net.op("Split", value, outputs=2, axis=1, split=[3, 5])
    graph = folded(net.model(net.op("Add", "x", net.op("Unsqueeze", a, axes=[3]))))
    assert ops(graph) == {"Add": 1}


@pytest.mark.parametrize("build", [
    lambda n: n.op("Gather", n.const(n.normal(512, 64, 3, 3)), n.ints(*range(511, -1, -1)), axis=0),
    lambda n: n.op("Pad", n.const(n.normal(8, 8)), n.ints(1, 0, 0, 1)),
    lambda n: n.op("Expand", n.const(n.normal(8, 1)), n.ints(8, 8)),
    lambda n: n.op("Transpose", n.const(n.normal(300, 300)), perm=[1, 0]),
])
def test_large_but_honest_constants_are_folded(build: Callable[[Net], str]) -> None:
    net = Net(1, 2)
    assert ops(folded(net.model(net.op("Add", net.op("ReduceSum", build(net), keepdims=0), "x"))))["ReduceSum"] == 1


COLUMN, ROW = np.zeros((70_000, 1), np.float32), np.zeros((1, 70_000), np.float32)
BOMBS: list[Callable[[Net], str]] = [
    lambda n: n.op("ConstantOfShape", n.ints(10**6, 10**6)),
    lambda n: n.op("Expand", n.const(COLUMN), n.ints(1, 70_000)),
    lambda n: n.op("Expand", n.const(np.float32(0)), n.ints(10**5, 10**5)),
    lambda n: n.op("Pad", n.const(ROW), n.ints(0, 0, 10**6, 0)),
    lambda n: n.op("Pad", n.const(ROW), n.ints(10**6, 0), n.const(np.float32(0)), n.ints(0)),
    lambda n: n.op("Range", n.const(np.int64(0)), n.const(np.int64(10**12)), n.const(np.int64(1))),
    lambda n: n.op("Gather", n.const(ROW), n.const(np.zeros(70_000, np.int64)), axis=0),
    *[lambda n, op=op: n.op(op, n.const(COLUMN), n.const(ROW)) for op in ("Add", "Mul", "Less", "Equal", "Max")],
    lambda n: n.op("Mod", n.const(COLUMN.astype(np.int64)), n.const(ROW.astype(np.int64) + 1)),
    lambda n: n.op("And", n.const(COLUMN > 0), n.const(ROW > 0)),
    lambda n: n.op("Where", n.const(COLUMN > 0), n.const(ROW), n.const(np.float32(0))),
]


@pytest.mark.parametrize("build", BOMBS)
def test_bombs_are_refused_before_they_go_off(build: Callable[[Net], str]) -> None:
    net = Net(1, 2)
    graph = Graph(net.model(net.op("Cast", net.op("Size", build(net)), to=TensorProto.FLOAT)))
    started = time.monotonic()
    with pytest.raises(UnsupportedModelError, match="would hold over"):
        fold_constants.run(graph)
    assert time.monotonic() - started < 5


def test_a_malformed_constant_expression_is_left_to_the_runtime() -> None:
    nodes = [helper.make_node("Pad", ["c", "p"], ["y"]), helper.make_node("Expand", ["c"], ["z"]),
             helper.make_node("Sum", ["y", "z"], ["w"])]
    constants = [numpy_helper.from_array(np.zeros((2, 2), np.float32), "c"), numpy_helper.from_array(np.ones(3, int), "p")]
    info = helper.make_tensor_value_info("w", TensorProto.FLOAT, None)
    graph = Graph(helper.make_model(helper.make_graph(nodes, "g", [], [info], constants),
                                    opset_imports=[helper.make_opsetid("", 18)]))
    fold_constants.run(graph)
    assert ops(graph) == {"Pad": 1, "Expand": 1, "Sum": 1}
