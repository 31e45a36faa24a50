"""Direct convolution of float16 in planes: the tiles of float32 (gkp.converter.native.kernels.pixel), on vectors of twice as
many pixels.

Any branch, without a product that it does not need. After CHAIN multiply-adds of float16 a sum is added to one of float32;
what follows is float32 as well, and what is stored is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gkp.converter.native.dtypes import FLOAT16
from gkp.converter.native.kernels import pixel
from gkp.converter.native.kernels.cpu import FP16, VECTORS, Cpu
from gkp.converter.native.kernels.emit import fill
from gkp.converter.native.kernels.halves.direct import CHAIN
from gkp.converter.native.kernels.halves.elements import ELEMENTS, bits, weights
from gkp.converter.native.kernels.jobs import Words
from gkp.converter.native.kernels.kernel import Draft, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.pixel import PixelTile, Spot, join_rows
from gkp.converter.native.kernels.taps import is_sparse, macs, used
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv

_WIDE = '''
    typedef _Float16 W __attribute__((vector_size(4 * LANES)));
    static inline W load_wide(const Fp16* p) {
      W w;
      __builtin_memcpy(&w, p, sizeof w);
      return w;
    }
    static inline void store_wide(Fp16* p, W w) { __builtin_memcpy(p, &w, sizeof w); }
    template <int N> static inline void store_first_wide(Fp16* p, W w) { __builtin_memcpy(p, &w, 2 * N); }
    // One half of a vector, in float32, and a vector of both.
    template <int HALF> static inline V part(W w) {
      Halves h;
      __builtin_memcpy(&h, reinterpret_cast<const char*>(&w) + HALF * sizeof h, sizeof h);
      return widened(h);
    }
    static inline W both(V a, V b) {
      const Halves h[2] = {rounded(a), rounded(b)};
      W w;
      __builtin_memcpy(&w, h, sizeof w);
      return w;
    }
'''
_CHAINS = '''
    @begun@
    for (int i = 0; i < inputs;) {
      const int end = i + @most@ < inputs ? i + @most@ : inputs;
      @chains@
      for (; i < end; ++i) {
        const Fp16* p = x + in[i];
        @multiply@
      }
      @added@
    }
'''
_CHAIN = '''
    @chains@
    for (int i = 0; i < inputs; ++i) {
      const Fp16* p = x + in[i];
      @multiply@
    }
    @begun@
    @added@
'''


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 8) -> Iterator[Way]:
    """The family, for planes of float16: the `most` best tiles by the model. None for weights that float16 does not hold."""
    layouts = [at for at in (source, target, residual) if at]
    if not all(at.planar and at.value.dtype == FLOAT16 for at in layouts) \
            or not np.isfinite(weights(step.conv).view(np.float16)).all():
        return
    wide = replace(cpu, lanes=2 * cpu.lanes)
    for tile in pixel.tiles(step, source, target, wide, most):
        recipe = Recipe(partial(_draft, step, tile, source, target, wide), (VECTORS, FP16))
        trial = Trial(recipe, source, residual, target, pixel.cycles(step, tile, source, target, wide))
        count = macs(step.conv, windows=not is_sparse(step.conv))
        yield Way(layer_name(step), f"fp16 {tile.label}", trial, target.value.pixels * count, "pixel")


def _draft(step: Conv, tile: PixelTile, source: Layout, target: Layout, wide: Cpu) -> Draft:
    return _Writer(step, tile, source, target, wide).draft()


class _Writer(pixel.Writer):
    """Of vectors of `lanes` numbers, whose sums in float32 are two vectors each."""

    element, vector, weight = FLOAT16, "W", "_Float16"
    load, load_rows = "load_wide", "load_rows"

    def _put_weights(self, words: Words, weights: Any) -> int:
        halves = bits(np.asarray(weights, np.float32)).ravel()
        return words.put(np.pad(halves, (0, halves.size % 2)).view(np.int32), np.int32)

    def _rows(self) -> list[str]:
        width, made = self.target.value.width, [ELEMENTS, fill(_WIDE)]
        if self.per_vector > 1:
            made += [join_rows(*names, width, self.per_vector, FLOAT16, "W", "_Float16") for names in (
                ("load_rows", "store_in", "ROW"), ("load_out", "store_rows", "OUT_ROW"))]
        return made

    def _sums(self, outputs: int, spots: list[Spot]) -> str:
        names = [(o, s) for o in range(outputs) for s in range(len(spots))]
        taps = 1 if self.sparse else self.kh * self.kw
        most = max(1, CHAIN // taps)
        longest = max((len(used(b)) if self.sparse else len(b.in_index) for b in self.branches), default=0)
        return fill(_CHAIN if longest <= most else _CHAINS, most=most, multiply=self._products("h", outputs, spots),
                    begun=[f"V a{o}_{s}_0 = splat(bias[{o}]), a{o}_{s}_1 = a{o}_{s}_0;" for o, s in names],
                    chains=[f"W h{o}_{s}{{}};" for o, s in names],
                    added=[f"a{o}_{s}_{k} += part<{k}>(h{o}_{s});" for o, s in names for k in (0, 1)])

    def _stores(self, o: int, spots: list[Spot]) -> Iterator[str]:
        yield f"Fp16* y{o} = y + out[{o}];"
        if self.residual:
            yield f"const Fp16* r{o} = r + out[{o}];"
        for s, (y, x) in enumerate(spots):
            at = f" + {y * self.target.row + x}" if y or x else ""
            if self.residual:
                yield f"const W q{o}_{s} = {'load_out' if self.per_vector > 1 else 'load_wide'}(r{o}{at});"
            values = ", ".join(self._value(o, s, x, k) for k in (0, 1))
            store = f"store_first_wide<{self.length}>" if self.tile.line and self.length < self.lanes \
                else "store_rows" if self.per_vector > 1 else "store_wide"
            yield f"{store}(y{o}{at}, both({values}));"

    def _value(self, o: int, s: int, x: int, k: int) -> str:
        """What becomes of half of the sums of a vector."""
        value = activation(self.step.activation, f"a{o}_{s}_{k}")
        if self.residual:
            value = activation(self.step.final, f"{value} + part<{k}>(q{o}_{s})")
        return f"keep({value}, mask + {x + k * self.lanes // 2})" if self.masked else value
