"""Programs compute what their models compute, and what has no kernel is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from interpret import interpret
from net_blocks import classifier, shuffle
from onnx import TensorProto, helper
from onnx_kit import Net, run_ort
from program_kit import kinds, one_form_graph, only, translated, unsupported

from gkp.converter.graph import Graph
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Pool,
    Reshape,
    Softmax,
)
from gkp.converter.native.reading.frontend import HINT, program
from gkp.errors import UnsupportedModelError, UsageError

Build = Callable[[Net], str]


def net(build: Build, *shape: Any, **options: Any) -> onnx.ModelProto:
    made = Net(*shape, **options)
    return made.model(build(made))


# ---- convolutions and matrix products ----------------------------------------------------------------------------------
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("auto", ["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"])
def test_convolutions_of_every_group_count_and_padding(group: int, auto: str) -> None:
    pads = {"pads": [0, 1, 2, 1]} if auto == "NOTSET" else {"auto_pad": auto}
    found = translated(net(lambda n: n.conv("x", n.weight(16, 8 // group, 3, 2), bias=n.normal(16), group=group,
                                            strides=[2, 3], **pads), 3, 8, 9, 10))
    assert kinds(found) == {"Depthwise" if group == 8 else "Conv": 1}


def test_dilated_depthwise_convolution_with_a_channel_multiplier() -> None:
    found = translated(net(lambda n: n.conv("x", n.weight(12, 1, 3, 3), group=4, pads=[2, 1, 0, 3], dilations=[2, 1],
                                            strides=[1, 2]), 2, 4, 9, 7))
    step = only(found, Depthwise)
    assert step.weight.shape == (12, 3, 3)
    assert (step.pads, step.dilations, step.strides) == ((2, 1, 0, 3), (2, 1), (1, 2))


@pytest.mark.parametrize("auto", ["NOTSET", "SAME_LOWER"])
def test_one_dimensional_nets_become_planes_of_height_one(auto: str) -> None:
    def build(n: Net) -> str:
        pads = {"pads": [1, 2]} if auto == "NOTSET" else {"auto_pad": auto}
        y = n.relu(n.conv("x", n.weight(6, 2, 4), bias=n.normal(6), group=2, strides=[2], **pads))
        y = n.conv(y, n.weight(6, 1, 3), group=6, pads=[1, 1])
        y = n.op("AveragePool", n.op("MaxPool", y, kernel_shape=[2], strides=[2]), kernel_shape=[3], pads=[1, 1])
        return n.op("Flatten", n.op("GlobalAveragePool", y))

    found = translated(net(build, 2, 4, 21))
    assert only(found, Conv).conv.kernel_shape == (1, 4)
    assert found.inputs[0].shape == (4, 21)
    assert found.outputs[0].shape == (6,)
    assert {value.height for value in found.values} == {1}


def test_convolution_that_is_wider_than_its_input_is_refused() -> None:
    made = Net(1, 3, 4, 4)
    model = made.model(made.conv("x", made.weight(2, 3, 3, 3)))
    graph = one_form_graph(model)
    graph.inputs[0].shape = [1, 3, 2, 4]
    with pytest.raises(UnsupportedModelError, match="kernel is larger"):
        program(graph)


@pytest.mark.parametrize("bias", ["none", "vector", "row", "scalar"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm_is_a_1x1_convolution_of_a_vector(bias: str, transposed: int) -> None:
    def build(n: Net) -> str:
        c = {"none": [], "vector": [n.normal(5)], "row": [n.normal(1, 5)], "scalar": [np.float32(0.7)]}[bias]
        weight = n.normal(5, 7) if transposed else n.normal(7, 5)
        return n.op("Gemm", "x", n.const(weight), *map(n.const, c), alpha=0.5, beta=1.5, transB=transposed)

    conv = only(translated(net(build, 3, 7)), Conv).conv
    assert (conv.in_channels, conv.out_channels, conv.kernel_shape) == (7, 5, (1, 1))


def test_matmul_with_a_constant_added_is_one_convolution() -> None:
    found = translated(net(lambda n: n.relu(n.op("Add", n.op("MatMul", "x", n.const(n.normal(7, 5))), n.const(n.normal(5)))),
                           3, 7))
    assert kinds(found) == {"Conv": 1}
    assert only(found, Conv).activation is Activation.RELU


def test_flatten_of_a_plane_before_gemm_is_a_reshape() -> None:
    def build(n: Net) -> str:
        return n.op("Gemm", n.op("Flatten", n.conv3("x", 3, 4)), n.const(n.normal(4 * 30, 6)))

    found = translated(net(build, 2, 3, 5, 6))
    assert kinds(found) == {"Conv": 2, "Reshape": 1}
    assert found.values[only(found, Reshape).target].channels == 120


# ---- element by element -----------------------------------------------------------------------------------------------
ACTIVATIONS: dict[str, tuple[Build, Activation]] = {
    "relu": (lambda n: n.relu("x"), Activation.RELU),
    "clip from 0": (lambda n: n.op("Clip", "x", n.const(np.float32(0))), Activation.RELU),
    "clip to 6": (lambda n: n.op("Clip", n.op("Mul", "x", n.const(np.float32(5))), n.const(np.float32(0)),
                                 n.const(np.float32(6))), Activation.RELU6),
    "sigmoid": (lambda n: n.op("Sigmoid", "x"), Activation.SIGMOID),
    "hardsigmoid": (lambda n: n.op("HardSigmoid", "x", alpha=1 / 6, beta=0.5), Activation.HARDSIGMOID),
    "hardsigmoid, other slope": (lambda n: n.op("HardSigmoid", "x", alpha=0.3, beta=0.4), Activation.HARDSIGMOID),
    "hardswish": (lambda n: n.op("HardSwish", "x"), Activation.HARDSWISH),
    "x * hardsigmoid(x)": (lambda n: n.op("Mul", n.op("HardSigmoid", "x", alpha=1 / 6, beta=0.5), "x"),
                           Activation.HARDSWISH),
    "x * sigmoid(x)": (lambda n: n.op("Mul", "x", n.op("Sigmoid", "x")), Activation.SILU),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    build, kind = ACTIVATIONS[name]
    step = only(translated(net(build, 2, 5, 4, 3)), Affine)
    assert step.activation is kind


def test_batch_normalisation_left_over_is_an_affine() -> None:
    found = translated(net(lambda n: n.relu(n.bn("x", 5)), 2, 5, 4, 3))
    assert kinds(found) == {"Affine": 1}


@pytest.mark.parametrize(("op", "first"), [("Add", True), ("Add", False), ("Sub", True), ("Sub", False), ("Mul", True),
                                           ("Mul", False), ("Div", False)])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1, 1), (1, 5, 1, 1), (1, 1, 1, 1)])
def test_constants_per_channel_are_affine(op: str, shape: tuple[int, ...], first: bool) -> None:
    def build(n: Net) -> str:
        constant = n.const(np.asarray(n.normal(*shape) + 3, np.float32))
        return n.op(op, *((constant, "x") if first else ("x", constant)))

    assert kinds(translated(net(build, 2, 5, 4, 3))) == {"Affine": 1}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul"])
@pytest.mark.parametrize("narrow", ["channel", "image", "plane"])
@pytest.mark.parametrize("first", [False, True])
def test_operands_that_are_broadcast(op: str, narrow: str, first: bool) -> None:
    def build(n: Net) -> str:
        y = n.conv1("x", 5, 1 if narrow != "channel" else 5)
        y = y if narrow == "plane" else n.op("GlobalAveragePool", y)
        return n.op(op, *((y, "x") if first else ("x", y)))

    found = translated(net(build, 2, 5, 4, 3))
    step = only(found, Binary)
    whole = step.b if op == "Sub" and first else step.a
    assert found.values[whole] == found.values[step.target]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("axes", [(2,), (3,), (1, 3)])
def test_operands_that_are_a_part_of_the_plane_are_broadcast(op: str, axes: tuple[int, ...]) -> None:
    """Attention over rows and columns."""
    def build(n: Net) -> str:
        y = n.op("Sigmoid", n.op("ReduceMax", n.conv1("x", 5, 1) if 1 in axes else "x", n.ints(*[a for a in axes if a > 1])))
        return n.op(op, "x", y)

    found = translated(net(build, 2, 5, 4, 3))
    step = only(found, Binary)
    assert found.values[step.b].size < found.values[step.a].size
    assert kinds(found)["Copy"] == 0


@pytest.mark.parametrize(("op", "first"), [("Add", True), ("Add", False), ("Sub", True), ("Sub", False), ("Mul", True),
                                           ("Mul", False), ("Div", False)])
@pytest.mark.parametrize("shape", [(4, 3), (5, 4, 3), (1, 4, 1), (3,), (1, 5, 1, 3)])
def test_constants_may_differ_within_a_channel(op: str, first: bool, shape: tuple[int, ...]) -> None:
    def build(n: Net) -> str:
        constant = n.const(np.abs(n.normal(*shape)) + np.float32(0.5))
        return n.relu(n.op(op, *((constant, "x") if first else ("x", constant))))

    found = translated(net(build, 2, 5, 4, 3))
    step = only(found, ConstantBinary)
    assert step.activation is Activation.RELU
    assert step.constant.size == np.prod(shape)


def test_constants_of_lines_and_a_division_by_zero() -> None:
    found = translated(net(lambda n: n.op("Mul", n.op("Sub", n.const(n.normal(1, 2, 7)), "x"), n.const(n.normal(1, 7))), 3, 2, 7))
    assert kinds(found) == {"Affine": 1, "ConstantBinary": 2}
    (refused,) = unsupported(Graph(net(lambda n: n.op("Div", "x", n.const(np.float32([1, 0, 2]))), 1, 2, 3)))
    assert "not zero" in refused.reason


def test_sum_of_three_and_of_a_value_with_itself() -> None:
    assert kinds(translated(net(lambda n: n.op("Sum", "x", n.relu("x"), "x"), 2, 3, 4, 4))) == {"Affine": 1, "Binary": 2}
    assert kinds(translated(net(lambda n: n.op("Add", "x", "x"), 2, 3))) == {"Binary": 1}


# ---- pooling ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("op", "extra"), [("MaxPool", {}), ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1})])
@pytest.mark.parametrize("ceil", [0, 1])
@pytest.mark.parametrize(("kernel", "strides", "pads"), [((3, 3), (2, 2), (1, 1, 1, 1)), ((2, 3), (2, 1), (0, 0, 0, 0)),
                                                         ((3, 2), (3, 2), (0, 1, 2, 0)), ((4, 4), (4, 3), (1, 0, 0, 1))])
def test_pooling_windows(op: str, extra: dict[str, int], ceil: int, kernel: Any, strides: Any, pads: Any) -> None:
    found = translated(net(lambda n: n.op(op, "x", kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=ceil, **extra),
                           2, 3, 9, 11))
    assert only(found, Pool).maximum == (op == "MaxPool")


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_pooling_with_auto_pad(op: str, auto: str) -> None:
    translated(net(lambda n: n.op(op, "x", kernel_shape=[3, 2], strides=[2, 2], auto_pad=auto), 2, 3, 8, 7))


def test_dilated_max_pooling() -> None:
    found = translated(net(lambda n: n.op("MaxPool", "x", kernel_shape=[2, 3], dilations=[3, 2], pads=[1, 1, 1, 1]),
                           2, 3, 8, 9))
    assert only(found, Pool).dilations == (3, 2)


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (2,), (-1,)])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax", "ReduceSum"])
def test_reductions_over_spatial_axes(op: str, axes: tuple[int, ...], keep: int) -> None:
    found = translated(net(lambda n: n.op(op, n.relu("x"), n.ints(*axes), keepdims=keep), 2, 3, 5, 4))
    assert len(found.outputs[0].shape) == (3 if keep else 3 - len(axes))


def test_global_pooling_and_softmax() -> None:
    def build(n: Net) -> str:
        return n.op("Softmax", n.op("Flatten", n.op("GlobalMaxPool", "x")))

    assert kinds(translated(net(build, 2, 3, 5, 4))) == {"Pool": 1, "Softmax": 1}
    assert only(translated(net(lambda n: n.op("Softmax", "x", axis=1), 2, 3, 5, 4)), Softmax).source == 0


def test_softmax_over_an_axis_that_becomes_the_channels() -> None:
    """A distribution over 4 distances for each of 2 sides (YOLOv8's head)."""
    def build(n: Net) -> str:
        y = n.op("Softmax", n.op("Reshape", "x", n.ints(2, 2, 4, 9)), axis=2)
        return n.relu(n.op("Reshape", y, n.ints(2, 8, 3, 3)))

    assert kinds(translated(net(build, 2, 8, 3, 3)))["Softmax"] == 1


# ---- movement -----------------------------------------------------------------------------------------------------------
def sliced(n: Net, x: str, starts: Any, ends: Any, axes: Any, steps: Any) -> str:
    return str(n.op("Slice", x, n.ints(*starts), n.ints(*ends), n.ints(*axes), n.ints(*steps)))


MOVES: dict[str, tuple[Build, dict[str, int]]] = {
    "gather": (lambda n: n.take("x", [5, 0, 0, -1]), {"Copy": 1}),
    "one channel": (lambda n: n.op("Gather", "x", n.const(np.int64(2)), axis=1), {"Copy": 1, "Reshape": 1}),
    "split": (lambda n: n.op("Add", *n.op("Split", "x", n.ints(3, 3), outputs=2, axis=1)), {"Copy": 2, "Binary": 1}),
    "slice": (lambda n: sliced(n, "x", (4,), (-100,), (1,), (-2,)), {"Copy": 1}),
    "subsample": (lambda n: sliced(n, "x", (0, 0), (99, 99), (2, 3), (2, 3)), {"Copy": 1}),
    "subsample from 1": (lambda n: sliced(n, "x", (1,), (99,), (2,), (2,)), {"Copy": 1}),
    "crop": (lambda n: sliced(n, "x", (1, 2), (-1, 5), (-2, -1), (1, 1)), {"Copy": 1}),
    "shuffle": (lambda n: shuffle(n, "x", (2, 6, 8, 9), 3), {"Copy": 1}),
    "concat": (lambda n: n.concat("x", n.relu("x"), "x"), {"Affine": 1, "Copy": 3}),
    "concat of vectors": (lambda n: n.concat(*[n.op("Flatten", n.op(f"Global{k}Pool", "x")) for k in ("Max", "Average")]),
                          {"Pool": 2, "Copy": 2}),
    "option A": (lambda n: n.relu(n.concat(n.op("MaxPool", "x", kernel_shape=[1, 1], strides=[2, 2]),
                                           n.const(np.zeros((2, 4, 4, 5), np.float32)))), {"Affine": 1, "Copy": 1}),
    "flatten": (lambda n: n.op("Flatten", "x"), {"Reshape": 1}),
    "flatten and take": (lambda n: n.take(n.op("Flatten", "x"), [100, 3, 7]), {"Reshape": 1, "Copy": 1}),
    "to lines": (lambda n: n.op("Reshape", "x", n.ints(0, 6, -1)), {"Reshape": 1}),
    "there and back": (lambda n: n.relu(n.op("Reshape", n.op("Reshape", "x", n.ints(2, -1)), n.ints(-1, 6, 8, 9))),
                       {"Affine": 1}),
    "squeeze": (lambda n: n.op("Unsqueeze", n.op("Squeeze", n.op("GlobalMaxPool", "x"), n.ints(2, 3)), n.ints(-1)),
                {"Pool": 1}),
    "pad": (lambda n: n.op("Pad", "x", n.ints(0, 0, 1, 2, 0, 0, 0, 3)), {"Depthwise": 1}),
    "pad channels": (lambda n: n.op("Pad", "x", n.ints(1, 1, 2, 0), n.const(np.float32(0)), n.ints(1, 2)),
                     {"Copy": 1, "Depthwise": 1}),
    "focus": (lambda n: n.conv1(n.concat(*[sliced(n, "x", (a, b), (8, 8), (2, 3), (2, 2)) for a in (0, 1) for b in (0, 1)]),
                                24, 5), {"Copy": 8, "Conv": 1}),
    "uneven split": (lambda n: n.concat(*n.op("Split", "x", n.ints(1, 3, 2), outputs=3, axis=1)[::-1]), {"Copy": 1}),
    "split without sizes": (lambda n: n.concat(*n.op("Split", "x", outputs=4, axis=1, num_outputs=4)[::-1]), {"Copy": 1}),
    "columns side by side": (lambda n: n.op("Concat", "x", n.relu("x"), axis=3), {"Affine": 1, "Paste": 2}),
    "twice the same rows": (lambda n: n.op("Concat", "x", "x", axis=2), {"Copy": 1, "Reshape": 1}),
    "twice the same columns": (lambda n: n.op("Concat", "x", "x", axis=3), {"Paste": 2}),
    "lines of two planes": (lambda n: n.op("Split", n.op("Concat", *[n.op("Reshape", y, n.ints(2, 6, -1)) for y in (
        "x", n.op("MaxPool", "x", kernel_shape=[2, 2]))], axis=2), n.ints(2, 4), outputs=2, axis=1)[1],
        {"Pool": 1, "Copy": 2, "Reshape": 2, "Paste": 2}),
    "dropout": (lambda n: n.relu(n.op("Dropout", "x")), {"Affine": 1}),
    "nothing": (lambda n: n.op("Identity", "x"), {"Copy": 1}),
}


@pytest.mark.parametrize("name", MOVES)
def test_movement(name: str) -> None:
    build, expected = MOVES[name]
    assert kinds(translated(net(build, 2, 6, 8, 9))) == expected


@pytest.mark.parametrize("name", ["crop", "subsample from 1"])
def test_what_is_not_finite_spoils_nothing_beside_it(name: str) -> None:
    model = net(MOVES[name][0], 2, 6, 8, 9)
    x = np.random.default_rng(0).standard_normal((2, 6, 8, 9)).astype(np.float32)
    x[:, :, ::3, ::4] = np.inf
    x[:, 0, 2, 3] = np.nan
    np.testing.assert_array_equal(interpret(program(one_form_graph(model)), [x])[0], run_ort(model, {"x": x})[0])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_is_interleaved_behind_a_convolution_in_either_order(mode: str) -> None:
    found = translated(net(lambda n: n.relu(n.op("DepthToSpace", n.conv3("x", 3, 8), blocksize=2, mode=mode)), 2, 3, 5, 6))
    assert kinds(found) == {"Conv": 1, "Interleave": 1}


def test_depth_to_space_made_of_a_transposition_is_recognised() -> None:
    def build(n: Net) -> str:
        y = n.op("Reshape", n.conv3("x", 3, 12), n.ints(2, 2, 2, 3, 5, 6))
        return n.op("Reshape", n.op("Transpose", y, perm=[0, 3, 4, 1, 5, 2]), n.ints(2, 3, 10, 12))

    assert kinds(translated(net(build, 2, 3, 5, 6))) == {"Conv": 1, "Interleave": 1}


def test_space_to_depth() -> None:
    found = translated(net(lambda n: n.conv1(n.op("SpaceToDepth", "x", blocksize=2), 12, 5), 2, 3, 8, 6))
    assert kinds(found)["Conv"] == 1


def test_spatial_pad_goes_into_the_convolution_and_the_average() -> None:
    pads = (0, 0, 1, 0, 0, 0, 2, 1)
    found = translated(net(lambda n: n.conv(n.op("Pad", "x", n.ints(*pads)), n.weight(4, 3, 3, 3), pads=[1, 1, 0, 0]),
                           2, 3, 6, 7))
    assert kinds(found) == {"Conv": 1}
    assert only(found, Conv).conv.pads == (2, 1, 2, 1)
    found = translated(net(lambda n: n.op("AveragePool", n.op("Pad", "x", n.ints(*pads)), kernel_shape=[3, 3]), 2, 3, 6, 7))
    assert kinds(found) == {"Pool": 1}
    assert only(found, Pool).count_pads


def test_spatial_pad_before_a_maximum_stays_a_zero() -> None:
    found = translated(net(lambda n: n.op("MaxPool", n.op("Pad", n.op("Sub", "x", n.const(np.float32(9))),
                                                         n.ints(0, 0, 1, 1, 0, 0, 1, 1)), kernel_shape=[3, 3]), 2, 3, 6, 7))
    assert kinds(found) == {"Affine": 1, "Depthwise": 1, "Pool": 1}


def test_strided_copy_of_a_recognised_shortcut_is_no_convolution() -> None:
    def build(n: Net) -> str:
        small = n.op("AveragePool", "x", kernel_shape=[1, 1], strides=[2, 2])
        return n.op("Add", n.conv3("x", 4, 8, stride=2), n.concat(small, n.op("Mul", small, n.const(np.float32(0)))))

    found = translated(net(build, 2, 4, 7, 8))
    assert kinds(found) == {"Conv": 1, "Copy": 1}
    copy = only(found, Copy)
    assert copy.strides == (2, 2)
    assert copy.index.tolist() == [0, 1, 2, 3, -1, -1, -1, -1]


# ---- names -------------------------------------------------------------------------------------------------------------
def test_classifier_of_a_network_keeps_its_layer_names() -> None:
    made = Net(2, 3, 8, 8)
    model = made.model(classifier(made, made.relu(made.conv("x", made.weight(8, 3, 3, 3), name="stem")), 8))
    found = translated(model)
    assert [s.layer for s in found.steps if isinstance(s, Conv)] == ["stem", model.graph.node[-1].name]


# ---- ports --------------------------------------------------------------------------------------------------------------
def test_symbolic_batch_and_several_inputs_and_outputs() -> None:
    made = Net("N", 3, 6, 6)
    made.inputs.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 4]))
    y = made.conv3("x", 3, 4)
    pooled = made.op("Reshape", made.op("GlobalAveragePool", y), made.ints(-1, 4))
    z = made.op("Mul", pooled, "z")
    found = translated(made.model(z, y, made.op("Identity", z)))
    assert [p.name for p in found.inputs] == ["x", "z"]
    assert [p.shape for p in found.outputs] == [(4,), (4, 6, 6), (4,)]


