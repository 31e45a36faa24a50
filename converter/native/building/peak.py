"""What one core can do at most: multiply-adds per second by each of its units, and bytes per second from memory."""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gkp.converter.native.building.toolchain import build, host_cpu
from gkp.converter.native.kernels.bfloats.direct import PAIRS
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, BF16, FP16, Cpu
from gkp.converter.native.kernels.halves.direct import DOTS
from gkp.converter.native.kernels.integers.dots import Dot, dots
from gkp.converter.native.kernels.prelude import prelude

FP32, INT8 = "fp32", "int8"
"""Multiply-adds of vectors of float32; sums of products of bytes in vectors. Other units go by their instructions."""

_CHAINS = 12
_BYTES = 256 << 20

_SOURCE = """#include "gkp.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Independent chains of sums on registers: enough to hide the latency of two units, few enough for 16 registers. The result
// depends on all of them, and the compiler does not know the operands, so nothing can be left out.
constexpr int CHAINS = @CHAINS@;

template <class T> static inline double total(const T* chain) {
  T sum{};
  for (int c = 0; c < CHAINS; ++c) sum += chain[c];
  double result = 0;
  for (int lane = 0; lane < LANES; ++lane) result += sum[lane];
  return result;
}

EXPORT double fp32(long rounds) {
  volatile float factor = 0.999f, term = 0.001f;
  const V f = splat(factor), t = splat(term);
  V chain[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chain[c] = splat(static_cast<float>(c));
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) chain[c] = chain[c] * f + t;
  return total(chain);
}

// Reads n floats, n a multiple of 8 vectors.
EXPORT float read_all(const float* x, long n) {
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
"""
_SUMS = """
namespace of_@NAME@ {
@DOT@
}
EXPORT double @NAME@(long rounds) {
  volatile int x = 0x3c013c01, w = 0x3c023c02;
  const I left = I{} + x, right = I{} + w;
  I chain[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chain[c] = I{} + c;
  for (long r = 0; r < rounds; ++r)
    for (int c = 0; c < CHAINS; ++c) chain[c] = of_@NAME@::dot(chain[c], left, right);
  return total(chain);
}
"""
_TILES = 4
"""Of sums: a product waits for the one before it in its tile about as long as three others take."""
_PRODUCT = """
EXPORT double @NAME@(long rounds) {
  alignas(64) unsigned char config[64] = {1};
  for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16;  // bytes of a row, rows
  alignas(64) int tile[256];
  for (int& word : tile) word = 0x3c013c02;
  asm volatile("ldtilecfg %0" : : "m"(config));
  asm volatile("tileloadd (%0,%1,1), %%tmm4\\n tileloadd (%0,%1,1), %%tmm5\\n tileloadd (%0,%1,1), %%tmm6\\n"
               "tileloadd (%0,%1,1), %%tmm7" : : "r"(tile), "r"(64l) : "memory");
  for (long r = 0; r < rounds; ++r)
    asm volatile("@INSTRUCTION@ %%tmm6, %%tmm4, %%tmm0\\n @INSTRUCTION@ %%tmm7, %%tmm4, %%tmm1\\n"
                 "@INSTRUCTION@ %%tmm6, %%tmm5, %%tmm2\\n @INSTRUCTION@ %%tmm7, %%tmm5, %%tmm3" ::);
  asm volatile("tilestored %%tmm0, (%0,%1,1)\\n tilerelease" : : "r"(tile), "r"(64l) : "memory");
  return tile[0];
}
"""


@dataclass(frozen=True)
class _Burst:
    """code: C++ of a function of the number of rounds; products: of a round; cycles: of a round, about."""

    code: str
    products: int
    cycles: int


class Peak:
    """Bursts on each unit of this machine's processor that kernels use, compiled together. BackendMissingError without a
    compiler."""

    def __init__(self) -> None:
        here = host_cpu()
        self._bursts = _bursts(here)
        with tempfile.TemporaryDirectory(prefix="gkp-") as name:
            folder = Path(name)
            (folder / "gkp.h").write_text(prelude(here), "ascii")
            source = _SOURCE.replace("@CHAINS@", str(_CHAINS)) + "".join(burst.code for burst in self._bursts.values())
            (folder / "peak.cpp").write_text(source, "ascii")
            self._library = ctypes.CDLL(str(build(folder, here)))
        self._library.read_all.argtypes, self._library.read_all.restype = [ctypes.c_void_p, ctypes.c_long], ctypes.c_float

    @property
    def units(self) -> tuple[str, ...]:
        return tuple(self._bursts)

    def gflops(self, units: str = FP32, seconds: float = 0.0005) -> float:
        """Operations per second / 1e9 of one core, a product and its addition being two, in one burst of about `seconds`."""
        burst, function = self._bursts[units], getattr(self._library, _name(units))
        rounds = max(1, int(seconds * 4e9 / burst.cycles))
        return 2 * rounds * burst.products / _seconds(lambda: function(ctypes.c_long(rounds))) / 1e9

    def bandwidth(self, tries: int = 5) -> float:
        """Bytes per second / 1e9 that one core reads from an array which no cache holds (256 MiB); best of `tries`."""
        array, read = np.ones(_BYTES // 4, np.float32), self._library.read_all
        return _BYTES / min(_seconds(lambda: read(array.ctypes.data, array.size)) for _ in range(tries)) / 1e9


def _bursts(cpu: Cpu) -> dict[str, _Burst]:
    """By units."""
    found = {FP32: _Burst("", _CHAINS * cpu.lanes, _CHAINS // 2), INT8: _sums(INT8, dots(cpu, 127)[0], cpu)}
    if BF16 in cpu.instructions:
        found[BF16] = _sums(BF16, PAIRS, cpu)
    if FP16 in cpu.instructions:
        found[FP16] = _sums(FP16, next(dot for dot in DOTS if dot.runs_on(cpu)), cpu)
    for units, instruction, depth in ((AMX_INT8, "tdpbusd", 64), (AMX_BF16, "tdpbf16ps", 32)):
        if units in cpu.instructions:
            code = _PRODUCT.replace("@NAME@", _name(units)).replace("@INSTRUCTION@", instruction)
            found[units] = _Burst(code, _TILES * 16 * 16 * depth, _TILES * 16)
    return found


def _sums(units: str, dot: Dot, cpu: Cpu) -> _Burst:
    code = _SUMS.replace("@NAME@", _name(units)).replace("@DOT@", dot.code)
    return _Burst(code, _CHAINS * cpu.lanes * dot.word, _CHAINS // 2)


def _name(units: str) -> str:
    """In C."""
    return units.replace("-", "_")


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
