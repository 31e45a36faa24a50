"""Lowering: any choice of candidates computes the same as stock ONNX, and channels lie where they are wanted."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from net_blocks import classifier, depthwise, dsp_block, gumi_conv, networks, tmi_block
from onnx_kit import Net, assert_close, checked, feeds_of, ops, run_ort, with_batch

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate, candidates, dense, grouped, split
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify

Pick = Callable[[BranchedConv], Candidate | None]


def graph_of(model: onnx.ModelProto) -> Graph:
    return simplify(recognise(Graph(model)))


def lowered(model: onnx.ModelProto, pick: Pick, batches: tuple[int, ...] = (1, 3)) -> onnx.ModelProto:
    """The model with `pick` of every layer, once onnx.checker accepts it and it computes the same."""
    graph = graph_of(model)
    chosen = {n.name: pick(branched_node.read(n)) for n in graph.branched()}
    out = checked(lower(graph, {name: c for name, c in chosen.items() if c is not None}).to_model())
    same(out, model, batches)
    return out


def same(got: onnx.ModelProto, want: onnx.ModelProto, batches: tuple[int, ...], tol: float = 1e-4) -> None:
    for batch in batches:
        one, two = with_batch(got, batch), with_batch(want, batch)
        feeds = feeds_of(two)
        assert_close(run_ort(one, feeds), run_ort(two, feeds), f"batch {batch}", tol)


def in_groups(block: int = 1) -> Pick:
    return lambda conv: grouped(conv, len(conv.branches), block)


def in_parts(conv: BranchedConv) -> Candidate | None:
    return split(conv, len(conv.branches))


# ---- any network, any choice --------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(), st.sampled_from([1, 4, 8, 16]), st.integers(0, 2**31))
def test_any_choice_computes_the_same(model: onnx.ModelProto, block: int, seed: int) -> None:
    graph, rng, chosen = graph_of(model), np.random.default_rng(seed), {}
    for node in graph.branched():
        conv = branched_node.read(node)
        n = len(conv.branches)
        offered = [*candidates(conv, block, tuple(node.outputs[0].shape[2:])),
                   *(c for c in (grouped(conv, n, block), split(conv, n)) if c is not None)]  # those not worth it too
        chosen[node.name] = offered[rng.integers(len(offered))]
    out = checked(lower(graph, chosen).to_model())
    same(out, model, (int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value),))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.sampled_from(["grouped", "padded", "split", "dense"]), st.integers(0, 2**31))
def test_one_to_three_dimensions(nd: int, how: str, seed: int) -> None:
    net = Net(2, 6, *(7, 6, 5)[:nd], seed=seed)
    kernel, order = (3, 1, 2)[:nd], net.rng.permutation(12)
    y = net.conv("x", net.weight(12, 2, *kernel), group=3, bias=net.normal(12), strides=[2] * nd,
                 pads=[int(p) for p in net.rng.integers(0, 2, 2 * nd)])
    y = net.conv(net.take(net.relu(y), order), net.weight(6, 6, *(1,) * nd), group=2)
    picks: Mapping[str, Pick] = {"grouped": in_groups(), "padded": in_groups(8), "split": in_parts, "dense": dense}
    out = lowered(net.model(y), picks[how])
    assert not ops(out)["BranchedConv"]


@pytest.mark.parametrize("pick", [in_groups(), in_groups(8), in_parts, dense])
def test_a_dynamic_batch_stays_dynamic(pick: Pick) -> None:
    net = Net("N", 8, 5, 5)
    model = net.model(net.relu(gumi_conv(net, net.relu(gumi_conv(net, "x", 8, 8)), 8, 8)))
    out = lowered(model, pick)
    assert out.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"


def test_layers_without_a_choice_are_dense() -> None:
    net = Net(2, 8, 5, 5)
    out = lowered(net.model(gumi_conv(net, "x", 8, 8)), lambda conv: None)
    assert ops(out) == {"Conv": 1}


# ---- where channels lie -------------------------------------------------------------------------------------------
def test_aligned_groups_through_residual_stages_need_no_gather() -> None:
    net = Net(2, 3, 8, 8)
    order = net.rng.permutation(16)

    def aligned(x: str) -> str:
        y = net.conv3(net.take(x, order), 16, 16, group=4)
        return net.bn(net.take(y, np.argsort(order)), 16)

    x = net.relu(net.conv3("x", 3, 16))
    for _ in range(3):
        x = net.relu(net.op("Add", x, aligned(net.relu(aligned(x)))))
    out = lowered(net.model(classifier(net, x, 16)), in_groups())
    assert set(ops(out)) == {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


@pytest.mark.parametrize("block", [1, 8])
def test_a_block_diagonal_convolution_between_dense_ones_needs_no_gather(block: int) -> None:
    net = Net(2, 8, 5, 5)
    y = net.relu(net.conv1("x", 8, 24))
    y = net.relu(net.bn(gumi_conv(net, y, 24, 24), 24))
    out = lowered(net.model(net.conv1(y, 24, 8)), in_groups(block))
    assert ops(out) == {"Conv": 3, "Relu": 2}
    assert {a.i for n in out.graph.node for a in n.attribute if a.name == "group"} == {1, 4}


def test_two_grouped_convolutions_in_a_row_follow_each_other_where_they_fit() -> None:
    net = Net(2, 8, 5, 5)
    y = net.conv1("x", 8, 16)
    for _ in range(2):
        y = net.relu(net.conv3(y, 16, 16, group=4))
    assert ops(lowered(net.model(net.conv1(y, 16, 4)), in_groups())) == {"Conv": 4, "Relu": 2}


def test_groups_that_disagree_get_a_gather_and_only_there() -> None:
    net = Net(2, 8, 5, 5)
    y = net.relu(net.conv1("x", 8, 16))
    a, b = gumi_conv(net, y, 16, 16), gumi_conv(net, y, 16, 16)
    out = lowered(net.model(net.conv1(net.relu(a), 16, 4), net.conv1(net.relu(b), 16, 4)), in_groups())
    assert ops(out)["Gather"] == 1


def test_a_gather_of_neighbours_is_a_slice() -> None:
    net = Net(2, 8, 5, 5)
    out = lowered(net.model(net.conv3("x", 8, 8, group=2)), in_parts)
    assert ops(out) == {"Slice": 2, "Conv": 2, "Concat": 1}


def test_overlapping_branches_of_tmi_gkp_gather_once_in_front() -> None:
    net = Net(2, 8, 6, 6)
    out = lowered(net.model(tmi_block(net, "x", 8)), in_groups())
    assert 1 <= ops(out)["Gather"] <= 3


@pytest.mark.parametrize("flatten", [
    lambda n, x, c: n.op("Flatten", x),
    lambda n, x, c: n.op("Reshape", x, n.ints(-1, c)),
    lambda n, x, c: n.op("Reshape", x, n.ints(0, -1)),
    lambda n, x, c: n.op("Squeeze", x, n.ints(2, 3)),
])
@pytest.mark.parametrize("pool", [
    lambda n, x: n.op("GlobalAveragePool", x),
    lambda n, x: n.op("ReduceMean", x, n.ints(2, 3)),
    lambda n, x: n.op("AveragePool", x, kernel_shape=[5, 5]),
])
@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("block", [1, 8])
def test_the_classifier_follows_a_permuted_and_padded_layout(flatten: Any, pool: Any, trans: int, block: int) -> None:
    net = Net(2, 8, 5, 5)
    x = flatten(net, pool(net, net.relu(gumi_conv(net, net.relu(net.conv1("x", 8, 20)), 20, 20))), 20)
    weight = net.normal(5, 20) if trans else net.normal(20, 5)
    out = lowered(net.model(net.op("Gemm", x, net.const(weight), net.const(net.normal(5)), transB=trans)),
                  in_groups(block))
    assert ops(out)["Gather"] == 0


def test_a_mean_without_its_axes_flattens_too() -> None:
    net = Net(2, 8, 5, 5)
    x = net.op("ReduceMean", net.relu(gumi_conv(net, net.conv1("x", 8, 16), 16, 16)), net.ints(2, 3), keepdims=0)
    out = lowered(net.model(net.op("Gemm", x, net.const(net.normal(16, 5)))), in_groups())
    assert ops(out)["Gather"] == 0


FOLLOWERS: list[tuple[str, Callable[[Net, str], str]]] = [
    ("batch-norm", lambda n, x: n.bn(n.relu(x), 20)),
    ("depthwise", lambda n, x: depthwise(n, n.relu(x), 20)),
    ("max-pool", lambda n, x: n.op("MaxPool", x, kernel_shape=[2, 2])),
    ("add", lambda n, x: n.op("Add", x, n.relu(x))),
    ("squeeze-excite", lambda n, x: n.op("Mul", x, n.op("Sigmoid", n.conv1(n.op("GlobalAveragePool", x), 20, 20)))),
    ("scalar", lambda n, x: n.op("Mul", n.relu(x), n.const(np.float32(2)))),
    ("clip", lambda n, x: n.op("Clip", x, n.const(np.float32(0.5)), n.const(np.float32(2)))),
]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("after", [f[1] for f in FOLLOWERS], ids=[f[0] for f in FOLLOWERS])
def test_channelwise_operators_follow_permuted_and_padded_layouts(after: Callable[[Net, str], str], block: int) -> None:
    net = Net(2, 8, 5, 5)
    y = after(net, gumi_conv(net, net.conv1("x", 8, 20), 20, 20))
    assert ops(lowered(net.model(net.conv1(y, 20, 4)), in_groups(block)))["Gather"] == 0


UNKNOWN: list[tuple[str, Callable[[Net, str], str]]] = [
    ("per-channel-scale", lambda n, x: n.op("Mul", n.relu(x), n.const(n.normal(20, 1, 1)))),
    ("prelu", lambda n, x: n.op("PRelu", x, n.const(n.normal(20, 1, 1)))),
    ("softmax", lambda n, x: n.op("Softmax", x, axis=1)),
    ("channel-mean", lambda n, x: n.op("Mul", x, n.op("ReduceMean", x, n.ints(1)))),
    ("quotient", lambda n, x: n.op("Div", n.op("Sigmoid", x), n.op("Exp", n.op("Sigmoid", x)))),
    ("quotient-of-zeros", lambda n, x: n.op("Clip", n.op("Div", x, n.op("Abs", x)), n.const(np.float32(-1)),
                                            n.const(np.float32(1)))),
    ("half-of-the-channels", lambda n, x: n.concat(n.op("Slice", n.relu(x), n.ints(0), n.ints(10), n.ints(1)),
                                                   n.op("Slice", n.relu(x), n.ints(10), n.ints(20), n.ints(1)))),
    ("one-channel-added", lambda n, x: n.op("Add", x, n.op("ReduceMax", x, n.ints(1)))),
    ("instance-norm", lambda n, x: n.op("InstanceNormalization", x, n.const(n.normal(20)), n.const(n.normal(20)))),
]


@pytest.mark.parametrize("block", [1, 8])
@pytest.mark.parametrize("after", [u[1] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_everything_else_meets_the_original_order(after: Callable[[Net, str], str], block: int) -> None:
    net = Net(2, 8, 5, 5)
    y = after(net, gumi_conv(net, net.conv1("x", 8, 20), 20, 20))
    lowered(net.model(net.conv1(y, 20, 4)), in_groups(block))


def test_a_gemm_that_adds_a_tensor_keeps_that_tensor_in_order() -> None:
    net = Net(2, 8, 5, 5)

    def pooled(x: str) -> str:
        return str(net.op("Flatten", net.op("GlobalAveragePool", net.relu(gumi_conv(net, x, 8, 8)))))

    lowered(net.model(net.op("Gemm", pooled("x"), net.const(net.normal(8, 8)), pooled("x"))), in_groups())


def test_outputs_of_the_model_keep_their_order() -> None:
    net = Net(2, 8, 5, 5)
    y = gumi_conv(net, net.relu(net.conv1("x", 8, 20)), 20, 20)
    lowered(net.model(net.conv1(net.relu(y), 20, 4), y), in_groups(8))


def test_unequal_branches_of_dsp_as_parts_and_as_padded_groups() -> None:
    net = Net(2, 8, 6, 6)
    model = net.model(dsp_block(net, net.relu(net.conv3("x", 8, 8)), 8, "nd"))
    assert ops(lowered(model, in_parts))["Concat"] == 2
    assert ops(lowered(model, in_groups(4)))["Conv"] == 3


def test_lowering_leaves_the_graph_as_it_was() -> None:
    net = Net(2, 8, 5, 5)
    graph = graph_of(net.model(net.relu(gumi_conv(net, "x", 8, 8))))
    before = graph.to_model().SerializeToString()
    lower(graph, {n.name: grouped(branched_node.read(n), 4, 8) for n in graph.branched()})  # type: ignore[misc]
    assert graph.to_model().SerializeToString() == before


def test_an_activation_of_a_constant_is_no_obstacle() -> None:
    net = Net(2, 8, 5, 5)
    y = net.op("Add", net.relu(gumi_conv(net, "x", 8, 8)), net.op("Sigmoid", net.const(net.normal(1, 8, 1, 1))))
    lowered(net.model(net.conv1(y, 8, 8)), in_groups())
