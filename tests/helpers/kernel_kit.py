"""Single kernels, compiled many at a time and run on buffers that show every wrong access."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gkp.converter.native.building import toolchain
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.kernel import FUNCTION, Kernel
from gkp.converter.native.kernels.layout import Halo, Layout, channels_last, planar
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.program import Value
from gkp.runtime.environment import vector_floats

Array = npt.NDArray[Any]
Function = Callable[..., None]
PARTS = (1, 2, 3, 7)
UNTOUCHED = np.float32(np.frombuffer(b"\x77\x66\xc5\x7f", "<f4")[0])  # a NaN that no computation gives
_GUARD = 64  # floats before and behind each buffer

NARROW = Cpu("narrow", 4, 16, CPUS["x86-64-v3"].flags)
"""Vectors of 4 floats, as on aarch64, on the processor at hand."""


def cpus() -> list[Any]:
    """Parameters: the three widths of vectors, those that this machine cannot run skipped."""
    every = (NARROW, CPUS["x86-64-v3"], CPUS["x86-64-v4"])
    return [pytest.param(c, id=f"{c.lanes} lanes",
                         marks=pytest.mark.skipif(vector_floats() < max(c.lanes, 8), reason=f"this machine has not {c.name}"))
            for c in every]


@dataclass(frozen=True)
class Buffer:
    """A layout with the number of its cells that hold elements or the halo's zeros (the rest is slack)."""

    layout: Layout
    cells: int

    def place(self) -> npt.NDArray[np.int64]:
        """Where element (c, y, x) lies."""
        a, v = self.layout, self.layout.value
        c, y, x = np.ogrid[:v.channels, :v.height, :v.width]
        where: npt.NDArray[np.int64] = a.origin + c * a.channel + y * a.row + x * a.column
        return where

    def filled(self, values: Array | None, old: Array | None = None) -> Array:
        """Elements, zeros around them, NaN in the slack. values None: elements that nobody has written yet."""
        flat = np.full(self.layout.size, UNTOUCHED, np.float32)
        flat[:self.cells] = 0
        flat[self.place()] = UNTOUCHED if values is None else values
        return flat


@dataclass(frozen=True)
class Case:
    """A kernel with its operands and what it must give. written: mask of the target's elements that it writes (all)."""

    label: str
    kernel: Kernel
    x: Buffer
    y: Buffer
    feed: Array
    expected: Array
    r: Buffer | None = None
    second: Array | None = None
    written: Array | None = None
    tolerance: float = 0.0


def random_buffer(rng: np.random.Generator, value: Value, lanes: int, halo: Halo | None = None, kind: str = "",
                  pitch: int | None = None) -> Buffer:
    """A layout of either kind with any halo."""
    top, left, bottom, right = halo or ((0, 0, 0, 0) if rng.integers(3) == 0 else map(int, rng.integers(0, 4, 4)))
    if (kind or rng.choice(["planar", "last"])) == "planar":
        if pitch is None and rng.integers(4) == 0:
            pitch = value.width + max(left, right) + int(rng.integers(1, 5))
        layout = planar(value, (top, left, bottom, right), lanes, pitch)
        return Buffer(layout, value.channels * layout.channel + left + right)
    layout = channels_last(value, (top, left, bottom, right), lanes)
    return Buffer(layout, layout.row * (value.height + top + bottom))


def exact_buffer(layout: Layout) -> Buffer:
    return Buffer(layout, layout.size)


def random_value(rng: np.random.Generator) -> Value:
    """Planes around the sizes of vectors, and everything tiny."""
    c = int(rng.choice([1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 24, 32, 33, 50, 64, 70]))
    sides = [1, 2, 3, 4, 5, 7, 8, 9, 14, 15, 16, 17, 20, 31, 32, 35]
    h, w = (int(rng.choice(sides)) for _ in range(2))
    return Value(c, 1, 1) if rng.integers(8) == 0 else Value(c, 1 if rng.integers(8) == 0 else h, w)


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


