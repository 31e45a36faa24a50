"""Graph: what a round trip keeps, how tensors are rewired, and which files are refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_kit import Net, assert_close, feeds_of, ops, run_ort

from gkp.converter.graph import Graph, channels, spatial, values
from gkp.errors import FileError, UnsupportedModelError


def small() -> onnx.ModelProto:
    net = Net(2, 3, 5, 5)
    return net.model(net.relu(net.conv3("x", 3, 4, bias=True)))


def test_round_trip_keeps_function_names_opset_ir_version_and_metadata() -> None:
    model = small()
    model.ir_version = 9
    helper.set_model_props(model, {"author": "somebody"})
    after = Graph(model).to_model()
    onnx.checker.check_model(after, full_check=True)
    assert after.ir_version == 9
    assert after.opset_import[0].version == 18
    assert {p.key: p.value for p in after.metadata_props} == {"author": "somebody"}
    assert [i.name for i in after.graph.input] == ["x"]
    assert [o.name for o in after.graph.output] == [o.name for o in model.graph.output]
    feeds = feeds_of(model)
    assert_close(run_ort(after, feeds), run_ort(model, feeds))


def test_zero_dimensional_constants_stay_zero_dimensional() -> None:
    net = Net(2, 3, 5, 5)
    model = net.model(net.op("Clip", "x", net.const(np.float32(0)), net.const(np.float32(1))))
    graph = Graph(Graph(model).to_model())
    assert [values(t).shape for t in graph.nodes[0].inputs[1:]] == [(), ()]


def test_what_onnx_infers_no_shape_of_gets_that_of_its_input() -> None:
    net = Net(2, 4, 5, 5, opset=21)
    y = net.op("GroupNormalization", "x", net.const(np.ones(4, np.float32)), net.const(np.zeros(4, np.float32)), num_groups=2)
    out = helper.make_tensor_value_info(net.conv3(y, 4, 8), TensorProto.FLOAT, [2, 8, 5, 5])
    model = helper.make_model(helper.make_graph(net.nodes, "net", net.inputs, [out], net.constants),
                              opset_imports=[helper.make_opsetid("", net.opset)])
    assert [n.outputs[0].shape for n in Graph(model).nodes] == [[2, 4, 5, 5], [2, 8, 5, 5]]


def test_copy_is_independent() -> None:
    graph = Graph(small())
    copy = graph.copy()
    copy.remove(copy.nodes[-1])
    copy.nodes[0].attrs["strides"] = [2, 2]
    assert len(graph.nodes) == len(copy.nodes) + 1
    assert graph.nodes[0].attrs["strides"] != [2, 2]


def test_values_of_constants_are_shared_and_read_only() -> None:
    graph = Graph(small())
    weight = values(graph.nodes[0].inputs[1])
    assert weight is not None
    assert np.shares_memory(weight, values(graph.copy().nodes[0].inputs[1]))
    with pytest.raises(ValueError, match="read-only"):
        weight[:] = 0


def test_redirect_keeps_the_name_of_a_graph_output() -> None:
    graph = Graph(small())
    relu = graph.nodes[-1]
    graph.redirect(relu.outputs[0], relu.inputs[0])
    after = graph.to_model()
    assert ops(after) == {"Conv": 1}
    assert [o.name for o in after.graph.output] == [o.name for o in small().graph.output]
    onnx.checker.check_model(after, full_check=True)


def test_redirect_to_a_graph_input_leaves_an_identity() -> None:
    graph = Graph(small())
    graph.redirect(graph.outputs[0], graph.inputs[0])
    after = graph.to_model()
    assert ops(after) == {"Identity": 1}
    feeds = feeds_of(after)
    assert_close(run_ort(after, feeds), [feeds["x"]])


def test_names_are_unique() -> None:
    graph = Graph(small())
    first, second = graph.nodes
    graph.rename(second, first.name)
    assert first.name != second.name
    assert graph.variable("a").name != graph.variable("a").name


def test_nodes_without_a_name_get_one() -> None:
    model = small()
    for node in model.graph.node:
        node.name = ""
    assert all(n.name for n in Graph(model).nodes)


def test_sole_consumer_is_none_for_shared_tensors_and_outputs() -> None:
    net = Net(1, 2, 4, 4)
    y = net.relu("x")
    shared = net.relu(y)
    graph = Graph(net.model(net.op("Add", shared, shared), y))
    relu, inner, add = graph.nodes
    assert graph.sole_consumer(relu.outputs[0]) is None  # a graph output
    assert graph.sole_consumer(inner.outputs[0]) is None  # read twice
    assert graph.sole_consumer(add.outputs[0]) is None


def test_channels_and_plane_are_none_where_dynamic() -> None:
    net = Net("N", 3, "H", 5)
    x = Graph(net.model(net.relu("x"))).inputs[0]
    assert channels(x) == 3
    assert spatial(x) is None


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph([helper.make_node("Identity", ["x"], ["b"])], "b", [],
                               [helper.make_tensor_value_info("b", TensorProto.FLOAT, [1])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
                                            helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])])
    with pytest.raises(UnsupportedModelError, match="holds a subgraph"):
        Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def test_an_empty_model_and_a_cycle_are_refused_in_one_line() -> None:
    with pytest.raises(FileError, match="has no graph"):
        Graph(onnx.ModelProto())
    info = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    nodes = [helper.make_node("Relu", ["y"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [info]))
    with pytest.raises(FileError) as error:
        Graph(model).to_model()
    assert "\n" not in error.value.message


@pytest.mark.parametrize(("index", "axis", "op"), [([1, 2], 1, "Slice"), ([2, 0, 0], 1, "Gather"), ([3], 2, "Slice"), ([4, 1], 3, "Gather")])
def test_elements_of_an_axis_are_taken_by_a_slice_where_they_are_neighbours(index: list[int], axis: int, op: str) -> None:
    net = Net(2, 3, 5, 5)
    graph = Graph(net.model(net.op("Abs", "x")))
    y = graph.take(graph.outputs[0], index, axis, name="part")
    assert (y.inputs[0].op, y.inputs[0].name) == (op, "part")
    graph.gs.outputs = [y]
    model = graph.to_model()
    feeds = feeds_of(model)
    want = np.take(np.abs(feeds["x"]), index, axis)
    np.testing.assert_array_equal(run_ort(model, feeds)[0], want)
    assert y.shape == list(want.shape)
