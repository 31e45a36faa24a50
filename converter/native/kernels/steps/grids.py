"""Steps that read or write integers or floats of 16 bits: loads that give the numbers they stand for, stores that round to
them.

A kernel written for vectors of floats computes with bytes when its pointers are of bytes: `load` and `store` of gkp.h have
overloads here, on the integers as floats. The same goes for floats of 16 bits (_ELEMENTS).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, FLOAT32
from gkp.converter.native.kernels.bfloats import elements as bfloats
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.halves import elements as halves
from gkp.converter.native.kernels.kernel import Kernel, literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps import words
from gkp.converter.native.program import Grid

_BYTES = '''
    typedef unsigned char Byte;
    typedef Byte Bytes __attribute__((vector_size(LANES)));
    static inline V numbers(Bytes b) { return __builtin_convertvector(__builtin_convertvector(b, I), V); }
    static inline V load(const Byte* p) {
      Bytes b;
      __builtin_memcpy(&b, p, LANES);
      return numbers(b);
    }
    template <int N> static inline V load_first(const Byte* p, V rest = V{}) {
      Bytes b{};
      __builtin_memcpy(&b, p, N);
      const V v = numbers(b);
      __builtin_memcpy(&rest, &v, 4 * N);
      return rest;
    }
    template <int N> static inline V load_strided(const Byte* p, long stride, V rest = V{}) {
      for (int i = 0; i < N; ++i) rest[i] = p[i * stride];
      return rest;
    }
    static inline V load_even(const Byte* p) { return load_strided<LANES>(p, 2); }
    // Rounded half to even and saturated. 1.5 * 2^23 + v holds the rounded v in its low bits.
    static inline Bytes rounded(V v) {
      return __builtin_convertvector((I)(clip(v, 0.0f, 255.0f) + 12582912.0f) - 0x4b400000, Bytes);
    }
    static inline void store(Byte* p, V v) {
      const Bytes b = rounded(v);
      __builtin_memcpy(p, &b, LANES);
    }
    template <int N> static inline void store_first(Byte* p, V v) {
      const Bytes b = rounded(v);
      __builtin_memcpy(p, &b, N);
    }
    template <int N> static inline void store_strided(Byte* p, long stride, V v) {
      const Bytes b = rounded(v);
      for (int i = 0; i < N; ++i) p[i * stride] = b[i];
    }
    // Before the zero point is added, so that halves are rounded to even steps, as ONNX does.
    static inline V steps(V v) { return (clip(v, -256.0f, 256.0f) + 12582912.0f) - 12582912.0f; }
'''


def numbers(expression: str, grid: Grid | None) -> str:
    """What integers stand for."""
    if grid is None:
        return expression
    return f"(({expression} - {literal(grid.zero)}) * {literal(grid.scale)})"


def integers(expression: str, grid: Grid | None) -> str:
    """What is stored for numbers, by a store that saturates."""
    if grid is None:
        return expression
    return f"steps(({expression}) / {literal(grid.scale)}) + {literal(grid.zero)}"


def between(expression: Callable[[Sequence[str]], str], values: Sequence[str], grids: Sequence[Grid | None],
            target: Grid | None) -> str:
    """The expression of values as they lie in memory, as it is stored. What is only moved is not converted."""
    read = [numbers(v, grid) for v, grid in zip(values, grids, strict=True)]
    text = expression(read)
    if read and text == read[0] and grids[0] == target:
        return values[0]
    return integers(text, target)


def regridded(source: Grid, target: Grid) -> bytes:
    """Each integer on another grid: a table of 256."""
    numbers = (np.arange(256, dtype=np.float32) - np.float32(source.zero)) * np.float32(source.scale)
    steps = np.rint(numbers / np.float32(target.scale)) + target.zero
    return bytes(np.clip(steps, 0, 255).astype(np.uint8))


_ELEMENTS = {BFLOAT16: bfloats.ELEMENTS, FLOAT16: halves.ELEMENTS}


def typed(body: str, x: Layout, y: Layout, r: Layout | None = None, data: bytes = b"") -> Kernel:
    """A kernel whose operands are of any type."""
    values = [layout.value for layout in (x, y, r or x)]
    head = fill(_BYTES) if any(value.grid is not None for value in values) else ""
    head += "".join(code for dtype, code in _ELEMENTS.items() if any(value.dtype == dtype for value in values))
    if y.words:
        head += fill(words.CODE)
    return Kernel(unit(body, head, x.value.dtype, r.value.dtype if r else FLOAT32, y.value.dtype), data)
