"""Instructions for sums of products: all that a kernel of them needs of a processor beyond vectors of gkp.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, UINT8, DType
from gkp.converter.native.kernels.cpu import AVX_VNNI, DOTPROD, I8MM, MADD, PERMUTE, VECTORS, VNNI, Cpu
from gkp.converter.native.kernels.integers.scales import weights


@dataclass(frozen=True)
class Dot:
    """How a processor sums products into vectors of LANES sums of 32 bits. `code` is C++ on vectors I of gkp.h and defines
    - dot(sums, x, w): to each sum, the products of the elements of x and w in its word of 32 bits are added;
    - spread(p): the elements at p in every word;
    - pick(order, p), where window is not 0: in every word any elements of the window of so many elements at p.

    name: for reports; needs: instructions; lanes: of which vectors; word: elements in a word of 32 bits (weights
    have 32 / word bits); offset: what spread and pick subtract from every element; largest: weight, beyond which it is not
    exact; element: of the source; weights: of a layer, [F, C, kh, kw], as they are multiplied; chain: where sums are numbers
    of the element's type, how many multiply-adds one takes before `total(sums)`, of each word in float32, is added to
    others (0: sums take any number)."""

    name: str
    needs: tuple[str, ...]
    lanes: tuple[int, ...]
    word: int
    window: int
    code: str
    offset: int = 0
    largest: int = 128
    element: DType = UINT8
    weights: Callable[[BranchedConv], npt.NDArray[Any]] = weights
    chain: int = 0

    @property
    def precision(self) -> str:
        return {UINT8: "int8", BFLOAT16: "bf16", FLOAT16: "fp16"}[self.element]

    @property
    def window_bytes(self) -> int:
        return self.window * self.element.bytes

    def runs_on(self, cpu: Cpu) -> bool:
        return cpu.lanes in self.lanes and all(need in cpu.instructions for need in self.needs)


# Inline assembly, because clang and gcc name their builtins differently, and versions give them different types; the header
# of intrinsics takes as long to compile as three kernels.
_SPREAD_4 = '''
static inline I spread(const unsigned char* p) {
  int word;
  __builtin_memcpy(&word, p, 4);
  return (I{} + word)@signs@;
}
'''
_VNNI = '''
static inline I dot(I sums, I x, I w) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
#else
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
#endif
  return sums;
}
'''
_PICK_64 = '''
static inline I pick(I order, const unsigned char* p) {
  asm("vpermb %1, %0, %0" : "+v"(order) : "v"(words(p)));
  return order;
}
'''
_PICK_128 = '''
static inline I pick(I order, const unsigned char* p) {
  asm("vpermi2b %2, %1, %0" : "+v"(order) : "v"(words(p)), "v"(words(p + 64)));
  return order;
}
'''
# Byte shuffles stay within 16 bytes, so these are loaded into every quarter.
_REPEATED = '''
static inline I repeated(const unsigned char* p) {
  int quarter[4];
  __builtin_memcpy(quarter, p, 16);
  I v;
  for (int i = 0; i < LANES; ++i) v[i] = quarter[i % 4];
  return v;
}
'''
_PICK_16 = '''
static inline I pick(I order, const unsigned char* p) {
  asm("vpshufb %0, %1, %0" : "+v"(order) : "v"(repeated(p)));
  return order;
}
'''
# Sums of two products saturate at 16 bits: 2 * 255 * 64 does not reach that.
_SEVEN_BITS = '''
static inline I dot(I sums, I x, I w) {
  const I ones = I{} + 0x00010001;
  asm("vpmaddubsw %1, %0, %0" : "+v"(x) : "v"(w));
  asm("vpmaddwd %1, %0, %0" : "+v"(x) : "v"(ones));
  return sums + x;
}
'''
# Two products of 16 bits in a word, for larger weights.
_MADD = '''
static inline I dot(I sums, I x, I w) {
  asm("vpmaddwd %1, %0, %0" : "+v"(x) : "v"(w));
  return sums + x;
}
static inline I spread(const unsigned char* p) {
  typedef unsigned char Half __attribute__((vector_size(2 * LANES)));
  typedef short Pairs __attribute__((vector_size(2 * LANES)));
  typedef short Whole __attribute__((vector_size(4 * LANES)));
  short pair;
  __builtin_memcpy(&pair, p, 2);
  return (I)__builtin_convertvector((Half)(Pairs{} + pair), Whole);
}
'''
_SDOT = '''
static inline I dot(I sums, I x, I w) {
  asm("@name@ %0.4s, %1.16b, %2.16b" : "+w"(sums) : "w"(x), "w"(w));
  return sums;
}
'''
_TABLE = '''
static inline I pick(I order, const unsigned char* p) {
  asm("tbl %0.16b, {%1.16b}, %0.16b" : "+w"(order) : "w"(words(p)));
  return order@signs@;
}
'''
_PLAIN = '''
static inline I dot(I sums, I x, I w) { return sums + x * w; }
static inline I spread(const unsigned char* p) { return I{} + static_cast<int>(*p); }
'''
_SIGNS = " ^ static_cast<int>(0x80808080)"
"""Bytes without a sign to bytes with one, 128 less."""


def _with(code: str, **names: str) -> str:
    for name, value in names.items():
        code = code.replace(f"@{name}@", value)
    return code


_X86 = _with(_SPREAD_4, signs="")
_QUADS = _X86 + _VNNI
PICK_64 = Dot("picked 64", (VECTORS, VNNI, PERMUTE), (16,), 4, 64, _QUADS + _PICK_64)
PICK_128 = Dot("picked 128", (VECTORS, VNNI, PERMUTE), (16,), 4, 128, _QUADS + _PICK_128)
_UNSIGNED = _X86 + _with(_SDOT, name="usdot")
_SIGNED = _with(_SPREAD_4 + _SDOT, name="sdot", signs=_SIGNS)

KINDS: tuple[tuple[Dot, ...], ...] = (
    (Dot("broadcast", (VECTORS, VNNI), (16,), 4, 0, _QUADS), PICK_64, PICK_128),
    (Dot("broadcast", (VECTORS, AVX_VNNI), (8,), 4, 0, _QUADS),
     Dot("picked 16", (VECTORS, AVX_VNNI), (8,), 4, 16, _QUADS + _REPEATED + _PICK_16)),
    (Dot("broadcast", (VECTORS, I8MM), (4,), 4, 0, _UNSIGNED),
     Dot("picked 16", (VECTORS, I8MM), (4,), 4, 16, _UNSIGNED + _with(_TABLE, signs=""))),
    (Dot("broadcast", (VECTORS, DOTPROD), (4,), 4, 0, _SIGNED, 128),
     Dot("picked 16", (VECTORS, DOTPROD), (4,), 4, 16, _SIGNED + _with(_TABLE, signs=_SIGNS), 128)),
    (Dot("broadcast", (VECTORS, MADD), (8, 16), 4, 0, _X86 + _SEVEN_BITS, largest=64),
     Dot("picked 16", (VECTORS, MADD), (8, 16), 4, 16, _X86 + _SEVEN_BITS + _REPEATED + _PICK_16, largest=64)),
    (Dot("broadcast", (VECTORS, MADD), (8, 16), 2, 0, _MADD),
     Dot("picked 16", (VECTORS, MADD), (8, 16), 2, 16, _MADD + _REPEATED + _PICK_16)),
    (Dot("broadcast", (VECTORS,), (4, 8, 16), 1, 0, _PLAIN),),
)
"""Fastest first: a layer uses the first kind that the processor has, and that is exact for its weights."""


def dots(cpu: Cpu, largest: int) -> list[Dot]:
    """Those that are offered to a layer whose largest weight, without its sign, is this."""
    return next(found for kind in KINDS if (found := [dot for dot in kind if dot.runs_on(cpu) and largest <= dot.largest]))
