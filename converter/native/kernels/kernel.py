"""What a kernel generator returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
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
    data: weights and tables of this step, placed at an address that is a multiple of 64 bytes. needs: instructions that it
    is made of."""

    source: str
    data: bytes = b""
    needs: tuple[str, ...] = (VECTORS,)


@dataclass(frozen=True)
class Draft:
    """A kernel but for its data, which `fill` makes. key: what its time depends on besides the source."""

    source: str
    key: str
    fill: Callable[[], bytes]


@dataclass(frozen=True, eq=False)
class Recipe:
    """A kernel that is written when it is needed: many are ranked, some are tried, few are kept. needs: instructions, which
    not every processor has (Cpu.instructions)."""

    write: Callable[[], Draft]
    needs: tuple[str, ...] = (VECTORS,)

    @cached_property
    def draft(self) -> Draft:
        return self.write()

    @property
    def source(self) -> str:
        return self.draft.source

    def kernel(self) -> Kernel:
        return Kernel(self.source, self.draft.fill(), self.needs)


def recipe(make: Callable[[], Kernel]) -> Recipe:
    """Of a kernel with little data."""
    def write() -> Draft:
        made = make()
        return Draft(made.source, str(len(made.data)), lambda: made.data)

    return Recipe(write)


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
