"""What becomes of a sum of integers: numbers and order of operations, which all kernels and processors share.

    u = float32(sum) * factor[f]
    u = activation(u)
    u = fma(residual, added, u)      the residual as it is, or its integer minus its zero point; one rounding
    u = final(u)
    u = u * step                     where u is not in steps of the target yet
    q = rint(clamp(u, -zero, 255 - zero)) + zero

Functions that only clamp are computed in steps of the target; others, and all functions of a target of floats, in the
values that the integers stand for. Each line rounds to float32 once. Compilers may fuse a product and a sum, so no product
is followed by a sum here but within the explicit fma.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.kernel import activation, literal
from gkp.converter.native.program import Activation, Conv, Function, Grid, Value

Bounds = tuple[float, float]
HIGHEST = 255


def clamp(function: Function) -> Bounds | None:
    """The bounds of a function that only clamps; None of another."""
    if isinstance(function, Activation):
        return {Activation.NONE: (-inf, inf), Activation.RELU: (0.0, inf), Activation.RELU6: (0.0, 6.0)}.get(function)
    return (function.parameters[0], function.parameters[1]) if function.name == "clip" else None


@dataclass(frozen=True)
class Scales:
    """Of one layer. factor: float32 [F], of a sum; added: of the residual, residual_zero: its zero point (None: it has no
    grid); step: the last factor (1: none); unit: what a step of u stands for; grid: the target's (None: floats)."""

    step: float
    unit: float
    factor: npt.NDArray[np.float32]
    added: float
    residual_zero: int | None
    grid: Grid | None

    def bounds(self, function: Function) -> Bounds | None:
        """Of a function that only clamps, in steps of u."""
        found = clamp(function)
        return found and (float(np.float32(found[0] / self.unit)), float(np.float32(found[1] / self.unit)))

    def function(self, kind: Function, value: str) -> str:
        """C++: the function of a vector of u."""
        bounds = self.bounds(kind) if self.unit != 1 else None
        if bounds is None or kind is Activation.NONE:
            return activation(kind, value)
        low, high = bounds
        return f"relu({value})" if bounds == (0.0, inf) else f"clip({value}, {literal(low)}, {literal(high)})"

    def saturated(self, last: Function, value: str) -> str:
        """C++: the last function, the last factor and the clamp, which are one clamp where they can be."""
        assert self.grid is not None
        ends = -self.grid.zero, HIGHEST - self.grid.zero
        bounds = self.bounds(last) if self.step == 1 else None
        if bounds is None:
            stepped = self.function(last, value) + ("" if self.step == 1 else f" * {literal(self.step)}")
            return f"clip({stepped}, {literal(ends[0])}, {literal(ends[1])})"
        low, high = (literal(float(np.clip(b, *ends))) for b in bounds)
        return f"clip({value}, {low}, {high})"


def scales(step: Conv, source: Value, target: Value, residual: Value | None) -> Scales:
    """Of a convolution over a source with a grid."""
    assert source.grid is not None
    assert step.conv.scale is not None
    folds = target.grid is not None and clamp(step.activation) is not None and clamp(step.final) is not None
    unit = target.grid.scale if folds and target.grid else 1.0
    factor = np.float32(np.float64(source.grid.scale) * np.asarray(step.conv.scale, np.float64) / unit)
    grid = residual.grid if residual else None
    added = (grid.scale if grid else 1.0) / unit
    last = 1.0 if target.grid is None or folds else 1.0 / target.grid.scale
    return Scales(float(np.float32(last)), unit, factor, float(np.float32(added)), grid.zero if grid else None, target.grid)


@lru_cache(maxsize=64)
def weights(conv: BranchedConv) -> npt.NDArray[np.int8]:
    """The integers [F, C, kh, kw], zeros in the holes."""
    scale = np.asarray(conv.scale, np.float64).reshape(-1, 1, 1, 1)
    return np.rint(conv.to_dense() / scale).astype(np.int8)


def constants(conv: BranchedConv, grid: Grid) -> npt.NDArray[np.int32]:
    """[F]: what is added to the sum of q * weight: the bias in its steps, and -zero * weight for all taps."""
    unit = np.float64(grid.scale) * np.asarray(conv.scale, np.float64)
    taps = weights(conv).reshape(conv.out_channels, -1).sum(1, dtype=np.int64)
    bias = np.rint(np.asarray(conv.bias, np.float64) / unit).astype(np.int64)
    return np.asarray(bias - grid.zero * taps, np.int32)
