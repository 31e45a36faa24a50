"""The graph of one device under construction: tensors that are parts of the network's, and taking less or another order of
them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from gkp.converter.graph import Graph, Tensor
from gkp.converter.lower.candidates import Candidate
from gkp.edge.divide.tiles import Tile


class LocalTensor(NamedTuple):
    """A tensor of a device's graph, and the part of the network's tensor that it is; its channels may be in any order."""

    tensor: Tensor
    tile: Tile


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


def take(builder: Builder, held: LocalTensor, tile: Tile) -> LocalTensor:
    """This part of it, channels in this order; nothing is done where it is all."""
    tensor, start = held.tensor, held.tile.rows[0]
    if tile.rows != held.tile.rows:
        tensor = builder.graph.take(tensor, range(tile.rows[0] - start, tile.rows[1] - start), 2, "rows")
    if tile.channels != held.tile.channels:
        place = {c: k for k, c in enumerate(held.tile.channels)}
        tensor = builder.graph.take(tensor, [place[c] for c in tile.channels], 1)
    return LocalTensor(tensor, tile)
