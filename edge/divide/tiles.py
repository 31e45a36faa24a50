"""Parts of a tensor: some of its channels (axis 1) by a range of its rows (axis 2). Exact set arithmetic on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gkp.converter.graph import Tensor
from gkp.errors import UnsupportedModelError


@dataclass(frozen=True)
class Tile:
    """channels: sorted numbers on axis 1; rows: (first, end) on axis 2. A tensor without such an axis, or that is only
    taken whole, counts as one channel, or one row."""

    channels: tuple[int, ...]
    rows: tuple[int, int]

    @property
    def size(self) -> int:
        """Channels times rows."""
        return len(self.channels) * (self.rows[1] - self.rows[0])

    def __and__(self, other: Tile) -> Tile | None:
        """What both hold, None when that is nothing."""
        rows = max(self.rows[0], other.rows[0]), min(self.rows[1], other.rows[1])
        if rows[0] >= rows[1]:
            return None
        channels = self.channels
        if channels is not other.channels and channels != other.channels:
            theirs = set(other.channels)
            channels = tuple(c for c in channels if c in theirs)
        return Tile(channels, rows) if channels else None

    def minus(self, other: Tile) -> list[Tile]:
        """The rest without what `other` holds, as disjoint tiles."""
        common = self & other
        if common is None:
            return [self]
        taken = () if common.channels is self.channels else set(common.channels)
        rest = tuple(c for c in self.channels if c not in taken) if taken else ()
        parts = [Tile(rest, self.rows)] if rest else []
        for rows in ((self.rows[0], common.rows[0]), (common.rows[1], self.rows[1])):
            if rows[0] < rows[1]:
                parts.append(Tile(common.channels, rows))
        return parts


def whole(tensor: Tensor) -> Tile:
    """All of a tensor. UnsupportedModelError when its shape is not known."""
    shape = tensor.shape
    if shape is None or not all(isinstance(n, int) for n in shape):
        raise UnsupportedModelError(f"the shape of {tensor.name!r} is not known", "give --input-shape")
    channels = shape[1] if len(shape) > 1 else 1
    return Tile(_first(channels), (0, shape[2] if len(shape) > 2 else 1))


@lru_cache(maxsize=256)
def _first(channels: int) -> tuple[int, ...]:
    """One object for each number: comparing it with itself takes no time."""
    return tuple(range(channels))


def without(tiles: Iterable[Tile], taken: Tile) -> list[Tile]:
    """The tiles without what `taken` holds."""
    return [part for tile in tiles for part in tile.minus(taken)]


def union(tiles: Iterable[Tile]) -> list[Tile]:
    """The same set as few disjoint tiles."""
    found: list[Tile] = []
    for tile in sorted(set(tiles), key=lambda r: -r.size):
        rest = [tile]
        for other in found:
            rest = without(rest, other)
        found += rest
    return _joined(found)


def _joined(tiles: list[Tile]) -> list[Tile]:
    """Tiles of the same rows become one, and those of the same channels whose rows touch."""
    by_rows: dict[tuple[int, int], set[int]] = {}
    for tile in tiles:
        by_rows.setdefault(tile.rows, set()).update(tile.channels)
    by_channels: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for rows, channels in sorted(by_rows.items()):
        stacked = by_channels.setdefault(tuple(sorted(channels)), [])
        if stacked and stacked[-1][1] == rows[0]:
            stacked[-1] = stacked[-1][0], rows[1]
        else:
            stacked.append(rows)
    return [Tile(channels, rows) for channels, stacked in by_channels.items() for rows in stacked]


def cover(wanted: Iterable[Tile], owners: Sequence[tuple[int, Tile]]) -> list[tuple[int, Tile]]:
    """Which owner sends what, so that every wanted part comes once: [(owner, tile)]. Owners that come first are asked
    first. ValueError when nobody has a part."""
    sent: list[tuple[int, Tile]] = []
    rest = list(wanted)
    for owner, tile in owners:
        if not rest:
            break
        given = [common for part in rest if (common := part & tile)]
        if given:
            sent += [(owner, part) for part in _joined(given)]
            rest = without(rest, tile)
    if rest:
        raise ValueError(f"nobody has {rest[0]}")
    return sent
