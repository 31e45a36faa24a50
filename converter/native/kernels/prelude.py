"""gkp.h: the C++ that all kernels share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill
from gkp.converter.native.kernels.functions import functions


def prelude(cpu: Cpu) -> str:
    """gkp.h: vectors, loads, stores, activations; parts of vectors, strided access, shuffles, reductions."""
    n = cpu.lanes
    return fill(_PRELUDE, lanes=n, functions=functions(), over_four=n > 4, eight=n == 8, sixteen=n == 16,
                even=_list(2 * i for i in range(n)), odd=_list(2 * i + 1 for i in range(n)),
                low_even=_list(2 * i + (i >= n // 2) for i in range(n)),
                sum=_reduction("v + w", n), largest=_reduction("maximum(v, w)", n),
                low1=_quarters(n, 0, 4, 1, 5), high1=_quarters(n, 2, 6, 3, 7), low2=_quarters(n, 0, 1, 4, 5),
                high2=_quarters(n, 2, 3, 6, 7), even4=_list(i for i in range(2 * n) if i % 8 < 4),
                odd4=_list(i for i in range(2 * n) if i % 8 >= 4))


def _list(indices: Iterable[int]) -> str:
    return ", ".join(map(str, indices))


def _quarters(lanes: int, *order: int) -> str:
    """The same pattern in every quarter of 128 bits; 4 to 7 are b's floats."""
    return _list(q + o % 4 + o // 4 * lanes for q in range(0, lanes, 4) for o in order)


def _reduction(expression: str, lanes: int) -> Iterator[str]:
    """All lanes to one, in log2(lanes) steps."""
    half = lanes // 2
    while half:
        order = _list((i + half) % lanes for i in range(lanes))
        yield f"{'V ' if half == lanes // 2 else ''}w = __builtin_shufflevector(v, v, {order});"
        yield f"v = {expression};"
        half //= 2


_PRELUDE = '''
// Shared by all kernels: vectors of LANES floats, loads and stores at any address, activations.
#pragma once

constexpr int LANES = @lanes@;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int I __attribute__((vector_size(4 * LANES)));
typedef float Vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
static inline V splat(float f) { return V{} + f; }
// v where the mask is set, else zero.
static inline V keep(V v, const int* mask) {
  typedef int Iu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
  return (V)((I)v & *reinterpret_cast<const Iu*>(mask));
}

// As ONNX Runtime does: NaN stays NaN, -0 stays -0 (written so that one max instruction computes it).
static inline V relu(V v) { return 0.0f > v ? V{} : v; }
static inline V relu6(V v) { v = relu(v); return 6.0f < v ? splat(6.0f) : v; }
static inline V hardsigmoid(V v) {
  v = v * (1.0f / 6.0f) + 0.5f;
  v = relu(v);
  return 1.0f < v ? splat(1.0f) : v;
}
static inline V hardswish(V v) { return v * hardsigmoid(v); }
// e^r - 1 for |r| <= ln 2 / 2 by a polynomial (minimax fit).
static inline V fraction(V r) {
  V p = r * 0.0013813878f + 0.008369064f;
  p = p * r + 0.041668423f;
  p = p * r + 0.16666518f;
  p = p * r + 0.49999994f;
  return (r * r) * p + r;
}
// e^v to 1 ulp, also for denormal results. v = n ln 2 + r with |r| <= ln 2 / 2,
// 2^n as two factors because n reaches -150 and 128.
static inline V exponential(V v) {
  v = v > 89.0f ? splat(89.0f) : v;
  v = v < -104.0f ? splat(-104.0f) : v;
  const V shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (v - n * 0.693359375f) + n * 0.00021219444f;
  const V p = fraction(r) + 1.0f;
  const I exponent = (I)shifted - 0x4b400000, half = exponent >> 1;
  return p * (V)((half + 127) << 23) * (V)((exponent - half + 127) << 23);
}
// With e^-|v| nothing overflows, and small results keep their precision.
static inline V sigmoid(V v) {
  const V e = exponential(v > 0.0f ? -v : v);
  return (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}
static inline V silu(V v) { return v * sigmoid(v); }
@functions@

// [begin, end) of part `part` of `parts` of n items.
static inline int first_of(int n, int part, int parts) { return static_cast<int>(static_cast<long>(n) * part / parts); }

static inline V maximum(V a, V b) { return a > b ? a : b; }

// N floats, and zeros (or those of `rest`) in the other lanes; nothing else is read or written.
template <int N> static inline V load_first(const float* p, V rest = V{}) {
  __builtin_memcpy(&rest, p, 4 * N);
  return rest;
}
template <int N> static inline void store_first(float* p, V v) { __builtin_memcpy(p, &v, 4 * N); }
template <int N> static inline V keep_first(V v) {
  V kept{};
  __builtin_memcpy(&kept, &v, 4 * N);
  return kept;
}
// N floats to or from the lanes AT, AT + 1, ...
template <int AT, int N> static inline void load_lanes(V& v, const float* p) {
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 4 * AT, p, 4 * N);
}
template <int AT, int N> static inline void store_lanes(float* p, const V& v) {
  __builtin_memcpy(p, reinterpret_cast<const char*>(&v) + 4 * AT, 4 * N);
}

// The even floats of two vectors side by side.
static inline V even(V a, V b) { return __builtin_shufflevector(a, b, @even@); }
// The odd ones.
static inline V odd(V a, V b) { return __builtin_shufflevector(a, b, @odd@); }
// The even floats of a, then the odd ones of b.
static inline V low_even(V a, V b) { return __builtin_shufflevector(a, b, @low_even@); }

// Every second float, from p[0] to p[2 * LANES - 2].
static inline V load_even(const float* p) { return low_even(load(p), load(p + LANES - 1)); }
template <int N> static inline V load_strided(const float* p, long stride, V rest = V{}) {
  for (int i = 0; i < N; ++i) rest[i] = p[i * stride];
  return rest;
}
template <int N> static inline void store_strided(float* p, long stride, V v) {
  for (int i = 0; i < N; ++i) p[i * stride] = v[i];
}

static inline float sum(V v) {
  @sum@
  return v[0];
}

static inline float largest(V v) {
  @largest@
  return v[0];
}

// Steps of the transposition: single floats and pairs within quarters, then quarters.
static inline V low1(V a, V b) { return __builtin_shufflevector(a, b, @low1@); }
static inline V high1(V a, V b) { return __builtin_shufflevector(a, b, @high1@); }
static inline V low2(V a, V b) { return __builtin_shufflevector(a, b, @low2@); }
static inline V high2(V a, V b) { return __builtin_shufflevector(a, b, @high2@); }
$if over_four: static inline V even4(V a, V b) { return __builtin_shufflevector(a, b, @even4@); }
$if over_four: static inline V odd4(V a, V b) { return __builtin_shufflevector(a, b, @odd4@); }
// Lane j of v[i] and lane i of v[j] change places.
static inline void transpose(V (&v)[LANES]) {
  for (int i = 0; i < LANES; i += 4) {
    const V a = low1(v[i], v[i + 1]), b = high1(v[i], v[i + 1]);
    const V c = low1(v[i + 2], v[i + 3]), d = high1(v[i + 2], v[i + 3]);
    v[i] = low2(a, c), v[i + 1] = high2(a, c), v[i + 2] = low2(b, d), v[i + 3] = high2(b, d);
  }
  $if eight: for (int i = 0; i < 4; ++i) {
    $if eight: const V a = v[i], b = v[i + 4];
    $if eight: v[i] = even4(a, b), v[i + 4] = odd4(a, b);
  $if eight: }
  $if sixteen: for (int i = 0; i < 4; ++i) {
    $if sixteen: const V a = even4(v[i], v[i + 4]), b = odd4(v[i], v[i + 4]);
    $if sixteen: const V c = even4(v[i + 8], v[i + 12]), d = odd4(v[i + 8], v[i + 12]);
    $if sixteen: v[i] = even4(a, c), v[i + 4] = even4(b, d), v[i + 8] = odd4(a, c), v[i + 12] = odd4(b, d);
  $if sixteen: }
}
'''
