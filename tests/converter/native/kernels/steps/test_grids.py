"""Steps between values of integers: each as the reference says it, many side by side in one library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from interpret import interpret, on_grid
from kernel_kit import cpus
from native_kit import native_runs

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.building.toolchain import host_cpu
from gkp.converter.native.dtypes import FLOAT32, UINT8
from gkp.converter.native.kernels.cpu import CPUS, Cpu
from gkp.converter.native.kernels.layout import WORD
from gkp.converter.native.planning.geometry import geometry
from gkp.converter.native.planning.planner import make_plan
from gkp.converter.native.program import (
    Activation,
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Dequantise,
    Grid,
    Interleave,
    Map,
    Parametric,
    Paste,
    Permute,
    Pool,
    Port,
    PRelu,
    Program,
    Quantise,
    Reshape,
    Step,
    Value,
    beside,
    reads,
)

Array = npt.NDArray[Any]
Rng = np.random.Generator
Make = Callable[[Rng, Value], tuple[Step, Value, Sequence[Value]]]
"""(the step from values 0, 1, ... to the one after them, its target, other sources than the first)."""


def grid(rng: Rng, scale: float | None = None) -> Grid:
    return Grid(float(np.float32(scale or rng.uniform(0.01, 0.05))), int(rng.choice([0, 1, 128, 200, 255, *rng.integers(0, 256, 3)])))


def on(value: Value, own: Grid | None) -> Value:
    return Value(*value.shape, FLOAT32 if own is None else UINT8, own)


def small(rng: Rng) -> Value:
    sides = [1, 2, 3, 5, 8, 9, 17]
    return Value(int(rng.choice([1, 3, 8, 13, 16, 24, 33])), int(rng.choice(sides)), int(rng.choice(sides)), UINT8, grid(rng))


def floats(rng: Rng, n: int) -> Array:
    return rng.standard_normal(n).astype(np.float32)


# ---- steps that compute -----------------------------------------------------------------------------------------------
def ends(rng: Rng, value: Value) -> Value:
    """A target of integers, or of floats."""
    return on(value, grid(rng) if rng.integers(3) else None)


def _affine(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    kind = [Activation.RELU, Activation.HARDSWISH, Activation.SIGMOID, Parametric("clip", (-0.5, 1.0))][rng.integers(4)]
    return Affine(0, 1, floats(rng, x.channels), floats(rng, x.channels), kind), ends(rng, x), ()


def _binary(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    shapes = [x.shape, (x.channels, 1, 1), (1, *x.shape[1:])]
    other = Value(*shapes[rng.integers(3)], UINT8, grid(rng))
    other = on(other, other.grid if rng.integers(2) else None)
    op = str(rng.choice(["add", "sub", "mul", "max", "min"]))
    return Binary(0, 1, 2, op, [Activation.NONE, Activation.RELU][rng.integers(2)]), ends(rng, x), (other,)


def _constant(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return ConstantBinary(0, 1, "add", rng.standard_normal((1, *x.shape[1:])).astype(np.float32)), ends(rng, x), ()


def _map(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return Map(0, 1, "abs"), ends(rng, x), ()


def _prelu(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return PRelu(0, 1, floats(rng, x.channels)), ends(rng, x), ()


def _average(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    if rng.integers(2):
        return Pool(0, 1, False, x.shape[1:], (1, 1), (0, 0, 0, 0)), ends(rng, Value(x.channels, 1, 1)), ()
    target = Value(x.channels, (x.height + 1) // 2, (x.width + 1) // 2)
    return Pool(0, 1, False, (2, 2), (2, 2), (0, 0, 1, 1), count_pads=bool(rng.integers(2))), ends(rng, target), ()


def _quantise(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return Quantise(0, 1), on(x, grid(rng)), ()


def _dequantise(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return Dequantise(0, 1), on(x, None), ()


# ---- steps that move ----------------------------------------------------------------------------------------------------
def _maximum(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    target = Value(x.channels, (x.height - 1) // 2 + 1, (x.width - 1) // 2 + 1)
    return Pool(0, 1, True, (3, 3), (2, 2), (1, 1, 1, 1)), on(target, x.grid), ()


def _copy(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    """Few runs of channels, or many; zeros among them; strides; from the second row on."""
    index = np.arange(-1, x.channels) if rng.integers(2) else rng.integers(-1, x.channels, int(rng.integers(1, 40)))
    strides = (2, 1) if rng.integers(2) else (1, 1)
    top = int(x.height > 1 and rng.integers(2))
    target = Value(len(index), (x.height - top - 1) // strides[0] + 1, x.width)
    return Copy(0, 1, index, strides, offset=(top, 0)), on(target, x.grid), ()


def _copy_onto(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    """To another grid."""
    step, target, _ = _copy(rng, x)
    return step, on(target, grid(rng)), ()


def _paste(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    return Paste(0, 1, (0, 0)), x, ()


def _permute(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    a, b, c = (int(k) for k in rng.permutation(3))
    return Permute(0, 1, (a, b, c)), on(Value(x.shape[a], x.shape[b], x.shape[c]), x.grid), ()


def _reshape(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    shape = [(x.size, 1, 1), (1, x.channels, x.pixels), (x.pixels, 1, x.channels)][rng.integers(3)]
    return Reshape(0, 1), on(Value(*shape), x.grid), ()


def _interleave(rng: Rng, x: Value) -> tuple[Step, Value, Sequence[Value]]:
    phases = x.channels // 4 * 4 or x.channels
    strides = (2, 2) if phases % 4 == 0 else (1, 1)
    if phases != x.channels:
        return _paste(rng, x)
    target = Value(phases // (strides[0] * strides[1]), x.height * strides[0], x.width * strides[1])
    return Interleave(0, 1, strides), on(target, x.grid), ()


COMPUTE: tuple[Make, ...] = (_affine, _binary, _constant, _map, _prelu, _average, _quantise, _dequantise, _copy_onto)
MOVE: tuple[Make, ...] = (_maximum, _copy, _paste, _permute, _reshape, _interleave)


def alone(step: Step, target: Value, sources: Sequence[Value]) -> Program:
    """The step from inputs of the network to an output."""
    inputs = tuple(Port(f"x{n}", n, value.shape) for n, value in enumerate(sources))
    return Program((*sources, target), (step,), inputs, (Port("y", len(sources), target.shape),))


def check(programs: Sequence[Program], cpu: Cpu, rng: Rng, quanta: float) -> None:
    """All side by side, in two runs of which the first leaves its numbers in memory; off by `quanta` at most, and rarely."""
    plan, runs = make_plan(beside(programs), cpu), ((2, 1), (1, 3))
    every = [[[on_grid(np.float32(rng.standard_normal((batch, *port.shape)) * 3), p.values[port.value].grid) for port in p.inputs]
              for p in programs] for batch, _ in runs]
    feeds = [{f"{n} {port.name}": x for n, (p, xs) in enumerate(zip(programs, fed, strict=True))
              for port, x in zip(p.inputs, xs, strict=True)} for fed in every]
    results = native_runs(plan, [(f, threads) for f, (_, threads) in zip(feeds, runs, strict=True)], shared=True, together=True)
    for fed, got in zip(every, results, strict=True):
        off = 0
        for program, xs, y in zip(programs, fed, got, strict=True):
            want = interpret(program, xs, double=True)[0]
            target = program.values[program.outputs[0].value]
            error = np.abs(y - want) / (target.grid.scale if target.grid else max(1.0, float(np.abs(want).max())) * 1e-5)
            assert error.max() <= (quanta if target.grid else 1) + 0.01, f"{program.steps[0]} from {program.values}: {error.max()}"
            off += int((error > 0.01).sum()) if target.grid else 0
        assert off <= 0.01 * sum(y.size for y in got)


@pytest.mark.parametrize("cpu", cpus())
def test_what_steps_compute_of_integers(cpu: Cpu) -> None:
    rng = np.random.default_rng(cpu.lanes)
    programs = []
    for make in COMPUTE * 3:
        x = small(rng)
        source = on(x, None) if make is _quantise and rng.integers(2) else x
        step, target, others = make(rng, x)
        if not all(value.grid is None for value in (source, target, *others)):
            programs.append(alone(step, target, (source, *others)))
    check(programs, cpu, rng, 1)


@pytest.mark.parametrize("cpu", cpus())
def test_integers_are_moved_as_they_are(cpu: Cpu) -> None:
    rng = np.random.default_rng((1, cpu.lanes))
    programs = []
    for make in MOVE * 3:
        x = small(rng)
        step, target, others = make(rng, x)
        programs.append(alone(step, target, (x, *others)))
    check(programs, cpu, rng, 0)


@pytest.mark.parametrize("cpu", cpus())
def test_integers_of_few_channels_that_a_convolution_reads(cpu: Cpu) -> None:
    """Their pixels are words. Quantised, packed or moved to them; the convolution chooses each channel once."""
    rng = np.random.default_rng((2, cpu.lanes))
    programs = []
    for make in (*MOVE, _quantise) * 4:
        source = replace(small(rng), channels=int(rng.choice([1, 2, 3, 4, 4])))
        step, target, _ = make(rng, source)
        if target.channels > WORD or target.grid is None:
            continue
        n, scale = target.channels, np.full(target.channels, 2.0 ** -6, np.float32)
        every = Branch(np.arange(n), rng.permutation(n), np.eye(n, dtype=np.float32)[:, :, None, None])
        conv = BranchedConv(n, n, (every,), np.zeros(n, np.float32), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), scale)
        program = alone(step, target, (source,))
        programs.append(Program((*program.values, on(target, None)), (step, Conv(1, 2, conv)), program.inputs,
                                (Port("y", 2, target.shape),)))
        assert geometry(programs[-1], cpu.lanes).layouts[1]["last"].words
    assert len({type(p.steps[0]) for p in programs}) > 4
    check(programs, cpu, rng, 0)


# ---- depthwise ----------------------------------------------------------------------------------------------------------
def depthwise(rng: Rng) -> Program:
    """Of any window, with or without a residual."""
    windows = [(3, 3), (3, 3), (5, 5), (1, 1), (3, 1), (1, 5), (7, 7), (2, 2), (3, 4)]
    kernel, strides, dilations = (found[rng.integers(len(found))] for found in (
        windows, [(1, 1), (2, 2), (1, 2), (3, 3)], [(1, 1), (1, 1), (2, 2), (1, 2)]))
    reach = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
    top, left, bottom, right = (int(rng.integers(0, r + 1)) for r in (*reach, *reach))
    c, height, width = int(rng.choice([1, 3, 8, 16, 17, 48])), *(max(1, r, int(rng.integers(1, 20))) for r in reach)
    out = [(n + p - r - 1) // s + 1 for n, p, r, s in zip((height, width), (top + bottom, left + right), reach, strides, strict=True)]
    source, target = Value(c, height, width, UINT8, grid(rng)), Value(c, out[0], out[1], UINT8, grid(rng, 0.05))
    scale = rng.uniform(0.002, 0.01, c).astype(np.float32)
    weight = (rng.integers(-127, 128, (c, *kernel)) * scale[:, None, None]).astype(np.float32)
    assert source.grid is not None
    bias = (rng.integers(-2000, 2000, c) * scale * np.float32(source.grid.scale)).astype(np.float32)
    kind = [Activation.NONE, Activation.RELU, Activation.RELU6, Activation.HARDSWISH][rng.integers(4)]
    others = (on(target, grid(rng)),) if rng.integers(2) else ()
    step = Depthwise(0, 1 + len(others), weight, bias, strides, (top, left, bottom, right), dilations, kind, 1 if others else None,
                     Activation.NONE, "", scale)
    return alone(step, target, (source, *others))


@pytest.mark.parametrize("cpu", [CPUS["x86-64-v3"], host_cpu()], ids=lambda cpu: cpu.name)
def test_depthwise_convolutions_of_integers(cpu: Cpu) -> None:
    rng = np.random.default_rng(7)
    check([depthwise(rng) for _ in range(20)], cpu, rng, 1)


def test_a_step_has_the_sources_that_are_given() -> None:
    rng = np.random.default_rng(0)
    for make in (*COMPUTE, *MOVE):
        step, _, others = make(rng, small(rng))
        assert reads(step) == tuple(range(1 + len(others)))
