"""What one core can do at most: multiply-adds per second, and bytes per second from memory."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.converter.native.kernels.bfloats import direct as bfloats
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.halves import direct as halves
from gkp.converter.native.kernels.integers.dots import Dot, dots
from gkp.converter.native.kernels.prelude import prelude

_CHAINS = 12
_BYTES = 256 << 20

SOURCE = """#include "gkp.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// CHAINS independent chains of multiply-adds on registers: enough to hide the latency of two units, few enough for 16
// registers. The result depends on all of them, so nothing can be left out.
constexpr int CHAINS = @CHAINS@;

EXPORT float gkp_multiply_adds(long rounds, float factor, float term) {
  const V f = splat(factor), t = splat(term);
  V chain[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chain[c] = splat(static_cast<float>(c));
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) chain[c] = chain[c] * f + t;
  V sum{};
  for (int c = 0; c < CHAINS; ++c) sum += chain[c];
  float result = 0;
  for (int lane = 0; lane < LANES; ++lane) result += sum[lane];
  return result;
}

// Reads n floats, n a multiple of 8 vectors.
EXPORT float gkp_read(const float* x, long n) {
  V sum[8] = {};
  for (long i = 0; i < n; i += 8 * LANES)
    for (int k = 0; k < 8; ++k) sum[k] += load(x + i + k * LANES);
  float result = 0;
  for (int k = 0; k < 8; ++k)
    for (int lane = 0; lane < LANES; ++lane) result += sum[k][lane];
  return result;
}

static inline I words(const void* p) {
  I v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
@DOT@
EXPORT int gkp_dots(long rounds, int x, int w) {
  I chain[CHAINS], left = I{} + x, right = I{} + w;
  for (int c = 0; c < CHAINS; ++c) chain[c] = I{} + c;
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) chain[c] = dot(chain[c], left, right);
  I sum{};
  for (int c = 0; c < CHAINS; ++c) sum += chain[c];
  int result = 0;
  for (int lane = 0; lane < LANES; ++lane) result += sum[lane];
  return result;
}
"""


class Peak:
    """SOURCE, compiled for a processor of the machine's own kind. precision: the peak is that of its sums of bytes (int8),
    of pairs of bfloat16 (bf16), or of multiply-adds in float16 (fp16) or float32 (fp32). BackendMissingError without a
    compiler."""

    def __init__(self, precision: str = "fp32", cpu: Cpu | None = None) -> None:
        here = cpu or host_cpu()
        self._sums, dot = precision != "fp32", _dot(precision, here)
        self._products = here.lanes * (dot.word if self._sums else 1)
        with tempfile.TemporaryDirectory(prefix="gkp-") as name:
            folder = Path(name)
            (folder / "gkp.h").write_text(prelude(here), "ascii")
            (folder / "peak.cpp").write_text(SOURCE.replace("@CHAINS@", str(_CHAINS)).replace("@DOT@", dot.code), "ascii")
            loaded = ctypes.CDLL(str(build(folder, here)))
        self._multiply_adds, self._dots, self._read = loaded.gkp_multiply_adds, loaded.gkp_dots, loaded.gkp_read
        self._dots.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int]
        self._multiply_adds.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_long]
        self._multiply_adds.restype = self._read.restype = ctypes.c_float

    def gflops(self, seconds: float = 0.0005) -> float:
        """Operations per second / 1e9 of one core, a product and its addition being two, in one burst of about `seconds`."""
        rounds = max(1, int(seconds * 4e9 / (_CHAINS / 2)))
        if self._sums:
            taken = _seconds(lambda: self._dots(rounds, 0x3c013c01, 0x3c023c02))
        else:
            taken = _seconds(lambda: self._multiply_adds(rounds, 0.999, 0.001))
        return 2 * rounds * _CHAINS * self._products / taken / 1e9

    def bandwidth(self, tries: int = 5) -> float:
        """Bytes per second / 1e9 that one core reads from an array which no cache holds (256 MiB); best of `tries`."""
        array = np.ones(_BYTES // 4, np.float32)
        return _BYTES / min(_seconds(lambda: self._read(array.ctypes.data, array.size)) for _ in range(tries)) / 1e9


def _dot(precision: str, cpu: Cpu) -> Dot:
    """The first that the processor has."""
    offered = {"bf16": bfloats.DOTS, "fp16": halves.DOTS}.get(precision, ())
    return next((dot for dot in offered if dot.runs_on(cpu)), dots(cpu, 127)[0])


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
