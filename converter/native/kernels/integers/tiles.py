"""Tiles of output pixels and vectors of channels: which are worth trying, by a model of cycles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.integers.panels import QUAD, Panel, panels
from gkp.converter.native.kernels.jobs import cuts
from gkp.converter.native.program import Conv, Value

Tap = tuple[int, int]
_SHAPES = ((1, 1), (1, 3), (1, 4), (1, 5), (1, 6), (1, 7), (1, 8), (1, 9), (1, 12), (1, 14), (1, 16), (1, 20), (1, 24),
           (1, 28), (2, 2), (2, 3), (2, 4), (2, 5), (2, 7), (2, 8), (2, 14), (3, 2), (3, 3), (3, 4), (3, 7), (3, 8), (4, 2),
           (4, 4), (4, 5), (4, 7), (7, 2))
"""Rows and columns of output pixels, cut to the plane."""
_MOST_VECTORS = 8
_STORE, _PICK, _CALL = 7.0, 0.6, 16.0
"""Cycles: to make bytes of a vector of sums, of a shuffle beside the products, to begin and end a tile."""


@dataclass(frozen=True)
class Tile:
    """vectors: of output channels; rows, columns: output pixels. taps: rows and columns of the part of the window that is
    worked off together: what a pixel of the source gives is used for all of its taps in there. window: bytes from which
    every lane picks its channels (0: broadcast). by_tile: all output channels of some pixels before the next pixels."""

    vectors: int
    rows: int
    columns: int
    taps: Tap
    window: int
    by_tile: bool

    @property
    def label(self) -> str:
        return (f"int8 {self.sort} {self.vectors}x{self.rows}x{self.columns} taps {self.taps[0]}x{self.taps[1]}"
                f"{' by tile' if self.by_tile else ''}")

    @property
    def sort(self) -> str:
        return f"picked {self.window}" if self.window else "broadcast"

    @property
    def registers(self) -> int:
        weights = self.taps[0] * self.taps[1] * self.vectors
        return self.vectors * self.rows * self.columns + weights + (2 if self.window else 1)


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


def tiles(step: Conv, source: Value, target: Value, plane: tuple[int, int], windows: tuple[int, ...], cpu: Cpu,
          most: int) -> Iterator[Tile]:
    """The `most` best of each sort, best first. plane: rows and columns of the target as the tiles see them."""
    kh, kw = step.conv.kernel_shape
    vectors = ceil(target.channels / cpu.lanes)
    for window in windows:
        found = set[Tile]()
        for taps in {(1, 1), (1, kw), (kh, kw)}:
            for v in range(1, min(vectors, _MOST_VECTORS) + 1):
                for rows, columns in _SHAPES:
                    tile = Tile(v, min(rows, plane[0]), min(columns, plane[1]), taps, window, by_tile=False)
                    if tile.registers <= cpu.registers:
                        found |= {tile, replace(tile, by_tile=True)}
        yield from sorted(found, key=lambda t: cycles(step, t, source, plane, cpu))[:most]


def cycles(step: Conv, tile: Tile, source: Value, plane: tuple[int, int], cpu: Cpu) -> float:
    """Of one image, by the model: a product of vectors takes a cycle, and so does a load; shuffles go beside, in part."""
    conv = step.conv
    every = panels(conv, tile.vectors, cpu.lanes, tile.window)
    parts = conv.kernel_shape[0] * conv.kernel_shape[1] // (tile.taps[0] * tile.taps[1])
    count = ceil(plane[0] / tile.rows) * ceil(plane[1] / tile.columns)
    rows, columns = plane[0] / ceil(plane[0] / tile.rows), plane[1] / ceil(plane[1] / tile.columns)
    reads = len(places(conv, tile, tile.rows, tile.columns)) * rows * columns / (tile.rows * tile.columns)
    total = 0.0
    for panel in every:
        products = rows * columns * panel.vectors * tile.taps[0] * tile.taps[1]
        loads = reads * max(1, tile.window // 64) + panel.vectors * tile.taps[0] * tile.taps[1] + 1
        inner = max(products + (_PICK * reads if tile.window else 0.1 * reads), loads, 4.0)
        total += count * (inner * parts * panel.items + _STORE * rows * columns * panel.vectors + _CALL)
    streams = conv.out_channels * conv.in_channels * conv.kernel_shape[0] * conv.kernel_shape[1] < source.size
    return total * (1.0 if tile.by_tile == streams else 1.005)


def shapes(tile: Tile, plane: tuple[int, int]) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By rows and columns of the tiles into which the plane is cut evenly: the first pixels of these."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y0, y1 in cuts(plane[0], tile.rows):
        for x0, x1 in cuts(plane[1], tile.columns):
            found.setdefault((y1 - y0, x1 - x0), []).append((y0, x0))
    return found


def executed(step: Conv, tile: Tile, target: Value, cpu: Cpu) -> int:
    """Multiply-accumulates of one image."""
    def of(panel: Panel) -> int:
        return panel.items * QUAD * panel.vectors * cpu.lanes

    taps = step.conv.kernel_shape[0] * step.conv.kernel_shape[1]
    return target.pixels * taps * sum(map(of, panels(step.conv, tile.vectors, cpu.lanes, tile.window)))
