"""ONNX files: opsets, functions, dynamic axes, and initialisers listed as inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cli_kit import save, small_net
from onnx import helper
from onnx_kit import Net, feeds_of, run_ort

from gkp.converter.dynamic import free_axes
from gkp.converter.sources import OpenOptions, open_model
from gkp.converter.sources.onnx_file import MIN_OPSET, fix_shapes, from_model, input_shapes
from gkp.errors import UsageError


def opened(model: onnx.ModelProto, folder: Path, **options: object) -> onnx.ModelProto:
    return open_model(save(model, folder / "m.onnx"), OpenOptions(**options)).model


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 17, 20])
def test_old_opsets_are_upgraded_and_compute_the_same(opset: int, tmp_path: Path) -> None:
    net = Net(2, 3, 8, 8, opset=opset)
    x = net.relu(net.bn(net.conv3("x", 3, 8, group=1), 8))
    given = net.model(net.op("Flatten", net.op("GlobalAveragePool", net.take(x, [3, 1, 0, 2, 7, 6, 5, 4]))))
    model = opened(given, tmp_path)
    assert next(o.version for o in model.opset_import if not o.domain) >= MIN_OPSET
    x = feeds_of(given)  # type: ignore[assignment]
    np.testing.assert_allclose(run_ort(model, x)[0], run_ort(given, x)[0], atol=1e-5)


def test_initialisers_that_are_listed_as_inputs_are_not_inputs(tmp_path: Path) -> None:
    given = small_net()
    weight = given.graph.initializer[0]
    given.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    assert [i.name for i in opened(given, tmp_path).graph.input] == ["x"]


def test_functions_are_inlined(tmp_path: Path) -> None:
    given = small_net()
    body = [helper.make_node("Relu", ["a"], ["b"])]
    given.functions.append(helper.make_function("local", "Twice", ["a"], ["b"], body, [helper.make_opsetid("", 18)]))
    given.opset_import.append(helper.make_opsetid("local", 1))
    relu = next(n for n in given.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = "Twice", "local"
    model = opened(given, tmp_path)
    assert "Twice" not in {n.op_type for n in model.graph.node}
    assert not model.functions


def test_a_file_is_known_by_its_content_too(tmp_path: Path) -> None:
    path = save(small_net(), tmp_path / "weights.bin")
    assert open_model(path).system == "onnx"


def test_dynamic_axes_get_a_size_to_work_at_and_are_remembered() -> None:
    model = small_net(batch="n", size=8)
    static, dynamic = fix_shapes(model, OpenOptions())
    assert input_shapes(static) == {"x": (1, 3, 8, 8)}
    assert dynamic == {"x": {0: "n"}}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n", "the given model is left as it is"
    static, dynamic = fix_shapes(model, OpenOptions({"x": (4, 3, 8, 8)}))
    assert input_shapes(static) == {"x": (4, 3, 8, 8)}
    assert dynamic == {"x": {0: "n"}}


@pytest.mark.parametrize("batch", [1, "n"])
def test_the_opened_model_is_valid_as_it_is(batch: object, tmp_path: Path) -> None:
    """It is what comes out when nothing beats the model as given."""
    model = open_model(save(small_net(batch=batch), tmp_path / "m.onnx"))
    onnx.checker.check_model(free_axes(model.model, model.dynamic), full_check=True)


def test_a_declared_batch_may_be_changed_other_axes_may_not() -> None:
    static, dynamic = fix_shapes(small_net(), OpenOptions({"": (4, 3, 8, 8)}))
    assert input_shapes(static) == {"x": (4, 3, 8, 8)}
    assert not dynamic
    with pytest.raises(UsageError, match="axis 3"):
        fix_shapes(small_net(), OpenOptions({"": (1, 3, 8, 9)}))


def test_the_reference_is_the_file_as_given(tmp_path: Path) -> None:
    given = small_net(batch="n")
    model = open_model(save(given, tmp_path / "m.onnx"))
    x = {"x": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    np.testing.assert_allclose(model.reference(x)[0], run_ort(given, x)[0], atol=1e-5)


@pytest.mark.parametrize("fixed", [1, 3])
def test_a_file_with_a_fixed_batch_is_the_reference_for_every_batch(fixed: int) -> None:
    model, free = small_net(batch=fixed), small_net(batch="n")
    given, x = from_model(model, OpenOptions()), feeds_of(free, 7)
    np.testing.assert_allclose(given.reference(x)[0], run_ort(free, x)[0], atol=1e-5)
