"""Channels that are read in pieces, x[:, a:b], by the hundred: they go into the convolutions, exactly."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_kit import MOVES, Net, one_form, ops, run_ort
from sliced_nets import Choose, SlicedResNet, exported, lively, reordered, runs, singles

from gkp.converter.budget import Budget
from gkp.converter.graph import Graph
from gkp.converter.lower.emit import lower
from gkp.converter.passes import absorb_inputs, lift_convs
from gkp.converter.recognise import left_over


@pytest.mark.parametrize(("width", "choose", "order"), [
    (136, runs(0, lambda c: c // 2), None),
    (80, singles(0, 0.9), reordered(0, 80)),
], ids=["ranges", "single-channels"])
def test_a_network_that_reads_pieces_computes_what_it_did_and_keeps_none(width: int, choose: Choose,
                                                                         order: Choose | None) -> None:
    torch.manual_seed(0)
    module = lively(SlicedResNet(choose, order, width=width, blocks=(1,), deep=False))
    model = exported(module, 8)
    assert max(len(n.input) for n in model.graph.node if n.op_type == "Concat") > 64
    graph = one_form(model, tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)
    assert left_over(graph) == []
    x = torch.randn(1, 3, 8, 8)
    (got,) = run_ort(lower(graph, {}).to_model(), {graph.inputs[0].name: x.numpy()})
    want = module(x).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


@st.composite
def read_in_pieces(draw: st.DrawFn) -> onnx.ModelProto:
    """conv -> perhaps an activation -> Slices in any order, with steps and repeats -> Concat -> conv; with other readers."""
    c, seed = draw(st.integers(2, 12)), draw(st.integers(0, 2**31))
    net = Net(draw(st.sampled_from([1, 2])), 3, 5, 5, seed=seed)
    x = net.conv3("x", 3, c, bias=draw(st.booleans()))
    x = net.op(draw(st.sampled_from(["Relu", "Sigmoid"])), x) if draw(st.booleans()) else x
    parts, width = [], 0
    for _ in range(draw(st.one_of(st.integers(1, 5), st.integers(60, 150)))):
        start = int(net.rng.integers(0, c))
        end, step = int(net.rng.integers(start + 1, c + 3)), int(net.rng.integers(1, 3))
        width += len(range(start, min(end, c), step))
        first = start - c if net.rng.random() < 0.3 else start
        parts.append(net.op("Slice", x, net.ints(first), net.ints(end), net.ints(1), net.ints(step)))
    moved = net.concat(*parts)
    y = net.conv3(moved, width, 4)
    more = [net.op("Sigmoid", x)] if draw(st.booleans()) else []
    more += [net.conv1(moved, width, 3)] if draw(st.booleans()) else []
    return net.model(net.relu(y), *more)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(read_in_pieces())
def test_any_pieces_go_into_the_convolutions_that_read_them(model: onnx.ModelProto) -> None:
    graph = one_form(model, tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)
    assert left_over(graph) == []


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**31), st.integers(2, 100), st.sampled_from(["Relu", "Sigmoid", "Add"]))
def test_any_order_of_pieces_goes_into_the_convolution_that_writes_them(seed: int, pieces: int, reader: str) -> None:
    net = Net(1, 3, 5, 5, seed=seed)
    x = net.conv3("x", 3, 100)
    y = net.conv1(net.relu(x), 100, 100, group=4)
    y = net.concat(*(net.op("Slice", y, net.ints(a), net.ints(b), net.ints(1)) for a, b in reordered(seed, pieces)(100)))
    graph = one_form(net.model(net.op("Add", x, y) if reader == "Add" else net.op(reader, y)), tol=1e-4)
    assert not any(ops(graph)[m] for m in MOVES)


def test_convolutions_all_along_a_chain_of_pieces_cost_no_more_than_turns_through_it() -> None:
    net = Net(1, 3, 5, 5)
    x, total = net.conv3("x", 3, 8), ""
    for _ in range(150):
        x = net.op("Transpose", x, perm=[0, 1, 3, 2])
        total = net.op("Add", total, net.conv1(x, 8, 1)) if total else net.conv1(x, 8, 1)
    model = net.model(total)
    graph = Graph(model, Budget(model.ByteSize()))
    with pytest.MonkeyPatch.context() as patch:
        runs: list[int] = []
        patch.setattr(absorb_inputs, "movement", lambda graph, way: runs.append(len(way.nodes)))
        lift_convs.run(graph)
        absorb_inputs.run(graph)
    assert sum(n for n in runs if n > 64) <= 8 * len(graph.nodes)
    assert max(runs) > 64
