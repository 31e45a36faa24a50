"""Tensors as values with their axes in another order.

A value is [channels, height, width]; a tensor of the model may have its channels last, or more axes. What is computed
element by element, or over some axes, does not care: the step works on the value as it lies, and the result is the tensor
in the same order. Only what cannot be read so is moved first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.converter.graph import Tensor
from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.program import Affine, Binary, Grid, Map, Normalise, Pool, Reduce, Value
from gkp.converter.native.reading.builder import Builder, View, as_value
from gkp.converter.native.reading.moves import Elements, Refused
from gkp.converter.native.reading.orders import order_of
from gkp.types import Floats

_COMMUTES = ("add", "mul", "max", "min")


@dataclass(frozen=True)
class Oriented:
    """A tensor without the batch. value: its elements; shape: the tensor's; order: its axes from the slowest to the fastest
    in the value."""

    value: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes, in the value's order."""
        return tuple(self.shape[a] for a in self.order)


# ---- tensors --------------------------------------------------------------------------------------------------------
def oriented(b: Builder, tensor: Tensor) -> Oriented:
    """The tensor, moved as little as possible. Refused, to the blame of the moving operator, when no steps can."""
    view = b.view(tensor)
    plain = tuple(range(len(view.shape)))
    if view.value is not None:
        return Oriented(view.value, view.shape, view.order or plain)
    elements = b.elements(tensor)
    order = order_of(elements)
    turned = elements.transpose(order)
    number = b.whole(turned.ravel())
    if number is None and not _in_order(view.shape, order):
        with suppress(Refused):
            number = b.express(turned)
    if number is None:
        return Oriented(b.number(tensor), view.shape, plain)
    bind(b, tensor, Oriented(number, view.shape, order))
    return Oriented(number, view.shape, order)


def bind(b: Builder, tensor: Tensor, result: Oriented) -> None:
    """The tensor is this."""
    value = b.values[result.value]
    whole = _in_order(result.shape, result.order) and as_value(result.shape, value.dtype) == value
    b.bind(tensor, View(result.shape, result.value, None, None if whole else result.order))


def _in_order(shape: Sequence[int], order: Sequence[int]) -> bool:
    long = [a for a in order if shape[a] > 1]
    return long == sorted(long)


def elements_of(b: Builder, x: Oriented) -> Elements:
    """The numbers of the tensor's elements, in its shape."""
    moved: Elements = b.numbers(x.value).reshape(x.sizes).transpose(np.argsort(x.order))
    return moved


def like(b: Builder, value: int) -> int:
    """A new value of the same shape."""
    same = b.values[value]
    return b.value((same.channels, same.height, same.width), same.dtype)


def on_grid(b: Builder, value: int, grid: Grid) -> int:
    """A new value of the same shape, of integers."""
    made = b.value(b.values[value].shape, UINT8)
    b.values[made] = replace(b.values[made], grid=grid)
    return made


