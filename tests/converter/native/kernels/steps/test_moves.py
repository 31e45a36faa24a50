"""Kernels that move elements: every cell exact, nothing beside them touched."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from kernel_kit import (
    Array,
    Buffer,
    Case,
    check,
    check_bounds,
    compile_kernels,
    cpus,
    exact_buffer,
    normal,
    random_buffer,
    random_value,
)

from gkp.converter.native.dtypes import FLOAT32
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.steps import convert, pack, space_to_depth, step_kernel, unpack
from gkp.converter.native.kernels.steps.convert import contiguous
from gkp.converter.native.program import Copy, Permute, Reshape, Value

Rng = np.random.Generator


def _feed(rng: Rng, value: Value) -> Array:
    return normal(rng, value.channels, value.height, value.width)


def pack_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    y, feed = random_buffer(rng, value, cpu.lanes), _feed(rng, value)
    return Case(f"pack {y.layout}", pack(FLOAT32, y.layout, cpu), exact_buffer(contiguous(value)), y, feed, feed)


def unpack_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    x, feed = random_buffer(rng, value, cpu.lanes), _feed(rng, value)
    return Case(f"unpack {x.layout}", unpack(x.layout, cpu), x, exact_buffer(contiguous(value)), feed, feed)


def convert_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    x, y, feed = random_buffer(rng, value, cpu.lanes), random_buffer(rng, value, cpu.lanes), _feed(rng, value)
    return Case(f"convert {x.layout} {y.layout}", convert(x.layout, y.layout, cpu), x, y, feed, feed)


def phases_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    strides = [(2, 2), (2, 2), (1, 2), (2, 1), (3, 2), (2, 3), (3, 3)][rng.integers(7)]
    offsets = (int(rng.integers(0, 4)), int(rng.integers(0, 4)))
    h, w = (-(-(n + o) // s) + int(rng.integers(-1, 2)) for n, o, s in zip((value.height, value.width), offsets, strides, strict=True))
    out = Value(value.channels * strides[0] * strides[1], max(1, h), max(1, w))
    x, y = random_buffer(rng, value, cpu.lanes, kind="planar"), random_buffer(rng, out, cpu.lanes, kind="planar")
    feed = _feed(rng, value)
    expected = np.zeros((strides[0], strides[1], value.channels, out.height, out.width), np.float32)
    for py, px, i, j in np.ndindex(*strides, out.height, out.width):
        a, b = i * strides[0] + py - offsets[0], j * strides[1] + px - offsets[1]
        if 0 <= a < value.height and 0 <= b < value.width:
            expected[py, px, :, i, j] = feed[:, a, b]
    return Case(f"phases {strides} {offsets} {x.layout} {y.layout}",
                space_to_depth(x.layout, y.layout, strides, offsets, cpu), x, y, feed,
                expected.reshape(out.channels, out.height, out.width))


def copy_case(rng: Rng, cpu: Cpu) -> Case:
    value, n = random_value(rng), int(rng.integers(1, 40))
    strides = (int(rng.choice([1, 1, 2, 3])), int(rng.choice([1, 1, 2, 2, 3])))
    style = rng.integers(4)
    if style == 0:
        index = rng.integers(-1, value.channels, n)
    elif style == 1:
        index = np.concatenate([np.full(n // 3, -1), np.arange(value.channels), np.full(n // 2, -1)])
    elif style == 2:
        index = np.arange(value.channels)
    else:
        index = np.sort(rng.permutation(value.channels)[:n])
    first, rest = int(rng.integers(0, 9)), int(rng.integers(0, 5))
    crop = int(rng.integers(0, 2)) if min(value.height, value.width) > 1 else 0
    top, left = (int(rng.integers(0, n - crop)) if rng.integers(2) else 0 for n in (value.height, value.width))
    out = Value(first + index.size + rest, -(-(value.height - crop - top) // strides[0]),
                -(-(value.width - crop - left) // strides[1]))
    x, y, feed = random_buffer(rng, value, cpu.lanes), random_buffer(rng, out, cpu.lanes), _feed(rng, value)
    step = Copy(0, 1, index, strides, first, (top, left))
    expected = np.zeros((out.channels, out.height, out.width), np.float32)
    taken = feed[:, top::strides[0], left::strides[1]][:, :out.height, :out.width]
    expected[first:first + index.size] = np.where((index >= 0)[:, None, None], taken[index], 0)
    written = np.zeros(expected.shape, bool)
    written[first:first + index.size] = True
    return Case(f"copy {step} {x.layout} {y.layout}",
                step_kernel(step, [value, out], {0: x.layout, 1: y.layout}, cpu), x, y, feed, expected, written=written)


def reshape_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    factors = [int(f) for f in (rng.choice(_divisors(value.size)),)]
    rest = value.size // factors[0]
    height = int(rng.choice(_divisors(rest)))
    out = Value(factors[0], height, rest // height) if rng.integers(2) else Value(value.size, 1, 1)
    bare = (0, 0, 0, 0) if rng.integers(2) else None
    x: Buffer = random_buffer(rng, value, cpu.lanes, bare if rng.integers(2) else None)
    y: Buffer = random_buffer(rng, out, cpu.lanes, bare)
    feed = _feed(rng, value)
    return Case(f"reshape {x.layout} {y.layout}",
                step_kernel(Reshape(0, 1), [value, out], {0: x.layout, 1: y.layout}, cpu), x, y, feed,
                feed.reshape(out.channels, out.height, out.width))


def permute_case(rng: Rng, cpu: Cpu) -> Case:
    value, order = random_value(rng), tuple(int(k) for k in rng.permutation(3))
    feed = _feed(rng, value)
    expected = feed.transpose(order)
    out = Value(*expected.shape)
    x, y = random_buffer(rng, value, cpu.lanes), random_buffer(rng, out, cpu.lanes)
    step = Permute(0, 1, (order[0], order[1], order[2]))
    return Case(f"permute {step} {x.layout} {y.layout}", step_kernel(step, [value, out], {0: x.layout, 1: y.layout}, cpu), x, y,
                feed, expected)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("cpu", cpus())
@pytest.mark.parametrize("make", [pack_case, unpack_case, convert_case, phases_case, copy_case, reshape_case, permute_case])
def test_elements_arrive_and_nothing_else_is_touched(make: Callable[[Rng, Cpu], Case], cpu: Cpu) -> None:
    rng = np.random.default_rng(cpu.lanes)
    cases = [make(rng, cpu) for _ in range(40)]
    functions = compile_kernels([c.kernel for c in cases], cpu)
    check_bounds(cases, functions)
    for case, function in zip(cases, functions, strict=True):
        check(case, function)
