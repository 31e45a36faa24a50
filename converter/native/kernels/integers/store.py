"""How a tile's sums become bytes or floats: the C++ of what scales.py defines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gkp.converter.native.kernels.emit import fill
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.integers.panels import Panel
from gkp.converter.native.kernels.integers.scales import HIGHEST, Scales, constants, scales
from gkp.converter.native.kernels.jobs import Words
from gkp.converter.native.kernels.kernel import literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Activation, Conv, zero_at_zero

_FUNCTIONS = '''
    typedef unsigned char Bytes __attribute__((vector_size(LANES)));
    static inline V integers(const unsigned char* p, int zero) {
      Bytes b;
      __builtin_memcpy(&b, p, LANES);
      return __builtin_convertvector(__builtin_convertvector(b, I) - zero, V);
    }
    // Rounded once, whatever the compiler does with products and sums.
    static inline V fused(V a, V b, V c) {
    #if __has_builtin(__builtin_elementwise_fma)
      return __builtin_elementwise_fma(a, b, c);
    #else
      for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
      return c;
    #endif
    }
    // Half to even, where |v| is below 2^22.
    static inline V whole(V v) { return (v + 12582912.0f) - 12582912.0f; }
    // v, not below -zero, half to even, and saturated.
    static inline void put(unsigned char* p, V v, int zero) {
      @put@
      __builtin_memcpy(p, &b, LANES);
    }
'''
_PUT = '''
    v = minimum(v, splat(static_cast<float>(255 - zero)));
    // 1.5 * 2^23 + v is v as an integer, held in the low bits
    const Bytes b = __builtin_convertvector((I)(v + 12582912.0f) + zero, Bytes);
'''
_PUT_512 = '''
    Bytes b;
    I rounded;  // of what is too large, the largest unsigned number
    asm("vcvtps2dq %1, %0" : "=v"(rounded) : "v"(v));
    rounded += zero;
    asm("vpmovusdb %1, %0" : "=v"(b) : "v"(rounded));
'''


def fits(target: Layout, residual: Layout | None) -> bool:
    """Whole vectors of what both layouts hold of a pixel."""
    return all(at.channel == 1 and at.block is None for at in (target, residual) if at)


class Store:
    def __init__(self, step: Conv, scales: Scales, target: Layout, residual: Layout | None, lanes: int) -> None:
        self._step, self._scales, self._target, self._residual, self._lanes = step, scales, target, residual, lanes
        zeros = zero_at_zero(step.activation) and zero_at_zero(step.final)
        self._masked = target.value.grid is None and target.value.channels % lanes != 0 and not zeros

    def constants(self, words: Words, added: npt.NDArray[np.int32], factor: npt.NDArray[np.float32], size: int) -> int:
        """Of a panel: what begins its sums, what multiplies them, and the residual (in memory, because a compiler that sees
        a 1 leaves the multiplication out, and then fuses), and a mask of the lanes that hold a channel, where the others
        would not become zero by themselves."""
        at = words.put(_padded(added, size), np.int32)
        words.put(_padded(factor, size), np.float32)
        if self._residual is not None:
            words.put(_padded(np.full(len(added), self._scales.added), size), np.float32)
        if self._masked:
            words.put(-(np.arange(size) < len(added)).astype(np.int32), np.int32)
        return at

    def functions(self) -> str:
        return fill(_FUNCTIONS, put=fill(_PUT_512 if self._lanes == 16 else _PUT))

    def statements(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        """C++ that stores the sums a<pixel>_<vector> of a tile."""
        yield f"const float* factors = reinterpret_cast<const float*>(constants + {n * self._lanes});"
        for p, (row, column) in enumerate(pixels):
            at = row * self._target.row + column * self._target.column
            for v in range(n):
                yield from self._one(f"a{p}_{v}", row, column, v * self._lanes, at + v * self._lanes, n)

    def _one(self, name: str, row: int, column: int, lane: int, at: int, n: int) -> Iterator[str]:
        s = self._scales
        value, last = f"__builtin_convertvector({name}, V) * load(factors + {lane})", self._step.activation
        if s.before is not None:
            high = literal(HIGHEST - s.before.grid.zero) if s.before.grid else ""
            value = f"whole(minimum({s.before.saturated(last, value)}, splat({high}))) * {literal(s.back)}"
            last = Activation.NONE
        if self._residual is not None:
            there = row * self._residual.row + column * self._residual.column + lane
            read = f"load(r + {there})" if s.residual_zero is None else f"integers(r + {there}, {s.residual_zero})"
            value = f"fused({read}, load(factors + {n * self._lanes + lane}), {s.last.function(last, value)})"
            last = self._step.final
        if s.last.grid is not None:
            yield f"put(y + {at}, {s.last.saturated(last, value)}, {s.last.grid.zero});"
            return
        value = s.last.function(last, value)
        if self._masked:
            value = f"keep({value}, constants + {(3 if self._residual else 2) * n * self._lanes + lane})"
        yield f"store(y + {at}, {value});"


class PanelStore(Store):
    """Of a convolution in panels."""

    def __init__(self, step: Conv, dot: Dot, source: Layout, target: Layout, residual: Layout | None, lanes: int) -> None:
        super().__init__(step, scales(step, source.value, target.value, residual.value if residual else None), target,
                         residual, lanes)
        self._dot, self._source = dot, source.value

    @cached_property
    def _added(self) -> npt.NDArray[np.int32]:
        assert self._source.grid is not None
        return constants(self._step.conv, self._source.grid, self._dot.offset)

    def panel(self, words: Words, panel: Panel) -> int:
        """Puts the constants of a panel; their position."""
        size = panel.vectors * self._lanes
        part = slice(panel.first, panel.first + size)
        return self.constants(words, self._added[part], self._scales.factor[part], size)


def _padded(values: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    return np.pad(values, (0, size - len(values)))
