"""What a kernel generator returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isinf

import numpy as np

from gkp.converter.native.kernels.cpu import VECTORS
from gkp.converter.native.program import Activation, Function, Parametric

FUNCTION = "KERNEL"
"""Stands for the function's name in Kernel.source; kernels with the same source share one object file."""

SIGNATURE = "const void* source, const void* second, void* target, const unsigned char* data, int part, int parts"


@dataclass(frozen=True)
class Kernel:
    """One step as C++.

    source: a translation unit that includes "gkp.h" and defines `extern "C" void KERNEL(SIGNATURE)`: it is given the first
    bytes of the buffers of source, residual or second operand, and target (not their origins). Part `part` of `parts` is
    computed: the parts are disjoint and together make the whole; any number of parts is allowed.
    data: weights and tables of this step, placed at an address that is a multiple of 64 bytes."""

    source: str
    data: bytes = b""


@dataclass(frozen=True, eq=False)
class Recipe:
    """A kernel whose data is made when it is needed: many are tried, few are kept. key: what its time depends on besides
    the source; needs: instructions, which not every processor has (Cpu.instructions)."""

    source: str
    key: str
    fill: Callable[[], bytes]
    needs: tuple[str, ...] = (VECTORS,)

    def kernel(self) -> Kernel:
        return Kernel(self.source, self.fill())


def recipe(kernel: Kernel) -> Recipe:
    """Of a kernel that is there."""
    return Recipe(kernel.source, str(len(kernel.data)), lambda: kernel.data)


def activation(kind: Function, expression: str) -> str:
    """The expression with the activation around it."""
    if isinstance(kind, Parametric):
        return f"{kind.name}({', '.join([expression, *map(literal, kind.parameters)])})"
    return expression if kind is Activation.NONE else f"{kind.value}({expression})"


def literal(number: float) -> str:
    """A float32 as C says it."""
    if isinf(number):
        return f"{'-' if number < 0 else ''}__builtin_inff()"
    return f"{float(np.float32(number))!r}f"
