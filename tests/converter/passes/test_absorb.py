"""absorb_inputs, absorb_outputs, hoist_activations: the movement goes, the function and the other readers stay."""

import numpy as np
import pytest
from net_blocks import index_add, option_a
from onnx import TensorProto
from onnx_kit import Net, assert_close, feeds_of, macs, one_form, ops, run_one_form, run_ort

from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.passes import absorb_inputs, absorb_outputs, hoist_activations, lift_convs


def after(module, net: Net, *outputs: str) -> Graph:  # type: ignore[no-untyped-def]
    """lift + one pass, once the result computes the same."""
    model = net.model(*outputs)
    graph, feeds = Graph(model), feeds_of(model)
    lift_convs.run(graph)
    module.run(graph)
    assert_close(run_one_form(graph.to_model(), feeds), run_ort(model, feeds))
    return graph


# ---- inputs -----------------------------------------------------------------------------------------------------
def test_other_readers_of_a_gathered_tensor_keep_it() -> None:
    net = Net(2, 4, 5, 5)
    moved = net.take("x", [3, 1])
    graph = after(absorb_inputs, net, net.conv3(moved, 2, 4), net.relu(moved))
    assert ops(graph) == {"BranchedConv": 1, "Gather": 1, "Relu": 1}
    assert next(graph.branched()).inputs[0].name == "x"


def test_a_channel_read_twice_is_read_once_with_both_weights() -> None:
    net = Net(2, 4, 5, 5)
    graph = after(absorb_inputs, net, net.conv3(net.take("x", [3, 1, 3]), 3, 4))
    assert branched_node.read(next(graph.branched())).branches[0].in_index.tolist() == [1, 3]


def test_a_strided_input_stays() -> None:
    net = Net(2, 4, 6, 6)
    y = net.conv3(net.op("AveragePool", "x", kernel_shape=[1, 1], strides=[2, 2]), 4, 4)
    assert ops(after(absorb_inputs, net, y)) == {"AveragePool": 1, "BranchedConv": 1}


def test_a_concat_of_two_tensors_stays() -> None:
    net = Net(2, 4, 5, 5)
    assert ops(after(absorb_inputs, net, net.conv3(net.concat("x", net.relu("x")), 8, 4)))["Concat"] == 1


# ---- outputs ----------------------------------------------------------------------------------------------------
def test_concat_of_equal_convolutions_of_one_tensor_is_one_branched_convolution() -> None:
    net = Net(2, 4, 5, 5)
    graph = after(absorb_outputs, net, net.concat(net.conv3("x", 4, 2, bias=True), net.conv3("x", 4, 3, bias=True)))
    assert ops(graph) == {"BranchedConv": 1}
    assert len(branched_node.read(next(graph.branched())).branches) == 2


@pytest.mark.parametrize("other", [
    lambda n: n.conv1("x", 4, 3),  # another kernel (inception)
    lambda n: n.conv("x", n.normal(3, 4, 3, 3), pads=[2] * 4, dilations=[2, 2]),
    lambda n: n.conv3(n.relu("x"), 4, 3),  # another input
])
def test_concat_of_unequal_convolutions_is_not_traded_for_additions(other) -> None:  # type: ignore[no-untyped-def]
    net = Net(2, 4, 5, 5)
    graph = after(absorb_outputs, net, net.concat(net.conv3("x", 4, 3), other(net)))
    assert ops(graph)["Concat"] == 1
    assert ops(graph)["Add"] == 0


@pytest.mark.parametrize("how", ["elements", "nd"])
def test_index_adds_into_a_residual_become_one_addition(how: str) -> None:
    net = Net(2, 6, 5, 5)
    y = index_add(net, "x", [5, 0], net.conv3("x", 6, 2), how)
    y = index_add(net, y, [1, 2, 4], net.conv3("x", 6, 3), how)
    graph = one_form(net.model(net.relu(y)))
    assert ops(graph) == {"BranchedConv": 1, "Add": 1, "Relu": 1}
    assert branched_node.read(next(graph.branched())).written.tolist() == [True, True, True, False, True, True]


