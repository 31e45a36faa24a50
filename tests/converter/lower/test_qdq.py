"""Lowering in int8: every choice of forms computes with the same integers, and runtimes find them where they can use them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from int8_kit import by_hand, integer_layers
from net_blocks import BLOCKS, classifier, gumi_conv, networks
from onnx_kit import Net, checked, feeds_of, ops, run_ort

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.lower.candidates import Candidate, candidates, dense, dense_padded, grouped, split
from gkp.converter.lower.emit import lower
from gkp.converter.reference import reference
from gkp.errors import UnsupportedModelError

MOVES = ("Gather", "Slice", "Concat")
EXACT = ("tmi", "gumi", "gumi-1", "dsp", "dsp-nd", "masked", "split", "bn", "depthwise", "take", "pool", "dense-net", "chunk")
"""Blocks whose operators compute the same bits everywhere: what is left of a difference is the lowering's."""
FUSED = ("tmi", "gumi", "gumi-1", "dsp", "dsp-nd", "masked", "split", "depthwise")
"""Of these, those that are convolutions, additions and Relu once they are recognised: no channel is moved by the network itself."""
Pick = Callable[[BranchedConv], Candidate | None]
PICKS: dict[str, Pick] = {
    "dense": dense, "dense, padded": lambda conv: dense_padded(conv, 16), "grouped": lambda conv: grouped(conv, len(conv.branches)),
    "grouped, padded": lambda conv: grouped(conv, len(conv.branches), 8), "split": lambda conv: split(conv, len(conv.branches))}


def in_forms(graph: Graph, pick: Pick) -> Graph:
    """The graph with `pick` of every layer, dense where it gives none."""
    chosen = {n.name: pick(branched_node.read(n)) for n in graph.branched()}
    return lower(graph, {name: form for name, form in chosen.items() if form is not None})


def assert_equal(got: Sequence[Any], want: Sequence[Any]) -> None:
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(g, w)


