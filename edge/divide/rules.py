"""What one device must have, and do, to compute a part of a node's output: one rule per kind of operator.

A rule says along which axes the operator can be divided, which part of each input a part of the output needs, and writes the
operator for a part into a device's graph. What no rule knows is only computed whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

import numpy as np

from gkp.converter.graph import Node, Tensor, is_branched, values
from gkp.converter.operators import is_batchnorm
from gkp.converter.quantiser import is_quantiser
from gkp.edge.divide import operators
from gkp.edge.divide.builder import Builder, LocalTensor, part_shape, take
from gkp.edge.divide.convs import Branches
from gkp.edge.divide.tiles import Tile, whole
from gkp.edge.divide.windows import Window, window_of
from gkp.text import clean

CHANNELS, ROWS = "channels", "rows"
BOTH = frozenset({CHANNELS, ROWS})


class Rule(Protocol):
    """kinds: how the node can be divided. exact: its inputs must hold just the channels that it needs, in their order."""

    kinds: frozenset[str]
    exact: bool

    def needs(self, out: Tile) -> list[Tile | None]:
        """The part of each input of the node that is read; None for constants and what is not read at all."""
        ...

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        """Append what computes the part `out` of every output; its tensors."""
        ...


def rule_of(node: Node) -> Rule:
    """The rule for a node; one instance serves all parts of the node (it may keep what parts share)."""
    x, y = next((t for t in node.inputs if values(t) is None), None), node.outputs[0]
    if node.domain and not is_branched(node) and not is_quantiser(node):
        return Opaque(node)
    if is_branched(node):
        return Branched(node)
    if x is None or len(node.outputs) > 1 or not operators.ranked(x, y):
        return Opaque(node)
    for fits, rule in _RULES:
        if fits(node):
            return rule(node)
    return Opaque(node)


# ---- rules ------------------------------------------------------------------------------------------------------------
class Opaque:
    """Computed whole, as it is."""

    kinds: frozenset[str] = frozenset()
    exact = True

    def __init__(self, node: Node) -> None:
        self.node = node

    def needs(self, out: Tile) -> list[Tile | None]:
        return [None if values(t) is not None or not t.name else whole(t) for t in self.node.inputs]

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        inputs = [_input(builder, t, h) for t, h in zip(self.node.inputs, held, strict=True)]
        outputs = [builder.tensor(t, whole(t)) if t.name else builder.graph.variable("unread", None)
                   for t in self.node.outputs]
        builder.graph.add(self.node.op, inputs, outputs, name=clean(self.node.name), attrs=dict(self.node.attrs),
                          domain=self.node.domain)
        return outputs


def _input(builder: Builder, tensor: Tensor, held: LocalTensor | None) -> Tensor:
    """What stands for an input of the network's node: the held part, a copy of the constant, or nothing (optional)."""
    if held is not None:
        return held.tensor
    value = values(tensor)
    return tensor if value is None else builder.graph.constant("constant", value)


class _Single(ABC):
    """One data input, at place 0; subclasses say what is read and which parameters change."""

    kinds: frozenset[str] = BOTH
    exact = True

    def __init__(self, node: Node) -> None:
        self.node, self.x, self.y = node, node.inputs[0], node.outputs[0]
        self.all, self.out = whole(self.x), whole(self.y)

    @abstractmethod
    def reads(self, out: Tile) -> Tile:
        """What of the data input a part of the output needs."""

    def needs(self, out: Tile) -> list[Tile | None]:
        return [self.reads(out), *[None] * (len(self.node.inputs) - 1)]

    def _add(self, builder: Builder, inputs: Sequence[Tensor], out: Tile, op: str = "", **attrs: Any) -> list[Tensor]:
        y = builder.tensor(self.y, out)
        merged = {**self.node.attrs, **attrs} if not op else attrs
        builder.graph.add(op or self.node.op, inputs, [y], name=clean(self.node.name), attrs=merged)
        return [y]

    def _rest(self, builder: Builder) -> list[Tensor]:
        return [_input(builder, t, None) for t in self.node.inputs[1:]]


