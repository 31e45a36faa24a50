"""Kernels that make planes of another size: sampled anew, interleaved, pasted together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from interpret import run_step
from kernel_kit import Case, check, check_bounds, compile_kernels, cpus, normal, random_buffer, random_value

from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import planar
from gkp.converter.native.kernels.steps import SimpleStep, step_kernel
from gkp.converter.native.program import Interleave, Paste, Program, Resize, Sampling, Value

Rng = np.random.Generator


def _case(rng: Rng, cpu: Cpu, step: SimpleStep, source: Value, target: Value, written: Any = None, feed: Any = None) -> Case:
    kinds = rng.choice(["planar", "last"], 2) if rng.integers(3) == 0 else [rng.choice(["planar", "last"])] * 2
    x, y = (random_buffer(rng, v, cpu.lanes, kind=str(k)) for v, k in zip((source, target), kinds, strict=True))
    feed = normal(rng, source.channels, source.height, source.width) if feed is None else feed
    expected = run_step(Program((source, target), (step,), (), ()), step, {0: feed.astype(np.float64)[None]})[0]
    shown = f"{step.rows} {step.columns}" if isinstance(step, Resize) else str(step)
    return Case(f"{shown} {x.layout} {y.layout}", step_kernel(step, [source, target], {0: x.layout, 1: y.layout}, cpu), x, y,
                feed, expected, written=written, tolerance=2e-6)


def spoiled_case(rng: Rng, cpu: Cpu) -> Case:
    """Infinities among the elements: an element without weight does not count, others are infinite by themselves."""
    value = random_value(rng)
    rows, columns = sampling(rng, value.height), sampling(rng, value.width)
    feed = normal(rng, value.channels, value.height, value.width)
    feed[rng.random(feed.shape) < 0.1] = np.inf
    return _case(rng, cpu, Resize(0, 1, rows, columns), value, Value(value.channels, rows.low.size, columns.low.size), feed=feed)


def _at(x: Any, n: int) -> Sampling:
    """Linear, at these places of n elements."""
    x = np.clip(x, 0, n - 1)
    low = np.floor(x).astype(np.int64)
    return Sampling(low, np.minimum(low + 1, n - 1), (x - low).astype(np.float32))


def sampling(rng: Rng, n: int) -> Sampling:
    """What models ask for (enlarged by whole numbers, to the corners, left alone) and anything."""
    style, factor = rng.integers(6), int(rng.choice([2, 2, 3, 4, 8, 9]))
    if style == 0:
        near = np.arange(n * factor) // factor
        return Sampling(near, near, np.zeros(near.size, np.float32))
    if style == 1:
        return _at((np.arange(n * factor) + 0.5) / factor - 0.5, n)
    if style == 2:
        return _at(np.linspace(0, n - 1, n * factor), n)
    if style == 3:
        return _at(np.arange(n), n)
    places = rng.random(int(rng.integers(1, 40))) * n
    if style == 4:
        return _at(places, n)
    near = places.astype(np.int64)
    return Sampling(near, near, np.zeros(near.size, np.float32))


def resize_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    rows, columns = sampling(rng, value.height), sampling(rng, value.width)
    return _case(rng, cpu, Resize(0, 1, rows, columns), value, Value(value.channels, rows.low.size, columns.low.size))


def interleave_case(rng: Rng, cpu: Cpu) -> Case:
    out = random_value(rng)
    strides = [(2, 2), (2, 2), (1, 2), (2, 1), (3, 2), (4, 4), (1, 1)][rng.integers(7)]
    offsets = (0, 0) if rng.integers(2) else (int(rng.integers(0, 5)), int(rng.integers(0, 5)))
    plane = [(n - 1 + o) // s + 1 + int(rng.integers(0, 2)) for n, o, s in zip((out.height, out.width), offsets, strides, strict=True)]
    value = Value(out.channels * strides[0] * strides[1], *plane)
    return _case(rng, cpu, Interleave(0, 1, strides, offsets), value, out)


def paste_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    before, after = rng.integers(0, 9, (2, 2)).tolist()
    out = Value(value.channels, before[0] + value.height + after[0], before[1] + value.width + after[1])
    written = np.zeros((out.channels, out.height, out.width), bool)
    written[:, before[0]:before[0] + value.height, before[1]:before[1] + value.width] = True
    return _case(rng, cpu, Paste(0, 1, (before[0], before[1])), value, out, written)


@pytest.mark.parametrize("cpu", cpus())
@pytest.mark.parametrize("make", [resize_case, spoiled_case, interleave_case, paste_case])
def test_every_element_is_right_and_nothing_else_is_touched(make: Callable[[Rng, Cpu], Case], cpu: Cpu) -> None:
    rng = np.random.default_rng(cpu.lanes)
    cases = [make(rng, cpu) for _ in range(25)]
    functions = compile_kernels([c.kernel for c in cases], cpu)
    check_bounds(cases, functions)
    for case, function in zip(cases, functions, strict=True):
        check(case, function)


def test_what_does_not_fit_is_refused() -> None:
    cpu, same = CPUS["x86-64-v3"], _at(np.arange(4), 4)
    small, large = Value(2, 4, 4), Value(2, 8, 8)
    layouts = {0: planar(small, lanes=cpu.lanes), 1: planar(large, lanes=cpu.lanes)}
    wrong: list[SimpleStep] = [Resize(0, 1, same, same), Resize(1, 0, _at(np.arange(4) + 5, 9), same), Interleave(0, 1, (2, 2)),
                               Paste(0, 1, (5, 0)), Paste(0, 1, (0, -1))]
    for step in wrong:
        with pytest.raises(ValueError, match=r"\d"):
            step_kernel(step, [small, large], layouts, cpu)