# ---- compiling ------------------------------------------------------------------------------------------------------
def compile_kernels(kernels: Sequence[Kernel], cpu: Cpu) -> list[Function]:
    """All kernels in one library."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "gkp.h").write_text(prelude(cpu))
        exported = '__attribute__((visibility("default"))) void'
        files = []
        for half in range(2):  # two cores
            files.append(f"kernels{half}.cpp")
            (folder / files[half]).write_text("\n".join(
                k.source.replace(f'extern "C" void {FUNCTION}', f'extern "C" {exported} k{n}')
                for n, k in enumerate(kernels) if n % 2 == half))
        objects = toolchain.compile_objects(folder, files, cpu)
        library = ctypes.CDLL(str(toolchain.link(folder, objects, cpu)))
    functions = []
    for n in range(len(kernels)):
        function = getattr(library, f"k{n}")
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 2
        function.restype = None
        functions.append(function)
    return functions


# ---- running --------------------------------------------------------------------------------------------------------
class _Guarded:
    """Floats at an address that is `shift` floats past a multiple of 64 bytes, with a guard on both sides."""

    def __init__(self, flat: Array, shift: int = 0) -> None:
        self.memory = np.full(flat.size + 2 * _GUARD + 32, UNTOUCHED, np.float32)
        self.start = _GUARD + (-(self.memory.ctypes.data // 4 + _GUARD) % 16) + shift
        self.size, self.before = flat.size, flat.copy()
        self.memory[self.start:self.start + flat.size] = flat

    @property
    def flat(self) -> Array:
        return self.memory[self.start:self.start + self.size]

    @property
    def address(self) -> int:
        return self.memory.ctypes.data + 4 * self.start

    def guards_hold(self) -> bool:
        outside = np.concatenate([self.memory[:self.start], self.memory[self.start + self.size:]])
        return bool((outside.view(np.int32) == UNTOUCHED.view(np.int32)).all())


def check(case: Case, function: Function) -> None:
    """Runs the kernel in all numbers of parts; values, halos, slack, guards, and that the parts share the work."""
    data = _Guarded(np.frombuffer(case.kernel.data + bytes(-len(case.kernel.data) % 4), np.float32))
    x = _Guarded(case.x.filled(case.feed), 1 if case.x.cells == case.x.layout.size else 0)
    r = _Guarded(case.r.filled(case.second)) if case.r and case.second is not None else None
    place = case.y.place()
    for parts in PARTS:
        y = _Guarded(case.y.filled(None), 3 if case.y.cells == case.y.layout.size else 0)
        writers = np.zeros(y.size, np.int64)
        for part in reversed(range(parts)):
            seen = y.flat.copy()
            function(x.address, r.address if r else None, y.address, data.address, part, parts)
            writers += y.flat.view(np.int32) != seen.view(np.int32)
        what = f"{case.label} in {parts} parts"
        _check_values(case, y.flat, what)
        assert (writers[place] <= 1).all(), f"{what}: several parts write one element"
        beside = np.ones(y.size, bool)
        beside[place] = False
        around, slack = beside.copy(), beside.copy()
        around[case.y.cells:], slack[:case.y.cells] = False, False
        assert (y.flat[around] == 0).all(), f"{what}: halo or padded channels are not zero"
        assert (y.flat[slack].view(np.int32) == y.before[slack].view(np.int32)).all(), f"{what}: slack overwritten"
        for b in (x, y, data, *([r] if r else [])):
            assert b.guards_hold(), f"{what}: writes out of bounds"
        for b in (x, data, *([r] if r else [])):
            assert (b.flat.view(np.int32) == b.before.view(np.int32)).all(), f"{what}: overwrites its input"


def _check_values(case: Case, flat: Array, what: str) -> None:
    got, place = flat[case.y.place()], case.expected
    if case.written is not None:
        untouched = got[~case.written].view(np.int32) == UNTOUCHED.view(np.int32)
        assert untouched.all(), f"{what}: writes elements of others"
        got, place = got[case.written], place[case.written]
    bad = ~np.isclose(got, place, rtol=case.tolerance, atol=case.tolerance, equal_nan=True)
    assert not bad.any(), (f"{what}: {bad.sum()} of {bad.size} wrong, first at {np.argwhere(bad)[0]}: "
                           f"{got[bad][0]} for {place[bad][0]}")


def check_bounds(cases: Sequence[Case], functions: Sequence[Function]) -> None:
    """Runs all kernels in a child process on buffers beside forbidden memory: behind them, then before them."""
    check_walls([(case.label, partial(_operands, case), function) for case, function in zip(cases, functions, strict=True)])


def _operands(case: Case) -> list[Array]:
    return [case.x.filled(case.feed), case.r.filled(case.second) if case.r else np.zeros(1, np.float32), case.y.filled(None),
            np.frombuffer(case.kernel.data or bytes(4), np.float32)]


def check_walls(runs: Sequence[tuple[str, Callable[[], Sequence[Array]], Function]]) -> None:
    """The same for (label, contents of source, residual, target and data, kernel)."""
    progress = mmap.mmap(-1, mmap.PAGESIZE)
    child = os.fork()
    if child == 0:
        try:
            for behind in (True, False):
                for n, (_, operands, function) in enumerate(runs):
                    progress[:4] = n.to_bytes(4, "little")
                    walls = [_Wall(f, behind) for f in operands()]
                    for part in range(3):
                        function(*(w.address for w in walls), part, 3)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"{runs[int.from_bytes(progress[:4], 'little')][0]}: accesses memory out of bounds ({status})"


class _Wall:
    """An array that ends (or begins) at a page which nobody may touch."""

    def __init__(self, flat: Array, behind: bool) -> None:
        page = mmap.PAGESIZE
        size = -(-flat.nbytes // page) * page
        self.memory = mmap.mmap(-1, size + 2 * page)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = base + page + (size - flat.nbytes if behind else 0)
        ctypes.memmove(self.address, np.ascontiguousarray(flat).ctypes.data, flat.nbytes)
        protect = ctypes.CDLL(None).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for wall in (base, base + page + size):
            assert protect(wall, page, 0) == 0
