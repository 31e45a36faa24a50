"""Steps that compute each element of the target from the elements at the same place of the operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, get, loop, put, share
from gkp.converter.native.kernels.kernel import Kernel, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps import words
from gkp.converter.native.kernels.steps.grids import between, typed
from gkp.converter.native.program import Affine, Binary, ConstantBinary, Grid, zero_at_zero

_OPERATORS = {"add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "max": "maximum({0}, {1})",
              "min": "minimum({0}, {1})"}


@dataclass(frozen=True)
class Operand:
    """Element (c, y, x) lies at pointer[origin + c * strides[0] + y * strides[1] + x * strides[2]]. A stride of 0
    broadcasts. grid: of integers; gaps: are there places without a channel between those with one? dtype: of the
    elements."""

    pointer: str
    origin: int
    strides: tuple[int, int, int]
    grid: Grid | None = None
    gaps: bool = False
    dtype: DType = FLOAT32


def whole(pointer: str, layout: Layout) -> Operand:
    return Operand(pointer, layout.origin, (layout.channel, layout.row, layout.column), layout.value.grid,
                   layout.padded != layout.value.channels, layout.value.dtype)


@dataclass(frozen=True)
class _Axis:
    name: str
    extent: int
    strides: tuple[int, ...]  # of the target, then of the operands


Expression = Callable[[Sequence[str]], str]


def elementwise(target: Operand, operands: Sequence[Operand], shape: tuple[int, int, int], expression: Expression,
                keeps_zero: bool, lanes: int, split: bool = True) -> str:
    """target = expression(operands), over a [channels, height, width] shape. The target overlaps no operand, or is one
    of them exactly.

    keeps_zero: the expression of zeros is zero, and everything between the elements is zero in every operand and may
    be written: where all have the same strides, halos are then computed like elements, in one long line. (Of integers, what
    lies where there is no channel is not zero.)
    split: the parts share the work (else each does it all)."""
    keeps_zero &= target.grid is not None or not any(o.grid and o.gaps for o in operands)
    axes = _axes(target, operands, shape, keeps_zero)
    *outer, inner = axes
    terms = [[(a.name, a.strides[k]) for a in outer] for k in range(1 + len(operands))]
    addresses = [at(o.pointer, o.origin, *t) for o, t in zip((target, *operands), terms, strict=True)]
    body = f"{target.dtype.c}* {target.pointer}s = {addresses[0]};\n"
    for k, operand in enumerate(operands, 1):
        body += (f"const {operand.dtype.c}* {operand.pointer}s = {addresses[k]};\n" if inner.strides[k]
                 else f"const V {operand.pointer}v = splat(*({addresses[k]}));\n")

    def piece(position: str, n: int) -> str:
        values = [get(at(f"{o.pointer}s", 0, (position, s)), n, lanes, s) if s else f"{o.pointer}v"
                  for o, s in zip(operands, inner.strides[1:], strict=True)]
        place = at(f"{target.pointer}s", 0, (position, inner.strides[0]))
        return put(place, between(expression, values, [o.grid for o in operands], target.grid), n, lanes, inner.strides[0])

    if not outer and split:
        return body + _line(inner.extent, lanes, piece)
    body += chunks(inner.extent, lanes, piece)
    best = max(outer, key=lambda a: min(a.extent, 16)) if outer else None  # the outermost of those long enough
    for a in reversed(outer):
        shared = split and a is best
        body = loop(a.name, "begin" if shared else 0, "end" if shared else a.extent, body)
    return (share(best.extent) if split and best else "") + body


def _line(n: int, lanes: int, piece: Callable[[str, int], str]) -> str:
    """One line of n floats, its vectors shared by the parts."""
    full, text = n // lanes, ""
    if full:
        text = share(full) + loop("i", "begin * LANES", "end * LANES", piece("i", lanes), "LANES")
    if n % lanes:
        text += block("if (part == parts - 1)", piece(str(full * lanes), n % lanes))
    return text


def _axes(target: Operand, operands: Sequence[Operand], shape: tuple[int, int, int], keeps_zero: bool) -> list[_Axis]:
    """From the outermost to the innermost, merged where possible; the target's innermost stride is 1 where possible."""
    everything = (target, *operands)
    channels = shape[0] > 1 and target.strides[0] == 1 and not (shape[2] > 1 and target.strides[2] == 1)
    order = (1, 2, 0) if channels else (0, 1, 2)
    names = ("c", "row", "column")
    axes = [_Axis(names[k], shape[k], tuple(o.strides[k] for o in everything)) for k in order if shape[k] > 1]
    if not axes:
        return [_Axis("c", 1, (1,) * len(everything))]
    merged = [axes[-1]]
    for axis in reversed(axes[:-1]):
        inner = merged[0]
        if all(s == inner.extent * t for s, t in zip(axis.strides, inner.strides, strict=True)):
            merged[0] = _Axis(axis.name, axis.extent * inner.extent, inner.strides)
        elif keeps_zero and set(inner.strides) == {1} and len(set(axis.strides)) == 1:
            merged[0] = _Axis(axis.name, (axis.extent - 1) * axis.strides[0] + inner.extent, inner.strides)
        else:
            merged.insert(0, axis)
    assert prod(shape) <= prod(a.extent for a in merged)
    return merged