def test_dynamic_height_is_a_usage_error() -> None:
    made = Net("N", 3, "H", 6)
    with pytest.raises(UsageError, match="dynamic axis") as error:
        program(Graph(made.model(made.relu("x"))))
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("dtype", "shape"), [(TensorProto.FLOAT16, (1, 3, 4, 4)), (TensorProto.DOUBLE, (1, 3)), (TensorProto.FLOAT, ())])
def test_inputs_that_are_no_images_of_float32(dtype: int, shape: tuple[int, ...]) -> None:
    made = Net(*shape, dtype=dtype)
    with pytest.raises(UnsupportedModelError) as error:
        program(Graph(made.model(made.relu("x"))))
    assert "--target ort" in error.value.hint


# ---- refusals -----------------------------------------------------------------------------------------------------------
MIXING: dict[str, Build] = {
    "flatten everything": lambda n: n.op("Flatten", n.relu("x"), axis=0),
    "reshape into the batch": lambda n: n.op("Reshape", n.relu("x"), n.ints(-1, 3, 16)),
    "reshape to one row": lambda n: n.op("Reshape", n.relu("x"), n.ints(1, -1)),
    "transpose": lambda n: n.op("Transpose", n.relu("x"), perm=[1, 0, 2, 3]),
    "slice": lambda n: n.op("Slice", n.relu("x"), n.ints(0), n.ints(1), n.ints(0)),
    "gather": lambda n: n.op("Gather", n.relu("x"), n.ints(1, 0), axis=0),
    "concat": lambda n: n.op("Concat", n.relu("x"), "x", axis=0),
    "mean over the batch": lambda n: n.op("ReduceMean", n.relu("x"), n.ints(0, 2, 3)),
    "mean over everything": lambda n: n.op("ReduceMean", n.relu("x")),
    "softmax": lambda n: n.op("Softmax", n.relu("x"), axis=0),
    "a constant per image": lambda n: n.op("Add", n.relu("x"), n.const(n.normal(2, 6, 1, 1))),
    "slopes per image": lambda n: n.op("PRelu", n.relu("x"), n.const(n.normal(2, 6, 1, 1))),
    "a row per image": lambda n: n.op("Gemm", n.op("Flatten", "x"), n.const(n.normal(96, 4)), n.const(n.normal(2, 4))),
}


