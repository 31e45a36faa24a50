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
    caller's contiguous array of one image); in the planner also "buffer", whose place is not settled. further: of a buffer
    that each image of a group has of its own, first byte in the memory of each but the first (Plan.group)."""

    where: str
    at: int
    further: int | None = None


@dataclass(frozen=True)
class Call:
    """One step of the compiled network. layer: name in the model ("" for our own conversions), for reports only, never
    in code. macs: multiply-accumulates it executes for one image. kind: what it is, for reports ("conv 3x3"). together:
    parts of it, each of which is computed for all images of a group before the next; 0: images are computed alone."""

    kernel: Kernel
    x: Place
    r: Place | None
    y: Place
    layer: str = ""
    kind: str = ""
    macs: int = 0
    together: int = 0


@dataclass(frozen=True)
class Fill:
    """Bytes of the arena, from `first` on, that are `value` when it is created."""

    first: int
    bytes: int
    value: int


@dataclass(frozen=True)
class Group:
    """Images of a batch that one thread computes together. images: how many at most; bytes: of memory for each but the
    first, which has the arena; zero when created, but for the fills."""

    images: int = 1
    bytes: int = 0
    fills: tuple[Fill, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that is compiled. arena: bytes of working memory for one image in flight, zero when created, but for the
    fills; seconds: of one image, by the timer that chose the kernels, for the layers that are convolutions. Only calls
    before the first one that is computed together use buffers that the images of a group share."""

    cpu: Cpu
    calls: tuple[Call, ...]
    arena: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    seconds: Mapping[str, float] = field(default_factory=dict)
    fills: tuple[Fill, ...] = ()
    group: Group = Group()