class Branched(_Single):
    """gkp::BranchedConv. Any order of the input's channels will do: the branches' index lists follow it."""

    exact = False

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.branches = Branches(node)
        self.window = Window.of_conv(self.branches.conv)
        if not self.window.divisible:
            self.kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(self.branches.reads(out.channels), self.window.rows(out.rows, self.out.rows, self.all.rows))

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        x = held[0]
        assert x is not None
        y = builder.tensor(self.y, out)
        pads = self.window.pads(out.rows, self.out.rows, self.all.rows)
        name, form = self.branches.write(builder.graph, x.tensor, x.channels, y, out.channels, pads)
        builder.forms[name] = form
        return [y]


class Depthwise(_Single):
    """One filter per channel."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.window = window_of(node)
        if not self.window.divisible:
            self.kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(out.channels, self.window.rows(out.rows, self.out.rows, self.all.rows))

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        parameters = [builder.graph.constant("depthwise", value[list(out.channels)]) for t in self.node.inputs[1:]
                      if (value := values(t)) is not None]
        pads = self.window.pads(out.rows, self.out.rows, self.all.rows)
        attrs = {**self.node.attrs, "pads": self.window.with_pads(pads), "group": len(out.channels)}
        attrs.pop("auto_pad", None)
        y = builder.tensor(self.y, out)
        builder.graph.add("Conv", [_tensor(held[0]), *parameters], [y], name=clean(self.node.name), attrs=attrs)
        return [y]


def _tensor(held: LocalTensor | None) -> Tensor:
    assert held is not None
    return held.tensor


class Pool(_Single):
    """Maximum or average over windows."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.window = window_of(node)
        if not self.window.divisible or (node.attrs.get("ceil_mode", 0) and node.attrs.get("count_include_pad", 0)):
            self.kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(out.channels, self.window.rows(out.rows, self.out.rows, self.all.rows))

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        pads = self.window.pads(out.rows, self.out.rows, self.all.rows)
        return self._add(builder, [_tensor(held[0])], out, pads=self.window.with_pads(pads), auto_pad="NOTSET")


class Plane(_Single):
    """One number per channel out of its whole plane."""

    kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(out.channels, self.all.rows)

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        return self._add(builder, [_tensor(held[0]), *self._rest(builder)], out)


class BatchNorm(_Single):
    """scale, shift, mean and variance per channel."""

    def reads(self, out: Tile) -> Tile:
        return out

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        parameters = [builder.graph.constant("bn", value[list(out.channels)]) for t in self.node.inputs[1:]
                      if (value := values(t)) is not None]
        return self._add(builder, [_tensor(held[0]), *parameters], out)


class Elementwise:
    """Any number of inputs, broadcast against each other."""

    kinds = BOTH
    exact = True

    def __init__(self, node: Node) -> None:
        self.node, self.y = node, node.outputs[0]
        self.kinds = BOTH if len(self.y.shape) > 2 else frozenset({CHANNELS})

    def needs(self, out: Tile) -> list[Tile | None]:
        return [None if values(t) is not None or not t.name else self._reads(t, out) for t in self.node.inputs]

    def _reads(self, tensor: Tensor, out: Tile) -> Tile:
        """Axes of length one are broadcast."""
        everything, mine = whole(self.y), whole(tensor)
        return Tile(out.channels if mine.channels == everything.channels else mine.channels,
                    out.rows if mine.rows == everything.rows else mine.rows)

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        inputs = [self._constant(builder, t, out) if h is None else h.tensor
                  for t, h in zip(self.node.inputs, held, strict=True)]
        y = builder.tensor(self.y, out)
        builder.graph.add(self.node.op, inputs, [y], name=clean(self.node.name), attrs=dict(self.node.attrs),
                          domain=self.node.domain)
        return [y]

    def _constant(self, builder: Builder, tensor: Tensor, out: Tile) -> Tensor:
        value = values(tensor)
        if value is None:
            return tensor
        rank = len(self.y.shape)
        for axis, index in ((1, np.asarray(out.channels)), (2, np.arange(*out.rows))):
            place = axis - rank + value.ndim
            if axis < rank and place >= 0 and value.shape[place] > 1 and index.size != value.shape[place]:
                value = np.take(value, index, axis=place)
        return builder.graph.constant("constant", value)


