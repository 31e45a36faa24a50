"""Processors to compile for."""

from __future__ import annotations

from dataclasses import dataclass

VECTORS = "vectors"
"""Multiply-adds on vectors of float32: every processor that is compiled for has them."""
VNNI = "vnni"
"""AVX512-VNNI: sums of four products of uint8 and int8, into 16 sums of int32."""
BF16 = "bf16"
"""AVX512-BF16: sums of two products of bfloat16, into 16 sums of float32."""
AMX_INT8, AMX_BF16 = "amx-int8", "amx-bf16"
"""Intel's AMX: products of matrices, of bytes and of bfloat16. Only where AVX-512 has VNNI, VBMI and BF16 too."""
FP16 = "fp16"
"""Multiply-adds on vectors of float16 (AVX512-FP16, aarch64 with fp16)."""
PERMUTE = "permute"
"""AVX512-VBMI: any 64 of 128 bytes in one instruction."""

AVX_VNNI = "avx-vnni"
"""The same as VNNI on vectors of 256 bits, where there are none of 512."""
MADD = "madd"
"""Sums of two products of 16 bits: every x86-64 with AVX2."""
DOTPROD = "dotprod"
"""aarch64: sums of four products of int8."""
NEON = "neon"
"""aarch64: shuffles of 16 bytes."""
I8MM = "i8mm"
"""aarch64: sums of four products of uint8 and int8."""


@dataclass(frozen=True)
class Cpu:
    """A processor to compile for. lanes: floats per vector; registers: vector registers; instructions: the families of
    instructions that it has, for kernels that name what they need (Recipe.needs)."""

    name: str
    lanes: int
    registers: int
    flags: tuple[str, ...]
    triple: str | None = None
    instructions: tuple[str, ...] = (VECTORS,)


_WIDE = "-mprefer-vector-width=512"
_ARM = "aarch64-linux-gnu"
CPUS = {c.name: c for c in (
    Cpu("x86-64-v3", 8, 16, ("-march=x86-64-v3",), None, (VECTORS, MADD)),
    Cpu("x86-64-v3-vnni", 8, 16, ("-march=x86-64-v3", "-mavxvnni"), None, (VECTORS, MADD, AVX_VNNI)),
    Cpu("x86-64-v4", 16, 32, ("-march=x86-64-v4", _WIDE), None, (VECTORS, MADD)),
    Cpu("x86-64-v4-vnni", 16, 32, ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", _WIDE), None,
        (VECTORS, MADD, VNNI, PERMUTE)),
    Cpu("x86-64-v4-amx", 16, 32, ("-march=x86-64-v4", "-mavx512vnni", "-mavx512vbmi", "-mavx512bf16", "-mamx-tile",
                                  "-mamx-int8", "-mamx-bf16", _WIDE), None,
        (VECTORS, MADD, VNNI, PERMUTE, AMX_INT8, AMX_BF16)),
    Cpu("aarch64", 4, 32, ("-march=armv8-a",), _ARM),
    Cpu("aarch64-dotprod", 4, 32, ("-march=armv8.2-a+dotprod",), _ARM, (VECTORS, DOTPROD)),
    Cpu("aarch64-fp16", 4, 32, ("-march=armv8.2-a+fp16",), _ARM, (VECTORS, NEON, FP16)),
    Cpu("aarch64-i8mm", 4, 32, ("-march=armv8.2-a+dotprod+i8mm",), _ARM, (VECTORS, DOTPROD, I8MM)))}
