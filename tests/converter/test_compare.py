"""`gkp verify A B`: files and artefacts in any combination, on the same inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_kit import DENSE, GROUPED, save, small_net
from onnx import TensorProto, helper, numpy_helper

import gkp
from gkp.converter.compare import compare_models, open_runnable
from gkp.converter.sources import OpenOptions
from gkp.errors import FileError, UsageError

OPTIONS = OpenOptions()


def test_a_model_equals_itself_and_its_artefact(tmp_path: Path) -> None:
    path = save(small_net(batch="n"), tmp_path / "m.onnx")
    gkp.convert(path, output=tmp_path / "out", benchmark=False, threads=1)
    for a, b in ((path, path), (path, tmp_path / "out"), (tmp_path / "out", path), (tmp_path / "out", tmp_path / "out")):
        result = compare_models(a, b, OPTIONS, "fp32")
        assert result.passed
        assert {c.batch for c in result.checks} == {1, 3}
        assert {c.name for c in result.checks} == {"random", "zeros", "large", "small"}


def test_a_static_batch_is_compared_at_that_batch(tmp_path: Path) -> None:
    path = save(small_net(batch=2), tmp_path / "m.onnx")
    gkp.convert(path, output=tmp_path / "out", benchmark=False, threads=1)
    assert {c.batch for c in compare_models(path, tmp_path / "out", OPTIONS, "fp32").checks} == {2}


def test_one_changed_weight_is_found(tmp_path: Path) -> None:
    model = small_net()
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] += 0.1
    other = small_net()
    next(t for t in other.graph.initializer if t.name == weight.name).CopyFrom(numpy_helper.from_array(array, weight.name))
    a, b = save(model, tmp_path / "a.onnx"), save(other, tmp_path / "b.onnx")
    assert not compare_models(a, b, OPTIONS, "fp32").passed


def test_inputs_may_have_other_names_but_not_other_shapes(tmp_path: Path) -> None:
    model, renamed = small_net(), small_net()
    for node in renamed.graph.node:
        node.input[:] = ["image" if t == "x" else t for t in node.input]
    renamed.graph.input[0].name = "image"
    a, b = save(model, tmp_path / "a.onnx"), save(renamed, tmp_path / "b.onnx")
    assert compare_models(a, b, OPTIONS, "fp32").passed
    with pytest.raises(UsageError, match=r"\[1, 3, 8, 8\]"):
        compare_models(a, save(small_net(size=10), tmp_path / "c.onnx"), OPTIONS, "fp32")
    two = small_net()
    two.graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    with pytest.raises(UsageError, match="inputs"):
        compare_models(a, save(two, tmp_path / "d.onnx"), OPTIONS, "fp32")


def test_an_integer_input_is_compared_with_integers(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table", "x"], ["y"])
    table = numpy_helper.from_array(np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32), "table")
    graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", TensorProto.INT64, [1, 3])],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 5])], [table])
    path = save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    assert compare_models(path, path, OPTIONS, "fp32").passed


def test_the_dense_and_the_pruned_example_differ() -> None:
    assert not compare_models(GROUPED, DENSE, OPTIONS, "fp32").passed


def test_what_a_runnable_takes_is_known(tmp_path: Path) -> None:
    opened = open_runnable(GROUPED, OPTIONS)
    assert opened.shapes == [(None, 3, 32, 32)]
    assert opened.fixed_batch is None
    path = save(small_net(batch=2), tmp_path / "m.onnx")
    assert open_runnable(path, OPTIONS).fixed_batch == 2
    with pytest.raises(FileError):
        open_runnable(tmp_path, OPTIONS)