class Flattened(_Single):
    """[N, C, ...] -> [N, C * ...]: a channel becomes as many as it has pixels."""

    kinds = frozenset({CHANNELS})

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.pixels = prod(int(n) for n in self.x.shape[2:])

    def reads(self, out: Tile) -> Tile:
        return Tile(tuple(sorted({c // self.pixels for c in out.channels})), self.all.rows)

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        made = tuple(c * self.pixels + k for c in self.reads(out).channels for k in range(self.pixels))
        flat = self._add(builder, [_tensor(held[0])], Tile(made, out.rows), op="Flatten", axis=1)[0]
        return [flat if made == out.channels else take(builder, LocalTensor(flat, made, out.rows), out.channels).tensor]


class Unflattened(_Single):
    """[N, C, 1..] -> [N, C, 1..] of another rank."""

    kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(out.channels, self.all.rows)

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        shape = builder.graph.constant("shape", np.asarray(part_shape(self.y, out), np.int64))
        return self._add(builder, [_tensor(held[0]), shape], out, op="Reshape")


class Matrix(_Single):
    """Gemm or MatMul of [N, K] with constant weights. Any order of the K inputs will do: the weights follow it."""

    kinds = frozenset({CHANNELS})
    exact = False

    def reads(self, out: Tile) -> Tile:
        return self.all

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        x = held[0]
        assert x is not None
        transposed = bool(self.node.attrs.get("transB", 0))
        weight = values(self.node.inputs[1])
        assert weight is not None
        if x.channels != self.all.channels:
            weight = np.take(weight, x.channels, axis=1 if transposed else 0)
        inputs = [x.tensor, builder.graph.constant("matrix", self._columns(weight, out, 0 if transposed else 1))]
        if len(self.node.inputs) > 2:
            bias = np.asarray(values(self.node.inputs[2]))
            inputs.append(builder.graph.constant("bias", self._columns(bias, out, bias.ndim - 1)))
        return self._add(builder, inputs, out)

    def _columns(self, array: Any, out: Tile, axis: int) -> Any:
        """The columns of the outputs in `out`; a bias may be one number for all."""
        full = array.ndim > 0 and array.shape[axis] == len(self.out.channels)
        return np.take(array, out.channels, axis=axis) if full and out.channels != self.out.channels else array


class Concatenated:
    """Along the channels."""

    kinds = BOTH
    exact = True

    def __init__(self, node: Node) -> None:
        self.node, self.y = node, node.outputs[0]
        self.starts = np.cumsum([0, *(t.shape[1] for t in node.inputs)])
        self.kinds = BOTH if len(self.y.shape) > 2 else frozenset({CHANNELS})

    def needs(self, out: Tile) -> list[Tile | None]:
        found: list[Tile | None] = []
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            mine = tuple(int(c - start) for c in out.channels if start <= c < end)
            found.append(Tile(mine, out.rows) if mine else None)
        return found

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        parts = [h.tensor for h in held if h is not None]
        if len(parts) == 1:
            return parts
        y = builder.tensor(self.y, out)
        builder.graph.add("Concat", parts, [y], name=clean(self.node.name), attrs={"axis": 1})
        return [y]


class Taken(_Single):
    """Gather of channels by constant numbers."""

    exact = False

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        n = len(self.all.channels)
        self.index = [int(c) % n for c in np.asarray(values(node.inputs[1]))]
        self.kinds = BOTH if len(self.y.shape) > 2 else frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        return Tile(tuple(sorted({self.index[c] for c in out.channels})), out.rows)

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        x = held[0]
        assert x is not None
        return [take(builder, x, tuple(self.index[c] for c in out.channels)).tensor]


class RowSlice(_Single):
    """A range of rows: nothing but the part that is read."""

    kinds = frozenset({CHANNELS})

    def reads(self, out: Tile) -> Tile:
        height = self.all.rows[1]
        start, end = (int(np.clip(v + height if v < 0 else v, 0, height)) for v in (
            int(np.asarray(values(t))[0]) for t in self.node.inputs[1:3]))
        return Tile(out.channels, (start, end))

    def write(self, builder: Builder, held: Sequence[LocalTensor | None], out: Tile) -> list[Tensor]:
        return [_tensor(held[0])]


_RULES: tuple[tuple[Callable[[Node], bool], Callable[[Node], Rule]], ...] = (
    (operators.is_elementwise, Elementwise), (operators.is_pool, Pool), (operators.is_plane, Plane),
    (is_batchnorm, BatchNorm), (operators.is_depthwise_conv, Depthwise), (operators.is_flatten, Flattened),
    (operators.is_unflatten, Unflattened), (operators.is_matrix, Matrix), (operators.is_concat, Concatenated),
    (operators.is_take, Taken), (operators.is_row_slice, RowSlice))
