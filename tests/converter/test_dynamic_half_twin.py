"""Free axes, half precision, and the dense twin."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cli_kit import small_net
from onnx import TensorProto, numpy_helper
from onnx_kit import Net, feeds_of, run_ort, with_batch
from torch_kit import shared

from gkp.converter import node as branched_node
from gkp.converter.describe import graph_macs
from gkp.converter.dynamic import batch_axes, free_axes
from gkp.converter.graph import Graph
from gkp.converter.half import to_half
from gkp.converter.lower.emit import lower
from gkp.converter.recognise import recognise, simplify
from gkp.converter.sources import OpenOptions, open_model
from gkp.converter.twin import full_size
from gkp.errors import UnsupportedModelError


# ---- dynamic axes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 3])
def test_a_freed_batch_takes_any_size(batch: int) -> None:
    net = Net(batch, 3, 8, 8)
    x = net.op("Reshape", net.conv3("x", 3, 8), net.ints(batch, 512))
    model = net.model(net.op("Gemm", x, net.const(net.weight(5, 512)), transB=1))
    free = free_axes(model, batch_axes(model))
    onnx.checker.check_model(free)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == batch, "the given model is left as it is"
    for n in (1, 2, 7):
        x = feeds_of(with_batch(small_net(), n))
        assert run_ort(free, x)[0].shape == (n, 5)
    x = feeds_of(model)
    np.testing.assert_array_equal(run_ort(free, x)[0], run_ort(model, x)[0])


def test_a_reshape_that_allows_zeros_copies_the_freed_batch() -> None:
    """PyTorch's newer exporter writes allowzero; a 0 would be an empty axis."""
    net = Net(2, 3, 8, 8)
    x = net.op("Reshape", net.conv3("x", 3, 8), net.ints(2, 512), allowzero=1)
    model = net.model(net.op("Gemm", x, net.const(net.weight(5, 512)), transB=1))
    free = free_axes(model, batch_axes(model))
    for n in (1, 2, 7):
        assert run_ort(free, feeds_of(with_batch(small_net(), n)))[0].shape == (n, 5)


def test_a_freed_height_and_width_take_any_size() -> None:
    net = Net(1, 3, 8, 8)
    model = net.model(net.relu(net.conv3("x", 3, 8)))
    free = free_axes(model, {"x": {2: "h", 3: "w"}})
    onnx.checker.check_model(free)
    for size in (5, 8, 20):
        x = {"x": np.zeros((1, 3, size, size), np.float32)}
        assert run_ort(free, x)[0].shape == (1, 8, size, size)


def test_nothing_dynamic_changes_nothing() -> None:
    model = small_net()
    assert free_axes(model, {}) is model
    assert free_axes(model, {"x": {}}) is model


# ---- half precision --------------------------------------------------------------------------------------------------
def test_half_precision_keeps_float_inputs_and_outputs() -> None:
    model = small_net()
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert {t.data_type for t in half.graph.initializer} <= {TensorProto.FLOAT16, TensorProto.INT64}
    x = feeds_of(model)
    want, got = run_ort(model, x)[0], run_ort(half, x)[0]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-2 * np.abs(want).max())
    assert not np.array_equal(got, want)


def test_a_weight_that_overflows_half_precision_is_refused() -> None:
    model = small_net()
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] = 70_000
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    with pytest.raises(UnsupportedModelError, match="fp16"):
        to_half(model)


def test_an_input_that_is_an_output_survives_half_precision() -> None:
    net = Net(1, 3, 8, 8)
    y = net.relu(net.conv3("x", 3, 4))
    model = net.model(y, net.op("Sigmoid", y))
    half = to_half(model)
    onnx.checker.check_model(half, full_check=True)
    assert [o.name for o in half.graph.output] == [o.name for o in model.graph.output]
    assert len(run_ort(half, feeds_of(model))) == 2


# ---- the dense twin --------------------------------------------------------------------------------------------------
def test_the_twin_is_dense_without_a_single_zero_weight() -> None:
    graph = recognise(Graph(small_net(channels=16)))
    twin = full_size(graph, {})
    for node in twin.branched():
        conv = branched_node.read(node)
        if not conv.is_copy:
            assert len(conv.branches) == 1
            assert conv.branches[0].weight.shape[:2] == (conv.out_channels, conv.in_channels)
            assert np.all(conv.branches[0].weight != 0)
    assert graph_macs(twin) > graph_macs(graph)
    assert any(len(branched_node.read(n).branches) > 1 for n in graph.branched()), "the given graph is left as it is"


def test_the_twin_keeps_the_weights_that_are_there() -> None:
    graph = recognise(Graph(small_net(channels=16)))
    twins = {n.name: branched_node.read(n) for n in full_size(graph, {}).branched()}
    for node in graph.branched():
        given = branched_node.read(node).to_dense()
        if not branched_node.read(node).is_copy:
            filled = twins[node.name].to_dense()
            np.testing.assert_array_equal(filled[given != 0], given[given != 0])


def test_two_twins_are_equal() -> None:
    graph = recognise(Graph(small_net()))
    one, two = (lower(simplify(full_size(graph, {})), {}).to_model() for _ in range(2))
    assert one.SerializeToString() == two.SerializeToString()


def test_the_twin_of_dsp_has_the_widths_it_was_pruned_from() -> None:
    """Published: 40.81 M multiply-accumulates for ResNet-20."""
    opened = open_model(shared("dsp/resnet20_g4.pt"), OpenOptions())
    graph = recognise(Graph(opened.model))
    twin = full_size(graph, opened.dense_width_of)
    assert graph_macs(twin) == pytest.approx(40.81e6, rel=1e-3)
    convs = [branched_node.read(n) for n in twin.branched()]
    widths = {(c.in_channels, c.out_channels) for c in convs if c.kernel_shape == (3, 3)}
    assert widths == {(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)}
    assert all(np.all(b.weight != 0) for c in convs if not c.is_copy for b in c.branches)
