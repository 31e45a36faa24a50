"""Models with operators that have no kernel: split into segments, which together compute the model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from interpret import interpret
from net_blocks import networks
from onnx import TensorProto, helper
from onnx_kit import Net, assert_close, checked, feeds_of, run_ort
from program_kit import one_form_graph, unsupported

from gkp.converter.graph import Graph
from gkp.converter.native.reading.frontend import Translation
from gkp.converter.native.reading.parts import NATIVE, ONNX, Part, parts, segments, stock_model
from gkp.errors import UnsupportedModelError


def run_segments(parts: list[Part], feeds: Mapping[str, Any], dynamic: bool = False) -> dict[str, Any]:
    """Everything that the segments compute: native ones by the interpreter, ONNX ones by ONNX Runtime."""
    known = dict(feeds)
    for part in parts:
        given = {name: known[name] for name in part.inputs}
        if part.program is not None:
            assert [p.name for p in part.program.inputs] == part.inputs
            results = interpret(part.program, list(given.values()))
        else:
            model = checked(stock_model(part, dynamic))
            assert [v.name for v in model.graph.input] == part.inputs
            results = run_ort(model, given)
        known.update(zip(part.outputs, results, strict=True))
    return known


def segments_of(graph: Graph) -> list[Part]:
    return segments(graph, unsupported(graph))


def split(model: onnx.ModelProto) -> list[Part]:
    """The segments, after they were compared with the model, at its own batch and at another one."""
    feeds = feeds_of(model)
    parts = segments_of(one_form_graph(model))
    known = run_segments(parts, feeds)
    assert_close([known[o.name] for o in model.graph.output], run_ort(model, feeds))
    return parts


def kinds(parts: list[Part]) -> list[str]:
    return [part.kind for part in parts]


def test_supported_model_is_one_native_segment() -> None:
    net = Net(2, 3, 8, 8)
    assert kinds(split(net.model(net.relu(net.conv3("x", 3, 4))))) == [NATIVE]


def test_a_graph_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole where kernels run it, else once more part by part."""
    walked: list[int] = []
    run = Translation.run
    monkeypatch.setattr(Translation, "run", lambda self: (walked.append(len(self.graph.nodes)), run(self))[1])
    net = Net(2, 3, 8, 8)
    y = net.relu(net.conv3("x", 3, 4))
    for hybrid in (False, True):
        (part,) = parts(one_form_graph(net.model(y)), hybrid)
        assert part.program is not None
        assert len(walked) == 1
        walked.clear()
    found = parts(one_form_graph(net.model(net.conv3(net.op("Sin", y), 4, 4))), hybrid=True)
    assert kinds(list(found)) == [NATIVE, ONNX, NATIVE]
    assert len(walked) == 3


def test_nothing_native_is_an_error() -> None:
    net = Net(2, 3, 8, 8)
    model = net.model(net.op("Sin", "x"))
    for hybrid, message in ((True, "no part of this model"), (False, "do not run Sin")):
        with pytest.raises(UnsupportedModelError, match=message):
            parts(one_form_graph(model), hybrid)


def test_resize_between_convolutions_and_a_shortcut_around_it() -> None:
    net = Net(2, 3, 8, 8)
    y = net.relu(net.conv3("x", 3, 4))
    small = net.conv3(y, 4, 4, stride=2)
    up = net.op("Resize", small, "", net.const(np.array([1, 1, 2, 2], np.float32)), mode="cubic")
    parts = split(net.model(net.op("Add", net.conv3(up, 4, 4), y)))
    assert kinds(parts) == [NATIVE, ONNX, NATIVE]
    assert len(parts[0].outputs) == len(parts[2].inputs) == 2
    assert [n.op for n in parts[1].graph.nodes] == ["Resize"]


def test_two_foreign_operators_side_by_side_share_a_segment() -> None:
    net = Net(2, 3, 8, 8)
    a, b = (net.conv3("x", 3, 4) for _ in range(2))
    y = net.op("Add", net.op("Sin", a), net.op("Celu", net.relu(b)))
    assert kinds(split(net.model(net.conv3(y, 4, 4)))) == [NATIVE, ONNX, NATIVE]


