"""gkp::BranchedConv as an ONNX operator: schema, round trip, reference implementation."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cli_kit import refuse, save
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_kit import Net, assert_close, feeds_of, run_one_form

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter import quantiser
from gkp.converter.graph import Graph
from gkp.errors import UnsupportedModelError

QUICK = settings(max_examples=25, deadline=None)


@st.composite
def forms(draw: st.DrawFn) -> BranchedConv:
    """1 to 3 dimensions, 0 to 3 branches."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    nd, n, c, f = draw(st.integers(1, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(3, 6))
    kernel = [draw(st.integers(1, 2)) for _ in range(nd)]
    parts = np.array_split(rng.permutation(f)[:-1], n) if n else []
    triples = []
    for out in parts:
        ins = rng.permutation(c)[: rng.integers(1, c + 1)]
        triples.append((ins, out, rng.standard_normal((len(out), len(ins), *kernel)).astype(np.float32)))
    return BranchedConv.build(c, f, triples, bias=rng.standard_normal(f).astype(np.float32), kernel_shape=kernel,
                              strides=[draw(st.integers(1, 2)) for _ in range(nd)],
                              pads=[draw(st.integers(0, 1)) for _ in range(2 * nd)],
                              dilations=[draw(st.integers(1, 2)) for _ in range(nd)])


def model_of(conv: BranchedConv) -> onnx.ModelProto:
    net = Net(2, conv.in_channels, *(5, 6, 4)[: len(conv.kernel_shape)])
    graph = Graph(net.model(net.op("Identity", "x")))
    y = graph.outputs[0]
    graph.remove(graph.nodes[0])
    branched_node.write(graph, conv, graph.inputs[0], y, "layer")
    return graph.to_model()


@QUICK
@given(forms())
def test_node_round_trip_and_reference_keep_the_form(conv: BranchedConv) -> None:
    model = model_of(conv)
    node = next(Graph(model).branched())
    again = branched_node.read(node)
    assert node.name == "layer"
    assert len(again.branches) == len(conv.branches)
    for a, b in zip(again.branches, conv.branches, strict=True):
        assert a.in_index.tolist() == b.in_index.tolist()
        assert a.out_index.tolist() == b.out_index.tolist()
        assert np.array_equal(a.weight, b.weight)
    assert (again.strides, again.pads, again.dilations) == (conv.strides, conv.pads, conv.dilations)
    feeds = feeds_of(model)
    assert_close(run_one_form(model, feeds), [conv(feeds["x"])])
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == list(conv(feeds["x"]).shape)


def test_schema_registers_and_the_full_check_passes() -> None:
    """In a process of its own: registration is global to a process."""
    script = ("import onnx, sys; from gkp.converter.node import schema\n"
              "model = onnx.load_from_string(sys.stdin.buffer.read())\n"
              "onnx.defs.register_schema(schema()); onnx.checker.check_model(model, full_check=True)\n"
              "model.graph.node[0].attribute.pop()\n"
              "try: onnx.checker.check_model(model)\n"
              "except onnx.checker.ValidationError: print('refused')\n")
    conv = BranchedConv.build(3, 4, [([0, 2], [1, 3], np.ones((2, 2, 3, 3), np.float32))], kernel_shape=[3, 3])
    done = subprocess.run([sys.executable, "-c", script], input=model_of(conv).SerializeToString(), check=False,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().strip() == "refused"


def test_rewrite_keeps_the_name_and_moves_the_input() -> None:
    net = Net(1, 4, 3, 3)
    graph = Graph(net.model(net.relu(net.take("x", [1, 0, 2, 3]))))
    gather = graph.nodes[0]
    conv = BranchedConv.from_dense(np.ones((4, 4, 1, 1), np.float32))
    y = graph.variable("y", np.float32, None)
    graph.nodes[1].inputs[0] = y
    node = branched_node.write(graph, conv, gather.outputs[0], y, "conv")
    node = branched_node.rewrite(graph, node, conv, x=graph.inputs[0])
    assert node.name == "conv"
    assert node.inputs[0] is graph.inputs[0]
    assert y.shape == [1, 4, 3, 3]


@pytest.mark.parametrize(("change", "text"), [
    (lambda n: n.attrs.pop("pads"), "lacks the attribute pads"),
    (lambda n: n.attrs.update(in_sizes=[3]), "in_sizes does not match"),
    (lambda n: n.attrs.update(out_sizes=[1, 1]), "out_sizes does not match"),
    (lambda n: n.inputs.__setitem__(1, n.inputs[0]), "needs constant weights"),
])
def test_malformed_nodes_are_refused(change, text) -> None:  # type: ignore[no-untyped-def]
    conv = BranchedConv.build(3, 4, [([0, 2], [1, 3], np.ones((2, 2, 3, 3), np.float32))], kernel_shape=[3, 3])
    node = next(Graph(model_of(conv)).branched())
    change(node)
    with pytest.raises(UnsupportedModelError, match=text):
        branched_node.read(node)


# ---- integers -----------------------------------------------------------------------------------------------------
def integers() -> BranchedConv:
    scale = np.array([0.5, 0.25, 3, 1], np.float32)
    weight = np.arange(-18, 18, dtype=np.float32).reshape(2, 2, 3, 3) * scale[[1, 3]].reshape(-1, 1, 1, 1)
    return BranchedConv.build(3, 4, [([0, 2], [1, 3], weight)], kernel_shape=[3, 3], scale=scale)


def test_the_scale_of_integers_is_kept_and_changes_no_value() -> None:
    conv, plain = integers(), replace(integers(), scale=None)
    again = branched_node.read(next(Graph(model_of(conv)).branched()))
    assert np.array_equal(again.scale, conv.scale)
    assert again.scale.dtype == np.float32
    assert branched_node.read(next(Graph(model_of(plain)).branched())).scale is None
    feeds = feeds_of(model_of(conv))
    assert np.array_equal(*(run_one_form(model_of(c), feeds)[0] for c in (conv, plain)))


@pytest.mark.parametrize(("scale", "code"), [
    ([1.0] * 3, 6), ([1.0, 0.0, 1.0, 1.0], 6), ([1.0, -1.0, 1.0, 1.0], 6), ([float("nan")] * 4, 6), ([float("inf")] * 4, 6),
    (1.0, 6), ("scales", 3), ([0.3] * 4, 6), ([1e-9] * 4, 6), ([1e30] * 4, 6), ([1] * 4, 6)], ids=str)
def test_a_file_whose_weights_are_not_what_its_scale_says_does_not_open_as_another_network(scale: Any, code: int, tmp_path: Path) -> None:
    """The weights are what counts: rounding them to the grid that is claimed would be another network, verified against itself."""
    conv = integers()
    net = Net(2, 3, 5, 6)
    graph = Graph(net.model(net.op("Identity", "x")))
    y, x = graph.outputs[0], graph.variable("quantised", np.float32, [2, 3, 5, 6])
    graph.remove(graph.nodes[0])
    quantiser.write(graph, quantiser.Quantiser(0.125, 0, "int8"), graph.inputs[0], x)
    branched_node.write(graph, conv, x, y, "layer")
    model = graph.to_model()
    node = next(n for n in model.graph.node if n.op_type == "BranchedConv")
    kept = [a for a in node.attribute if a.name != "weight_scale"]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute("weight_scale", scale)])
    refuse(tmp_path, save(model, tmp_path / "m.onnx"), code, "scale")
