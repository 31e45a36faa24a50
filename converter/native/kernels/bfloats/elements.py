"""bfloat16 in C++ and in numpy: the upper half of a float32, rounded half to even."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv

ELEMENTS = '''
    // Elements of values in bfloat16. `load` and `store` of gkp.h have overloads here, on the numbers as floats.
    typedef unsigned short Halves __attribute__((vector_size(2 * LANES)));
    static inline Halves rounded(V v) {
      Halves h;
      asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
      return h;
    }
    static inline V widened(Halves h) { return (V)(__builtin_convertvector(h, I) << 16); }
    struct Bf16 {
      unsigned short bits;
      operator float() const {
        const unsigned wide = static_cast<unsigned>(bits) << 16;
        float f;
        __builtin_memcpy(&f, &wide, 4);
        return f;
      }
      Bf16& operator=(float f) {
        bits = rounded(splat(f))[0];
        return *this;
      }
    };
    static inline V load(const Bf16* p) {
      Halves h;
      __builtin_memcpy(&h, p, sizeof h);
      return widened(h);
    }
    template <int N> static inline V load_first(const Bf16* p, V rest = V{}) {
      Halves h{};
      __builtin_memcpy(&h, p, 2 * N);
      const V v = widened(h);
      __builtin_memcpy(&rest, &v, 4 * N);
      return rest;
    }
    template <int N> static inline V load_strided(const Bf16* p, long stride, V rest = V{}) {
      for (int i = 0; i < N; ++i) rest[i] = p[i * stride];
      return rest;
    }
    static inline V load_even(const Bf16* p) { return load_strided<LANES>(p, 2); }
    static inline void store(Bf16* p, V v) {
      const Halves h = rounded(v);
      __builtin_memcpy(p, &h, sizeof h);
    }
    template <int N> static inline void store_first(Bf16* p, V v) {
      const Halves h = rounded(v);
      __builtin_memcpy(p, &h, 2 * N);
    }
    template <int N> static inline void store_strided(Bf16* p, long stride, V v) {
      const Halves h = rounded(v);
      for (int i = 0; i < N; ++i) p[i * stride].bits = h[i];
    }
'''


def bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite numbers rounded to bfloat16, half to even; a zero has no sign."""
    whole = np.ascontiguousarray(values + np.float32(0), np.float32).view(np.uint32)
    return ((whole + 0x7fff + (whole >> 16 & 1)) >> 16).astype(np.uint16)


@lru_cache(maxsize=64)
def weights(conv: BranchedConv) -> npt.NDArray[Any]:
    """[F, C, kh, kw] of bfloat16 as uint16, zeros in the holes."""
    return bits(conv.to_dense())
