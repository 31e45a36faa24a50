"""Planes of numbers to pixels of integers that are words: the first byte of a word is the first channel."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from gkp.converter.native.kernels.emit import at, chunks, fill, get, loop, share
from gkp.converter.native.kernels.kernel import literal
from gkp.converter.native.kernels.layout import Layout

CODE = '''
    // Rounded once, whatever the compiler does with products and sums.
    static inline V fused(V a, V b, V c) {
    #if __has_builtin(__builtin_elementwise_fma)
      return __builtin_elementwise_fma(a, b, c);
    #else
      for (int i = 0; i < LANES; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
      return c;
    #endif
    }
    // v / scale, rounded half to even and saturated to [low, high], both whole and below 256. inverse: 1 / scale. What a
    // product with it is off by is added, so that halves are those of the division, without taking its time.
    static inline I steps_of(V v, float scale, float inverse, float low, float high) {
      v = clip(v, scale * (low - 0.25f), scale * (high + 0.25f));
      const V near = v * inverse, exact = fused(fused(-near, splat(scale), v), splat(inverse), near);
      return (I)(exact + 12582912.0f) - 0x4b400000;
    }
    template <int N> static inline void store_words(unsigned char* p, I v) { __builtin_memcpy(p, &v, 4 * N); }
'''


def fits(source: Layout, target: Layout) -> bool:
    """Numbers in planes, to words? (And is nothing on the way too small or too large for float32?)"""
    grid = target.value.grid
    return target.words and grid is not None and 2.0 ** -80 < grid.scale < 2.0 ** 80 \
        and source.planar and source.value.grid is None and source.value.shape == target.value.shape


def from_planes(source: Layout, target: Layout, lanes: int, number: Callable[[int, str], str] = lambda c, v: v) -> str:
    """The body of the kernel. number(c, v): what becomes of numbers of channel c before they are put on the grid."""
    grid, value = target.value.grid, target.value
    assert grid is not None
    scale = np.float32(grid.scale)
    ends = ", ".join(literal(float(v)) for v in (scale, 1 / scale, -grid.zero, 255 - grid.zero))

    def piece(column: str, n: int) -> str:
        read = [number(c, get(at("s", 0, (column, 1), (c, source.channel)), n, lanes)) for c in range(value.channels)]
        parts = [f"(steps_of({v}, {ends}) + {grid.zero}) << {8 * c}" for c, v in enumerate(read)]
        return f"store_words<{n}>({at('t', 0, (column, target.column))}, {' | '.join(parts)});\n"

    body = fill('''
        const auto* s = @s@;
        auto* t = @t@;
        @pixels@
    ''', s=at("x", source.origin, ("row", source.row)), t=at("y", target.origin, ("row", target.row)),
                pixels=chunks(value.width, lanes, piece, "column"))
    return share(value.height) + loop("row", "begin", "end", body)
