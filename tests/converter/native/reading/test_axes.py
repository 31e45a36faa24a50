"""Tensors with their channels last, with more axes than a plane has, and what is computed over any of their axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_kit import Net
from program_kit import kinds, only, translated

from gkp.converter.native.program import Binary, Conv, Normalise, Parametric, Pool, Reduce, Softmax

Build = Callable[[Net], str]


def net(build: Build, *shape: Any, **options: Any) -> onnx.ModelProto:
    made = Net(*shape, **options)
    return made.model(build(made))


def last(n: Net, x: str) -> Any:
    """NCHW -> NHWC."""
    return n.op("Transpose", x, perm=[0, 2, 3, 1])


def first(n: Net, x: str) -> Any:
    """NHWC -> NCHW."""
    return n.op("Transpose", x, perm=[0, 3, 1, 2])


def norm(n: Net, x: str, c: int, axis: int = -1) -> Any:
    return n.op("LayerNormalization", x, n.const(n.normal(c)), n.const(n.normal(c)), axis=axis, epsilon=1e-6)


# ---- channels last -------------------------------------------------------------------------------------------------------
def test_layer_normalisation_of_channels_last_moves_nothing() -> None:
    found = translated(net(lambda n: first(n, norm(n, last(n, n.relu("x")), 6)), 2, 6, 4, 5))
    assert kinds(found) == {"Affine": 1, "Normalise": 1}
    assert only(found, Normalise).epsilon == pytest.approx(1e-6)


def test_matrix_product_over_the_last_axis_is_a_1x1_convolution_of_the_plane() -> None:
    def build(n: Net) -> str:
        y = n.op("Add", n.op("MatMul", last(n, "x"), n.const(n.weight(6, 9))), n.const(n.normal(9)))
        y = n.op("MatMul", n.op("Relu", y), n.const(n.weight(9, 6)))
        return str(n.op("Add", "x", first(n, n.op("Mul", n.const(n.normal(6)), y))))

    found = translated(net(build, 2, 6, 4, 5))
    assert kinds(found) == {"Conv": 2}
    assert [s.residual for s in found.steps if isinstance(s, Conv)] == [None, 0]


def test_matrix_product_of_tokens() -> None:
    def build(n: Net) -> str:
        tokens = n.op("Transpose", n.op("Reshape", n.conv1("x", 3, 6), n.ints(0, 6, -1)), perm=[0, 2, 1])
        y = n.op("MatMul", norm(n, tokens, 6), n.const(n.weight(6, 8)))
        return str(n.op("ReduceMean", y, n.ints(1), keepdims=0))

    found = translated(net(build, 2, 3, 4, 5))
    assert kinds(found) == {"Conv": 2, "Normalise": 1, "Pool": 1}


def test_operands_in_the_same_order_meet_as_they_lie() -> None:
    def build(n: Net) -> str:
        y = n.op("Mul", last(n, n.conv1("x", 6, 6)), last(n, n.relu("x")))
        return first(n, n.op("Max", y, n.op("Unsqueeze", n.op("ReduceMean", y, n.ints(1, 2), keepdims=0), n.ints(1, 2))))

    assert kinds(translated(net(build, 2, 6, 4, 5))) == {"Conv": 1, "Affine": 1, "Pool": 1, "Binary": 2}


def test_plane_that_is_flattened_with_its_channels_last_is_transposed_once() -> None:
    def build(n: Net) -> str:
        return str(n.op("Gemm", n.op("Flatten", last(n, n.conv1("x", 3, 4))), n.const(n.weight(4 * 20, 6))))

    assert kinds(translated(net(build, 2, 3, 4, 5))) == {"Conv": 2, "Permute": 1, "Reshape": 1}


def test_input_and_output_with_channels_last() -> None:
    found = translated(net(lambda n: last(n, n.conv1(first(n, "x"), 3, 4)), 2, 4, 5, 3))
    assert kinds(found) == {"Conv": 1, "Permute": 2}
    assert [p.shape for p in (*found.inputs, *found.outputs)] == [(4, 5, 3), (4, 5, 4)]


def test_half_of_the_last_axis() -> None:
    def build(n: Net) -> str:
        a, b = n.op("Split", last(n, n.conv1("x", 6, 8)), n.ints(4, 4), axis=3, outputs=2)
        return first(n, n.op("Mul", a, n.op("Sigmoid", b)))

    assert kinds(translated(net(build, 2, 6, 4, 5))) == {"Conv": 1, "Copy": 2, "Affine": 1, "Binary": 1}


# ---- any axes -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [(1,), (1, 2, 3), (-1,), (1, 3), (2, 3)])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"])
def test_reductions_over_any_axes(op: str, axes: tuple[int, ...], keep: int) -> None:
    translated(net(lambda n: n.op(op, n.relu("x"), n.ints(*axes), keepdims=keep), 2, 6, 4, 5))
    translated(net(lambda n: n.op(op, last(n, "x"), n.ints(*axes), keepdims=keep), 2, 6, 4, 5))


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_softmax_over_any_axis(axis: int, turned: bool) -> None:
    found = translated(net(lambda n: n.op("Softmax", last(n, "x") if turned else "x", axis=axis), 2, 6, 4, 5))
    assert found.values[only(found, Softmax).source].channels == ((4, 5, 6) if turned else (6, 4, 5))[axis - 1]


@pytest.mark.parametrize("one", [1, 2, 3, 4])
def test_softmax_beside_an_axis_of_one(one: int) -> None:
    """Wherever it stands, the other axes stay neighbours."""
    axis = 3 if one < 3 else 2
    translated(net(lambda n: n.op("Softmax", n.op("Unsqueeze", "x", n.ints(one)), axis=axis), 2, 3, 4, 5))


def test_split_attention_reads_its_five_axes_as_channels() -> None:
    """ResNeSt: the sum over the radix, its softmax, the weighted sum."""
    def build(n: Net) -> str:
        y = n.op("Reshape", n.conv1("x", 6, 12), n.ints(-1, 2, 6, 4, 5))
        gap = n.op("ReduceMean", n.op("ReduceSum", y, n.ints(1), keepdims=0), n.ints(2, 3), keepdims=1)
        gates = n.op("Transpose", n.op("Reshape", n.conv1(gap, 6, 12), n.ints(-1, 3, 2, 2)), perm=[0, 2, 1, 3])
        gates = n.op("Reshape", n.op("Softmax", gates, axis=1), n.ints(-1, 2, 6, 1, 1))
        return str(n.op("ReduceSum", n.op("Mul", y, gates), n.ints(1), keepdims=0))

    found = translated(net(build, 2, 6, 4, 5))
    assert [(s.count, s.inner) for s in found.steps if isinstance(s, Reduce)] == [(2, 6), (2, 6)]
    assert [found.values[s.source].size for s in found.steps if isinstance(s, Softmax)] == [12]
    (product,) = [s for s in found.steps if isinstance(s, Binary)]
    assert found.values[product.b].pixels == 1


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_normalisation_as_pytorch_exports_it(groups: int) -> None:
    def build(n: Net) -> str:
        ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
        y = n.op("InstanceNormalization", n.op("Reshape", n.conv1("x", 3, 6), n.ints(0, groups, -1)), n.const(ones), n.const(zeros))
        y = n.op("Mul", n.op("Reshape", y, n.ints(2, 6, 4, 5)), n.const(n.normal(6, 1, 1)))
        return str(n.op("Add", y, n.const(n.normal(6, 1, 1))))

    assert kinds(translated(net(build, 2, 3, 4, 5)))["Pool"] == 2


@pytest.mark.parametrize("opset", [18, 21])
def test_the_group_normalisation_operator(opset: int) -> None:
    n, made = 3 if opset == 18 else 6, Net(2, 6, 4, 5, opset=opset)
    y = made.op("GroupNormalization", "x", made.const(made.normal(n)), made.const(made.normal(n)), num_groups=3)
    out = helper.make_tensor_value_info(y, TensorProto.FLOAT, (2, 6, 4, 5))  # onnx does not infer it
    graph = helper.make_graph(made.nodes, "net", made.inputs, [out], made.constants)
    translated(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_layer_normalisation_over_several_axes(axis: int) -> None:
    shape = (6, 4, 5)[axis - 1:]
    ones = np.ones(shape, np.float32)
    translated(net(lambda n: n.op("LayerNormalization", "x", n.const(ones), n.const(0 * ones), axis=axis), 2, 6, 4, 5))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize(("a", "b"), [((6, 4, 5), (6, 4, 5)), ((6, 1, 1), (6, 4, 5)), ((1, 4, 5), (6, 4, 1)), ((6, 4, 5), (1, 1, 5)),
                                      ((6, 1, 5), (1, 4, 1))])
@pytest.mark.parametrize("turned", [False, True])
def test_two_computed_operands_are_broadcast_along_any_axes(op: str, a: Any, b: Any, turned: bool) -> None:
    def narrowed(n: Net, x: str, shape: tuple[int, ...]) -> Any:
        axes = [k + 1 for k, size in enumerate(shape) if size == 1]
        y = n.op("ReduceMax", n.op("Exp", x), n.ints(*axes), keepdims=1) if axes else n.op("Exp", x)
        return last(n, y) if turned else y

    translated(net(lambda n: n.op(op, narrowed(n, "x", a), narrowed(n, "x", b)), 2, 6, 4, 5))


def test_five_axes_of_input_and_output() -> None:
    found = translated(net(lambda n: n.op("Relu", "x"), 2, 3, 2, 4, 5))
    assert found.values[0].channels == 6
    assert found.outputs[0].shape == (3, 2, 4, 5)


# ---- functions ----------------------------------------------------------------------------------------------------------
FUNCTIONS: dict[str, Build] = {
    "Tanh": lambda n: n.op("Tanh", "x"), "Erf": lambda n: n.op("Erf", "x"), "Softplus": lambda n: n.op("Softplus", "x"),
    "Gelu": lambda n: n.op("Gelu", "x"), "Gelu by tanh": lambda n: n.op("Gelu", "x", approximate="tanh"),
    "Mish": lambda n: n.op("Mish", "x"), "Elu": lambda n: n.op("Elu", "x", alpha=0.5), "LeakyRelu": lambda n: n.op("LeakyRelu", "x"),
    "PRelu": lambda n: n.op("PRelu", "x", n.const(n.normal(5, 1, 1))), "one slope": lambda n: n.op("PRelu", "x", n.const(n.normal(1))),
    "Clip": lambda n: n.op("Clip", "x", n.const(np.float32(-0.5)), n.const(np.float32(0.25))),
    "Clip from above": lambda n: n.op("Clip", "x", "", n.const(np.float32(0.25))),
    "Clip to infinity": lambda n: n.op("Clip", "x", n.const(np.float32(0)), n.const(np.float32(np.inf))),
    "Abs": lambda n: n.op("Abs", "x"), "Neg": lambda n: n.op("Neg", "x"), "Exp": lambda n: n.op("Exp", "x"),
    "Sqrt": lambda n: n.op("Sqrt", n.op("Abs", "x")), "Reciprocal": lambda n: n.op("Reciprocal", n.op("Exp", "x")),
    "divided by": lambda n: n.op("Div", n.const(np.float32(3)), n.op("Exp", "x")),
    "Max with a number": lambda n: n.op("Max", "x", n.const(np.float32(0.5))),
    "Min with a number": lambda n: n.op("Min", n.const(np.float32(0.5)), "x"),
    **{f"Pow {p}": lambda n, p=p: n.op("Pow", n.op("Exp", "x"), n.const(np.float32(p)))  # type: ignore[misc]
       for p in (-1, -0.5, 0.5, 1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_single_elements(name: str) -> None:
    translated(net(FUNCTIONS[name], 2, 5, 4, 3, opset=20))


@pytest.mark.parametrize("op", ["Tanh", "Gelu", "Mish", "LeakyRelu", "Elu", "Clip"])
def test_they_go_into_the_convolution_before_them_and_leave_room_for_a_residual(op: str) -> None:
    bounds = [-1.0, 1.5] if op == "Clip" else []

    def build(n: Net) -> str:
        return str(n.op("Add", "x", n.op(op, n.conv3("x", 5, 5), *(n.const(np.float32(v)) for v in bounds))))

    step = only(translated(net(build, 2, 5, 4, 3, opset=20)), Conv)
    assert step.residual == 0
    assert isinstance(step.activation, Parametric) == (op in ("LeakyRelu", "Elu", "Clip"))


# ---- chains -------------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_chains_of_moves_reductions_and_functions(data: st.DataObject) -> None:
    shape = [data.draw(st.integers(1, 4)) for _ in range(data.draw(st.integers(1, 3)))]
    made, x = Net(2, *shape, seed=data.draw(st.integers(0, 99))), "x"
    for _ in range(data.draw(st.integers(1, 6))):
        x, shape = _random_step(data, made, x, shape)
    translated(made.model(x), tol=1e-4)


def _random_step(data: st.DataObject, n: Net, x: str, shape: list[int]) -> tuple[str, list[int]]:
    rank, axis = len(shape), data.draw(st.integers(0, len(shape) - 1))
    kind = data.draw(st.sampled_from(["transpose", "unsqueeze", "reduce", "softmax", "tanh", "scale", "centre", "matmul", "norm"]))
    if kind == "transpose":
        perm = data.draw(st.permutations(range(rank)))
        return str(n.op("Transpose", x, perm=[0, *(1 + a for a in perm)])), [shape[a] for a in perm]
    if kind == "unsqueeze" and rank < 4:
        return str(n.op("Unsqueeze", x, n.ints(axis + 1))), [*shape[:axis], 1, *shape[axis:]]
    if kind == "reduce" and rank > 1:
        op, keep = data.draw(st.sampled_from(["ReduceMean", "ReduceMax", "ReduceSum"])), data.draw(st.integers(0, 1))
        left = [*shape[:axis], *[1] * keep, *shape[axis + 1:]]
        return str(n.op(op, x, n.ints(axis + 1), keepdims=keep)), left
    if kind == "softmax":
        return str(n.op("Softmax", x, axis=axis + 1)), shape
    if kind == "scale":
        return str(n.op("Mul", x, n.const(n.normal(1)))), shape
    if kind == "centre":
        return str(n.op("Sub", x, n.op("ReduceMean", x, n.ints(axis + 1), keepdims=1))), shape
    if kind == "matmul" and rank > 1:
        width = data.draw(st.integers(1, 4))
        return str(n.op("MatMul", x, n.const(n.weight(shape[-1], width)))), [*shape[:-1], width]
    if kind == "norm":
        ones = np.ones(shape[axis:], np.float32)
        return str(n.op("LayerNormalization", x, n.const(ones), axis=axis + 1, epsilon=0.1)), shape
    return str(n.op("Tanh", x)), shape


def test_pool_of_a_plane_that_has_one_axis() -> None:
    found = translated(net(lambda n: n.op("ReduceMean", n.op("Reshape", n.relu("x"), n.ints(0, 6, -1)), n.ints(2)), 2, 6, 4, 5))
    assert only(found, Pool).kernel == (4, 5)
