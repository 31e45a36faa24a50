"""The one form of every pruning system's blocks, built by hand: same function after every pass, no movement left."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from net_blocks import (
    classifier,
    depthwise,
    dsp_block,
    gumi_block,
    masked,
    networks,
    shuffle,
    split_convs,
    squeeze_excite,
    tmi_block,
)
from onnx_kit import MOVES, Net, macs, one_form, ops

from gkp.converter import node as branched_node
from gkp.converter.budget import Budget
from gkp.converter.graph import Graph
from gkp.converter.recognise import left_over, recognise

C = 8


def stem(net: Net) -> str:
    return net.relu(net.bn(net.conv3("x", 3, C), C))


def built(block: Callable[[Net, str], str], seed: int = 0) -> onnx.ModelProto:
    net = Net(2, 3, 8, 8, seed=seed)
    return net.model(classifier(net, block(net, stem(net)), C))


def forms(graph: Graph) -> list[int]:
    """Branches per layer."""
    return [len(branched_node.read(n).branches) for n in graph.branched()]


SYSTEMS = [
    ("tmi-gkp", lambda n, x: tmi_block(n, tmi_block(n, x, C), C), [1, 4, 4, 4, 4]),
    ("gumi", lambda n, x: gumi_block(n, x, C), [1, 4, 4, 4]),
    ("dsp-torchscript", lambda n, x: dsp_block(n, x, C), [1, 3, 2]),
    ("dsp-dynamo", lambda n, x: dsp_block(n, x, C, "nd"), [1, 3, 2]),
    ("masked", lambda n, x: n.relu(n.bn(masked(n, x, C, C), C)), [1, 3]),
    ("split-concat", lambda n, x: split_convs(n, x, C, 3), [1, 3]),
    ("shuffle", lambda n, x: n.conv1(shuffle(n, n.relu(n.bn(n.conv1(x, C, C, group=2), C)), (2, C, 8, 8)), C, C,
                                     group=4), [1, 2, 4]),
]


@pytest.mark.parametrize(("block", "want"), [s[1:] for s in SYSTEMS], ids=[s[0] for s in SYSTEMS])
def test_every_system_ends_without_any_movement(block: Callable[[Net, str], str], want: list[int]) -> None:
    model = built(block)
    graph = one_form(model, tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)
    assert ops(graph)["BatchNormalization"] == 0
    assert sorted(forms(graph)) == sorted(want)
    assert left_over(graph) == []


def test_option_a_network_is_nothing_but_convolutions_additions_and_activations() -> None:
    net = Net(2, 3, 8, 8)
    x = tmi_block(net, tmi_block(net, stem(net), C), C, stride=2)
    graph = one_form(net.model(classifier(net, x, 2 * C)), tol=1e-4)
    assert set(ops(graph)) == {"BranchedConv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}
    assert sum(branched_node.read(n).is_copy for n in graph.branched()) == 1


def test_dynamic_batch_is_recognised_too() -> None:
    net = Net("N", 3, 8, 8)
    graph = one_form(net.model(gumi_block(net, stem(net), C)), batch=3, tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 20])
def test_every_operator_set_is_recognised(opset: int) -> None:
    net = Net(2, 3, 8, 8, opset=opset)
    graph = one_form(net.model(gumi_block(net, stem(net), C)), tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)


@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 4, 4, 5, 3)])
def test_one_and_three_dimensions_are_recognised(shape: tuple[int, ...]) -> None:
    net = Net(*shape)
    nd = len(shape) - 2
    y = net.take("x", [3, 1, 0, 2])
    y = net.take(net.conv(y, net.normal(8, 2, *(3,) * nd), group=2, pads=[1] * 2 * nd), np.arange(8)[::-1])
    y = net.conv(shuffle(net, net.relu(net.bn(y, 8)), (2, 8, *shape[2:])), net.normal(4, 4, *(1,) * nd), group=2)
    assert ops(one_form(net.model(y))) == {"BranchedConv": 2, "Relu": 1}


def test_intermediate_results_that_are_outputs_stay_outputs() -> None:
    net = Net(2, 3, 8, 8)
    x = stem(net)
    y = net.take(net.conv3(net.take(x, [1, 0, 2, 3, 4, 5, 6, 7]), C, C, group=2), np.arange(C)[::-1])
    one_form(net.model(net.relu(y), y, x))


def test_activations_that_follow_one_another_are_not_taken_for_constants() -> None:
    net = Net(1, 3, 256, 256)
    x = net.conv1("x", 3, 64)
    for _ in range(40):
        x = net.op("Sigmoid", x)
    model = net.model(x)
    assert ops(recognise(Graph(model, Budget(model.ByteSize()))))["Sigmoid"] == 40


# ---- what is not a grouped convolution ----------------------------------------------------------------------------
def inception(net: Net, x: str) -> str:
    return net.concat(net.relu(net.conv1(x, C, 3)), net.relu(net.conv3(x, C, 3)),
                      net.relu(net.conv1(net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), C, 2)))


def dense_net(net: Net, x: str) -> str:
    for _ in range(2):
        x = net.concat(x, net.conv3(net.relu(net.bn(x, C)), C, 4))
        x = net.conv1(net.relu(net.bn(x, C + 4)), C + 4, C)
    return x


def shuffle_unit(net: Net, x: str) -> str:
    a, b = net.op("Split", x, net.ints(4, 4), outputs=2, axis=1)
    b = net.relu(net.bn(net.conv1(b, 4, 4), 4))
    b = net.relu(net.bn(net.conv1(net.bn(depthwise(net, b, 4), 4), 4, 4), 4))
    return shuffle(net, net.concat(a, b), (2, C, 8, 8))


def u_net(net: Net, x: str) -> str:
    y = net.relu(net.conv3(net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), C, C))
    y = net.op("Resize", y, "", net.const(np.float32([1, 1, 2, 2])), mode="nearest")
    return net.conv3(net.concat(x, y), 2 * C, C)


NEGATIVES = [("inception", inception), ("dense-net", dense_net), ("shuffle-net-unit", shuffle_unit),
             ("squeeze-excite", lambda n, x: squeeze_excite(n, n.conv3(x, C, C), C)), ("u-net", u_net)]


@pytest.mark.parametrize("block", [n[1] for n in NEGATIVES], ids=[n[0] for n in NEGATIVES])
def test_other_architectures_keep_their_function_and_get_no_worse(block: Callable[[Net, str], str]) -> None:
    model = built(block)
    graph = one_form(model, tol=1e-4)
    before, after = ops(model), ops(graph)
    for op in ("Add", "Mul", "Concat", "Gather", "Split", "Reshape", "Transpose"):
        assert after[op] <= before[op], op
    assert after["BranchedConv"] + after["Conv"] <= before["Conv"]
    lifted = Graph(model)
    recognise(lifted)
    assert macs(graph) <= macs(lifted) or not macs(lifted)


@pytest.mark.parametrize(("block", "reasons"), [
    (inception, ["Concat"]), (shuffle_unit, ["depthwise", "Split", "Concat"]), (u_net, ["Concat"]),
])
def test_what_is_left_over_is_named_with_a_reason(block: Callable[[Net, str], str], reasons: list[str]) -> None:
    notes = left_over(one_form(built(block), tol=1e-4))
    for reason in reasons:
        assert any(reason in text for _, text in notes), notes


def cropped(net: Net, x: str) -> str:
    return net.conv3(net.op("Slice", x, net.ints(1), net.ints(7), net.ints(2)), C, C)


def every_second(net: Net, x: str) -> str:
    return net.conv3(net.op("Slice", x, net.ints(0, 0), net.ints(99, 99), net.ints(2, 3), net.ints(2, 2)), C, C)


def many_pieces_of_two(net: Net, x: str) -> str:
    y = net.op("Sigmoid", x)
    parts = [net.op("Slice", x if k % 2 else y, net.ints(k % C), net.ints(k % C + 1), net.ints(1)) for k in range(80)]
    return net.conv3(net.concat(*parts), 80, C)


def read_by_a_pooling(net: Net, x: str) -> str:
    y = net.op("MaxPool", net.take(x, [3, 1, 2]), kernel_shape=[3, 3], pads=[1] * 4)
    return net.op("Add", net.conv3(y, 3, C), net.conv3(x, C, C))


@pytest.mark.parametrize(("block", "nodes", "reason"), [
    (inception, 1, "Concat: its channels come from 3 tensors"),
    (cropped, 1, "Slice: it does not move whole channels of the same image"),
    (every_second, 1, "Slice: it leaves out rows and columns"),
    (many_pieces_of_two, 81, "its channels come from 2 tensors"),
    (read_by_a_pooling, 1, "Gather: its channels come from or go to something other than one convolution"),
])
def test_the_reason_for_what_is_left_is_true(block: Callable[[Net, str], str], nodes: int, reason: str) -> None:
    net = Net(2, 3, 8, 8)
    notes = left_over(one_form(net.model(block(net, stem(net))), tol=1e-4))
    assert len(notes) == nodes
    assert all(text.endswith(reason) for _, text in notes), notes


def test_names_in_the_report_are_safe_to_print() -> None:
    model = built(inception)
    for node in model.graph.node:
        node.name = f"\x1b[31m{node.name}"
    assert not any("\x1b" in name for name, _ in left_over(one_form(model, tol=1e-4)))


# ---- any network --------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks())
def test_random_networks_compute_the_same_after_every_pass(model: onnx.ModelProto) -> None:
    graph = one_form(model, tol=1e-4)
    before, after = ops(model), ops(graph)
    assert after["Add"] <= before["Add"] + before["ScatterElements"] + before["ScatterND"]
    assert after["Concat"] <= before["Concat"]
    assert after["Gather"] <= before["Gather"]
    assert after["BranchedConv"] <= before["Conv"] + before["AveragePool"]


def test_bounds_computed_from_shapes_of_what_other_computed_bounds_cut_become_constant() -> None:
    """As PyTorch exports a chunk in every block of a YOLOv8."""
    net = Net(1, 16, 4, 4)
    y = "x"
    for c in (16, 8, 4):
        size = net.op("Gather", net.op("Shape", y), net.ints(1))
        half = net.op("Div", net.op("Add", size, net.ints(1)), net.ints(2))
        y = net.relu(net.conv1(net.op("Slice", y, net.ints(0), half, net.ints(1)), c // 2, c // 2))
    found = ops(one_form(net.model(y), batch=1))
    assert found["Shape"] == found["Slice"] == 0
    assert found["BranchedConv"] == 3
