"""Instructions for sums of products: all that a kernel of integers needs of a processor beyond vectors of gkp.h."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.native.kernels.cpu import PERMUTE, VECTORS, VNNI, Cpu


@dataclass(frozen=True)
class Dot:
    """dot(sums, x, w): to each of LANES sums of int32, the products of the 4 bytes of x and w in its place are added, x
    unsigned, w signed, without saturation. pick(order, p): vector of the bytes p[order[i]]. needs: instructions; window:
    bytes from which pick can choose; code: C++ of these, on vectors I of gkp.h."""

    needs: tuple[str, ...]
    lanes: int
    window: int
    code: str

    def runs_on(self, cpu: Cpu) -> bool:
        return cpu.lanes == self.lanes and all(need in cpu.instructions for need in self.needs)


# Inline assembly, because clang and gcc name their builtins differently, and versions give them different types; the header
# of intrinsics takes as long to compile as three kernels.
_VNNI = '''
static inline I dot(I sums, I x, I w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
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
BROADCAST = Dot((VECTORS, VNNI), 16, 0, _VNNI)
PICK_64 = Dot((VECTORS, VNNI, PERMUTE), 16, 64, _VNNI + _PICK_64)
PICK_128 = Dot((VECTORS, VNNI, PERMUTE), 16, 128, _VNNI + _PICK_128)
DOTS = (BROADCAST, PICK_64, PICK_128)
