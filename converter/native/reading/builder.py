"""Building a program: values, steps, and which tensor of the model is which value."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np

from gkp.converter.graph import Node, Tensor, producer, values
from gkp.converter.native.dtypes import DTYPES, FLOAT32, DType
from gkp.converter.native.program import Copy, Depthwise, Interleave, Paste, Permute, Reshape, Step, Value
from gkp.converter.native.reading.moves import ZERO, Elements, Refused, bounded, data_inputs, is_move, move
from gkp.converter.native.reading.orders import order_of, permutation
from gkp.converter.native.reading.runs import Concatenations, Run, gathered

Border = tuple[int, int, int, int]
"""top, left, bottom, right."""

_MAX_PIECES = 16
_MAX_PHASES = 64
_SHORT = 8
"""Runs that are copied one by one, besides two from each base."""


@dataclass(frozen=True, eq=False)
class View:
    """A tensor. shape: as in the model, without the batch. value: the value whose elements it has, in order (order: None) or
    otherwise (order: the tensor's axes from the slowest to the fastest; also given where the value has another shape); or,
    while nobody has needed it as a value, elements: the numbers of the elements that it is made of."""

    shape: tuple[int, ...]
    value: int | None = None
    elements: Elements | None = None
    order: tuple[int, ...] | None = None

    @property
    def whole(self) -> bool:
        """Is it a value as it is?"""
        return self.value is not None and self.order is None


def dtype_of(tensor: Tensor) -> DType:
    """The type of a tensor's elements. Refused for those that the kernels do not compute with."""
    for dtype in DTYPES:
        if tensor.dtype == dtype.numpy:
            return dtype
    raise Refused(f"a tensor of {tensor.dtype}")


def as_value(shape: Sequence[int], dtype: DType = FLOAT32) -> Value:
    """The value for a tensor of this shape (without the batch): [C], [C, L], [C, H, W], or more axes, of which the
    first ones are channels together. Refused for others."""
    if min(shape, default=1) < 1:
        raise Refused("an empty tensor")
    if prod(shape) >= 1 << 31:
        raise Refused("a tensor of over 2^31 elements per image")
    folded = (prod(shape[:-2]), *shape[-2:])
    padded = {0: (1, 1, 1), 1: (*shape, 1, 1), 2: (*shape[:1], 1, *shape[1:])}.get(len(shape), folded)
    return Value(int(padded[0]), int(padded[1]), int(padded[2]), dtype)


class Builder:
    """Values and steps so far. batch: the declared batch of the model's tensors, None when it is symbolic."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch
        self.values: list[Value] = []
        self.steps: list[Step] = []
        self._starts: list[int] = []  # number of the first element of each value
        self._end = ZERO + 1
        self._views: dict[int, View | None] = {}
        self._concatenations = Concatenations()

    # ---- values and tensors -------------------------------------------------------------------------------------
    def value(self, shape: Sequence[int], dtype: DType = FLOAT32) -> int:
        """A new value."""
        self.values.append(as_value(shape, dtype))
        self._starts.append(self._end)
        self._end += self.values[-1].size
        return len(self.values) - 1

    def bind(self, tensor: Tensor, view: View | None) -> None:
        """What the tensor is; None: something that no step can read."""
        self._views[id(tensor)] = view

    def view(self, tensor: Tensor) -> View:
        """What the tensor is. Refused for constants and for what no step can read."""
        constant = values(tensor)
        if constant is not None:
            raise Refused("one of its inputs is a constant")
        view = self._views.get(id(tensor))
        if view is None:
            raise Refused("its input has no static shape of float32", follows=True)
        return view

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The tensor's shape without the batch."""
        return self.view(tensor).shape

    def elements(self, tensor: Tensor) -> Elements:
        """The numbers of the tensor's elements, in its shape. A constant must be zero."""
        constant = values(tensor)
        if constant is not None:
            if constant.any() or constant.ndim == 0:
                raise Refused("a constant that is not zero takes part in the movement")
            return np.zeros(constant.shape[1:], np.int64)
        view = self.view(tensor)
        if view.elements is not None:
            return view.elements
        assert view.value is not None
        if view.order is None:
            return self.numbers(view.value).reshape(view.shape)
        sizes = [view.shape[a] for a in view.order]
        moved: Elements = self.numbers(view.value).reshape(sizes).transpose(np.argsort(view.order))
        return moved

    def numbers(self, value: int) -> Elements:
        """The numbers of a value's elements, in order. Refused when they are too many."""
        bounded(self.values[value].size)
        return np.arange(self._starts[value], self._starts[value] + self.values[value].size)

    def move(self, node: Node) -> None:
        """Bind the outputs of a node that only moves elements."""
        data = [self.elements(node.inputs[i]) for i in data_inputs(node)]
        if len({d.ndim for d in data}) > 1:
            raise Refused("its inputs do not fit together")
        for tensor, elements in zip(node.outputs, move(node, data, self.batch), strict=False):
            self.bind(tensor, View(elements.shape, None, elements))

    # ---- tensors as values --------------------------------------------------------------------------------------
    def number(self, tensor: Tensor) -> int:
        """The value that holds the tensor; steps that move the elements there are appended when needed. Refused, to the
        blame of the moving operator, when no steps can."""
        view = self.view(tensor)
        if view.value is not None and view.whole:
            return view.value
        node, elements = producer(tensor), self.elements(tensor)
        mover = node if node is not None and is_move(node) else None
        try:
            number = self.express(elements)
        except Refused:
            if mover is not None and self._rebase(mover):  # in two movements what does not work in one
                return self.number(tensor)
            try:
                number = self.moved(elements)
            except Refused as refusal:
                raise Refused(refusal.reason, mover) from None
        self.bind(tensor, View(view.shape, number))
        return number

    def trimmed(self, tensor: Tensor) -> tuple[int, Border]:
        """(value, zeros around it): the tensor without the border of zeros that a Pad has put around it."""
        view = self.view(tensor)
        if view.elements is not None and view.elements.ndim in (2, 3):
            plane = view.elements.reshape(_three(view.elements))
            border = _border(plane)
            if any(border):
                try:
                    return self.express(_without(plane, border)), border
                except Refused:
                    pass
        return self.number(tensor), (0, 0, 0, 0)

    def _rebase(self, node: Node) -> bool:
        """Make values of the node's inputs and apply it to them anew; False when they are values already."""
        lazy = [node.inputs[i] for i in data_inputs(node) if values(node.inputs[i]) is None
                and not self.view(node.inputs[i]).whole]
        for tensor in lazy:
            self.number(tensor)
        if lazy:
            self.move(node)
        return bool(lazy)

    def express(self, elements: Elements, shifts: bool = False) -> int:
        """A value with these elements: an old one, or a new one with the steps that fill it. shifts: channels may begin
        within the plane of their base."""
        flat = elements.ravel()
        wanted = as_value(elements.shape, self.values[self._base(int(flat.max(initial=ZERO)))].dtype)
        whole = self.whole(flat)
        if whole is not None:
            return self._reshaped(whole, elements.shape)
        plane = elements.reshape(_three(elements))
        border = _border(plane)
        if any(border):
            return self._bordered(self.express(_without(plane, border), shifts), border, wanted)
        unfolded = self._unfolded(plane)
        if unfolded is not None:
            return self._reshaped(self._copy(*unfolded), elements.shape)
        try:
            runs = self._runs(plane)
        except Refused:
            assembled = self._assembled(plane, wanted, shifts)
            if assembled is None:
                raise
            return assembled
        if not shifts and any(run.offset != (0, 0) for run in runs):
            raise Refused("it cuts out a part of the plane")
        return self._copy(plane.shape, runs)

    def moved(self, elements: Elements) -> int:
        """As express, also from a part of the plane, and across the axes of a value."""
        try:
            return self.express(elements, shifts=True)
        except Refused as refusal:
            source = self.whole(elements.transpose(order_of(elements)).ravel())
            value = None if source is None else self.values[source]
            found = None if value is None else permutation(elements, (value.channels, value.height, value.width))
            if found is None or source is None:
                raise refusal from None
        shape, order = found
        turned = self.value(shape, self.values[source].dtype)
        self.steps.append(Permute(self._reshaped(source, [shape[order.index(k)] for k in range(3)]), turned, order))
        return self._reshaped(turned, elements.shape)

    def _reshaped(self, source: int, shape: Sequence[int]) -> int:
        """The value under another shape, or itself."""
        wanted = as_value(shape, self.values[source].dtype)
        if self.values[source] == wanted:
            return source
        target = self.value(shape, wanted.dtype)
        self.steps.append(Reshape(source, target))
        return target

    def _copy(self, shape: Sequence[int], runs: Sequence[Run]) -> int:
        """A new value that the runs fill; where they alternate between their bases (channel shuffles), side by side
        first."""
        target = self.value(shape, self.values[runs[0].base].dtype)
        side, index = gathered(runs)
        if len(runs) > 2 * len(side) + _SHORT:
            source = self._copy((sum(run.index.size for run in side), *shape[1:]), side)
            self.steps.append(Copy(source, target, index))
            return target
        plane = tuple(shape[1:])
        for run in self._concatenations.shorter(plane, runs):
            self.steps.append(Copy(run.base, target, run.index, run.strides, run.first, run.offset))
        self._concatenations.note(plane, target, runs)
        return target

    def _unfolded(self, elements: Elements) -> tuple[tuple[int, ...], list[Run]] | None:
        """Another shape in which the elements are whole channels of their bases, unmoved within the plane."""
        flat = elements.ravel()
        value = self.values[self._base(int(flat.max()))]
        plane = (value.height, value.width)
        if flat.size % value.pixels or elements.shape[1:] == plane or value.pixels == 1:
            return None
        folded = flat.reshape(-1, *plane)
        try:
            runs = self._runs(folded)
        except Refused:
            return None
        still = all(run.offset == (0, 0) and run.strides == (1, 1) for run in runs)
        return (folded.shape, runs) if still else None

    def _assembled(self, plane: Elements, wanted: Value, shifts: bool) -> int | None:
        """A new value whose planes are put together from others."""
        shape = (wanted.channels, wanted.height, wanted.width)
        interleaved = self._interleaved(plane)
        if interleaved is not None:
            phases, strides = interleaved
            source, target = self.express(phases), self.value(shape, wanted.dtype)
            self.steps.append(Interleave(source, target, strides))
            return target
        pieces = []
        with suppress(Refused):
            pieces = [(offset, self.express(piece, shifts)) for offset, piece in self._pieces(plane)]
        if not pieces:
            rows = self._rows(plane)
            return None if rows is None else self.express(rows, shifts)
        target = self.value(shape, wanted.dtype)
        self.steps += [Paste(source, target, offset) for offset, source in pieces]
        return target

    def _interleaved(self, plane: Elements) -> tuple[Elements, tuple[int, int]] | None:
        """(phases, strides) of planes in which whole channels of one base are interleaved."""
        value = self.values[self._base(int(plane.max()))]
        (c, height, width), sizes = plane.shape, (value.height, value.width)
        sy, sx = height // sizes[0], width // sizes[1]
        if (sy * sizes[0], sx * sizes[1]) != (height, width) or value.pixels == 1 or not 1 < sy * sx <= _MAX_PHASES:
            return None
        phases = plane.reshape(c, sizes[0], sy, sizes[1], sx).transpose(2, 4, 0, 1, 3).reshape(-1, *sizes)
        try:
            runs = self._runs(phases)
        except Refused:
            return None
        still = all(run.offset == (0, 0) and run.strides == (1, 1) for run in runs)
        return (phases, (sy, sx)) if still else None

    def _rows(self, plane: Elements) -> Elements | None:
        """The same of a new value, whose channels are the base's rows; None where they are not whole rows of one base."""
        base = self._base(int(plane.max()))
        value, start = self.values[base], self._starts[base]
        rows = plane.reshape(-1, plane.shape[2])
        whole = (rows[:, 0] >= start) & ((rows[:, 0] - start) % value.width == 0)
        if value.height == 1 or value.width == 1 or plane.shape[2] != value.width or not whole.all() \
                or (np.diff(rows, axis=1) != 1).any():
            return None
        flat = self.value((value.channels * value.height, 1, value.width), value.dtype)
        self.steps.append(Reshape(base, flat))
        return plane - start + self._starts[flat]

    def _pieces(self, plane: Elements) -> list[tuple[tuple[int, int], Elements]]:
        """(offset, elements) of pieces of the planes that lie side by side, or one below the other, and come from different
        bases or begin in one anew; none where there is one piece only."""
        bases = np.searchsorted(self._starts, plane, "right")
        for axis, others in ((2, (0, 1)), (1, (0, 2))):
            follows = plane.take(range(1, plane.shape[axis]), axis)
            seams = (np.diff(bases, axis=axis) != 0) | ((np.diff(plane, axis=axis) <= 0) & (follows != ZERO))
            cuts = [0, *(np.flatnonzero(seams.any(others)) + 1), plane.shape[axis]]
            if 2 < len(cuts) <= 1 + _MAX_PIECES:
                return [((begin, 0) if axis == 1 else (0, begin), plane.take(range(begin, end), axis))
                        for begin, end in pairwise(map(int, cuts))]
        return []

    def whole(self, flat: Elements) -> int | None:
        """The value whose elements these are, all of them in order."""
        if flat[0] == ZERO:
            return None
        base = self._base(int(flat[0]))
        same = flat.size == self.values[base].size and np.array_equal(flat, self.numbers(base))
        return base if same else None

    def _base(self, element: int) -> int:
        return int(np.searchsorted(self._starts, element, "right")) - 1

    def _runs(self, plane: Elements) -> list[Run]:
        """The channels as runs of channels of one base each. Refused when they are not whole channels."""
        held = plane.any((1, 2))
        index = np.full(len(plane), -1, np.int64)
        if not held.any():
            return [Run(0, index, 0, (0, 0), (1, 1))]
        index[held], grid = self._channels(plane[held])
        changes = np.flatnonzero((grid[1:] != grid[:-1]).any(1)) + 1
        begins = [0, *np.flatnonzero(held)[changes]]
        return [Run(int(first), index[first:end], int(base), (int(y), int(x)), (int(down), int(right)))
                for first, end, (base, y, x, down, right) in
                zip(begins, [*begins[1:], len(plane)], grid[[0, *changes]], strict=True)]

    def _channels(self, plane: Elements) -> tuple[Elements, Elements]:
        """(channel of the base, [base, y, x, rows down, columns right]) of each channel of element numbers."""
        corner, (_, rows, columns) = plane[:, 0, 0], plane.shape
        base = np.searchsorted(self._starts, corner, "right") - 1
        used, places = np.unique(base, return_inverse=True)
        height, width = np.array([(self.values[b].height, self.values[b].width) for b in used]).T[:, places]
        channel, inside = np.divmod(corner - np.asarray(self._starts)[base], height * width)
        y, x = np.divmod(inside, width)
        down = (plane[:, 1, 0] - corner) // width if rows > 1 else height - y
        right = plane[:, 0, 1] - corner if columns > 1 else width - x
        steps = np.arange(rows)[:, None] * (down * width)[:, None, None] + np.arange(columns) * right[:, None, None]
        if (corner == ZERO).any() or (down < 1).any() or (right < 1).any() or (y + (rows - 1) * down >= height).any() \
                or (x + (columns - 1) * right >= width).any() or not np.array_equal(plane, corner[:, None, None] + steps):
            raise Refused("it moves elements within channels")
        return channel, np.stack([base, y, x, down, right], 1)

    def _bordered(self, source: int, border: Border, wanted: Value) -> int:
        """Zeros around a value, by a depthwise convolution of one tap with pads."""
        target = self.value((wanted.channels, wanted.height, wanted.width), wanted.dtype)
        self.steps.append(Depthwise(source, target, np.ones((wanted.channels, 1, 1), np.float32),
                                    np.zeros(wanted.channels, np.float32), (1, 1), border, (1, 1)))
        return target


def _three(elements: Elements) -> tuple[int, int, int]:
    value = as_value(elements.shape)
    return value.channels, value.height, value.width


def _border(plane: Elements) -> Border:
    """How many rows and columns of zeros lie around the rest; none when everything is zero."""
    rows, columns = np.flatnonzero(plane.any((0, 2))), np.flatnonzero(plane.any((0, 1)))
    if not rows.size:
        return 0, 0, 0, 0
    return (int(rows[0]), int(columns[0]), plane.shape[1] - 1 - int(rows[-1]), plane.shape[2] - 1 - int(columns[-1]))


def _without(plane: Elements, border: Border) -> Elements:
    top, left, bottom, right = border
    return plane[:, top:plane.shape[1] - bottom, left:plane.shape[2] - right]
