"""Activations made of the exponential, on vectors: a part of gkp.h. Errors are a few units of the last place, also near zero
where the function is zero."""

from __future__ import annotations

from collections.abc import Sequence

from gkp.converter.native.kernels.emit import fill
from gkp.converter.native.kernels.kernel import literal

# Minimax polynomials (relative error, fitted in float64), lowest power first.
_ERFC = (0.28208604, 0.28238192, 0.24305578, 0.20287606, -0.027071312, 0.2787121, -0.48776206, 0.28484577, -0.059124336)
"""erfc(z) e^(z^2) / t in t = 1 / (1 + z / 2), z >= 0; error 4e-8."""
_ERF = (1.1283791, -0.3761262, 0.11283377, -0.026834626, 0.0051143477, -0.00067495287)
"""erf(x) / x in x^2, |x| <= 3/4; error 1e-9."""
_LOG = (0.33333206, 0.2001085, 0.13999555, 0.14012311)
"""(atanh(s) / s - 1) / s^2 in s^2, |s| <= 1/3; error 5e-9."""


def functions() -> str:
    """C++, to stand behind the exponential."""
    return fill(_FUNCTIONS, erfc=_horner(_ERFC, "t"), erf=_horner(_ERF, "x"), log=_horner(_LOG, "x"))


def _horner(coefficients: Sequence[float], x: str) -> str:
    *rest, last = coefficients
    text = literal(last)
    for c in reversed(rest):
        text = f"({text} * {x} + {literal(c)})"
    return text


_FUNCTIONS = '''
static inline V minimum(V a, V b) { return a < b ? a : b; }
static inline V magnitude(V v) { return v < 0.0f ? -v : v; }
static inline V square_root(V v) {
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
static inline V clip(V v, float low, float high) {
  v = low > v ? splat(low) : v;
  return high < v ? splat(high) : v;
}
static inline V leaky_relu(V v, float slope) { return v < 0.0f ? v * slope : v; }
static inline V leaky_relu(V v, V slope) { return v < 0.0f ? v * slope : v; }

// e^v - 1 for v <= 0; nothing cancels near zero.
static inline V exponential_minus_1(V v) {
  v = v < -80.0f ? splat(-80.0f) : v;
  const V shifted = v * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const V scale = (V)(((I)shifted - 0x4b400000 + 127) << 23);
  return fraction((v - n * 0.693359375f) + n * 0.00021219444f) * scale + (scale - 1.0f);
}
static inline V elu(V v, float alpha) {
  const V negative = exponential_minus_1(v < 0.0f ? v : V{}) * alpha;
  return v < 0.0f ? negative : v;
}
static inline V tanh(V v) {
  const V e = exponential_minus_1(v > 0.0f ? -2.0f * v : 2.0f * v), t = e / (e + 2.0f);
  return v > 0.0f ? -t : t;
}
// erfc(z) for z >= 0.
static inline V erfc(V z) {
  const V t = 1.0f / (z * 0.5f + 1.0f);
  return exponential(-z * z) * t * @erfc@;
}
static inline V erf(V v) {
  const V z = magnitude(v), x = v * v, far = 1.0f - erfc(z);
  return z < 0.75f ? v * @erf@ : v < 0.0f ? -far : far;
}
// The smaller tail of the normal distribution keeps its precision.
static inline V gelu(V v) {
  const V tail = erfc(magnitude(v) * 0.70710678f) * 0.5f;
  return v * (v < 0.0f ? tail : 1.0f - tail);
}
static inline V gelu_tanh(V v) { return v * sigmoid(v * (v * v * 0.071354814f + 1.5957691f)); }
// log(1 + e^-|v|) = 2 atanh(e / (2 + e)).
static inline V softplus(V v) {
  const V e = exponential(v > 0.0f ? -v : v), s = e / (e + 2.0f), x = s * s;
  return relu(v) + 2.0f * s * (x * @log@ + 1.0f);
}
// tanh(softplus(v)) = n / (n + 2) with n = e^v (e^v + 2).
static inline V mish(V v) {
  const V e = exponential(v > 40.0f ? splat(40.0f) : v), n = e * (e + 2.0f);
  return v * (n / (n + 2.0f));
}
'''