# ---- steps ------------------------------------------------------------------------------------------------------
def affine(step: Affine, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """x: source; the data are scale, then shift."""
    value = target.value
    if source.value.shape != value.shape or step.scale.shape != (value.channels,) or step.shift.shape != (value.channels,):
        raise ValueError(f"{step.scale.size} scales and {step.shift.size} shifts for {source.value} giving {value}")
    constants = "const float* scale = reinterpret_cast<const float*>(data);\n" \
        + f"const float* shift = scale + {value.channels};\n"
    operands = [whole("x", source), Operand("scale", 0, (1, 0, 0)), Operand("shift", 0, (1, 0, 0))]
    if words.fits(source, target):
        body = words.from_planes(source, target, cpu.lanes, lambda c, v: activation(
            step.activation, f"{v} * splat(scale[{c}]) + splat(shift[{c}])"))
    else:
        body = elementwise(whole("y", target), operands, value.shape,
                           lambda v: activation(step.activation, f"{v[0]} * {v[1]} + {v[2]}"), False, cpu.lanes)
    data = np.concatenate([step.scale, step.shift]).astype("<f4").tobytes()
    return typed(constants + body, source, target, data=data)


def binary(step: Binary, a: Layout, b: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """x: a; r: b; broadcast along the axes on which they have size 1. Raises ValueError for shapes that do not fit."""
    value = target.value
    shape = value.shape
    operands = []
    for pointer, operand in (("x", a), ("r", b)):
        given = operand.value.shape
        if any(n not in (1, m) for n, m in zip(given, shape, strict=True)):
            raise ValueError(f"cannot broadcast {operand.value} to {value}")
        operands.append(_broadcast(whole(pointer, operand), given))
    keeps_zero = zero_at_zero(step.activation) and a.value.shape == b.value.shape == shape and step.op != "div"
    body = elementwise(whole("y", target), operands, shape,
                       lambda v: activation(step.activation, _OPERATORS[step.op].format(*v)), keeps_zero, cpu.lanes)
    return typed(body, a, target, b)


def constant_binary(step: ConstantBinary, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """x: source; the data are the constant, its axes in the order of the target's. Raises ValueError if it does not fit."""
    value, given = target.value, step.constant.shape
    shape = value.shape
    if source.value.shape != shape or len(given) != 3 or any(n not in (1, m) for n, m in zip(given, shape, strict=True)):
        raise ValueError(f"a constant of shape {given} does not take {source.value} to {value}")
    _, height, width = given
    if target.planar:
        strides, data = (height * width, width, 1), step.constant
    else:
        strides, data = (1, width * given[0], given[0]), step.constant.transpose(1, 2, 0)
    constant = _broadcast(Operand("constant", 0, strides), given)
    body = elementwise(whole("y", target), [whole("x", source), constant], shape,
                       lambda v: activation(step.activation, _OPERATORS[step.op].format(*v)), False, cpu.lanes)
    return typed("const float* constant = reinterpret_cast<const float*>(data);\n" + body, source, target,
                 data=data.astype("<f4").tobytes())


def _broadcast(operand: Operand, shape: Sequence[int]) -> Operand:
    """The operand, of this shape, broadcast along the axes of size 1."""
    c, y, x = (0 if n == 1 else s for n, s in zip(shape, operand.strides, strict=True))
    return replace(operand, strides=(c, y, x))
