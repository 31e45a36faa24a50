"""Resize and Upsample, in all their versions, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from interpret import interpret
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_kit import Net, assert_close, feeds_of, run_ort
from program_kit import kinds, only, translated, unsupported

from gkp.converter.graph import Graph
from gkp.converter.native.program import Resize
from gkp.converter.native.reading.frontend import program
from gkp.errors import UnsupportedModelError

COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
SCALES = (0.3, 0.5, 0.75, 1.0, 1.5, 5 / 3, 2.0, 2.3, 3.0, 4.0)


def resized(net: Net, x: str, scales: Any = None, sizes: Any = None, **attrs: Any) -> str:
    """A Resize in the form of the net's opset."""
    none = net.const(np.zeros(0, np.float32)) if net.opset < 13 else ""
    if sizes is not None:
        return str(net.op("Resize", x, none, none, net.ints(*sizes), **attrs))
    return str(net.op("Resize", x, none, net.const(np.asarray(scales, np.float32)), **attrs))


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_every_mode_at_any_size(data: st.DataObject) -> None:
    plane = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2))
    linear = data.draw(st.booleans())
    net = Net(1, 2, *plane, opset=data.draw(st.sampled_from([11, 13, 18, 19])))
    attrs: dict[str, Any] = {"coordinate_transformation_mode": data.draw(st.sampled_from(COORDINATES))}
    attrs |= {"mode": "linear"} if linear else {"nearest_mode": data.draw(st.sampled_from(NEAREST))}
    if data.draw(st.booleans()):
        sizes = [data.draw(st.integers(1, 20)) for _ in plane]
        y = resized(net, "x", sizes=(1, 2, *sizes), **attrs)
    else:
        scales = [data.draw(st.sampled_from(SCALES)) for _ in plane]
        exact = [int(n * float(np.float32(s))) for n, s in zip(plane, scales, strict=True)]
        assume(min(exact) > 0 and exact == [int(np.float32(n) * np.float32(s)) for n, s in zip(plane, scales, strict=True)])
        y = resized(net, "x", (1, 1, *scales), **attrs)
    assert set(kinds(translated(net.model(net.relu(y))))) <= {"Resize", "Affine"}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", *NEAREST])
