"""Direct convolution of float16: the tiles of integers, with two multiply-adds of float16 in a word.

A word of 32 bits holds two sums of float16, of the even and of the odd channels that it is given: what is loaded, spread and
picked is a pair of channels, as in bfloat16. After CHAIN multiply-adds of each, both are added to a sum of float32 and begin
again at zero; activation, residual and final function follow in float32, and what is stored as float16 is rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from gkp.converter.native.dtypes import FLOAT16
from gkp.converter.native.kernels import narrow
from gkp.converter.native.kernels.bfloats.direct import Store
from gkp.converter.native.kernels.cpu import FP16, NEON, VECTORS, Cpu
from gkp.converter.native.kernels.halves.elements import ELEMENTS, weights
from gkp.converter.native.kernels.integers.direct import tiled
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.program import Conv

CHAIN = 128
"""Roundings to 11 bits one after another, at most."""
_PAIRS = '''
typedef _Float16 Pairs __attribute__((vector_size(4 * LANES)));
static inline I dot(I sums, I x, I w) { return (I)((Pairs)x * (Pairs)w + (Pairs)sums); }
// Of each word, the sum of its two numbers.
static inline V total(I sums) {
  typedef unsigned U __attribute__((vector_size(4 * LANES)));
  return widened(__builtin_convertvector((U)sums, Halves)) + widened(__builtin_convertvector((U)sums >> 16, Halves));
}
'''
# Channels to bytes; a place beyond the table gives zero (tbl) or leaves what there is (tbx).
_BYTES = '''
static inline I bytes_of(I channels) {
  typedef unsigned short Places __attribute__((vector_size(4 * LANES)));
  return (I)((Places)channels * 0x0202 + 0x0100);
}
'''
_PICK_8 = '''
static inline I pick(I order, const Fp16* p) {
  I v;
  asm("tbl %0.16b, {%1.16b}, %2.16b" : "=w"(v) : "w"(words(p)), "w"(bytes_of(order)));
  return v;
}
'''
_PICK_16 = '''
static inline I pick(I order, const Fp16* p) {
  typedef unsigned char Bytes __attribute__((vector_size(16)));
  const Bytes first = (Bytes)bytes_of(order), second = first - 16;
  I v;
  asm("tbl %0.16b, {%1.16b}, %2.16b" : "=w"(v) : "w"(words(p)), "w"(first));
  asm("tbx %0.16b, {%1.16b}, %2.16b" : "+w"(v) : "w"(words(p + 8)), "w"(second));
  return v;
}
'''


def _pairs(name: str, lanes: int, window: int, code: str = "") -> Dot:
    needs = (VECTORS, FP16, *([NEON] if window and lanes == 4 else []))
    code = ELEMENTS + _PAIRS + narrow.spread("Fp16") + code
    return Dot(name, needs, (lanes,), 2, window, code, element=FLOAT16, weights=weights, chain=CHAIN)


DOTS = (_pairs("broadcast", 16, 0), _pairs("picked 32", 16, 32, narrow.pick_32("Fp16")),
        _pairs("picked 64", 16, 64, narrow.pick_64("Fp16")),
        _pairs("broadcast", 4, 0), _pairs("picked 8", 4, 8, _BYTES + _PICK_8), _pairs("picked 16", 4, 16, _BYTES + _PICK_16))
_PER_CYCLE = 2
"""As in bfloat16: what the model of tiles counts as one product is two, issued as fast as a multiply-add of float32."""


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """The family, for channels last in float16, targets and residuals in it or in float32: the `most` best tiles of each
    sort by the model. None for weights that float16 does not hold."""
    if source.value.dtype == FLOAT16 and source.channel == 1 and np.isfinite(weights(step.conv).view(np.float16)).all():
        for way in tiled(step, source, target, residual, cpu, [dot for dot in DOTS if dot.runs_on(cpu)], Store, most):
            yield replace(way, trial=replace(way.trial, cycles=way.trial.cycles / _PER_CYCLE))
