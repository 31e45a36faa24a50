"""The masks of the zoo: which convolutions get them, and that gkp finds the branches in the zeros."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_kit import Net, feeds_of, run_ort

from gkp.benchmarks.zoo.masks import FORMS, masked
from gkp.converter import node as branched_node
from gkp.converter.graph import Graph
from gkp.converter.recognise import recognise


def weights(model: onnx.ModelProto) -> list[Any]:
    """Of the convolutions, in their order."""
    found = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return [found[n.input[1]] for n in model.graph.node if n.op_type == "Conv"]


def kinds() -> onnx.ModelProto:
    """Convolutions that differ in what decides."""
    net = Net(1, 3, 8, 8)
    x = net.conv3("x", 3, 64)  # few in
    x = net.conv3(x, 64, 64)  # yes
    x = net.conv3(x, 64, 64, group=2)  # grouped
    x = net.conv1(x, 64, 96)  # yes
    x = net.conv(x, net.weight(96, 1, 3, 3), group=96, pads=[1] * 4)  # depthwise
    x = net.conv(x, net.weight(96, 96, 5, 5), pads=[2] * 4)  # another kernel
    x = net.conv1(x, 96, 63)  # few out
    return net.model(x)


@pytest.mark.parametrize(("name", "share"), [("block", 1 / 8), ("tmi", 9 / 16)])
def test_wide_ungrouped_3x3_and_1x1_convolutions_get_zeros_and_no_others(name: str, share: float) -> None:
    before = kinds()
    after, count = masked(before, FORMS[name])
    zeros = [float((w == 0).mean()) for w in weights(after)]
    assert zeros == [0, pytest.approx(1 - share), 0, pytest.approx(1 - share), 0, 0, 0]
    assert count == 2
    assert not any((w == 0).any() for w in weights(before)), "the model that was given stays as it was"


@pytest.mark.parametrize(("name", "ins"), [("block", 8), ("tmi", 36)])
def test_the_zeros_are_recognised_as_eight_branches(name: str, ins: int) -> None:
    net = Net(1, 64, 6, 6)
    made, _ = masked(net.model(net.conv3("x", 64, 64)), FORMS[name])
    (conv,) = (branched_node.read(node) for node in recognise(Graph(made)).branched())
    assert [(b.in_index.size, b.out_index.size) for b in conv.branches] == [(ins, 8)] * 8


@pytest.mark.parametrize("name", FORMS)
def test_activations_keep_their_size(name: str) -> None:
    net, x = Net(1, 64, 8, 8), "x"
    for _ in range(6):
        x = net.conv3(x, 64, 64)
    dense = net.model(x)
    made, count = masked(dense, FORMS[name])
    sizes = [float(run_ort(model, feeds_of(model))[0].std()) for model in (dense, made)]
    assert count == 6
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


def test_the_same_seed_gives_the_same_mask_and_another_one_another() -> None:
    model = kinds()
    first, again, other = (weights(masked(model, FORMS["tmi"], seed)[0])[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert ((first == 0) != (other == 0)).any()


def test_a_weight_of_two_convolutions_gets_one_mask() -> None:
    net = Net(1, 64, 6, 6)
    shared = net.const(net.weight(64, 64, 3, 3))
    x = "x"
    for _ in range(2):
        x = net.op("Conv", x, shared, pads=[1] * 4)
    made, count = masked(net.model(x), FORMS["block"])
    assert count == 2
    assert float((weights(made)[0] == 0).mean()) == 7 / 8
