"""What exporters write as several operators becomes one step, and only that."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_kit import Net
from program_kit import kinds, only, translated

from gkp.converter.native.program import Activation, Affine, Conv, Normalise

Build = Callable[[Net], str]


def net(build: Build, *shape: Any, **options: Any) -> onnx.ModelProto:
    made = Net(*shape, **options)
    return made.model(build(made))


def number(n: Net, value: float) -> str:
    return n.const(np.float32(value))


# ---- activations --------------------------------------------------------------------------------------------------------
def gelu(n: Net, x: str, half: str = "last", by: str = "Div") -> Any:
    """x * (1 + erf(x / sqrt(2))) / 2, the factor of 1/2 in one of three places."""
    inner = n.op("Div", x, number(n, sqrt(2))) if by == "Div" else n.op("Mul", x, number(n, sqrt(0.5)))
    gate = n.op("Add", n.op("Erf", inner), number(n, 1))
    if half == "last":
        return n.op("Mul", n.op("Mul", x, gate), number(n, 0.5))
    if half == "argument":
        return n.op("Mul", n.op("Mul", x, number(n, 0.5)), gate)
    return n.op("Mul", x, n.op("Mul", number(n, 0.5), gate))


@pytest.mark.parametrize("half", ["last", "argument", "gate"])
@pytest.mark.parametrize("by", ["Div", "Mul"])
def test_gelu_in_pieces_goes_into_the_convolution(half: str, by: str) -> None:
    step = only(translated(net(lambda n: gelu(n, n.conv3("x", 3, 5), half, by), 2, 3, 6, 6)), Conv)
    assert step.activation is Activation.GELU


def test_gelu_in_pieces_between_matrix_products_of_channels_last() -> None:
    def build(n: Net) -> str:
        y = n.op("MatMul", n.op("Transpose", "x", perm=[0, 2, 3, 1]), n.const(n.weight(3, 8)))
        y = gelu(n, n.op("Add", n.const(n.normal(8)), y))
        return str(n.op("Transpose", n.op("MatMul", y, n.const(n.weight(8, 3))), perm=[0, 3, 1, 2]))

    found = translated(net(build, 2, 3, 6, 6))
    assert kinds(found) == {"Conv": 2}


def test_gelu_without_its_half_keeps_the_factor() -> None:
    def build(n: Net) -> str:
        return str(n.op("Mul", "x", n.op("Add", n.op("Erf", n.op("Div", "x", number(n, sqrt(2)))), number(n, 1))))

    steps = translated(net(build, 2, 3, 6, 6)).steps
    assert [s.activation for s in steps if isinstance(s, Affine)] == [Activation.GELU, Activation.NONE]


@pytest.mark.parametrize(("inner", "shift"), [(1.0, 1.0), (sqrt(0.5), 0.5)])
def test_what_only_looks_like_gelu_stays(inner: float, shift: float) -> None:
    def build(n: Net) -> str:
        return str(n.op("Mul", "x", n.op("Add", n.op("Erf", n.op("Mul", "x", number(n, inner))), number(n, shift))))

    assert kinds(translated(net(build, 2, 3, 6, 6)))["Binary"] == 1


def test_error_function_that_others_read_is_kept_beside_gelu() -> None:
    def build(n: Net) -> list[str]:
        e = n.op("Erf", n.op("Div", "x", number(n, sqrt(2))))
        return [n.op("Mul", n.op("Mul", "x", n.op("Add", e, number(n, 1))), number(n, 0.5)), e]

    made = Net(2, 3, 6, 6)
    found = translated(made.model(*build(made)))
    assert {s.activation for s in found.steps if isinstance(s, Affine)} == {Activation.GELU, Activation.ERF}


def test_mish_in_pieces_goes_into_the_convolution() -> None:
    def build(n: Net) -> str:
        y = n.conv3("x", 3, 5)
        return str(n.op("Mul", y, n.op("Tanh", n.op("Softplus", y))))

    assert only(translated(net(build, 2, 3, 6, 6)), Conv).activation is Activation.MISH


def test_gelu_by_tanh_in_pieces_is_computed_as_it_is_written() -> None:
    def build(n: Net) -> str:
        cubic = n.op("Add", "x", n.op("Mul", n.op("Pow", "x", number(n, 3)), number(n, 0.044715)))
        gate = n.op("Add", n.op("Tanh", n.op("Mul", cubic, number(n, sqrt(2 / pi)))), number(n, 1))
        return str(n.op("Mul", n.op("Mul", "x", number(n, 0.5)), gate))

    translated(net(build, 2, 3, 6, 6))


# ---- normalisation ------------------------------------------------------------------------------------------------------
def layer_norm(n: Net, x: str, axis: int, square: str = "Pow", divide: str = "Div", twice: bool = False) -> Any:
    """As exported before LayerNormalization was an operator."""
    mean = n.op("ReduceMean", x, n.ints(axis), keepdims=1)
    d = n.op("Sub", x, mean)
    squares = n.op("Pow", n.op("Sub", x, mean) if twice else d, number(n, 2)) if square == "Pow" else n.op("Mul", d, d)
    root = n.op("Sqrt", n.op("Add", n.op("ReduceMean", squares, n.ints(axis), keepdims=1), number(n, 1e-6)))
    return n.op("Div", d, root) if divide == "Div" else n.op("Mul", n.op("Reciprocal", root), d)


@pytest.mark.parametrize("square", ["Pow", "Mul"])
@pytest.mark.parametrize("divide", ["Div", "Mul"])
@pytest.mark.parametrize("twice", [False, True])
def test_layer_normalisation_in_pieces_with_scale_and_shift(square: str, divide: str, twice: bool) -> None:
    def build(n: Net) -> str:
        y = layer_norm(n, n.op("Transpose", n.conv3("x", 3, 6), perm=[0, 2, 3, 1]), -1, square, divide, twice)
        y = n.op("Add", n.op("Mul", y, n.const(n.normal(6))), n.const(n.normal(6)))
        return str(n.op("Transpose", y, perm=[0, 3, 1, 2]))

    found = translated(net(build, 2, 3, 5, 4))
    assert kinds(found) == {"Conv": 1, "Normalise": 1}
    assert only(found, Normalise).epsilon == pytest.approx(1e-6)


def test_layer_normalisation_of_vectors() -> None:
    assert kinds(translated(net(lambda n: layer_norm(n, "x", 1), 3, 16))) == {"Normalise": 1}


def test_normalisation_over_rows_stays_in_pieces() -> None:
    assert "Normalise" not in kinds(translated(net(lambda n: layer_norm(n, "x", 2), 3, 4, 5, 6)))


def test_difference_that_others_read_is_kept_beside_the_normalisation() -> None:
    def build(n: Net) -> list[str]:
        d = n.op("Sub", "x", n.op("ReduceMean", "x", n.ints(1), keepdims=1))
        root = n.op("Sqrt", n.op("Add", n.op("ReduceMean", n.op("Mul", d, d), n.ints(1), keepdims=1), number(n, 1e-5)))
        return [n.op("Div", d, root), d]

    made = Net(3, 8, 4, 4)
    assert kinds(translated(made.model(*build(made)))) == {"Normalise": 1, "Reduce": 1, "Binary": 1}