@pytest.mark.parametrize("name", MIXING)
def test_operators_that_mix_images_are_refused(name: str) -> None:
    model = net(MIXING[name], 2, 6, 4, 4)
    (refused,) = unsupported(Graph(model))
    assert refused.name == model.graph.node[-1].name
    with pytest.raises(UnsupportedModelError, match=refused.operator):
        program(Graph(model))


OTHERS: dict[str, tuple[str, Build]] = {
    "resize": ("Resize", lambda n: n.op("Resize", "x", "", n.const(np.array([1, 1, 2, 2], np.float32)), mode="cubic")),
    "reflection": ("Pad", lambda n: n.op("Pad", "x", n.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")),
    "ones around": ("Pad", lambda n: n.op("Pad", "x", n.ints(0, 0, 1, 1, 0, 0, 1, 1), n.const(np.float32(1)))),
    "constant per image": ("Add", lambda n: n.op("Add", n.op("GlobalMaxPool", "x"), n.const(n.normal(4, 4)))),
    "computed weights": ("Conv", lambda n: n.op("Conv", "x", n.op("Reshape", "x", n.ints(2, 6, 4, 4)))),
    "indices of a maximum": ("MaxPool", lambda n: n.op("Cast", n.op("MaxPool", "x", kernel_shape=[2, 2], outputs=2)[1], to=1)),
    "window among the pads": ("MaxPool", lambda n: n.op("MaxPool", n.take("x", [0]), kernel_shape=[2, 1], dilations=[5, 1],
                                                        pads=[1, 0, 1, 0])),
    "a part without elements": ("Split", lambda n: n.op("Split", "x", n.ints(6, 0), outputs=2, axis=1)[1]),
    "nothing to compute": ("Sigmoid", lambda n: n.op("Sigmoid", n.op("Split", "x", n.ints(6, 0), outputs=2, axis=1)[1])),
    "pads wider than the window": ("AveragePool", lambda n: n.op("AveragePool", "x", kernel_shape=[2, 2], pads=[0, 2, 0, 0])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_kernel_is_refused(name: str) -> None:
    operator, build = OTHERS[name]
    refused = unsupported(Graph(net(build, 2, 6, 4, 4)))
    assert [u.operator for u in refused if not u.follows][:1] == [operator]


def test_all_refused_operators_are_named_at_once_with_both_ways_out() -> None:
    made = Net(1, 4, 6, 6)
    y = made.op("Celu", made.conv3("x", 4, 4))
    y = made.op("Sin", made.conv3(y, 4, 4))
    y = made.op("Celu", made.conv3(y, 4, 4))
    model = made.model(y)
    first = next(n.name for n in model.graph.node if n.op_type == "Celu")
    with pytest.raises(UnsupportedModelError) as error:
        program(one_form_graph(model))
    assert error.value.exit_code == 3
    assert f"Celu (2 nodes, the first is {first}: no kernel), Sin (" in error.value.message
    assert "Conv" not in error.value.message
    assert error.value.hint == HINT
    assert "--hybrid" in HINT
    assert "--target ort" in HINT


def test_names_from_the_model_are_cleaned_in_the_message() -> None:
    model = net(lambda n: n.op("Sin", "x"), 1, 3)
    model.graph.node[0].name = "evil\x1b[31m\nname"
    with pytest.raises(UnsupportedModelError) as error:
        program(Graph(model))
    assert error.value.message.isprintable()


def test_damaged_constants_are_refused() -> None:
    def build(n: Net) -> str:
        return n.op("Mul", "x", n.const(np.array([1, np.nan, 1], np.float32).reshape(3, 1, 1)))

    with pytest.raises(UnsupportedModelError, match="NaN"):
        program(Graph(net(build, 1, 3, 4, 4)))


def test_result_that_would_not_fit_in_memory_is_refused() -> None:
    model = net(lambda n: n.op("Pad", "x", n.ints(0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20)), 1, 3, 4, 4)
    (refused,) = unsupported(Graph(model))
    assert "elements" in refused.reason
