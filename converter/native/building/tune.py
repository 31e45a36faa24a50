"""How long a kernel takes: measured on this machine, and remembered."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from mmap import MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path

import numpy as np

from gkp.converter.cache import Seconds
from gkp.converter.native.building.toolchain import Toolchain, compile_objects, find, link
from gkp.converter.native.dtypes import BFLOAT16, UINT8, DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import FUNCTION
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.kernels.way import Trial
from gkp.runtime.environment import fingerprint
from gkp.types import Progress, silent

_BUDGET = 0.006
"""Seconds of repeated calls per kernel; the fastest counts, because this measures kernels, not the machine's other work."""

_TURNS = 2
"""All kernels are timed so many times over, some seconds apart: a busy phase of the machine hits few of them twice."""
_LARGE = 256 << 10
"""Bytes. In a network with weights of this size, a layer's weights have left the caches when its turn comes again: they are
thrown out before every call. (Copies used in turn do not do it: a server's last cache holds hundreds of megabytes.)"""
_PAGE = 2 << 20
_METHOD = 3
"""Times that were taken in another way are not taken from the cache."""
_TOGETHER = 16
"""Kernels in one call of the compiler, at most: starting it takes two thirds of the time that a kernel does."""


class Measured:
    """Compiles all kernels that the cache does not know, then times one after another."""

    measures = True

    def __init__(self, cpu: Cpu, toolchain: Toolchain | None = None, cache: Seconds | None = None,
                 progress: Progress = silent) -> None:
        self._cpu, self._toolchain = cpu, toolchain or find(cpu)
        self._cache, self._progress = cache or Seconds(), progress
        self._prefix = repr((_METHOD, self._toolchain.version, cpu, fingerprint().get("cpu"), prelude(cpu)))

    def seconds(self, trials: Sequence[Trial]) -> list[float]:
        keys = [self._key(t) for t in trials]
        unknown = {k: t for k, t in zip(keys, trials, strict=True) if self._cache.get(k) is None}
        if unknown:
            with tempfile.TemporaryDirectory(prefix="gkp-tune-") as folder:
                self._measure(unknown, Path(folder))
            self._cache.save()
        known = [self._cache.get(k) for k in keys]
        return [float("inf") if s is None else s for s in known]

    def _key(self, trial: Trial) -> str:
        types = [layout.value.dtype.name for layout in (trial.x, trial.r, trial.y) if layout]
        draft = trial.recipe.draft
        return hashlib.sha256(f"{self._prefix}{types}{draft.source}{draft.key}".encode()).hexdigest()[:32]

    def _measure(self, trials: dict[str, Trial], folder: Path) -> None:
        (folder / "gkp.h").write_text(prelude(self._cpu).replace("#pragma once", ""))  # each namespace has its own
        (folder / "driver.cpp").write_text(_DRIVER)
        sources = {t.recipe.source: f"kernel_{n}" for n, t in enumerate(trials.values())}
        told = partial(self._progress, f"compiling {len(sources)} kernels to try")
        told(0.0)
        files = ["driver.cpp", *_write_together(sources, folder)]
        objects = compile_objects(folder, files, self._cpu, self._toolchain, told)
        library = ctypes.CDLL(str(link(folder, objects, self._cpu, self._toolchain, "trials.so")))
        library.gkp_time.restype = ctypes.c_double
        best = dict.fromkeys(trials, float("inf"))
        for turn in range(_TURNS):
            for n, (key, t) in enumerate(trials.items()):
                self._progress(f"timing kernels ({n + 1} of {len(trials)})", (turn + n / len(trials)) / _TURNS)
                best[key] = min(best[key], _time(library, sources[t.recipe.source], t))
        for key, seconds in best.items():
            self._cache.put(key, seconds)


def _write_together(sources: Mapping[str, str], folder: Path) -> list[str]:
    """Write kernels (their names by source) into files of several each, a namespace around each, with a prelude of its own:
    a function that several kernels call is inlined less readily than in the library that is written, where each kernel is
    alone. The names of the files."""
    several = max(1, min(_TOGETHER, len(sources) // (2 * len(os.sched_getaffinity(0)))))
    every, files = list(sources.items()), []
    for n in range(0, len(every), several):
        files.append(f"kernels_{n}.cpp")
        (folder / files[-1]).write_text("\n".join(
            f"namespace of_{name} {{\n{_visible(source, name)}\n}}" for source, name in every[n:n + several]))
    return files


def _visible(source: str, name: str) -> str:
    return source.replace(f"void {FUNCTION}", f'__attribute__((visibility("default"))) void {name}')


def _time(library: ctypes.CDLL, name: str, trial: Trial) -> float:
    x, r, y = (_pages(layout.bytes if layout else 0) for layout in (trial.x, trial.r, trial.y))
    for array, layout in ((x, trial.x), (r, trial.r)):
        if layout:
            _occupy(array, layout.value.dtype)
    content = np.frombuffer(trial.recipe.draft.fill(), np.uint8)
    data = np.frombuffer(mmap(-1, max(1, content.size)), np.uint8)[:content.size]  # in small pages, as a library's
    data[:] = content
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, r, y, data)]
    cold = content.size if content.size > _LARGE else 0
    return float(library.gkp_time(getattr(library, name), *pointers, ctypes.c_long(cold), ctypes.c_double(_BUDGET)))


def _occupy(array: np.ndarray[tuple[int], np.dtype[np.uint8]], dtype: DType) -> None:
    """No denormals, no zeros; bytes of all sizes."""
    if dtype == UINT8:
        array[:] = np.arange(array.size) * 37
    elif dtype == BFLOAT16:
        array.view(np.uint16)[:] = 0x3f00
    else:
        array.view(dtype.numpy)[:] = 0.5


def _pages(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Zeros that lie in large pages, as working memory does."""
    memory = mmap(-1, size + _PAGE, MAP_PRIVATE | MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % _PAGE
    return raw[start:start + size]


_DRIVER = """// Times one kernel: the fastest of many calls, in seconds.
#include <time.h>
typedef void (*Kernel)(const void*, const void*, void*, const unsigned char*, int, int);
static double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}
constexpr int FEWEST = 4;  // samples, however long they take
// Throws so many bytes out of all caches.
static void forget(const unsigned char* data, long bytes) {
  for (const unsigned char* p = data; p < data + bytes; p += 64) {
#if defined(__CLFLUSHOPT__)
    __builtin_ia32_clflushopt(p);
#elif defined(__x86_64__)
    __builtin_ia32_clflush(p);
#else
    asm volatile("dc civac, %0" : : "r"(p) : "memory");
#endif
  }
  __sync_synchronize();
}
// cold: so many bytes of the data are in no cache when a call begins.
extern "C" __attribute__((visibility("default"))) double gkp_time(Kernel f, const void* x, const void* r, void* y,
                                                                  const unsigned char* data, long cold, double budget) {
  f(x, r, y, data, 0, 1);
  const double start = now();
  f(x, r, y, data, 0, 1);
  const double once = now() - start;
  const int calls = cold > 0 || once > 5e-5 ? 1 : static_cast<int>(5e-5 / (once + 1e-9)) + 1;
  const double end = now() + budget;
  double best = 1e9;
  for (int n = 0; n < FEWEST || now() < end; ++n) {
    forget(data, cold);
    const double before = now();
    for (int i = 0; i < calls; ++i) f(x, r, y, data, 0, 1);
    const double t = (now() - before) / calls;
    if (t < best) best = t;
  }
  return best;
}
"""
