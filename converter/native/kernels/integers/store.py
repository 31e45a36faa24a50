"""How a tile's sums become bytes or floats: the C++ of what scales.py defines."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gkp.converter.native.kernels.emit import fill
from gkp.converter.native.kernels.integers.dots import Dot
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
_PACKED = '''
    // Of four vectors of values below 2^31, 16 bytes each.
    static inline I packed(V a, V b, V c, V d, int zero) {
      I ab, cd, all;
      asm("vcvtps2dq %1, %0" : "=v"(ab) : "v"(a));
      asm("vcvtps2dq %1, %0" : "=v"(cd) : "v"(b));
      asm("vpackssdw %2, %1, %0" : "=v"(ab) : "v"(ab), "v"(cd));
      asm("vcvtps2dq %1, %0" : "=v"(cd) : "v"(c));
      asm("vcvtps2dq %1, %0" : "=v"(all) : "v"(d));
      asm("vpackssdw %2, %1, %0" : "=v"(cd) : "v"(cd), "v"(all));
      if (zero != 0) {
        const I zeros = I{} + zero * 0x00010001;
        asm("vpaddsw %1, %0, %0" : "+v"(ab) : "v"(zeros));
        asm("vpaddsw %1, %0, %0" : "+v"(cd) : "v"(zeros));
      }
      asm("vpackuswb %2, %1, %0" : "=v"(all) : "v"(ab), "v"(cd));  // of every quarter, a word of each vector
      return __builtin_shufflevector(all, all, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    }
    typedef int Half __attribute__((vector_size(2 * LANES)));
    typedef int Quarter __attribute__((vector_size(LANES)));
    static inline void put_whole(unsigned char* y, I all, int a) { __builtin_memcpy(y + a, &all, sizeof all); }
    static inline void put_halves(unsigned char* y, I all, int a, int b) {
      const Half low = __builtin_shufflevector(all, all, 0, 1, 2, 3, 4, 5, 6, 7);
      const Half high = __builtin_shufflevector(all, all, 8, 9, 10, 11, 12, 13, 14, 15);
      __builtin_memcpy(y + a, &low, sizeof low);
      __builtin_memcpy(y + b, &high, sizeof high);
    }
    static inline void put_quarters(unsigned char* y, I all, int a, int b, int c, int d) {
      const Quarter first = __builtin_shufflevector(all, all, 0, 1, 2, 3);
      const Quarter second = __builtin_shufflevector(all, all, 4, 5, 6, 7);
      const Quarter third = __builtin_shufflevector(all, all, 8, 9, 10, 11);
      const Quarter fourth = __builtin_shufflevector(all, all, 12, 13, 14, 15);
      __builtin_memcpy(y + a, &first, sizeof first);
      __builtin_memcpy(y + b, &second, sizeof second);
      __builtin_memcpy(y + c, &third, sizeof third);
      __builtin_memcpy(y + d, &fourth, sizeof fourth);
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
        self._fours = lanes == 16 and target.value.grid is not None and scales.largest < 2.0 ** 31 \
            and (residual is None or residual.value.grid is not None)
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
        put = fill(_FUNCTIONS, put=fill(_PUT_512 if self._lanes == 16 else _PUT))
        return put + fill(_PACKED) if self._fours else put

    def statements(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        """C++ that stores the sums a<pixel>_<vector> of a tile."""
        yield f"const float* factors = reinterpret_cast<const float*>(constants + {n * self._lanes});"
        spots = {row * self._target.row + column * self._target.column + v * self._lanes: (p, v, row, column)
                 for p, (row, column) in enumerate(pixels) for v in range(n)}
        fours = _fours(sorted(spots), self._lanes) if self._fours else []
        for name, starts, every in fours:
            values = ", ".join(self._value(*spots.pop(at), n, packs=True) for at in every)
            yield f"{name}(y, packed({values}, {self._zero}), {', '.join(map(str, starts))});"
        for at, spot in sorted(spots.items()):
            value = self._value(*spot, n)
            yield f"put(y + {at}, {value}, {self._zero});" if self._scales.last.grid else f"store(y + {at}, {value});"

    @property
    def _zero(self) -> int:
        return self._scales.last.grid.zero if self._scales.last.grid else 0

    def _value(self, pixel: int, vector: int, row: int, column: int, n: int, packs: bool = False) -> str:
        """C++: what becomes of the sums of a vector, but for the last rounding. packs: where low values are clamped by what
        stores them."""
        s, lane = self._scales, vector * self._lanes
        name = f"a{pixel}_{vector}"
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
            return s.last.saturated(last, value, packs)
        value = s.last.function(last, value)
        if self._masked:
            value = f"keep({value}, constants + {(3 if self._residual else 2) * n * self._lanes + lane})"
        return value


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

    def panel(self, words: Words, first: int, vectors: int) -> int:
        """Puts the constants of so many vectors of outputs; their position."""
        size = vectors * self._lanes
        part = slice(first, first + size)
        return self.constants(words, self._added[part], self._scales.factor[part], size)


def _padded(values: npt.NDArray[np.generic], size: int) -> npt.NDArray[np.generic]:
    return np.pad(values, (0, size - len(values)))


def _fours(places: list[int], lanes: int) -> list[tuple[str, list[int], list[int]]]:
    """Of vectors that lie at these places, in ascending order, four at a time: by what they are stored (put_...), where, and
    which. At most three are left over."""
    found, left = list[tuple[str, list[int], list[int]]](), set(places)
    for size, name in ((4, "put_whole"), (2, "put_halves"), (1, "put_quarters")):
        parts = list[list[int]]()
        for at in places:
            part = [at + k * lanes for k in range(size)]
            if left.issuperset(part):
                parts.append(part)
                left.difference_update(part)
        whole = len(parts) * size // 4 * 4 // size
        found += [(name, [p[0] for p in group], [at for p in group for at in p])
                  for k in range(0, whole, 4 // size) if (group := parts[k:k + 4 // size])]
        left.update(at for part in parts[whole:] for at in part)
    return found
