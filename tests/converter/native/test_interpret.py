"""The interpreter, step by step, against numpy written out and against the ONNX operators."""

from __future__ import annotations

from math import erf, exp, log1p, pi, sqrt, tanh
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpret import activate, interpret, run_step
from onnx_kit import Net, run_ort

from gkp.branched import BranchedConv
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    Conv,
    Copy,
    Depthwise,
    Pool,
    Port,
    Program,
    Reshape,
    Softmax,
    Step,
    Value,
)
from gkp.errors import UsageError

RNG = np.random.default_rng(0)


def image(*shape: int) -> Any:
    return RNG.standard_normal((2, *shape)).astype(np.float32)


def ran(step: Step, target: Value, *sources: Any) -> Any:
    """The step's target for operands at the values 0, 1, ...; the target is the value after them."""
    values = dict(enumerate(sources))
    program = Program((*(Value(*x.shape[1:]) for x in sources), target), (step,), (), ())
    result = run_step(program, step, values)
    assert result is values[len(sources)]
    assert result.dtype == sources[0].dtype
    return result


SCALARS = {Activation.NONE: lambda x: x, Activation.RELU: lambda x: max(x, 0), Activation.RELU6: lambda x: min(max(x, 0), 6),
           Activation.SIGMOID: lambda x: 1 / (1 + exp(-x)), Activation.SILU: lambda x: x / (1 + exp(-x)),
           Activation.HARDSIGMOID: lambda x: min(max(x / 6 + 0.5, 0), 1),
           Activation.HARDSWISH: lambda x: x * min(max(x / 6 + 0.5, 0), 1), Activation.TANH: tanh, Activation.ERF: erf,
           Activation.GELU: lambda x: x * (1 + erf(x / sqrt(2))) / 2, Activation.MISH: lambda x: x * tanh(log1p(exp(x))),
           Activation.GELU_TANH: lambda x: x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3))) / 2,
           Activation.SOFTPLUS: lambda x: log1p(exp(x))}


@pytest.mark.parametrize("kind", Activation)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_activation(kind: Activation, dtype: Any) -> None:
    x = np.array([-200, -7, -3, -1e-3, 0, 0.5, 2.9, 6.5, 200], dtype)
    got = activate(kind, x)
    assert got.dtype == dtype
    np.testing.assert_allclose(got, [SCALARS[kind](float(v)) for v in x], rtol=1e-6, atol=1e-12)


