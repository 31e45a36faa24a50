"""Tiles of output pixels and vectors of channels: which are worth trying, by a model of cycles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.cpu import MADD, Cpu
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.integers.panels import panels
from gkp.converter.native.kernels.jobs import cuts

Tap = tuple[int, int]
_SHAPES = ((1, 1), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (1, 9), (1, 12), (1, 14), (1, 16), (1, 20), (1, 24),
           (1, 28), (2, 2), (2, 3), (2, 4), (2, 5), (2, 7), (2, 8), (2, 14), (3, 2), (3, 3), (3, 4), (3, 7), (3, 8), (4, 2),
           (4, 4), (4, 5), (4, 7), (7, 2))
"""Rows and columns of output pixels, cut to the plane."""
_MOST_VECTORS = 8
_STORE, _CALL, _SPREAD, _PICK = 1.5, 12.0, 0.3, 0.55
"""Cycles, fitted to 324 kernels on Zen 4: to make bytes of a vector of sums (mostly beside the next tile's products), to
begin and end a tile, to give a pixel's word to all lanes, to pick from as many bytes as a vector has."""


@dataclass(frozen=True)
class Tile:
    """vectors: of output channels; rows, columns: output pixels. taps: rows and columns of the part of the window that is
    worked off together: what a pixel of the source gives is used for all of its taps in there. joined: a row of the window
    is one pixel (panels.joined). by_tile: all output channels of some pixels before the next pixels."""

    vectors: int
    rows: int
    columns: int
    taps: Tap
    dot: Dot
    joined: bool = False
    by_tile: bool = False

    @property
    def label(self) -> str:
        return (f"{self.dot.precision} {self.sort} {self.vectors}x{self.rows}x{self.columns} "
                f"taps {self.taps[0]}x{self.taps[1]}{' by tile' if self.by_tile else ''}")

    @property
    def sort(self) -> str:
        return f"{self.dot.name}{' rows' if self.joined else ''}"

    @property
    def registers(self) -> int:
        """What the inner loop holds at once, but for one of the weights of several taps, which may be loaded again."""
        taps = self.taps[0] * self.taps[1]
        inputs = 3 + self.dot.window_bytes // 128 if self.dot.window else 1
        return self.vectors * (self.rows * self.columns + taps) + inputs + (MADD in self.dot.needs) - (taps > 1)


def groups(conv: BranchedConv, tile: Tile) -> list[tuple[Tap, list[Tap]]]:
    """The parts of the window: the first tap of each, and all of them from there."""
    (kh, kw), (gh, gw) = conv.kernel_shape, tile.taps
    inner = [(y, x) for y in range(gh) for x in range(gw)]
    return [((y, x), inner) for y in range(0, kh, gh) for x in range(0, kw, gw)]


def places(conv: BranchedConv, tile: Tile, rows: int, columns: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By place in the source (row, column): the (pixel of a tile, tap of a group) that it is a factor of."""
    (sy, sx), (dy, dx), (gh, gw) = conv.strides, conv.dilations, tile.taps
    users: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for p in range(rows * columns):
        for t in range(gh * gw):
            place = p // columns * sy + t // gw * dy, p % columns * sx + t % gw * dx
            users.setdefault(place, []).append((p, t))
    return dict(sorted(users.items()))


def tiles(conv: BranchedConv, plane: tuple[int, int], dot: Dot, is_joined: bool, cpu: Cpu, most: int) -> list[Tile]:
    """The `most` best of one sort, best first. plane: rows and columns of the target as the tiles see them."""
    (kh, kw), found = conv.kernel_shape, set[Tile]()
    for taps in {(1, 1), (1, kw), (kh, kw)}:
        for v in range(1, min(ceil(conv.out_channels / cpu.lanes), _MOST_VECTORS) + 1):
            for rows, columns in _SHAPES:
                tile = Tile(v, min(rows, plane[0]), min(columns, plane[1]), taps, dot, is_joined)
                if tile.registers <= cpu.registers:
                    found |= {tile, replace(tile, by_tile=True)}
    return sorted(found, key=lambda t: cycles(conv, t, plane, cpu))[:most]


def cycles(conv: BranchedConv, tile: Tile, plane: tuple[int, int], cpu: Cpu) -> float:
    """Of one image, by the model: a product of vectors takes a cycle, and so does a load; shuffles go beside, in part."""
    every = panels(conv, tile.vectors, cpu.lanes, tile.dot)
    parts = conv.kernel_shape[0] * conv.kernel_shape[1] // (tile.taps[0] * tile.taps[1])
    count = ceil(plane[0] / tile.rows) * ceil(plane[1] / tile.columns)
    rows, columns = plane[0] / ceil(plane[0] / tile.rows), plane[1] / ceil(plane[1] / tile.columns)
    reads = rows * columns
    for axis, (n, taps) in enumerate(zip((tile.rows, tile.columns), tile.taps, strict=True)):
        reads *= len({p * conv.strides[axis] + t * conv.dilations[axis] for p in range(n) for t in range(taps)}) / n
    total, wide = 0.0, max(1, tile.dot.window_bytes // (4 * cpu.lanes))
    for panel in every:
        products = rows * columns * panel.vectors * tile.taps[0] * tile.taps[1]
        loads = reads * wide + panel.vectors * tile.taps[0] * tile.taps[1] + 1
        inner = max(products + reads * (_PICK * wide if tile.dot.window else _SPREAD), loads, 4.0)
        total += count * (inner * parts * panel.items + _STORE * rows * columns * panel.vectors + _CALL)
    few = conv.out_channels * conv.kernel_shape[0] * conv.kernel_shape[1] < plane[0] * plane[1]  # weights, by pixels
    return total * (1.0 if tile.by_tile == few else 1.005)


def shapes(tile: Tile, plane: tuple[int, int]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By rows and columns of the tiles into which the plane is cut evenly: the first pixels of these."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y0, y1 in cuts(plane[0], tile.rows):
        for x0, x1 in cuts(plane[1], tile.columns):
            found.setdefault((y1 - y0, x1 - x0), []).append((y0, x0))
    return found


def executed(conv: BranchedConv, tile: Tile, pixels: int, cpu: Cpu) -> int:
    """Multiply-accumulates of one image."""
    vectors = sum(panel.items * panel.vectors for panel in panels(conv, tile.vectors, cpu.lanes, tile.dot))
    return pixels * conv.kernel_shape[0] * conv.kernel_shape[1] * vectors * tile.dot.word * cpu.lanes
