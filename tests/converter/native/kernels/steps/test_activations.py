"""The activations of gkp.h, against float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from interpret import activate
from kernel_kit import compile_kernels, cpus

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import kernel
from gkp.converter.native.program import Activation

Floats = npt.NDArray[np.float32]
SPECIAL = [-np.inf, np.inf, np.nan, -0.0, 0.0, 1e30, -1e30, 88.72283, 88.72284, -87.4, -103.9, -104.1, 1e-40, 3.0, -3.0, 6.0]


def _apply(cpu: Cpu, names: list[str], x: Floats) -> list[Floats]:
    functions = compile_kernels([kernel(f"for (int i = 0; i < {x.size}; i += LANES) store(y + i, {n}(load(x + i)));\n")
                                 for n in names], cpu)
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
