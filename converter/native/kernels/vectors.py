"""The part of gkp.h that depends on the number of lanes: parts of vectors, strided access, shuffles, reductions."""

from __future__ import annotations

from collections.abc import Iterable


def vectors(lanes: int) -> str:
    """C++ for vectors of `lanes` floats, 4, 8 or 16; needs LANES, V, I, load and splat."""
    shuffles = [_shuffle("even", (2 * i for i in range(lanes)), "the even floats of two vectors side by side"),
                _shuffle("odd", (2 * i + 1 for i in range(lanes)), "the odd ones"),
                _shuffle("low_even", (2 * i + (i >= lanes // 2) for i in range(lanes)),
                         "the even floats of a, then the odd ones of b")]
    return "\n" + _PARTS + "\n" + "".join(shuffles) + _STRIDED + _reduce("sum", "v + w", lanes) \
        + _reduce("largest", "maximum(v, w)", lanes) + _transpose(lanes)


_PARTS = '''static inline V maximum(V a, V b) { return a > b ? a : b; }

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
'''

_STRIDED = '''
// Every second float, from p[0] to p[2 * LANES - 2].
static inline V load_even(const float* p) { return low_even(load(p), load(p + LANES - 1)); }
template <int N> static inline V load_strided(const float* p, long stride, V rest = V{}) {
  for (int i = 0; i < N; ++i) rest[i] = p[i * stride];
  return rest;
}
template <int N> static inline void store_strided(float* p, long stride, V v) {
  for (int i = 0; i < N; ++i) p[i * stride] = v[i];
}
'''


def _shuffle(name: str, indices: Iterable[int], meaning: str) -> str:
    return (f"// {meaning.capitalize()}.\nstatic inline V {name}(V a, V b) {{ return __builtin_shufflevector(a, b, "
            f"{', '.join(map(str, indices))}); }}\n")


def _reduce(name: str, expression: str, lanes: int) -> str:
    """All lanes to one, in log2(lanes) steps."""
    lines, half = [], lanes // 2
    while half:
        order = ", ".join(str((i + half) % lanes) for i in range(lanes))
        lines.append(f"  {'V ' if half == lanes // 2 else ''}w = __builtin_shufflevector(v, v, {order});")
        lines.append(f"  v = {expression};")
        half //= 2
    return f"\nstatic inline float {name}(V v) {{\n" + "\n".join(lines) + "\n  return v[0];\n}\n"


def _transpose(lanes: int) -> str:
    """A square block in registers: 4x4 blocks within the quarters of 128 bits, then whole quarters change places. Every
    pattern is one instruction on x86-64 and on aarch64."""
    def pattern(name: str, indices: Iterable[int]) -> str:
        return (f"static inline V {name}(V a, V b) {{ return __builtin_shufflevector(a, b, "
                f"{', '.join(map(str, indices))}); }}\n")

    def quarters(name: str, order: tuple[int, int, int, int]) -> str:  # the same in every quarter; 4 to 7 are b's
        return pattern(name, (q + o % 4 + o // 4 * lanes for q in range(0, lanes, 4) for o in order))

    text = (quarters("low1", (0, 4, 1, 5)) + quarters("high1", (2, 6, 3, 7))
            + quarters("low2", (0, 1, 4, 5)) + quarters("high2", (2, 3, 6, 7)))
    if lanes > 4:
        text += pattern("even4", (i for i in range(2 * lanes) if i % 8 < 4))
        text += pattern("odd4", (i for i in range(2 * lanes) if i % 8 >= 4))
    return ("\n// Steps of the transposition: single floats and pairs within quarters, then quarters.\n" + text
            + "// Lane j of v[i] and lane i of v[j] change places.\nstatic inline void transpose(V (&v)[LANES]) {\n"
            + _TRANSPOSE + {4: "", 8: _TRANSPOSE_8, 16: _TRANSPOSE_16}[lanes] + "}\n")


_TRANSPOSE = '''  for (int i = 0; i < LANES; i += 4) {
    const V a = low1(v[i], v[i + 1]), b = high1(v[i], v[i + 1]);
    const V c = low1(v[i + 2], v[i + 3]), d = high1(v[i + 2], v[i + 3]);
    v[i] = low2(a, c), v[i + 1] = high2(a, c), v[i + 2] = low2(b, d), v[i + 3] = high2(b, d);
  }
'''
_TRANSPOSE_8 = '''  for (int i = 0; i < 4; ++i) {
    const V a = v[i], b = v[i + 4];
    v[i] = even4(a, b), v[i + 4] = odd4(a, b);
  }
'''
_TRANSPOSE_16 = '''  for (int i = 0; i < 4; ++i) {
    const V a = even4(v[i], v[i + 4]), b = odd4(v[i], v[i + 4]);
    const V c = even4(v[i + 8], v[i + 12]), d = odd4(v[i + 8], v[i + 12]);
    v[i] = even4(a, c), v[i + 4] = even4(b, d), v[i + 8] = odd4(a, c), v[i + 12] = odd4(b, d);
  }
'''
