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


def spread(name: str) -> str:
    """C++: the two elements at p in every word."""
    return fill(_SPREAD, name=name)


def pick_32(name: str) -> str:
    """C++: in every word any two of the 32 elements at p (x86-64, 16 lanes)."""
    return fill(_PICK_32, name=name)


def pick_64(name: str) -> str:
    """C++: in every word any two of the 64 elements at p."""
    return fill(_PICK_64, name=name)


_SPREAD = '''
    static inline I spread(const @name@* p) {
      int word;
      __builtin_memcpy(&word, p, 4);
      return I{} + word;
    }
'''
_PICK_32 = '''
    static inline I pick(I order, const @name@* p) {
      asm("vpermw %1, %0, %0" : "+v"(order) : "v"(words(p)));
      return order;
    }
'''
_PICK_64 = '''
    static inline I pick(I order, const @name@* p) {
      asm("vpermi2w %2, %1, %0" : "+v"(order) : "v"(words(p)), "v"(words(p + 32)));
      return order;
    }
'''
