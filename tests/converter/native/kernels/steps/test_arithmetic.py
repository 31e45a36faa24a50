"""Kernels that compute, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from interpret import run_step
from kernel_kit import Array, Buffer, Case, check, check_bounds, compile_kernels, cpus, normal, random_buffer, random_value

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.steps import SimpleStep, step_kernel
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Depthwise,
    Function,
    Map,
    Normalise,
    Parametric,
    Pool,
    PRelu,
    Program,
    Reduce,
    Softmax,
    Value,
)

Rng = np.random.Generator


def _case(cpu: Cpu, step: SimpleStep, values: list[Value], buffers: dict[int, Buffer], feeds: dict[int, Array],
          tolerance: float) -> Case:
    """Value 0 is x, the last one the target, the one between them r."""
    last = len(values) - 1
    program = Program(tuple(values), (step,), (), ())
    with np.errstate(all="ignore"):
        expected = run_step(program, step, {n: f.astype(np.float64)[None] for n, f in feeds.items()})[0]
    layouts = {n: b.layout for n, b in buffers.items()}
    second = 1 if last == 2 else None
    shown = f"{step.weight.shape} {step.strides} {step.pads} {step.dilations} {step.activation} {step.final}" \
        if isinstance(step, Depthwise) else type(step).__name__ if isinstance(step, Affine | ConstantBinary) else str(step)
    return Case(f"{shown} {layouts}", step_kernel(step, values, layouts, cpu), buffers[0], buffers[last], feeds[0], expected,
                r=buffers[1] if second else None, second=feeds[1] if second else None, tolerance=tolerance)


def _activation(rng: Rng) -> Function:
    more = [Parametric("clip", (-1.0, 2.0)), Parametric("leaky_relu", (0.1,)), Parametric("elu", (1.5,))]
    chosen: Function = rng.choice(np.array([*Activation, *more], object))
    return chosen


def _feed(rng: Rng, value: Value) -> Array:
    feed: Array = normal(rng, value.channels, value.height, value.width) * np.float32(3)
    return feed


def _kinds(rng: Rng, n: int) -> list[str]:
    """Mostly the same kind of layout for all."""
    if rng.integers(4) == 0:
        return [str(rng.choice(["planar", "last"])) for _ in range(n)]
    return [str(rng.choice(["planar", "last"]))] * n


def binary_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    operands = [value, value if rng.integers(2) else _narrower(rng, value)]
    operands = operands[::-1] if rng.integers(4) == 0 else operands
    values, kinds = [*operands, value], _kinds(rng, 3)
    halo = (1, 1, 1, 1) if rng.integers(2) else None  # the same one often: then lines are computed whole
    buffers = {n: random_buffer(rng, v, cpu.lanes, halo, k) for n, (v, k) in enumerate(zip(values, kinds, strict=True))}
    step = Binary(0, 1, 2, str(rng.choice(["add", "sub", "mul", "div", "max", "min"])), _activation(rng))
    return _case(cpu, step, values, buffers, {n: _feed(rng, v) for n, v in enumerate(operands)}, 2e-6)


def _narrower(rng: Rng, value: Value) -> Value:
    """One along some axes."""
    c, height, width = (n if rng.integers(2) else 1 for n in (value.channels, value.height, value.width))
    return Value(c, height, width)


def constant_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    shape = [n if rng.integers(2) else 1 for n in (value.channels, value.height, value.width)]
    step = ConstantBinary(0, 1, str(rng.choice(["add", "mul"])), normal(rng, *shape), _activation(rng))
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    return _case(cpu, step, [value, value], buffers, {0: _feed(rng, value)}, 2e-6)


def affine_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    step = Affine(0, 1, normal(rng, value.channels), normal(rng, value.channels), _activation(rng))
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    return _case(cpu, step, [value, value], buffers, {0: _feed(rng, value)}, 2e-6)


def reduce_case(rng: Rng, cpu: Cpu) -> Case:
    out, kind = random_value(rng), str(rng.choice(["sum", "mean", "max"]))
    inner = int(rng.choice([n for n in range(1, out.channels + 1) if out.channels % n == 0]))
    count = int(rng.choice([1, 2, 3, 8, 17, 40]))
    value = Value(out.channels * count, out.height, out.width)
    buffers = {n: random_buffer(rng, v, cpu.lanes, kind=k)
               for n, (v, k) in enumerate(zip((value, out), _kinds(rng, 2), strict=True))}
    return _case(cpu, Reduce(0, 1, kind, count, inner), [value, out], buffers, {0: _feed(rng, value)}, 2e-5)


def normalise_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    value = Value(value.channels + 2, value.height, value.width)
    step = Normalise(0, 1, float(rng.choice([1e-6, 1e-3])), normal(rng, value.channels), normal(rng, value.channels))
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    return _case(cpu, step, [value, value], buffers, {0: _feed(rng, value) + np.float32(2)}, 1e-4)


def prelu_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    return _case(cpu, PRelu(0, 1, normal(rng, value.channels)), [value, value], buffers, {0: _feed(rng, value)}, 1e-6)


def map_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    step = Map(0, 1, str(rng.choice(["abs", "exp", "reciprocal", "sqrt"])))
    feed = _feed(rng, value)
    return _case(cpu, step, [value, value], buffers, {0: np.abs(feed) if step.function == "sqrt" else feed}, 1e-6)


def softmax_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    buffers = {n: random_buffer(rng, value, cpu.lanes, kind=k) for n, k in enumerate(_kinds(rng, 2))}
    return _case(cpu, Softmax(0, 1), [value, value], buffers, {0: _feed(rng, value) * 10}, 2e-6)


def pool_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    kernel, strides, dilations = ((int(a), int(b)) for a, b in rng.integers(1, 4, (3, 2)))
    dilations = dilations if rng.integers(3) == 0 else (1, 1)
    if rng.integers(4) == 0:
        kernel, strides = ((3, 3), (2, 2)) if rng.integers(2) else ((2, 2), (2, 2))
    pads = (int(rng.integers(0, kernel[0])), int(rng.integers(0, kernel[1])),
            int(rng.integers(0, kernel[0])), int(rng.integers(0, kernel[1])))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    sizes = [max(1, (n + pads[a] + pads[2 + a] - reach[a]) // strides[a] + 1 + int(rng.integers(0, 2)))
             for a, n in enumerate((value.height, value.width))]  # one more: as ceil_mode does
    for a, n in enumerate((value.height, value.width)):  # ONNX: no window begins behind the plane
        while sizes[a] > 1 and (sizes[a] - 1) * strides[a] - pads[a] >= n:
            sizes[a] -= 1
    step = Pool(0, 1, bool(rng.integers(2)), kernel, strides, pads, dilations, bool(rng.integers(2)))
    return _pool_case(rng, cpu, step, value, Value(value.channels, *sizes))


def global_pool_case(rng: Rng, cpu: Cpu) -> Case:
    value = random_value(rng)
    step = Pool(0, 1, bool(rng.integers(2)), (value.height, value.width), (1, 1), (0, 0, 0, 0))
    return _pool_case(rng, cpu, step, value, Value(value.channels, 1, 1))


def maximum_case(rng: Rng, cpu: Cpu) -> Case:
    """Infinities are found and NaN is left out, in whatever order they stand."""
    value, stride = random_value(rng), int(rng.integers(1, 3))
    c, *plane = value.shape
    step, out = [(Pool(0, 1, True, (3, 3), (stride, stride), (1, 1, 1, 1)), Value(c, *((n - 1) // stride + 1 for n in plane))),
                 (Pool(0, 1, True, value.shape[1:], (1, 1), (0, 0, 0, 0)), Value(c, 1, 1)),
                 (Reduce(0, 1, "max", c), Value(1, *plane))][rng.integers(3)]
    buffers = {n: random_buffer(rng, v, cpu.lanes, kind=k)
               for n, (v, k) in enumerate(zip((value, out), _kinds(rng, 2), strict=True))}
    feed = _feed(rng, value)
    for special in (np.inf, -np.inf, np.nan, np.nan):
        feed[rng.random(feed.shape) < 0.1] = special
    return replace(_case(cpu, step, [value, out], buffers, {0: np.where(np.isnan(feed), -np.inf, feed)}, 0), feed=feed)


def _pool_case(rng: Rng, cpu: Cpu, step: Pool, value: Value, out: Value) -> Case:
    buffers = {n: random_buffer(rng, v, cpu.lanes, kind=k)
               for n, (v, k) in enumerate(zip((value, out), _kinds(rng, 2), strict=True))}
    case = _case(cpu, step, [value, out], buffers, {0: _feed(rng, value)}, 1e-6)
    return replace(case, expected=np.where(np.isnan(case.expected), 0, case.expected))  # the average of no cell


def depthwise_case(rng: Rng, cpu: Cpu) -> Case:
    kernels = [(3, 3), (3, 3), (5, 5), (1, 3), (3, 1), (1, 1), (2, 2), (2, 4), (7, 7), (8, 8)]
    kernel = kernels[rng.integers(len(kernels))]
    strides = [(1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (1, 2), (2, 1), (3, 3)][rng.integers(8)]
    dilations = [(1, 1), (1, 1), (1, 1), (2, 2), (1, 3)][rng.integers(5)]
    pads = tuple(int(rng.integers(0, k)) for k in (*kernel, *kernel))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    value = random_value(rng)
    value = Value(value.channels, *(max(n, r - pads[a] - pads[2 + a])
                                    for a, (n, r) in enumerate(zip((value.height, value.width), reach, strict=True))))
    sizes = [(n + pads[a] + pads[2 + a] - reach[a]) // strides[a] + 1 for a, n in enumerate((value.height, value.width))]
    filters = value.channels * int(rng.choice([1, 1, 1, 2, 3]))
    halo = (pads[0], pads[1], pads[2] + int(rng.integers(0, 3)), pads[3] + int(rng.integers(0, 3)))
    other = halo if rng.integers(2) else None
    kinds = _kinds(rng, 2)
    out = Value(filters, *sizes)
    x, y = random_buffer(rng, value, cpu.lanes, halo, kinds[0]), random_buffer(rng, out, cpu.lanes, other, kinds[1])
    return _depthwise(rng, cpu, kernel, strides, pads, dilations, x, y)


def small_plane_depthwise_case(rng: Rng, cpu: Cpu) -> Case:
    """Planes narrower than a vector, pads that keep their size: several rows in one vector."""
    k = int(rng.choice([3, 3, 5, 9]))
    value = Value(int(rng.integers(1, 20)), int(rng.integers(2, 15)), int(rng.integers(1, cpu.lanes)))
    halo = (k // 2,) * 4
    x, y = (random_buffer(rng, value, cpu.lanes, halo, "planar", pitch=value.width + k // 2) for _ in range(2))
    return _depthwise(rng, cpu, (k, k), (1, 1), halo, (1, 1), x, y)


def _depthwise(rng: Rng, cpu: Cpu, kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...],
               dilations: tuple[int, int], x: Buffer, y: Buffer) -> Case:
    value, out, residual = x.layout.value, y.layout.value, bool(rng.integers(2))
    top, left, bottom, right = pads
    step = Depthwise(0, 2 if residual else 1, normal(rng, out.channels, *kernel), normal(rng, out.channels), strides,
                     (top, left, bottom, right), dilations, _activation(rng), 1 if residual else None,
                     _activation(rng) if residual else Activation.NONE)
    values, buffers, feeds = [value, out], {0: x, 1: y}, {0: _feed(rng, value)}
    if residual:
        halo = (1, 1, 1, 1) if rng.integers(2) else None
        r = y if rng.integers(2) else random_buffer(rng, out, cpu.lanes, halo, _kinds(rng, 1)[0])
        values, buffers, feeds = [value, out, out], {0: x, 1: r, 2: y}, {**feeds, 1: _feed(rng, out)}
    return _case(cpu, step, values, buffers, feeds, 4e-6 * float(np.sqrt(kernel[0] * kernel[1])))


MAKERS: list[Any] = [binary_case, constant_case, affine_case, softmax_case, reduce_case, normalise_case, prelu_case, map_case, pool_case,
                     global_pool_case, maximum_case, depthwise_case, small_plane_depthwise_case]


@pytest.mark.parametrize("cpu", cpus())
@pytest.mark.parametrize("make", MAKERS)
def test_values_are_right_and_nothing_else_is_touched(make: Callable[[Rng, Cpu], Case], cpu: Cpu) -> None:
    rng = np.random.default_rng(cpu.lanes)
    cases = [make(rng, cpu) for _ in range(40)]
    functions = compile_kernels([c.kernel for c in cases], cpu)
    check_bounds(cases, functions)
    for case, function in zip(cases, functions, strict=True):
        check(case, function)


@pytest.mark.parametrize("cpu", cpus())
def test_planes_that_do_not_stay_near_are_computed_pixel_by_pixel(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were no cache."""
    monkeypatch.setattr(import_module("gkp.converter.native.kernels.steps.depthwise"), "_WAYS", 0)
    test_values_are_right_and_nothing_else_is_touched(depthwise_case, cpu)