def per_channel(b: Builder, x: Oriented, array: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """One number for each channel of the tensor's value, from an array that is broadcast to the tensor. Refused when there
    is none."""
    value = b.values[x.value]
    if array.size == 1:
        return np.full(value.channels, array.item())
    if not is_per_channel(b, x, array):
        raise Refused("its constant differs within a channel")
    spread = _by_channel(b, x, array)
    numbers: npt.NDArray[np.floating[Any]] = spread[:, 0]
    return numbers


def is_per_channel(b: Builder, x: Oriented, array: npt.NDArray[np.floating[Any]]) -> bool:
    """Is it one number for each channel?"""
    if array.size == 1:
        return True
    spread = _by_channel(b, x, array)
    return bool((spread == spread[:, :1]).all())


def _by_channel(b: Builder, x: Oriented, array: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    value = b.values[x.value]
    spread: npt.NDArray[np.floating[Any]] = np.broadcast_to(array, x.shape).transpose(x.order).reshape(value.channels, -1)
    return spread


def channels_first(b: Builder, x: Oriented, axes: Sequence[int]) -> Oriented:
    """The tensor as a value whose channels are these axes, in this order."""
    rest = [a for a in x.order if a not in axes]
    value, n = b.values[x.value], prod(x.shape[a] for a in axes)
    first = [a for a in x.order if x.shape[a] > 1][:len([a for a in axes if x.shape[a] > 1])]
    if value.channels == n and first == [a for a in axes if x.shape[a] > 1]:
        return replace(x, order=(*axes, *rest))
    plane = [x.shape[a] for a in rest]
    if len(plane) > 2:  # axes of 1 may stand anywhere: taken together with them, the others are no neighbours
        plane = [m for m in plane if m > 1]
    if len(plane) > 2:
        plane = [prod(plane[:-1]), plane[-1]]
    order = (*axes, *rest)
    number = b.moved(elements_of(b, x).transpose(order).reshape(n, *plane))
    return Oriented(number, x.shape, order)


# ---- the axes of a tensor and those of its value -----------------------------------------------------------------------
@dataclass(frozen=True)
class _Axis:
    """One of a tensor, or a part of it. size: of the value; own: of the tensor that is to be spread over it."""

    size: int
    own: int


def _cut(axes: Sequence[_Axis], channels: int) -> tuple[list[_Axis], list[_Axis]] | None:
    """The axes that are channels, and the axes of the plane; an axis that is both is cut in two. None where that is not
    possible."""
    among: list[_Axis] = []
    left = channels
    for place, axis in enumerate(axes):
        if left == 1 and axis.size > 1:
            return among, list(axes[place:])
        if left % axis.size == 0:
            among.append(axis)
            left //= axis.size
        elif axis.size % left == 0 and axis.own in (1, axis.size):
            rest = axis.size // left
            among.append(_Axis(left, left if axis.own > 1 else 1))
            return among, [_Axis(rest, rest if axis.own > 1 else 1), *axes[place + 1:]]
        else:
            return None
    return among, []


def _plane(axes: Sequence[_Axis], value: Value) -> tuple[int, int] | None:
    """(height, width) of what is to be spread over the value's plane; None where that is no plane."""
    long = [axis for axis in axes if axis.size > 1]
    if all(axis.own == axis.size for axis in long):
        return value.height, value.width
    if all(axis.own == 1 for axis in long):
        return 1, 1
    if [axis.size for axis in long] == [value.height, value.width]:
        return long[0].own, long[1].own
    return None


# ---- steps over axes ---------------------------------------------------------------------------------------------------
def combined(b: Builder, op: str, first: Oriented, second: Oriented) -> Oriented:
    """first op second, where both have as many axes, broadcast as ONNX does."""
    if len(first.shape) != len(second.shape):
        raise Refused("it broadcasts over the batch or the channels")
    shape = tuple(max(m, n) for m, n in zip(first.shape, second.shape, strict=True))
    if any(m not in (1, n) for x in (first, second) for m, n in zip(x.shape, shape, strict=True)):
        raise Refused("its operands do not fit together")
    leader = next((x for x in (first, second) if x.shape == shape), None)
    order = tuple(range(len(shape))) if leader is None else leader.order
    target = b.value(shape) if leader is None else like(b, leader.value)
    wanted = b.values[target]
    a, c = (_spread(b, x, shape, order, wanted) for x in (first, second))
    if op in _COMMUTES and b.values[a] != wanted:
        a, c = c, a
    b.steps.append(Binary(a, c, target, op))
    return Oriented(target, shape, order)


def _spread(b: Builder, x: Oriented, shape: tuple[int, ...], order: tuple[int, ...], wanted: Value) -> int:
    """The tensor as a value that can be broadcast to the wanted one, which has this shape in this order."""
    if x.shape == shape and [a for a in x.order if shape[a] > 1] == [a for a in order if shape[a] > 1] \
            and b.values[x.value] == wanted:
        return x.value
    elements = elements_of(b, x).transpose(order)
    parts = _cut([_Axis(shape[a], x.shape[a]) for a in order], wanted.channels)
    plane = None if parts is None else _plane(parts[1], wanted)
    if parts is None or plane is None:
        full = np.broadcast_to(elements, [shape[a] for a in order])
        return b.moved(full.reshape(wanted.channels, wanted.height, wanted.width))
    among = parts[0]
    if any(axis.own > 1 for axis in among):  # along some channels, but not along others
        sizes = [axis.size for axis in among]
        elements = np.broadcast_to(elements.reshape(*[axis.own for axis in among], *plane), [*sizes, *plane])
    return b.moved(elements.reshape(-1, *plane))


def reduced(b: Builder, x: Oriented, axes: Collection[int], kind: str) -> Oriented:
    """The sum, mean or max (kind) over axes of the tensor, which become 1."""
    long = {a for a in axes if x.shape[a] > 1}
    shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    if not long:
        return x
    value = b.values[x.value]
    parts = _cut([_Axis(x.shape[a], 1 if a in long else x.shape[a]) for a in x.order], value.channels)
    plane = None if parts is None else _plane(parts[1], value)
    if parts is None or plane is None:
        moved = channels_first(b, x, sorted(long))
        return Oriented(_reduce(b, moved.value, kind, b.values[moved.value].channels, 1), shape, moved.order)
    number = x.value
    if plane != (value.height, value.width):
        kernel = value.height // plane[0], value.width // plane[1]
        target = b.value((value.channels, *plane), value.dtype)
        b.steps.append(Pool(number, target, kind == "max", kernel, (1, 1), (0, 0, 0, 0)))
        number = target
        if kind == "sum":
            number = scaled(b, number, prod(kernel))
    inner = 1
    for gone, group in groupby(reversed(parts[0]), key=lambda axis: axis.own < axis.size):
        n = prod(axis.size for axis in group)
        if gone:
            number = _reduce(b, number, kind, n, inner)
        else:
            inner *= n
    return Oriented(number, shape, x.order)


def _reduce(b: Builder, source: int, kind: str, count: int, inner: int) -> int:
    value = b.values[source]
    target = b.value((value.channels // count, value.height, value.width), value.dtype)
    b.steps.append(Reduce(source, target, kind, count, inner))
    return target


def scaled(b: Builder, source: int, scale: float | Floats, shift: float | Floats = 0.0) -> int:
    """source * scale + shift, by one number or per channel."""
    target, n = like(b, source), b.values[source].channels
    factors, shifts = (np.broadcast_to(np.asarray(v, np.float32), n) for v in (scale, shift))
    b.steps.append(Affine(source, target, factors, shifts))
    return target


def squeezed(x: Oriented, axes: Collection[int]) -> Oriented:
    """The tensor without these axes, which are 1."""
    kept = [a for a in range(len(x.shape)) if a not in axes]
    return Oriented(x.value, tuple(x.shape[a] for a in kept), tuple(kept.index(a) for a in x.order if a not in axes))


def normalised(b: Builder, x: Oriented, axes: Collection[int], epsilon: float) -> Oriented:
    """(x - mean) / sqrt(variance + epsilon), mean and variance over these axes."""
    value = b.values[x.value]
    parts = _cut([_Axis(x.shape[a], 1 if a in axes else x.shape[a]) for a in x.order], value.channels)
    if parts is not None and all(axis.own == 1 for axis in parts[0]) and all(axis.own == axis.size for axis in parts[1]):
        target, n = like(b, x.value), value.channels
        b.steps.append(Normalise(x.value, target, epsilon, np.ones(n, np.float32), np.zeros(n, np.float32)))
        return replace(x, value=target)
    centred = combined(b, "sub", x, reduced(b, x, axes, "mean"))
    variance = reduced(b, combined(b, "mul", centred, centred), axes, "mean")
    root = mapped(b, replace(variance, value=scaled(b, variance.value, 1.0, epsilon)), "sqrt")
    return combined(b, "mul", centred, mapped(b, root, "reciprocal"))


def mapped(b: Builder, x: Oriented, function: str) -> Oriented:
    """A Map of the tensor."""
    target = like(b, x.value)
    b.steps.append(Map(x.value, target, function))
    return replace(x, value=target)
