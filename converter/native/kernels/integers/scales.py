"""What becomes of a sum of integers: numbers and order of operations, which all kernels and processors share.

    u = float32(sum) * factor[f]
    u = activation(u)
    u = rint(clamp(u * step', -zero', 255 - zero')) * back      where the step says `rounded`
    u = fma(residual, added, u)      the residual as it is, or its integer minus its zero point; one rounding
    u = final(u)
    u = u * step                     where u is not in steps of the target yet
    q = rint(clamp(u, -zero, 255 - zero)) + zero

Functions that only clamp are computed in steps of the target (or of what is rounded to before the residual); others, and
all functions of a target of floats, in the values that the integers stand for. Each line rounds to float32 once. Compilers
may fuse a product and a sum, so no product is followed by a sum here but within the explicit fma.
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
class Onto:
    """Numbers u onto a grid, or none (floats). unit: what a step of u stands for; step: the last factor (1: none)."""

    grid: Grid | None
    unit: float
    step: float

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

    def saturated(self, last: Function, value: str, low_too: bool = False) -> str:
        """C++: the last function, the last factor and the clamp, one clamp where they can be; values that are too large
        (low_too: or too small) are left to what stores them."""
        assert self.grid is not None
        ends = float(-self.grid.zero), float(HIGHEST - self.grid.zero)
        bounds = self.bounds(last) if self.step == 1 else None
        if bounds is None:
            value = self.function(last, value) + ("" if self.step == 1 else f" * {literal(self.step)}")
            bounds = -inf, inf
        low, high = (float(np.clip(b, *ends)) for b in bounds)
        if low_too and (low, high) == ends:
            return value
        return (f"maximum({value}, splat({literal(low)}))" if high == ends[1]
                else f"clip({value}, {literal(low)}, {literal(high)})")


@dataclass(frozen=True)
class Scales:
    """Of one layer. factor: float32 [F], of a sum; added: of the residual, residual_zero: its zero point (None: it has no
    grid); before: what is rounded to before the residual, back: from there to the target's u; last: to the target."""

    factor: npt.NDArray[np.float32]
    added: float
    residual_zero: int | None
    before: Onto | None
    back: float
    last: Onto

    @property
    def largest(self) -> float:
        """Of u before the last function, as far as that is known."""
        own = (HIGHEST + 1) * self.back if self.before else 2.0 ** 31 * float(self.factor.max(initial=0))
        return own + (HIGHEST * self.added if self.residual_zero is not None else 0.0) if self.last.step == 1 else inf


def scales(step: Conv, source: Value, target: Value, residual: Value | None) -> Scales:
    """Of a convolution over a source with a grid."""
    assert source.grid is not None
    assert step.conv.scale is not None
    before = None if step.rounded is None else _onto(step.rounded, step.activation)
    last = _onto(target.grid, step.final, *(() if before else (step.activation,)))
    first = before or last
    factor = np.float32(np.float64(source.grid.scale) * np.asarray(step.conv.scale, np.float64) / first.unit)
    grid = residual.grid if residual else None
    added = (grid.scale if grid else 1.0) / last.unit
    back = step.rounded.scale / last.unit if step.rounded else 1.0
    return Scales(factor, float(np.float32(added)), grid.zero if grid else None, before, float(np.float32(back)), last)


def _onto(grid: Grid | None, *functions: Function) -> Onto:
    """The grid, or floats, after these functions."""
    if grid is not None and all(clamp(function) is not None for function in functions):
        return Onto(grid, grid.scale, 1.0)
    return Onto(grid, 1.0, 1.0 if grid is None else float(np.float32(1.0 / grid.scale)))


@lru_cache(maxsize=64)
def weights(conv: BranchedConv) -> npt.NDArray[np.int8]:
    """The integers [F, C, kh, kw], zeros in the holes."""
    scale = np.asarray(conv.scale, np.float64).reshape(-1, 1, 1, 1)
    return np.rint(conv.to_dense() / scale).astype(np.int8)


def constants(conv: BranchedConv, grid: Grid, offset: int = 0) -> npt.NDArray[np.int32]:
    """[F]: what is added to the sum of (q - offset) * weight: the bias in its steps, and (offset - zero) * weight for all
    taps."""
    unit = np.float64(grid.scale) * np.asarray(conv.scale, np.float64)
    taps = weights(conv).reshape(conv.out_channels, -1).sum(1, dtype=np.int64)
    bias = np.rint(np.asarray(conv.bias, np.float64) / unit).astype(np.int64)
    return np.asarray(bias + (offset - grid.zero) * taps, np.int32)