def test_overlapping_index_adds_keep_both_convolutions() -> None:
    net = Net(2, 6, 5, 5)
    y = index_add(net, "x", [5, 0], net.conv3("x", 6, 2), "nd")
    graph = one_form(net.model(net.relu(index_add(net, y, [0, 2], net.conv3("x", 6, 2), "nd"))))
    assert ops(graph) == {"BranchedConv": 2, "Add": 2, "Relu": 1}


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_option_a_shortcut_becomes_a_copy_in_the_type_of_the_model(dtype: int) -> None:
    net = Net(2, 4, 6, 6, dtype=dtype)
    small = net.op("Slice", "x", net.ints(0, 0), net.ints(99, 99), net.ints(2, 3), net.ints(2, 2))
    short = net.concat(small, net.op("Mul", small, net.const(net.numpy.type(0))))
    graph = one_form(net.model(net.op("Add", short, net.conv3("x", 4, 8, stride=2))), tol=1e-2)
    assert ops(graph) == {"BranchedConv": 2, "Add": 1}
    assert any(branched_node.read(n).is_copy for n in graph.branched())
    assert {branched_node.read(n).dtype for n in graph.branched()} == {net.numpy}


def test_residual_adds_of_whole_convolutions_are_left_alone() -> None:
    net = Net(2, 4, 5, 5)
    x = net.conv3("x", 4, 4)
    for _ in range(2):  # the base is a convolution with several readers
        x = net.op("Add", x, net.conv3(net.relu(net.conv3(x, 4, 4)), 4, 4))
    assert ops(one_form(net.model(x))) == {"BranchedConv": 5, "Add": 2, "Relu": 2}


def in_order(net: Net, x: str) -> str:
    return net.concat(*(net.op("Slice", x, net.ints(k), net.ints(k + 1), net.ints(1)) for k in range(4)))


def test_pieces_that_are_put_back_in_order_are_the_tensor_itself() -> None:
    net = Net(2, 4, 5, 5)
    x = net.op("MaxPool", "x", kernel_shape=[3, 3], pads=[1] * 4)
    graph = one_form(net.model(net.op("Sigmoid", in_order(net, x)), net.relu(x)))
    assert ops(graph) == {"MaxPool": 1, "Sigmoid": 1, "Relu": 1}


def test_an_input_that_is_an_output_too_keeps_both_names() -> None:
    net = Net(2, 4, 5, 5)
    y = in_order(net, "x")
    assert ops(one_form(net.model(y, net.conv3(y, 4, 4)))) == {"Identity": 1, "BranchedConv": 1}


def test_a_convolution_split_into_parts_that_all_go_falls_apart() -> None:
    net = Net(2, 4, 5, 5)
    a, b = net.op("Split", net.conv3("x", 4, 8), net.ints(3, 5), outputs=2, axis=1)
    graph = one_form(net.model(net.relu(a), net.op("Sigmoid", b)))
    assert ops(graph) == {"BranchedConv": 2, "Relu": 1, "Sigmoid": 1}
    assert macs(graph) == 4 * 8 * 9 * 25


def test_a_convolution_split_into_a_part_that_must_stay_is_not_computed_twice() -> None:
    net = Net(2, 4, 5, 5)
    a, b = net.op("Split", net.conv3("x", 4, 8), net.ints(3, 5), outputs=2, axis=1)
    cropped = net.op("Slice", b, net.ints(1), net.ints(4), net.ints(2))
    graph = one_form(net.model(net.relu(a), net.relu(cropped)))
    assert macs(graph) == 4 * 8 * 9 * 25


def test_a_convolution_whose_output_is_also_read_elsewhere_keeps_it() -> None:
    net = Net(2, 4, 5, 5)
    y = net.conv3("x", 4, 4)
    graph = one_form(net.model(net.take(y, [3, 2, 1, 0]), net.relu(y)))
    assert ops(graph) == {"BranchedConv": 1, "Gather": 1, "Relu": 1}


