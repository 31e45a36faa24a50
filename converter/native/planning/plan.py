"""A program laid out in memory: which kernel runs on which part of the arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.program import Port


@dataclass(frozen=True)
class Place:
    """A buffer. where: "arena" (at: first byte, a multiple of 64), "input" or "output" (at: number of the port; the
    caller's contiguous array of one image); in the planner also "buffer", whose place is not settled."""

    where: str
    at: int


@dataclass(frozen=True)
class Call:
    """One step of the compiled network. layer: name in the model ("" for our own conversions), for reports only, never
    in code. macs: multiply-accumulates it executes for one image. kind: what it is, for reports ("conv 3x3")."""

    kernel: Kernel
    x: Place
    r: Place | None
    y: Place
    layer: str = ""
    kind: str = ""
    macs: int = 0


@dataclass(frozen=True)
class Fill:
    """Bytes of the arena, from `first` on, that are `value` when it is created."""

    first: int
    bytes: int
    value: int


@dataclass(frozen=True)
class Plan:
    """Everything that is compiled. arena: bytes of working memory for one image in flight, zero when created, but for the
    fills; seconds: of one image, by the timer that chose the kernels, for the layers that are convolutions."""

    cpu: Cpu
    calls: tuple[Call, ...]
    arena: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    fills: tuple[Fill, ...] = ()
