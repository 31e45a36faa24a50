"""The graph of one device under construction: tensors that are parts of the network's, and taking less or another order of
them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from gkp.converter.graph import Graph, Tensor
from gkp.converter.lower.candidates import Candidate
from gkp.edge.divide.tiles import Tile


class LocalTensor(NamedTuple):
    """A tensor of a device's graph: these channels of the network's tensor, in this order, by these rows."""

    tensor: Tensor
    channels: tuple[int, ...]
    rows: tuple[int, int]


@dataclass(frozen=True)
class Builder:
    """A device's graph under construction. forms: how the convolutions in it are to be lowered, by name."""

    graph: Graph
    forms: dict[str, Candidate] = field(default_factory=dict)

    def tensor(self, like: Tensor, tile: Tile) -> Tensor:
        """A new one for a part of the network's tensor."""
        return self.graph.variable("part", like.dtype, part_shape(like, tile))


def part_shape(tensor: Tensor, tile: Tile) -> list[int]:
    """Shape of a part of a tensor."""
    shape = [int(n) for n in tensor.shape]
    if len(shape) > 1:
        shape[1] = len(tile.channels)
    if len(shape) > 2:
        shape[2] = tile.rows[1] - tile.rows[0]
    return shape


def take(builder: Builder, held: LocalTensor, channels: tuple[int, ...]) -> LocalTensor:
    """These channels of it, in this order: a Slice where they are neighbours, else a Gather; nothing where they are all."""
    if channels == held.channels:
        return held
    place = {c: k for k, c in enumerate(held.channels)}
    index = np.asarray([place[c] for c in channels], np.int64)
    out = builder.graph.variable("taken", held.tensor.dtype, [held.tensor.shape[0], len(channels), *held.tensor.shape[2:]])
    if np.array_equal(index, np.arange(index[0], index[0] + index.size)):
        builder.graph.add("Slice", [held.tensor, *_bounds(builder, int(index[0]), int(index[0]) + index.size, 1)], [out])
    else:
        builder.graph.add("Gather", [held.tensor, builder.graph.constant("index", index)], [out], attrs={"axis": 1})
    return LocalTensor(out, channels, held.rows)


def take_rows(builder: Builder, held: LocalTensor, rows: tuple[int, int]) -> LocalTensor:
    """These rows of it."""
    if rows == held.rows:
        return held
    first, end = rows[0] - held.rows[0], rows[1] - held.rows[0]
    shape = [*held.tensor.shape[:2], end - first, *held.tensor.shape[3:]]
    out = builder.graph.variable("rows", held.tensor.dtype, shape)
    builder.graph.add("Slice", [held.tensor, *_bounds(builder, first, end, 2)], [out])
    return LocalTensor(out, held.channels, rows)


def _bounds(builder: Builder, first: int, end: int, axis: int) -> list[Tensor]:
    return [builder.graph.constant("slice", np.array([v], np.int64)) for v in (first, end, axis)]