@pytest.mark.parametrize("scales", [(2, 2), (3, 2), (0.5, 1.5)])
def test_the_reference_of_onnx_agrees(coordinates: str, mode: str, scales: tuple[float, float]) -> None:
    net = Net(1, 1, 6, 4)
    attrs = {"mode": "linear"} if mode == "linear" else {"nearest_mode": mode}
    model = net.model(resized(net, "x", (1, 1, *scales), coordinate_transformation_mode=coordinates, **attrs))
    feeds = feeds_of(model)
    assert_close(interpret(program(Graph(model)), list(feeds.values())), ReferenceEvaluator(model).run(None, feeds))


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", NEAREST)
def test_where_runtime_and_reference_agree_on_the_nearest_so_do_the_kernels(coordinates: str, mode: str) -> None:
    """Sizes whose ties float32 moves by its last bit are among them: of 7 elements made 2, the second is 3.5."""
    for n, m in [(7, 2), (7, 4), (7, 8), (40, 52), (20, 6), (28, 78), (13, 16), (35, 80), (2, 7), (5, 3), (9, 10), (10, 84)]:
        net = Net(1, 1, n, 1)
        model = net.model(resized(net, "x", sizes=(1, 1, m, 1), coordinate_transformation_mode=coordinates, nearest_mode=mode))
        feeds = {"x": np.arange(n, dtype=np.float32).reshape(1, 1, n, 1)}
        (runtime,), (reference,) = run_ort(model, feeds), ReferenceEvaluator(model).run(None, feeds)
        agreed = runtime == reference
        assert agreed.mean() > 0.8
        np.testing.assert_array_equal(interpret(program(Graph(model)), list(feeds.values()))[0][agreed], runtime[agreed])


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_infinities_between_elements_are_those_of_runtime_and_reference(coordinates: str) -> None:
    net = Net(1, 1, 6, 5)
    model = net.model(resized(net, "x", (1, 1, 2.4, 2.4), mode="linear", coordinate_transformation_mode=coordinates))
    x = feeds_of(model)["x"]
    x[0, 0, 1, 2] = x[0, 0, 1, 3] = x[0, 0, 4, 4] = np.inf
    with np.errstate(invalid="ignore"):
        (reference,) = ReferenceEvaluator(model).run(None, {"x": x})
    reference = np.where(reference == np.finfo(np.float32).max, np.inf, reference)  # it writes infinities so
    (runtime,) = run_ort(model, {"x": x})
    agreed = np.isclose(runtime, reference, rtol=1e-4, atol=1e-4)
    assert np.isinf(runtime[agreed]).sum() > 10
    np.testing.assert_allclose(interpret(program(Graph(model)), [x])[0][agreed], runtime[agreed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("opset", [7, 9, 10])
def test_the_old_forms(opset: int, mode: str) -> None:
    net = Net(2, 3, 4, 5, opset=opset)
    scales = np.array([1, 1, 2, 3], np.float32)
    if opset == 7:
        y = net.op("Upsample", "x", scales=scales.tolist(), mode=mode)
    else:
        y = net.op("Upsample" if opset == 9 else "Resize", "x", net.const(scales), mode=mode)
    assert only(translated(net.model(y)), Resize).rows.low.size == 8


def test_chosen_axes_and_sizes_with_a_batch() -> None:
    net = Net(3, 2, 4, 5)
    y = net.op("Resize", "x", "", "", net.ints(7, 3), axes=[3, 2])
    assert translated(net.model(y)).outputs[0].shape == (2, 3, 7)
    net = Net(3, 2, 4, 5)
    assert translated(net.model(resized(net, "x", sizes=(3, 2, 8, 10), mode="linear"))).outputs[0].shape == (2, 8, 10)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cubic": ({"mode": "cubic"}, "mode cubic"),
    "crops": ({"coordinate_transformation_mode": "tf_crop_and_resize"}, "tf_crop_and_resize"),
    "symmetric": ({"coordinate_transformation_mode": "half_pixel_symmetric"}, "half_pixel_symmetric"),
    "antialias": ({"mode": "linear", "antialias": 1}, "antialias"),
    "weights outside": ({"mode": "cubic", "exclude_outside": 1}, "mode cubic"),
    "the channels": ({"scales": (1, 2, 1, 1)}, "resizes the channels"),
    "the batch": ({"scales": (2, 1, 1, 1)}, "resizes the batch"),
    "another batch": ({"sizes": (4, 2, 3, 3)}, "resizes the batch"),
    "proportions": ({"sizes": (2, 2, 8, 9), "keep_aspect_ratio_policy": "not_larger"}, "not_larger"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name: str) -> None:
    attrs, reason = REFUSED[name]
    given_scales = {} if {"scales", "sizes"} & set(attrs) else {"scales": (1, 1, 2, 2)}
    net = Net(2, 2, 4, 4, opset=19)
    model = net.model(net.relu(resized(net, "x", **given_scales, **attrs)))
    with pytest.raises(UnsupportedModelError, match=f"Resize .*{reason}") as error:
        program(Graph(model))
    assert error.value.exit_code == 3


def bare(plane: tuple[Any, ...], *values: onnx.TensorProto, **attrs: Any) -> Graph:
    """A Resize that no checker has seen; values: roi, scales, sizes."""
    node = helper.make_node("Resize", ["x", *(v.name for v in values)], ["y"], name="size", **attrs)
    ports = [helper.make_tensor_value_info(n, 1, s) for n, s in (("x", (1, 2, *plane)), ("y", None))]
    graph = helper.make_graph([node], "g", ports[:1], ports[1:], [v for v in values if v.name])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def tensor(name: str, *values: float) -> onnx.TensorProto:
    kind = onnx.TensorProto.INT64 if name == "sizes" else onnx.TensorProto.FLOAT
    return helper.make_tensor(name, kind, [len(values)], values)


NONE = onnx.TensorProto()


@pytest.mark.parametrize(("graph", "reason"), [
    (lambda: bare((4, 4), NONE, tensor("scales", 1, 1, 0.1, 1)), "empty"),
    (lambda: bare((4, 4), NONE, tensor("scales", 1, 1, -2, 1)), "not positive"),
    (lambda: bare((4, 4), NONE, tensor("scales", 1, 1, 2)), "do not fit"),
    (lambda: bare((4, 4), NONE, NONE, tensor("sizes", 1, 2, 0, 4)), "empty"),
    (lambda: bare((4, 4), NONE, NONE, tensor("sizes", 1, 2, 1 << 20, 1 << 20)), "elements"),
    (lambda: bare((3, 4), NONE, tensor("scales", 1, 1, 5 / 3, 2)), r"give \[2, 5, 8\] where \[2, 4, 8\]"),  # runtimes differ
    (lambda: bare((4, 4), NONE, tensor("scales", 1, 1, float("nan"), 2)), "NaN"),
    (lambda: bare((4, 4), tensor("scales", 1, 1, 0.7, 0.7)), "opset 11"),
])
def test_sizes_that_do_not_fit_are_refused(graph: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        program(graph())


def test_three_axes_are_refused() -> None:
    net = Net(1, 2, 4, 4)
    deep = net.op("Reshape", "x", net.ints(1, 2, 2, 2, 4))
    (refused,) = unsupported(Graph(net.model(net.op("Resize", deep, "", net.const(np.float32([1, 1, 2, 2, 2]))))))
    assert refused.reason == "it is not over one or two spatial axes"


def test_computed_sizes_are_refused() -> None:
    net = Net(1, 2, 4, 4)
    net.inputs.append(helper.make_tensor_value_info("scales", 1, (4,)))
    refused = unsupported(Graph(net.model(net.op("Resize", "x", "", "scales"))))
    assert [u.operator for u in refused] == ["Resize"]
