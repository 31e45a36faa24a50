"""Elements of 16 bits in C++: floats in memory, float32 where something is computed with them."""

from __future__ import annotations

from gkp.converter.native.kernels.emit import fill

_ELEMENTS = '''
    // Elements of values of 16 bits. `load` and `store` of gkp.h have overloads here, on the numbers as floats.
    typedef unsigned short Halves __attribute__((vector_size(2 * LANES)));
    static inline Halves rounded(V v) {
      @rounded@
    }
    static inline V widened(Halves h) {
      @widened@
    }
    struct @name@ {
      unsigned short bits;
      operator float() const { return widened(Halves{bits})[0]; }
      @name@& operator=(float f) {
        bits = rounded(splat(f))[0];
        return *this;
      }
    };
    static inline V load(const @name@* p) {
      Halves h;
      __builtin_memcpy(&h, p, sizeof h);
      return widened(h);
    }
    template <int N> static inline V load_first(const @name@* p, V rest = V{}) {
      Halves h{};
      __builtin_memcpy(&h, p, 2 * N);
      const V v = widened(h);
      __builtin_memcpy(&rest, &v, 4 * N);
      return rest;
    }
    template <int N> static inline V load_strided(const @name@* p, long stride, V rest = V{}) {
      for (int i = 0; i < N; ++i) rest[i] = p[i * stride];
      return rest;
    }
    static inline V load_even(const @name@* p) { return load_strided<LANES>(p, 2); }
    static inline void store(@name@* p, V v) {
      const Halves h = rounded(v);
      __builtin_memcpy(p, &h, sizeof h);
    }
    template <int N> static inline void store_first(@name@* p, V v) {
      const Halves h = rounded(v);
      __builtin_memcpy(p, &h, 2 * N);
    }
    template <int AT, int N> static inline void load_lanes(V& v, const @name@* p) {
      const V part = load_first<N>(p);
      __builtin_memcpy(reinterpret_cast<char*>(&v) + 4 * AT, &part, 4 * N);
    }
    template <int AT, int N> static inline void store_lanes(@name@* p, const V& v) {
      V part{};
      __builtin_memcpy(&part, reinterpret_cast<const char*>(&v) + 4 * AT, 4 * N);
      store_first<N>(p, part);
    }
    template <int N> static inline void store_strided(@name@* p, long stride, V v) {
      const Halves h = rounded(v);
      for (int i = 0; i < N; ++i) p[i * stride].bits = h[i];
    }
'''


def elements(name: str, rounded: str, widened: str) -> str:
    """The C++ of a type of elements. rounded, widened: the bodies of the functions from V v to Halves and from Halves h to
    V."""
    return fill(_ELEMENTS, name=name, rounded=rounded, widened=widened)