def test_light_operators_between_foreign_ones_stay_with_them() -> None:
    net = Net(2, 3, 8, 8)
    y = net.op("Sin", net.conv3("x", 3, 4))
    y = net.op("MaxPool", net.relu(y), kernel_shape=[2, 2])
    parts = split(net.model(net.conv3(net.op("Sin", y), 4, 4)))
    assert kinds(parts) == [NATIVE, ONNX, NATIVE]
    assert [n.op for n in parts[1].graph.nodes] == ["Sin", "Relu", "MaxPool", "Sin"]


def test_attention_over_pixels_is_left_whole_to_the_runtime() -> None:
    net = Net(2, 3, 6, 6)
    y = net.conv3("x", 3, 4)
    lines = net.op("Transpose", net.op("Reshape", y, net.ints(2, 4, 36)), perm=[0, 2, 1])
    scores = net.op("Softmax", net.op("MatMul", lines, net.op("Transpose", lines, perm=[0, 2, 1])), axis=-1)
    back = net.op("Reshape", net.op("Transpose", net.op("MatMul", scores, lines), perm=[0, 2, 1]), net.ints(2, 4, 6, 6))
    parts = split(net.model(net.op("Flatten", net.op("GlobalAveragePool", net.conv3(back, 4, 5)))))
    assert kinds(parts) == [NATIVE, ONNX, NATIVE]
    assert [n.op for n in parts[1].graph.nodes] == ["MatMul", "Softmax", "MatMul"]


def test_three_dimensional_convolutions_run_as_dense_ones() -> None:
    net = Net(2, 2, 4, 4, 4)
    y = net.conv("x", net.weight(4, 1, 3, 3, 3), group=2, pads=[1] * 6)
    parts = split(net.model(net.op("Gemm", net.op("Flatten", net.relu(y)), net.const(net.normal(256, 3)))))
    assert kinds(parts) == [ONNX, NATIVE]


def test_inputs_and_outputs_of_other_types_stay_with_the_runtime() -> None:
    net = Net(2, 3, 6, 6)
    net.inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, (2,)))
    y = net.relu(net.op("Flatten", net.op("GlobalAveragePool", net.conv3("x", 3, 4))))
    y = net.op("Add", y, net.op("Gather", net.const(net.normal(9, 4)), "ids"))
    largest = net.op("ArgMax", y, axis=1)
    model = net.model(net.op("Gemm", y, net.const(net.normal(4, 3))))
    model.graph.output.append(helper.make_tensor_value_info(largest, TensorProto.INT64, (2, 1)))
    feeds = feeds_of(model) | {"ids": np.array([8, 1])}
    parts = segments_of(one_form_graph(model))
    known = run_segments(parts, feeds)
    assert_close([known[o.name] for o in model.graph.output], run_ort(model, feeds))
    assert kinds(parts) == [NATIVE, ONNX, NATIVE, ONNX]
    assert [n.op for n in parts[1].graph.nodes] == ["Gather"]


def test_other_batches_when_asked_for() -> None:
    net = Net(1, 3, 8, 8)
    y = net.op("Sin", net.conv3("x", 3, 4))
    y = net.op("Reshape", net.op("Sin", net.op("GlobalAveragePool", y)), net.ints(1, 4))
    model = net.model(net.op("Gemm", y, net.const(net.normal(4, 3))))
    parts = segments_of(one_form_graph(model))
    x = np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)
    got = run_segments(parts, {"x": x}, dynamic=True)[model.graph.output[0].name]
    assert_close([got], [np.concatenate([run_ort(model, {"x": x[k:k + 1]})[0] for k in range(5)])])


def test_output_that_is_a_constant() -> None:
    net = Net(1, 3)
    model = net.model(net.relu("x"))
    graph = Graph(model)
    graph.gs.outputs.append(graph.constant("fixed", np.zeros(3, np.float32)))
    with pytest.raises(UnsupportedModelError, match="depend"):
        segments_of(graph)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks())
def test_random_networks(model: onnx.ModelProto) -> None:
    feeds = feeds_of(model)
    parts = segments_of(one_form_graph(model))
    known = run_segments(parts, feeds)
    assert_close([known[o.name] for o in model.graph.output], run_ort(model, feeds), tol=2e-4)
    assert all(a.kind != b.kind for a, b in pairwise(parts))
    done = set(feeds)
    for part in parts:
        assert done.issuperset(part.inputs)
        assert done.isdisjoint(part.outputs)
        done.update(part.outputs)
