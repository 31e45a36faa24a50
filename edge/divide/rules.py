"""What one device must have, and do, to compute a part of a node's output: one rule per kind of operator.

A rule says along which axes the operator can be divided, which part of each input a part of the output needs, and writes the
operator for a part into a device's graph. What no rule knows is only computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from gkp.converter import node as branched_node
from gkp.converter.graph import Node, Tensor, is_branched, spatial, values
from gkp.converter.operators import is_batchnorm
from gkp.converter.quantiser import is_quantiser
from gkp.edge.divide import operators
from gkp.edge.divide.builder import Builder, LocalTensor, part_shape, take
from gkp.edge.divide.convs import Branches
from gkp.edge.divide.tiles import Tile, whole
from gkp.edge.divide.windows import window_of
from gkp.text import clean
from gkp.types import Array

CHANNELS, ROWS = "channels", "rows"
BOTH, BY_CHANNELS = frozenset({CHANNELS, ROWS}), frozenset({CHANNELS})
Held = Sequence[LocalTensor | None]


class Rule:
    """Computed whole, as it is; and what all rules have in common. One instance serves all parts of a node. kinds: how the
    node can be divided; exact: its inputs must hold just the channels that it needs, in their order."""

    kinds: frozenset[str] = frozenset()
    exact = True
    op: str | None = None
    """That computes a part, where it is not the node's own."""
    hint = "constant"
    """In the names of constants."""

    def __init__(self, node: Node) -> None:
        self.node = node

    @cached_property
    def all(self) -> Tile:
        """All of the first input."""
        return whole(self.node.inputs[0])

    @cached_property
    def out(self) -> Tile:
        """All of the first output."""
        return whole(self.node.outputs[0])

    def needs(self, out: Tile) -> list[Tile | None]:
        """The part of each input of the node that is read; None for constants and what is not read at all."""
        return [None if values(t) is not None or not t.name else self.reads(t, out) for t in self.node.inputs]

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        """The part of an input that a part of the output needs."""
        return whole(tensor)

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        """Append what computes the part `out` of every output; its tensors. held: the inputs' parts, None where nothing
        is read."""
        inputs = [self._input(builder, t, h, out) for t, h in zip(self.node.inputs, held, strict=True)]
        return self._add(builder, inputs, out)

    def _add(self, builder: Builder, inputs: Sequence[Tensor], out: Tile) -> list[Tensor]:
        first, *others = self.node.outputs
        outputs = [builder.tensor(first, out) if first.name else builder.graph.variable("unread", None),
                   *(builder.tensor(t, whole(t)) if t.name else builder.graph.variable("unread", None) for t in others)]
        builder.graph.add(self.op or self.node.op, inputs, outputs, name=clean(self.node.name), attrs=self._attrs(out),
                          domain=self.node.domain)
        return outputs

    def _input(self, builder: Builder, tensor: Tensor, held: LocalTensor | None, out: Tile) -> Tensor:
        """What stands for an input of the network's node: the held part, a constant, or nothing (optional)."""
        if held is not None:
            return held.tensor
        value = values(tensor)
        return tensor if value is None else builder.graph.constant(self.hint, self._constant(value, out))

    def _constant(self, value: Array, out: Tile) -> Array:
        """What a part needs of a constant input."""
        return value

    def _attrs(self, out: Tile) -> dict[str, Any]:
        """The attributes of the operator for a part."""
        return dict(self.node.attrs)


def rule_of(node: Node) -> Rule:
    """The rule for a node."""
    x, y = next((t for t in node.inputs if values(t) is None), None), node.outputs[0]
    if is_branched(node):
        return Branched(node)
    if (node.domain and not is_quantiser(node)) or x is None or len(node.outputs) > 1 or not operators.ranked(x, y):
        return Rule(node)
    return next((rule for fits, rule in _RULES if fits(node)), Rule)(node)


# ---- windows and planes -----------------------------------------------------------------------------------------------
class Branched(Rule):
    """gkp::BranchedConv. Any order of the input's channels will do: the branches' index lists follow it."""

    exact = False

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.branches, self.window = Branches(node), window_of(node)
        self.kinds = BOTH if self.window.divisible else BY_CHANNELS

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return Tile(self.branches.reads(out.channels), self.window.rows(out.rows))

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        x, y = _first(held), builder.tensor(self.node.outputs[0], out)
        part, form = self.branches.part(out.channels, x.tile.channels, spatial(y) or (1,))
        part = replace(part, pads=tuple(self.window.pads(out.rows)))
        builder.forms[branched_node.write(builder.graph, part, x.tensor, y, clean(self.node.name)).name] = form
        return [y]


class Channelwise(Rule):
    """A channel of the output is made of the same channel of the input, and of its whole plane."""

    kinds = BY_CHANNELS

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return Tile(out.channels, self.all.rows)


class _Windowed(Channelwise):
    """An element of the output is made of a window of its channel."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.window = window_of(node)
        self.kinds = BOTH if self.window.divisible else BY_CHANNELS

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return Tile(out.channels, self.window.rows(out.rows))


class Pool(_Windowed):
    """Maximum or average."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        if node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0):
            self.kinds = BY_CHANNELS

    def _attrs(self, out: Tile) -> dict[str, Any]:
        return {**self.node.attrs, "pads": self.window.pads(out.rows), "auto_pad": "NOTSET"}


class Depthwise(_Windowed):
    """A convolution with one filter per channel."""

    hint = "depthwise"

    def _constant(self, value: Array, out: Tile) -> Array:
        return value[list(out.channels)]

    def _attrs(self, out: Tile) -> dict[str, Any]:
        attrs = {**self.node.attrs, "pads": self.window.pads(out.rows), "group": len(out.channels)}
        attrs.pop("auto_pad", None)
        return attrs


