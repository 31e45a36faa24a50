"""The activations of gkp.h, against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from interpret import activate
from kernel_kit import compile_kernels, cpus

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import kernel
from gkp.converter.native.kernels.kernel import activation
from gkp.converter.native.program import Activation, Parametric

Floats = npt.NDArray[np.float32]
SPECIAL = [-np.inf, np.inf, np.nan, -0.0, 0.0, 1e30, -1e30, 88.72283, 88.72284, -87.4, -103.9, -104.1, 1e-40, 3.0, -3.0, 6.0]


def _apply(cpu: Cpu, names: list[str], x: Floats) -> list[Floats]:
    """y = name(x) for every name."""
    return _applied(cpu, [f"{name}({{0}})" for name in names], x)


def _applied(cpu: Cpu, expressions: list[str], x: Floats) -> list[Floats]:
    functions = compile_kernels([kernel(f"for (int i = 0; i < {x.size}; i += LANES) store(y + i, {e.format('load(x + i)')});\n")
                                 for e in expressions], cpu)
    results = []
    for function in functions:
        y = np.empty_like(x)
        function(x.ctypes.data, None, y.ctypes.data, None, 0, 1)
        results.append(y)
    return results


def _points() -> Floats:
    near = np.linspace(-110, 95, 1 << 17), np.linspace(-1, 1, 1 << 15), np.array(SPECIAL)
    return np.concatenate(near).astype(np.float32)


def _units(got: Floats, wanted: npt.NDArray[np.float64]) -> float:
    """The largest error in units of the last place, where the result is finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = wanted.astype(np.float32)
        finite = np.isfinite(rounded)
        assert (np.isnan(got) == np.isnan(rounded)).all()
        assert (got[~finite & ~np.isnan(rounded)] == rounded[~finite & ~np.isnan(rounded)]).all()
        return float((np.abs(got.astype(np.float64) - wanted)[finite] / np.spacing(np.abs(rounded[finite]))).max())


@pytest.mark.parametrize("cpu", cpus())
def test_the_exponential_and_what_is_made_of_it_are_exact_to_a_few_units(cpu: Cpu) -> None:
    x = _points()
    exponential, sigmoid, silu = _apply(cpu, ["exponential", "sigmoid", "silu"], x)
    with np.errstate(over="ignore", invalid="ignore"):
        assert _units(exponential, np.exp(x.astype(np.float64))) <= 1
        assert _units(sigmoid, 1 / (1 + np.exp(-x.astype(np.float64)))) <= 2.5
        inside = np.abs(x) < 80  # further out the product is denormal
        assert _units(silu[inside], x[inside] / (1 + np.exp(-x[inside].astype(np.float64)))) <= 3.5


@pytest.mark.parametrize("cpu", cpus())
def test_the_piecewise_activations_agree_with_the_reference_and_let_nan_through(cpu: Cpu) -> None:
    x = _points()
    kinds = [Activation.RELU, Activation.RELU6, Activation.HARDSIGMOID, Activation.HARDSWISH]
    for kind, y in zip(kinds, _apply(cpu, [k.value for k in kinds], x), strict=True):
        with np.errstate(invalid="ignore"):
            wanted = activate(kind, x.astype(np.float64))
        np.testing.assert_allclose(y, wanted, rtol=3e-7, atol=1e-7, err_msg=kind.value)
        assert np.isnan(y[np.isnan(x)]).all(), kind


EXACT = [(Activation.TANH, 4.0), (Activation.ERF, 3.0), (Activation.SOFTPLUS, 3.5), (Activation.MISH, 4.0)]
"""Relative in units of the last place, wherever the result is not denormal."""


@pytest.mark.parametrize("cpu", cpus())
def test_the_smooth_activations_are_exact_to_a_few_units_wherever_they_are(cpu: Cpu) -> None:
    x = np.concatenate([_points(), np.geomspace(1e-30, 1, 1 << 12), -np.geomspace(1e-30, 1, 1 << 12)]).astype(np.float32)
    for (kind, units), y in zip(EXACT, _apply(cpu, [k.value for k, _ in EXACT], x), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = activate(kind, x.astype(np.float64))
        inside = (np.abs(x) < 80) & ((wanted == 0) | (np.abs(wanted) > 1e-37))
        assert _units(y[inside], wanted[inside]) <= units, kind
        assert np.isnan(y[np.isnan(x)]).all(), kind


@pytest.mark.parametrize("cpu", cpus())
def test_both_gelus_are_exact_beside_their_argument_and_in_the_lower_tail(cpu: Cpu) -> None:
    x = _points()
    for kind, y in zip((Activation.GELU, Activation.GELU_TANH), _apply(cpu, ["gelu", "gelu_tanh"], x), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = activate(kind, x.astype(np.float64))
        finite = np.isfinite(x)
        error = np.abs(y[finite] - wanted[finite])
        assert (error <= 3e-7 * np.minimum(np.abs(x[finite]), 1 + np.abs(wanted[finite]))).all(), kind
        tail = (x > -5) & (x < -1)
        np.testing.assert_allclose(y[tail], wanted[tail], rtol=5e-6)
        assert np.isnan(y[np.isnan(x)]).all(), kind


@pytest.mark.parametrize("cpu", cpus())
def test_activations_with_numbers_of_their_own(cpu: Cpu) -> None:
    x = _points()
    kinds = [Parametric("clip", (-1.5, 0.25)), Parametric("clip", (-np.inf, 3.0)), Parametric("leaky_relu", (0.01,)),
             Parametric("elu", (0.7,)), Parametric("elu", (-2.0,))]
    for kind, y in zip(kinds, _applied(cpu, [activation(k, "{0}") for k in kinds], x), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = activate(kind, x.astype(np.float64))
        np.testing.assert_allclose(y, wanted, rtol=4e-7, atol=0, err_msg=str(kind))


@pytest.mark.parametrize("cpu", cpus())
def test_roots_are_exact_and_absolute_values_too(cpu: Cpu) -> None:
    x = np.concatenate([np.geomspace(1e-38, 1e38, 1 << 12), [0, -2, np.inf]]).astype(np.float32)
    x = np.pad(x, (0, -x.size % 16), constant_values=1)
    root, size = _apply(cpu, ["square_root", "magnitude"], x)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(root, np.sqrt(x))
    np.testing.assert_array_equal(size, np.abs(x))
