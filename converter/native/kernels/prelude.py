"""gkp.h: the C++ that all kernels share."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.vectors import vectors


def prelude(cpu: Cpu) -> str:
    """gkp.h: vectors, loads, stores, activations."""
    return _PRELUDE.replace("@LANES@", str(cpu.lanes)) + vectors(cpu.lanes)


_PRELUDE = '''// Shared by all kernels: vectors of LANES floats, loads and stores at any address, activations.
#pragma once

constexpr int LANES = @LANES@;
typedef float V __attribute__((vector_size(4 * LANES)));
typedef int I __attribute__((vector_size(4 * LANES)));
typedef float Vu __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

static inline V load(const float* p) { return *reinterpret_cast<const Vu*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<Vu*>(p) = v; }
static inline void store_part(float* p, V v, int n) { for (int i = 0; i < n; ++i) p[i] = v[i]; }
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
// e^v to 1 ulp, also for denormal results. v = n ln 2 + r with |r| <= ln 2 / 2, e^r by a polynomial (minimax fit),
// 2^n as two factors because n reaches -150 and 128.
static inline V exponential(V v) {
  v = v > 89.0f ? splat(89.0f) : v;
  v = v < -104.0f ? splat(-104.0f) : v;
  const V shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer, held in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (v - n * 0.693359375f) + n * 0.00021219444f;
  V p = r * 0.0013813878f + 0.008369064f;
  p = p * r + 0.041668423f;
  p = p * r + 0.16666518f;
  p = p * r + 0.49999994f;
  p = (r * r) * p + r + 1.0f;
  const I exponent = (I)shifted - 0x4b400000, half = exponent >> 1;
  return p * (V)((half + 127) << 23) * (V)((exponent - half + 127) << 23);
}
// With e^-|v| nothing overflows, and small results keep their precision.
static inline V sigmoid(V v) {
  const V e = exponential(v > 0.0f ? -v : v);
  return (v < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}
static inline V silu(V v) { return v * sigmoid(v); }

// [begin, end) of part `part` of `parts` of n items.
static inline int first_of(int n, int part, int parts) { return static_cast<int>(static_cast<long>(n) * part / parts); }
'''