class BatchNorm(Channelwise):
    """scale, shift, mean and variance per channel."""

    kinds = BOTH
    hint = "bn"

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return out

    def _constant(self, value: Array, out: Tile) -> Array:
        return value[list(out.channels)]


class Unflattened(Channelwise):
    """[N, C, 1..] -> [N, C, 1..] of another rank."""

    op = "Reshape"

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        shape = builder.graph.constant("shape", np.asarray(part_shape(self.node.outputs[0], out), np.int64))
        return self._add(builder, [_first(held).tensor, shape], out)

    def _attrs(self, out: Tile) -> dict[str, Any]:
        return {}


class RowSlice(Channelwise):
    """A range of rows: nothing but the part that is read."""

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        first, end = (int(np.asarray(values(t))[0]) for t in self.node.inputs[1:3])
        return Tile(out.channels, slice(first, end).indices(self.all.rows[1])[:2])

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        return [_first(held).tensor]


# ---- other elements, other channels -----------------------------------------------------------------------------------
class Elementwise(Rule):
    """Any number of inputs, broadcast against each other."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.kinds = BOTH if len(node.outputs[0].shape) > 2 else BY_CHANNELS

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        """Axes of length one are broadcast."""
        mine = whole(tensor)
        return Tile(out.channels if mine.channels == self.out.channels else mine.channels,
                    out.rows if mine.rows == self.out.rows else mine.rows)

    def _constant(self, value: Array, out: Tile) -> Array:
        rank = len(self.node.outputs[0].shape)
        for axis, index in ((1, np.asarray(out.channels)), (2, np.arange(*out.rows))):
            place = axis - rank + value.ndim
            if axis < rank and place >= 0 and value.shape[place] > 1 and index.size != value.shape[place]:
                value = np.take(value, index, axis=place)
        return value


class Flattened(Rule):
    """[N, C, ...] -> [N, C * ...]: a channel becomes as many as it has pixels."""

    kinds = BY_CHANNELS
    op = "Flatten"

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.pixels = prod(int(n) for n in node.inputs[0].shape[2:])

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return Tile(tuple(sorted({c // self.pixels for c in out.channels})), self.all.rows)

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        x = _first(held)
        made = Tile(tuple(c * self.pixels + k for c in x.tile.channels for k in range(self.pixels)), out.rows)
        return [take(builder, LocalTensor(self._add(builder, [x.tensor], made)[0], made), out).tensor]

    def _attrs(self, out: Tile) -> dict[str, Any]:
        return {"axis": 1}


class Matrix(Rule):
    """Gemm or MatMul of [N, K] with constant weights. Any order of the K inputs will do: the weights follow it."""

    kinds = BY_CHANNELS
    exact = False

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        x, (_, weight, *biases) = _first(held), (values(t) for t in self.node.inputs)
        transposed = bool(self.node.attrs.get("transB", 0))
        assert weight is not None
        if x.tile.channels != self.all.channels:
            weight = np.take(weight, x.tile.channels, axis=1 if transposed else 0)
        inputs = [x.tensor, builder.graph.constant("matrix", self._columns(weight, out, 0 if transposed else 1))]
        inputs += [builder.graph.constant("bias", self._columns(np.asarray(bias), out, -1)) for bias in biases]
        return self._add(builder, inputs, out)

    def _columns(self, array: Array, out: Tile, axis: int) -> Array:
        """The columns of the outputs in `out`; a bias may be one number for all."""
        full = array.ndim > 0 and array.shape[axis] == len(self.out.channels)
        return np.take(array, out.channels, axis=axis) if full and out.channels != self.out.channels else array


class Concatenated(Rule):
    """Along the channels."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.starts = np.cumsum([0, *(t.shape[1] for t in node.inputs)])
        self.kinds = BOTH if len(node.outputs[0].shape) > 2 else BY_CHANNELS

    def needs(self, out: Tile) -> list[Tile | None]:
        found: list[Tile | None] = []
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            mine = tuple(int(c - start) for c in out.channels if start <= c < end)
            found.append(Tile(mine, out.rows) if mine else None)
        return found

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        parts = [h.tensor for h in held if h is not None]
        return parts if len(parts) == 1 else self._add(builder, parts, out)

    def _attrs(self, out: Tile) -> dict[str, Any]:
        return {"axis": 1}


class Taken(Rule):
    """Gather of channels by constant numbers."""

    exact = False

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.index = [int(c) % len(self.all.channels) for c in np.asarray(values(node.inputs[1]))]
        self.kinds = BOTH if len(node.outputs[0].shape) > 2 else BY_CHANNELS

    def reads(self, tensor: Tensor, out: Tile) -> Tile:
        return Tile(tuple(sorted({self.index[c] for c in out.channels})), out.rows)

    def write(self, builder: Builder, held: Held, out: Tile) -> list[Tensor]:
        return [take(builder, _first(held), Tile(tuple(self.index[c] for c in out.channels), out.rows)).tensor]


def _first(held: Held) -> LocalTensor:
    assert held[0] is not None
    return held[0]


_RULES: tuple[tuple[Callable[[Node], bool], type[Rule]], ...] = (
    (operators.is_elementwise, Elementwise), (operators.is_pool, Pool), (operators.is_plane, Channelwise),
    (is_batchnorm, BatchNorm), (operators.is_depthwise_conv, Depthwise), (operators.is_flatten, Flattened),
    (operators.is_unflatten, Unflattened), (operators.is_matrix, Matrix), (operators.is_concat, Concatenated),
    (operators.is_take, Taken), (operators.is_row_slice, RowSlice))
