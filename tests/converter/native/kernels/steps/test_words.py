"""Planes of numbers become pixels of integers in words, to the bit of a division."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conv_kit import place
from integer_kit import Memory
from kernel_kit import PARTS, check_walls, compile_kernels, cpus

from gkp.converter.native.dtypes import FLOAT32, UINT8, DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import WORD, Layout, integers, planar
from gkp.converter.native.kernels.prelude import prelude
from gkp.converter.native.kernels.steps import words
from gkp.converter.native.kernels.steps.convert import contiguous, convert, pack
from gkp.converter.native.kernels.steps.elementwise import affine
from gkp.converter.native.program import Activation, Affine, Grid, Value

Array = npt.NDArray[Any]
Rng = np.random.Generator
PLANES = [(1, 1), (1, 5), (3, 4), (2, 7), (5, 8), (4, 16), (3, 17), (2, 33), (1, 67)]


@dataclass(frozen=True)
class Case:
    kernel: Kernel
    source: Layout
    target: Layout
    feed: Array
    expected: Array

    def operands(self) -> list[Array]:
        """What the buffers hold before."""
        x = np.full(self.source.size, 7, self.source.value.dtype.numpy)
        x[place(self.source)] = self.feed
        y = np.full(self.target.size, 99, np.uint8)
        return [x.view(np.uint8), np.zeros(4, np.uint8), y, np.frombuffer(self.kernel.data or bytes(4), np.uint8)]


def quantised(numbers: Array, grid: Grid) -> Array:
    """As ONNX says."""
    with np.errstate(over="ignore"):
        steps = np.rint(numbers / np.float32(grid.scale)).astype(np.float64)
    return np.clip(steps + grid.zero, 0, 255).astype(np.uint8)


def numbers_on(rng: Rng, grid: Grid, shape: tuple[int, ...]) -> Array:
    """On halves of a step and their neighbours, within the grid and beyond, and what no float is beyond."""
    size, scale = int(np.prod(shape)), np.float32(grid.scale)
    halves = ((rng.integers(-300, 300, size) + 0.5) * np.float64(scale)).astype(np.float32)
    near = np.nextafter(halves, np.where(rng.integers(2, size=size), np.inf, -np.inf).astype(np.float32))
    wide = (rng.standard_normal(size) * 150).astype(np.float32) * scale
    extreme = rng.choice(np.array([np.inf, -np.inf, 1e38, -1e38, 0, -0.0, 1e-40], np.float32), size)
    return np.choose(rng.choice(4, size, p=[0.35, 0.3, 0.3, 0.05]), [halves, near, wide, extreme]).reshape(shape)


def random_target(rng: Rng, plane: tuple[int, int]) -> Layout:
    scale = float(np.float32(rng.choice([2 / 255, 1 / 255, 0.5, 1.0, rng.uniform(0.001, 5), rng.uniform(1e-20, 1e20)])))
    value = Value(int(rng.integers(1, 5)), *plane, UINT8, Grid(scale, int(rng.choice([0, 1, 114, 128, 255]))))
    return integers(value, tuple(map(int, rng.integers(0, 4, 4))), WORD)


def packed(rng: Rng, target: Layout, dtype: DType, cpu: Cpu) -> Case:
    """From the user's array."""
    value, grid = target.value, target.value.grid
    assert grid is not None
    feed = numbers_on(rng, grid, value.shape) if dtype == FLOAT32 else rng.integers(0, 256, value.shape).astype(np.uint8)
    source = contiguous(value, dtype)
    return Case(pack(dtype, target, cpu), source, target, feed, quantised(feed.astype(np.float32), grid))


def converted(rng: Rng, target: Layout, cpu: Cpu) -> Case:
    """From planes with a halo."""
    value, grid = target.value, target.value.grid
    assert grid is not None
    source = planar(replace(value, dtype=FLOAT32, grid=None), tuple(map(int, rng.integers(0, 4, 4))), cpu.lanes)
    feed = numbers_on(rng, grid, value.shape)
    return Case(convert(source, target, cpu), source, target, feed, quantised(feed, grid))


def normalised(rng: Rng, target: Layout, cpu: Cpu) -> Case:
    """From pixels of the user's: a product and a sum that are exact, with a function or without."""
    value, grid = target.value, target.value.grid
    assert grid is not None
    scale, shift = (np.float32(2.0 ** -6) * rng.integers(-8, 9, value.channels).astype(np.float32) for _ in range(2))
    feed = rng.integers(0, 256, value.shape).astype(np.uint8)
    step = Affine(0, 1, scale, shift, [Activation.NONE, Activation.RELU][rng.integers(2)])
    numbers = feed * scale[:, None, None] + shift[:, None, None]
    numbers = np.maximum(numbers, 0) if step.activation is Activation.RELU else numbers
    source = contiguous(value, UINT8)
    return Case(affine(step, source, target, cpu), source, target, feed, quantised(numbers.astype(np.float32), grid))


@pytest.mark.parametrize("cpu", cpus())
def test_every_way_to_words_is_a_division_rounded_half_to_even(cpu: Cpu) -> None:
    rng, cases = np.random.default_rng(cpu.lanes), list[Case]()
    for plane in PLANES:
        target = random_target(rng, plane)
        cases += [packed(rng, target, FLOAT32, cpu), packed(rng, target, UINT8, cpu), converted(rng, target, cpu),
                  normalised(rng, target, cpu)]
    assert all(words.fits(case.source, case.target) for case in cases)
    functions = compile_kernels([Kernel(spaced(case.kernel.source, n, cpu)) for n, case in enumerate(cases)], cpu)
    for case, function in zip(cases, functions, strict=True):
        for parts in PARTS:
            check(case, function, parts)
    check_walls([(str(case.target), case.operands, function) for case, function in zip(cases, functions, strict=True)])


def spaced(source: str, number: int, cpu: Cpu) -> str:
    """In a namespace of its own with a prelude of its own, to whose functions it adds overloads."""
    include = '#include "gkp.h"\n'
    return f"namespace n{number} {{\n{source.replace(include, prelude(cpu).replace('#pragma once', ''))}\n}}\n"


def check(case: Case, function: Any, parts: int) -> None:
    x, _, y, data = (Memory(content) for content in case.operands())
    for part in reversed(range(parts)):
        function(x.address, None, y.address, data.address, part, parts)
    assert all(m.guards_hold for m in (x, y, data))
    assert all((m.flat == m.before).all() for m in (x, data))
    where, v = place(case.target), case.target.value
    kept = np.ones(case.target.size, bool)
    kept[case.target.offset(0, 0, 0) + np.arange(v.height)[:, None, None] * case.target.row
         + np.arange(v.width)[:, None] * case.target.column + np.arange(WORD)] = False
    assert (y.flat[kept] == 99).all(), "writes into the halo"
    wrong = y.flat[where] != case.expected
    assert not wrong.any(), f"{v}: {case.feed[wrong][:4]} became {y.flat[where][wrong][:4]}, not {case.expected[wrong][:4]}"


def test_a_scale_beyond_what_a_product_bears_is_divided_by() -> None:
    value = Value(3, 2, 2, UINT8, Grid(1e-39, 0))
    assert not words.fits(contiguous(value), integers(value, pixel=WORD))
