"""Random convolutions, and every way to compute them run on memory that shows what is read and written in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from interpret import run_step
from kernel_kit import PARTS, Buffer, Case, Function, check_bounds, compile_kernels

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Halo, Kind, Layout, channels_last, planar
from gkp.converter.native.kernels.way import Way
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.planning.ways import conv_ways
from gkp.converter.native.program import Activation, Conv, Program, Value

Array = npt.NDArray[Any]
Rng = np.random.Generator
_POISON = np.float32(np.frombuffer(b"\x77\x66\xc5\x7f", "<f4")[0])  # a NaN that no computation gives
_GUARD = 64  # floats before and behind each buffer
KERNELS = ((1, 1), (1, 1), (3, 3), (3, 3), (3, 3), (1, 3), (3, 1), (2, 2), (5, 5), (1, 7), (4, 3), (2, 1))
SIDES = (1, 1, 2, 3, 4, 5, 7, 8, 8, 9, 13, 14, 16, 16, 17, 20, 31, 32, 35)


# ---- random convolutions --------------------------------------------------------------------------------------------
def random_branches(rng: Rng, ins: int, outs: int, kernel: tuple[int, int], most: int = 6) -> tuple[Branch, ...]:
    """Unequal branches whose inputs overlap; some outputs in no branch, sometimes; zero taps, sometimes."""
    count = int(rng.integers(0 if rng.integers(12) == 0 else 1, min(most, outs) + 1))
    order = rng.permutation(outs) if rng.integers(2) else np.arange(outs)
    if rng.integers(3) == 0:
        order = order[:int(rng.integers(min(count, outs), outs + 1))]
    cuts = np.sort(rng.choice(np.arange(1, len(order)), count - 1, False)) if count > 1 else np.zeros(0, int)
    holes, branches = bool(rng.integers(3) == 0), []
    for out in np.split(order, cuts) if count else []:
        reads = ins if rng.integers(4) == 0 else int(rng.integers(1, ins + 1))
        chosen = np.arange(ins) if reads == ins and rng.integers(2) else rng.permutation(ins)[:reads]
        weight = rng.standard_normal((len(out), reads, *kernel))
        if holes:  # a tap that is zero for all outputs, and taps that are zero for some
            weight *= rng.random((1, reads, *kernel)) < rng.choice([0.0, 0.3, 0.8])
            weight *= rng.random(weight.shape) < 0.9
        scale = 1 / np.sqrt(max(1, reads * kernel[0] * kernel[1]))
        branches.append(Branch(np.sort(chosen) if rng.integers(2) else chosen, out, (weight * scale).astype(np.float32)))
    return tuple(branches)


def random_conv(rng: Rng, kernel: tuple[int, int] | None = None, strides: tuple[int, int] | None = None, *,
                dilate: bool = True, ins: int | None = None, outs: int | None = None) -> BranchedConv:
    """Channels 1 to 70; asymmetric pads up to the window's size."""
    kernel = kernel or KERNELS[rng.integers(len(KERNELS))]
    strides = strides or ((1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (1, 2), (3, 2))[rng.integers(7)]
    dilations = ((1, 1), (1, 1), (1, 1), (2, 2), (1, 3), (2, 1))[rng.integers(6)] if dilate else (1, 1)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    pads = tuple(r // 2 for r in (*reach, *reach)) if rng.integers(3) else tuple(int(rng.integers(0, r + 1)) for r in (*reach, *reach))
    ins, outs = (int(rng.choice([1, 2, 3, 4, 8, 9, 15, 16, 17, 24, 32, 48, 64, 70])) if n is None else n for n in (ins, outs))
    return BranchedConv(ins, outs, random_branches(rng, ins, outs, kernel), rng.standard_normal(outs).astype(np.float32), kernel,
                        strides, pads, dilations)


def random_plane(rng: Rng, conv: BranchedConv) -> tuple[int, int]:
    """A source on which the convolution gives at least one pixel: narrower than a vector, of odd size, or larger."""
    need = [d * (k - 1) + 1 - conv.pads[a] - conv.pads[2 + a]
            for a, (d, k) in enumerate(zip(conv.dilations, conv.kernel_shape, strict=True))]
    height, width = (max(1, n, int(rng.choice(SIDES))) for n in need)
    if rng.integers(6) == 0:
        height, width = max(1, need[0]), max(1, need[1])  # one pixel
    return height, width


# ---- layouts --------------------------------------------------------------------------------------------------------
def needed_halo(conv: BranchedConv, source: Value, target: Value) -> Halo:
    """What the convolution reads beyond the plane of its source."""
    ends = [(t - 1) * s + (k - 1) * d + 1 - p - n for t, s, k, d, p, n in zip(
        (target.height, target.width), conv.strides, conv.kernel_shape, conv.dilations, conv.pads[:2], (source.height, source.width),
        strict=True)]
    return conv.pads[0], conv.pads[1], max(0, ends[0]), max(0, ends[1])


def random_geometry(rng: Rng, conv: BranchedConv, values: Sequence[Value], lanes: int) -> Geometry:
    """Of source, target (and residual): halos as large as needed, or larger; rows often as far apart in both planes, as
    lines of pixels ask for. Planes of one size share their layout, as they do in a network."""
    halo, other = needed_halo(conv, values[0], values[1]), (0, 0, 0, 0)
    if rng.integers(2):
        top, left, bottom, right = (a + int(rng.integers(0, 3)) for a in halo)
        halo = top, left, bottom, right
    if rng.integers(2):
        top, left, bottom, right = map(int, rng.integers(0, 3, 4))
        other = top, left, bottom, right
    pitches: list[int | None] = [None, None]
    if rng.integers(3):
        pitches = [max(v.width + max(h[1], h[3]) for v, h in zip(values[:2], (halo, other), strict=True))] * 2
    found: list[dict[Kind, Layout]] = [
        {"planar": planar(v, h, lanes, p), "last": channels_last(v, h, lanes)}
        for v, h, p in zip(values[:2], (halo, other), pitches, strict=True)]
    if len(values) > 2:
        top, left, bottom, right = map(int, rng.integers(0, 3, 4))
        found.append({"planar": found[1]["planar"], "last": channels_last(values[2], (top, left, bottom, right), lanes)})
    return Geometry(tuple(found))


def place(layout: Layout) -> npt.NDArray[np.int64]:
    """Where element (c, y, x) lies in the buffer."""
    v = layout.value
    c, y, x = np.ogrid[:v.channels, :v.height, :v.width]
    where: npt.NDArray[np.int64] = layout.origin + layout.channel_offsets(c) + y * layout.row + x * layout.column
    return where


# ---- cases ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Chain:
    """A convolution in one way: its kernels (transforms before and after among them), the layouts that they read and write
    one after another, and what comes out. residual: of the last kernel."""

    label: str
    kernels: tuple[Kernel, ...]
    layouts: tuple[Layout, ...]
    feed: Array
    expected: Array
    tolerance: float
    residual: Layout | None = None
    second: Array | None = None

    def bounds(self, lanes: int) -> list[Case]:
        """Each kernel alone, for kernel_kit.check_bounds: values do not matter."""
        rng, cases = np.random.default_rng(0), []
        for n, kernel in enumerate(self.kernels):
            last = n + 1 == len(self.kernels)
            x, y, r = (None if a is None else Buffer(replace(a, block=None), a.size - 2 * lanes)
                       for a in (*self.layouts[n:n + 2], self.residual if last else None))
            assert x is not None
            assert y is not None
            feed, second = (rng.standard_normal((b.layout.value.channels, b.layout.value.height, b.layout.value.width))
                            if b else None for b in (x, r))
            assert feed is not None
            cases.append(Case(self.label, kernel, x, y, feed, feed, r=r, second=second))
        return cases


def random_step(rng: Rng, conv: BranchedConv, residual: bool) -> Conv:
    """With any activation, and another behind the residual."""
    kinds = list(Activation)
    chosen = [kinds[i] for i in rng.integers(0, len(kinds), 2)]
    return Conv(0, 1, conv, chosen[0], *((2, chosen[1]) if residual else ()))


def chains(rng: Rng, conv: BranchedConv, plane: tuple[int, int], cpu: Cpu, pick: Callable[[Way], bool] = lambda way: True,
           most: int = 1_000_000, residual: bool | None = None, at: Geometry | None = None) -> list[Chain]:
    """A convolution in the ways that `pick` accepts, `most` of them at random."""
    step = random_step(rng, conv, bool(rng.integers(2)) if residual is None else residual)
    height, width = conv.out_shape(plane)
    source, target = Value(conv.in_channels, *plane), Value(conv.out_channels, height, width)
    values = (source, target, target) if step.residual is not None else (source, target)
    at = at or random_geometry(rng, conv, values, cpu.lanes)
    program = Program(values, (step,), (), ())
    feeds = {n: rng.standard_normal((1, v.channels, v.height, v.width)).astype(np.float32) for n, v in enumerate(values) if n != 1}
    with np.errstate(over="ignore"):
        expected = run_step(program, step, {n: f.astype(np.float64) for n, f in feeds.items()})[0]
    ways = [w for w in conv_ways(program, at, cpu)[0] if pick(w)]
    picked = rng.permutation(len(ways))[:most]
    return [_chain(ways[i], step, at, feeds, expected) for i in sorted(picked)]


def _chain(way: Way, step: Conv, at: Geometry, feeds: dict[int, Array], expected: Array) -> Chain:
    s, t = way.kinds
    trials = [trial for trial in (way.before, way.trial, way.after) if trial is not None]
    kernels = [trial.recipe.kernel() for trial in trials]
    layouts = (at.layouts[0][s], *(trial.y for trial in trials))
    assert layouts[-1] is at.layouts[1][t]
    c = step.conv
    shown = (f"{way.name}, {s} to {t}: {layouts[0].value} to {layouts[-1].value}, strides {c.strides}, pads {c.pads}, dilations "
             f"{c.dilations}, branches {[b.weight.shape[:2] for b in c.branches]}, {step.activation}, {step.final}, {layouts}")
    residual = None if step.residual is None else at.layouts[2][t]
    return Chain(shown, tuple(kernels), layouts, feeds[0][0], expected, 5e-5 if "winograd" in way.name else 1e-5, residual,
                 feeds[2][0] if residual is not None else None)


# ---- compiling and running ------------------------------------------------------------------------------------------
def compile_chains(cases: Sequence[Chain], cpu: Cpu) -> list[list[Function]]:
    """All kernels of all chains at once; kernels with the same source once."""
    sources = {source: n for n, source in enumerate(dict.fromkeys(k.source for c in cases for k in c.kernels))}
    functions = compile_kernels([Kernel(_spaced(source, n)) for source, n in sources.items()], cpu)
    return [[functions[sources[k.source]] for k in case.kernels] for case in cases]


def _spaced(source: str, number: int) -> str:
    """With a namespace of its own, so that several kernels fit into one file."""
    include = '#include "gkp.h"\n'
    assert source.startswith(include)
    return f"{include}namespace n{number} {{\n{source.removeprefix(include)}\n}}\n"


class _Memory:
    """A buffer between guards, `shift` floats past a multiple of 64 bytes: poison where nothing has been written, zeros in
    the halo, poison in the slack."""

    def __init__(self, flat: Array, shift: int = 0) -> None:
        self._all = np.full(flat.size + 2 * _GUARD + 32, _POISON, np.float32)
        self._start = _GUARD + (-(self._all.ctypes.data // 4 + _GUARD) % 16) + shift
        self.flat = self._all[self._start:self._start + flat.size]
        self.flat[:] = flat
        self.before = flat.copy()

    @property
    def address(self) -> int:
        return self._all.ctypes.data + 4 * self._start

    @property
    def untouched(self) -> bool:
        return bool((self.flat.view(np.int32) == self.before.view(np.int32)).all())

    @property
    def guards_hold(self) -> bool:
        around = np.concatenate([self._all[:self._start], self._all[self._start + self.flat.size:]])
        return bool((around.view(np.int32) == _POISON.view(np.int32)).all())


def _memory(layout: Layout, lanes: int, values: Array | None = None) -> _Memory:
    flat = np.full(layout.size, _POISON, np.float32)
    flat[:layout.size - 2 * lanes] = 0
    flat[place(layout)] = _POISON if values is None else values
    return _Memory(flat)


def check_chains(cases: Sequence[Chain], cpu: Cpu) -> None:
    """Compiles and checks all of them, on memory with guards and beside memory that nobody may touch."""
    functions = compile_chains(cases, cpu)
    for case, chain in zip(cases, functions, strict=True):
        check_chain(case, chain, cpu)
    check_bounds([c for case in cases for c in case.bounds(cpu.lanes)], [f for chain in functions for f in chain])


def check_chain(case: Chain, functions: Sequence[Function], cpu: Cpu, parts: Iterable[int] = PARTS) -> None:
    """Values, halos, padded channels, slack, guards, inputs; in every number of parts, which share the work."""
    for n in parts:
        memory = [_memory(case.layouts[0], cpu.lanes, case.feed), *(_memory(a, cpu.lanes) for a in case.layouts[1:])]
        second = _memory(case.residual, cpu.lanes, case.second) if case.residual is not None else None
        what = f"{case.label} in {n} parts"
        for number, (kernel, function) in enumerate(zip(case.kernels, functions, strict=True)):
            data = _Memory(np.frombuffer(kernel.data + bytes(-len(kernel.data) % 4), np.float32))
            x, y, layout = memory[number], memory[number + 1], case.layouts[number + 1]
            r = second if number + 1 == len(functions) else None
            x.before, writers, whole = x.flat.copy(), np.zeros(y.flat.size, np.int64), y.before.copy()
            for part in range(n):  # each on memory of its own: what two of them write must not look like one
                y.flat[:] = y.before
                function(x.address, r.address if r else None, y.address, data.address, part, n)
                written = y.flat.view(np.int32) != y.before.view(np.int32)
                whole[written] = y.flat[written]
                writers += written
            y.flat[:] = whole
            assert (writers <= 1).all(), f"{what}: kernel {number}: several parts write one element"
            assert all(b.guards_hold for b in (x, y, data, *([r] if r else []))), f"{what}: kernel {number} writes out of bounds"
            assert all(b.untouched for b in (x, data, *([r] if r else []))), f"{what}: kernel {number} overwrites its input"
            _check_around(layout, y, cpu.lanes, f"{what}: kernel {number}")
        got = memory[-1].flat[place(case.layouts[-1])]
        if second is not None and case.residual == case.layouts[-1] and not case.residual.planar:
            for part in range(n):
                functions[-1](memory[-2].address, second.address, second.address, data.address, part, n)
            over = second.flat[place(case.layouts[-1])]
            assert (over.view(np.int32) == got.view(np.int32)).all(), f"{what}: another sum where it is written over the residual"
        bad = ~(np.abs(got - case.expected) <= case.tolerance * max(1.0, float(np.abs(case.expected).max(initial=0))))
        assert not bad.any(), (f"{what}: {bad.sum()} of {bad.size} wrong, first at {np.argwhere(bad)[0]}: {got[bad][0]} for "
                               f"{case.expected[bad][0]}")


def _check_around(layout: Layout, memory: _Memory, lanes: int, what: str) -> None:
    around = np.ones(layout.size, bool)
    around[place(layout)] = False
    slack = np.arange(layout.size) >= layout.size - 2 * lanes
    assert (memory.flat[around & ~slack] == 0).all(), f"{what}: halo or padded channels are not zero"
    same = memory.flat.view(np.int32) == memory.before.view(np.int32)
    assert same[around & slack].all(), f"{what}: slack overwritten"