def test_convolution_adds_the_residual_between_two_activations() -> None:
    x, r = image(3, 5, 4), image(2, 5, 4)
    conv = BranchedConv.build(3, 2, [([2, 0], [1], RNG.standard_normal((1, 2, 3, 3)).astype(np.float32))],
                              bias=np.float32([3, -1]), kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    got = ran(Conv(0, 2, conv, Activation.RELU, 1, Activation.HARDSWISH), Value(2, 5, 4), x, r)
    inner = np.maximum(conv(x), 0) + r
    np.testing.assert_allclose(got, inner * np.clip(inner / 6 + 0.5, 0, 1), atol=1e-6)
    np.testing.assert_array_equal(np.maximum(conv(x), 0)[:, 0], np.full((2, 5, 4), 3))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_depthwise_is_a_grouped_convolution(data: st.DataObject) -> None:
    c, multiplier = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    kernel, strides, dilations = (data.draw(st.tuples(*2 * [st.integers(1, 3)])) for _ in range(3))
    pads = data.draw(st.tuples(*4 * [st.integers(0, 3)]))
    plane = [d * (k - 1) + 1 + data.draw(st.integers(0, 5)) for d, k in zip(dilations, kernel, strict=True)]
    x = image(c, *plane)
    weight, bias = RNG.standard_normal((c * multiplier, *kernel)).astype(np.float32), np.arange(c * multiplier, dtype=np.float32)
    form = BranchedConv.from_grouped(weight[:, None], c, bias, strides=strides, pads=pads, dilations=dilations)
    want = form(x)
    got = ran(Depthwise(0, 1, weight, bias, strides, pads, dilations), Value(*want.shape[1:]), x)
    np.testing.assert_allclose(got, want, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pooling_is_that_of_onnx(data: st.DataObject) -> None:
    kernel, strides = (data.draw(st.tuples(*2 * [st.integers(1, 3)])) for _ in range(2))
    maximum, counted = data.draw(st.booleans()), data.draw(st.booleans())
    dilations = data.draw(st.tuples(*2 * [st.integers(1, 2)])) if maximum else (1, 1)
    span = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = tuple(data.draw(st.integers(0, min(k - 1, 1))) for k in kernel * 2)
    plane = [s + data.draw(st.integers(0, 6)) for s in span]  # as wide as the window: none lies in the pads altogether
    x = image(2, *plane)
    net = Net(2, 2, *plane)
    attrs: dict[str, Any] = {"dilations": dilations} if maximum else {"count_include_pad": int(counted)}
    name = net.op("MaxPool" if maximum else "AveragePool", "x", kernel_shape=kernel, strides=strides, pads=pads,
                  ceil_mode=data.draw(st.integers(0, 1)), **attrs)
    (want,) = run_ort(net.model(name), {"x": x})
    step = Pool(0, 1, maximum, kernel, strides, pads, dilations, counted and not maximum)
    np.testing.assert_allclose(ran(step, Value(*want.shape[1:]), x), want, atol=1e-5)


@pytest.mark.parametrize(("op", "want"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 1), (1, 1, 1)])
def test_binary_broadcasts_its_second_operand(op: str, want: Any, shape: tuple[int, ...]) -> None:
    a, b = image(3, 4, 5), image(*shape)
    got = ran(Binary(0, 1, 2, op, Activation.RELU), Value(3, 4, 5), a, b)
    np.testing.assert_array_equal(got, np.maximum(want(a, b), 0))


def test_affine_scales_and_shifts_each_channel() -> None:
    x = image(3, 4, 5)
    got = ran(Affine(0, 1, np.float32([1, -2, 0]), np.float32([0, 1, 5]), Activation.RELU6), Value(3, 4, 5), x)
    np.testing.assert_allclose(got[:, 1], np.clip(1 - 2 * x[:, 1], 0, 6), rtol=1e-6)
    np.testing.assert_array_equal(got[:, 2], np.full((2, 4, 5), 5))


def test_copies_fill_one_target_side_by_side() -> None:
    a, b = image(3, 5, 7), image(1, 3, 4)
    program = Program((Value(3, 5, 7), Value(1, 3, 4), Value(4, 3, 4)), (), (), ())
    values = {0: a, 1: b}
    run_step(program, Copy(0, 2, np.array([2, -1, 2]), (2, 2), 1), values)
    run_step(program, Copy(1, 2, np.array([0])), values)
    np.testing.assert_array_equal(values[2][:, 0], b[:, 0])
    np.testing.assert_array_equal(values[2][:, 1], a[:, 2, ::2, ::2])
    np.testing.assert_array_equal(values[2][:, 2], 0)
    np.testing.assert_array_equal(values[2][:, 3], a[:, 2, ::2, ::2])


def test_reshape_keeps_the_order_and_softmax_sums_to_one() -> None:
    x = image(3, 2, 4) * 100
    np.testing.assert_array_equal(ran(Reshape(0, 1), Value(24, 1, 1), x).ravel(), x.ravel())
    y = ran(Softmax(0, 1), Value(3, 2, 4), x)
    np.testing.assert_allclose(y.sum(1), 1, rtol=1e-6)
    np.testing.assert_array_equal(y.argmax(1), x.argmax(1))


def line(step: Step, target: Value) -> Program:
    return Program((Value(4, 1, 6), target), (step,), (Port("x", 0, (4, 6)),), (Port("y", 1, (target.size,)),))


def test_ports_have_the_shapes_of_the_model_and_any_batch() -> None:
    program = line(Copy(0, 1, np.array([3, 3])), Value(2, 1, 6))
    x = RNG.standard_normal((5, 4, 6)).astype(np.float32)
    (y,) = interpret(program, [x])
    assert (y.shape, y.dtype) == ((5, 12), np.float32)
    assert interpret(program, [x], double=True)[0].dtype == np.float64


def test_double_keeps_what_float_loses() -> None:
    program = line(Affine(0, 1, np.ones(4, np.float32), np.full(4, 1e8, np.float32)), Value(4, 1, 6))
    x = np.ones((1, 4, 6), np.float32)
    assert interpret(program, [x])[0][0, 0] == 1e8
    assert interpret(program, [x], double=True)[0][0, 0] == 1e8 + 1


def test_inputs_and_steps_that_do_not_fit_are_refused() -> None:
    program = line(Copy(0, 1, np.array([0])), Value(1, 1, 6))
    with pytest.raises(UsageError, match=r"expected \[N, 4, 6\]"):
        interpret(program, [np.zeros((1, 6, 4), np.float32)])
    with pytest.raises(UsageError, match="0 inputs"):
        interpret(program, [])
    with pytest.raises(UsageError, match="declared"):
        interpret(line(Affine(0, 1, np.ones(4), np.ones(4)), Value(4, 1, 5)), [np.zeros((1, 4, 6), np.float32)])