def optimised(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    """By ONNX Runtime as it comes: in its integer kernels."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return list(ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds))


def net_of(*blocks: str) -> onnx.ModelProto:
    net = Net(1, 3, 8, 8)
    x = net.relu(net.conv3("x", 3, 8, bias=True))
    for block in blocks:
        x = BLOCKS[block](net, x, 8)
    return net.model(classifier(net, net.relu(net.conv3(x, 8, 8)), 8))


# ---- any network, any choice --------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(networks(blocks=EXACT), st.sampled_from([1, 4, 8, 16]), st.integers(0, 2**31))
def test_any_choice_computes_exactly_what_the_form_says(model: onnx.ModelProto, block: int, seed: int) -> None:
    graph, rng, chosen = by_hand(model, seed), np.random.default_rng(seed), {}
    for node in graph.branched():
        conv = branched_node.read(node)
        assert conv.scale is not None
        offered = [*candidates(conv, block, tuple(node.outputs[0].shape[2:])),
                   *(form for pick in PICKS.values() if (form := pick(conv)) is not None)]  # those not worth it too
        chosen[node.name] = offered[rng.integers(len(offered))]
    feeds = feeds_of(model, seed=seed)
    want = reference(graph.to_model())(feeds)
    lowered = checked(lower(graph, chosen).to_model())
    assert "FakeQuantize" not in ops(lowered)
    assert_equal(reference(lowered)(feeds), want)
    for got in (run_ort(lowered, feeds), optimised(lowered, feeds)):
        for g, w in zip(got, want, strict=True):  # the classifier's sums are in another order
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-6 * max(1.0, float(np.abs(w).max(initial=0))))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(st.sampled_from(FUSED), min_size=1, max_size=4), st.sampled_from(sorted(PICKS)), st.integers(0, 2**31))
def test_integers_alone_are_moved_and_every_convolution_can_be_computed_in_integers(blocks: list[str], how: str, seed: int) -> None:
    net = Net(1, 3, 8, 8, seed=seed)
    x = net.relu(net.conv3("x", 3, 8))
    for block in blocks:
        x = BLOCKS[block](net, x, 8)
    model = in_forms(by_hand(net.model(classifier(net, net.relu(net.conv3(x, 8, 8)), 8)), seed), PICKS[how]).to_model()
    assert integer_layers(model) == []
    makers = {o: n for n in model.graph.node for o in n.output}
    constants = {i.name for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in MOVES:
            moved = [name for name in node.input if name not in constants]
            assert {makers[name].op_type if name in makers else "input" for name in moved} <= {"QuantizeLinear", *MOVES}


# ---- where quantisers stand ---------------------------------------------------------------------------------------
def test_a_move_behind_a_move_lets_both_quantise_first() -> None:
    net = Net(1, 8, 5, 5)
    y = net.relu(gumi_conv(net, net.relu(net.conv1("x", 8, 8)), 8, 8))
    graph = by_hand(net.model(net.conv1(net.relu(gumi_conv(net, y, 8, 8)), 8, 4)))
    model = in_forms(graph, PICKS["split"]).to_model()
    assert ops(model)["Gather"] > 0
    assert integer_layers(model) == []


@pytest.mark.parametrize("how", PICKS)
def test_a_layer_pads_with_its_zero_point(how: str) -> None:
    """Of an input that is shifted: its zeros are another integer than 0."""
    net = Net(1, 8, 5, 5)
    graph = by_hand(net.model(net.op("Add", gumi_conv(net, net.op("HardSigmoid", "x", alpha=1.0, beta=-0.2), 8, 8), net.const(np.float32(0)))))
    quantisers = [n for n in graph.nodes if n.op == "FakeQuantize"]
    quantisers[0].attrs.update(type="uint8", zero_point=100)
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 8, 5, 5)).astype(np.float32)}
    model = in_forms(graph, PICKS[how]).to_model()
    assert_equal(reference(model)(feeds), reference(graph.to_model())(feeds))
    assert_equal(optimised(model, feeds), reference(model)(feeds))


def test_weights_are_int8_with_a_scale_per_output_and_biases_int32() -> None:
    model = in_forms(by_hand(net_of("tmi")), dense).to_model()
    constants = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    makers = {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            integers, scale, zero = (constants[name] for name in makers[node.input[1]].input)
            assert integers.dtype == np.int8
            assert scale.shape == zero.shape == (len(integers),)
            assert not zero.any()
            for name in node.input[2:]:
                assert constants[makers[name].input[0]].dtype == np.int32


def test_full_bytes_are_kept() -> None:
    """Weights of -127 and 127, with a Gemm: no smaller than the form has them."""
    graph = by_hand(net_of("dsp"), largest=127)
    feeds = feeds_of(net_of("dsp"))
    for pick in PICKS.values():
        assert_equal(reference(in_forms(graph, pick).to_model())(feeds), reference(graph.to_model())(feeds))
    assert max(int(np.abs(onnx.numpy_helper.to_array(i)).max()) for i in in_forms(graph, dense).to_model().graph.initializer
               if i.data_type == onnx.TensorProto.INT8 and i.dims) > 63


# ---- what the integers do not say ---------------------------------------------------------------------------------
def changed(graph: Graph, **changes: Any) -> tuple[Graph, str]:
    """With other fields of the first layer."""
    node = next(graph.branched())
    branched_node.rewrite(graph, node, replace(branched_node.read(node), **changes))
    return graph, node.name


@pytest.mark.parametrize("scale", [0.3, 1e-9, 1e9])
def test_weights_that_are_no_integers_of_their_scale_are_refused_not_rounded(scale: float) -> None:
    graph, _ = changed(by_hand(net_of("tmi")), scale=np.full(8, scale, np.float32))
    with pytest.raises(UnsupportedModelError, match="no integers of 8 bits"):
        lower(graph, {})


@pytest.mark.parametrize("bias", [0.123456, 1e9])
def test_a_bias_that_is_no_integer_of_its_scale_stays_as_it_is(bias: float) -> None:
    graph, _ = changed(by_hand(net_of("tmi")), bias=np.full(8, bias, np.float32))
    feeds = feeds_of(net_of("tmi"))
    model = lower(graph, {}).to_model()
    assert_equal(reference(model)(feeds), reference(graph.to_model())(feeds))
    first = next(n for n in model.graph.node if n.op_type == "Conv")
    assert first.input[2] in {i.name for i in model.graph.initializer}


def test_a_layer_that_is_not_quantised_stays_in_float32_among_those_that_are() -> None:
    graph = by_hand(net_of("tmi", "dsp"))
    node = list(graph.branched())[1]
    branched_node.rewrite(graph, node, replace(branched_node.read(node), scale=None), x=node.inputs[0].inputs[0].inputs[0])
    feeds = feeds_of(net_of("tmi", "dsp"))
    for pick in PICKS.values():
        got, want = reference(in_forms(graph, pick).to_model())(feeds), reference(graph.to_model())(feeds)
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=0, atol=0.05)  # sums in another order may end a step further
