"""Direct convolution of bfloat16: the tiles of integers, with sums of two products in one instruction.

The instruction rounds to float32 after each of its two products, half to even, and takes denormal numbers for zero. The sums
begin with the bias; activation, residual and final function follow in float32; what is stored as bfloat16 is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gkp.converter.native.dtypes import BFLOAT16
from gkp.converter.native.kernels import narrow
from gkp.converter.native.kernels.bfloats.elements import ELEMENTS, weights
from gkp.converter.native.kernels.cpu import BF16, VECTORS, Cpu
from gkp.converter.native.kernels.integers.direct import tiled
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.jobs import Words
from gkp.converter.native.kernels.kernel import activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.program import Conv, zero_at_zero

_PAIRS = '''
static inline I dot(I sums, I x, I w) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
  return sums;
}
'''


def _pairs(name: str, window: int, code: str = "") -> Dot:
    code = ELEMENTS + _PAIRS + narrow.spread("Bf16") + code
    return Dot(name, (VECTORS, BF16), (16,), 2, window, code, element=BFLOAT16, weights=weights)


PAIRS = _pairs("broadcast", 0)
DOTS = (PAIRS, _pairs("picked 32", 32, narrow.pick_32("Bf16")), _pairs("picked 64", 64, narrow.pick_64("Bf16")))

_PER_CYCLE = 2
"""Products of vectors, where the model of kernels of float32 counts two multiply-adds: both are issued equally fast, and the
model of tiles counts one."""


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """The family, for sources in bfloat16, targets and residuals in it or in float32: the `most` best tiles of each sort by
    the model."""
    if source.value.dtype == BFLOAT16:
        for way in tiled(step, source, target, residual, cpu, [dot for dot in DOTS if dot.runs_on(cpu)], Store, most):
            yield replace(way, trial=replace(way.trial, cycles=way.trial.cycles / _PER_CYCLE))


class Store:
    def __init__(self, step: Conv, dot: Dot, source: Layout, target: Layout, residual: Layout | None, lanes: int) -> None:
        self._step, self._target, self._residual, self._lanes = step, target, residual, lanes
        zeros = zero_at_zero(step.activation) and zero_at_zero(step.final)
        self._masked = target.value.channels % lanes != 0 and not zeros

    def panel(self, words: Words, first: int, vectors: int) -> int:
        """The bias, and a mask of the lanes that hold a channel, where the others would not become zero by themselves."""
        size = vectors * self._lanes
        bias = np.asarray(self._step.conv.bias[first:first + size], np.float32)
        at = words.put(np.pad(bias, (0, size - len(bias))), np.float32)
        if self._masked:
            words.put(-(np.arange(size) < len(bias)).astype(np.int32), np.int32)
        return at

    def functions(self) -> str:
        return ""

    def statements(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        """C++ that stores the sums a<pixel>_<vector> of a tile."""
        for p, (row, column) in enumerate(pixels):
            for v in range(n):
                lane = v * self._lanes
                value = activation(self._step.activation, f"(V)a{p}_{v}")
                if self._residual is not None:
                    there = row * self._residual.row + column * self._residual.column + lane
                    value = activation(self._step.final, f"{value} + load(r + {there})")
                if self._masked:
                    value = f"keep({value}, constants + {n * self._lanes + lane})"
                yield f"store(y + {row * self._target.row + column * self._target.column + lane}, {value});"