def test_names_of_united_branches_are_what_they_share() -> None:
    net = Net(2, 4, 5, 5)
    parts = [net.conv("x", net.normal(2, 4, 1, 1), name=f"/block/layers_a.{k}/Conv") for k in range(2)]
    model = net.model(net.concat(*parts))
    for k, node in enumerate(model.graph.node[:2]):
        old, node.input[1] = node.input[1], f"block.layers_a.{k}.weight"
        next(c for c in model.graph.initializer if c.name == old).name = node.input[1]
    assert next(one_form(model).branched()).name == "block.layers_a"


# ---- activations ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "Exp", "HardSwish", "Softplus"])
def test_activations_move_behind_a_concat(op: str) -> None:
    net = Net(2, 4, 5, 5)
    graph = one_form(net.model(net.concat(*(net.op(op, net.conv3("x", 4, 3)) for _ in range(2)))))
    assert ops(graph) == {"BranchedConv": 1, op: 1}


@pytest.mark.parametrize(("op", "moves"), [("Relu", True), ("Tanh", True), ("Sigmoid", False), ("Exp", False)])
def test_only_what_keeps_zero_moves_behind_zero_channels(op: str, moves: bool) -> None:
    net = Net(2, 4, 5, 5)
    y = net.op("Pad", net.op(op, net.conv3("x", 4, 3)), net.ints(0, 1, 0, 0, 0, 0, 0, 0))
    assert ops(after(hoist_activations, net, y))["Pad"] == 1
    assert ops(one_form(net.model(y)))["Pad"] == (not moves)


def test_an_activation_that_is_an_output_too_stays() -> None:
    net = Net(2, 4, 5, 5)
    y = net.relu(net.conv3("x", 4, 4))
    assert ops(one_form(net.model(y, net.take(y, [3, 1, 0, 2])))) == {"BranchedConv": 1, "Relu": 1, "Gather": 1}


def test_clip_moves_when_its_limits_are_the_same_tensors() -> None:
    net = Net(2, 4, 5, 5)
    low, high, other = (net.const(np.float32(v)) for v in (0, 6, 1))
    same = net.concat(*(net.op("Clip", net.conv3("x", 4, 3), low, high) for _ in range(2)))
    mixed = net.concat(*(net.op("Clip", net.conv3("x", 4, 3), low, v) for v in (high, other)))
    assert ops(one_form(net.model(same))) == {"BranchedConv": 1, "Clip": 1}
    assert ops(one_form(net.model(mixed)))["Concat"] == 1


@pytest.mark.parametrize("attrs", [({"alpha": 0.1}, {"alpha": 0.2})])
def test_unlike_activations_stay(attrs: tuple[dict[str, float], ...]) -> None:
    net = Net(2, 4, 5, 5)
    y = net.concat(*(net.op("LeakyRelu", net.conv3("x", 4, 3), **a) for a in attrs))
    assert ops(one_form(net.model(y)))["Concat"] == 1


def test_an_activation_that_is_split_keeps_every_part_activated() -> None:
    net = Net(2, 4, 6, 6)
    a, b = net.op("Split", net.relu(net.conv3("x", 4, 8)), net.ints(4, 4), outputs=2, axis=1)
    graph = one_form(net.model(net.op("MaxPool", a, kernel_shape=[2, 2]), net.op("Sigmoid", b)))
    assert ops(graph)["Relu"] == 1


def test_an_activation_with_a_reader_of_its_own_stays() -> None:
    net = Net(2, 4, 6, 6)
    y = net.relu(net.conv3("x", 4, 4))
    assert ops(one_form(net.model(net.take(y, [3, 2, 1, 0]), net.op("Tanh", y))))["Gather"] == 1


def test_a_moved_activation_at_the_end_keeps_the_name_of_the_output() -> None:
    net = Net(2, 4, 6, 6)
    model = net.model(net.take(net.relu(net.conv3("x", 4, 4)), [3, 2, 1, 0]))
    graph = one_form(model)
    assert ops(graph) == {"BranchedConv": 1, "Relu": 1}
    assert graph.outputs[0].name == model.graph.output[0].name


def test_option_a_inside_a_network_needs_no_concat() -> None:
    net = Net(2, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 4))
    assert ops(one_form(net.model(net.op("Add", option_a(net, x, 4), net.conv3(x, 4, 8, stride=2))))) == {
        "BranchedConv": 3, "Relu": 1, "Add": 1}
