"""Blocks of strips and vectors of outputs: which are worth trying, by a model of cycles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.jobs import cuts
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.matrix.chunks import COLUMNS, Lines, begins, best_words, count
from gkp.converter.native.kernels.matrix.strips import ROWS, Strip
from gkp.converter.native.program import Conv

REGISTERS = 8
_SHAPES = ((2, 2), (1, 4), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1), (1, 1))
_AHEAD = 3
"""Registers of sums, twice as many of which leave enough for what is multiplied."""
_ROW, _SPLIT, _STORE, _RESIDUAL, _CALL, _LATENCY = 0.55, 3.0, 3.5, 4.0, 20.0, 52.0
"""Cycles, measured: to load a row of a register, and if it lies in two lines of the cache; to make elements of a vector of
sums, to add a residual to it, to begin and end a block; from a product to the next one that is added to the same sums, or
until these can be stored."""
_LINE, _SAMPLE = 64, 4


@dataclass(frozen=True)
class Tile:
    """What is summed at once: strips x vectors registers of sums. words: of 32 bits in a row of a chunk; joined: a row of
    the window is one line (chunks.lines). ahead: the next sums are begun before these are stored. by_strip: all outputs of
    some strips before the next strips."""

    strips: int
    vectors: int
    words: int
    joined: bool
    dot: Dot
    ahead: bool = False
    by_strip: bool = False

    @property
    def label(self) -> str:
        return (f"{self.dot.precision} {self.sort} {self.strips}x{self.vectors}{' ahead' if self.ahead else ''} "
                f"words {self.words}{' by strip' if self.by_strip else ''}")

    @property
    def sort(self) -> str:
        return f"matrix{' rows' if self.joined else ''}"


def tiles(found: Lines, joined: bool, dot: Dot, strips: Sequence[Strip]) -> Iterator[Tile]:
    """Those that the layer is large enough for."""
    outputs = -(-len(found.weights) // COLUMNS)
    for rows, vectors in _SHAPES:
        if rows <= len(strips) and vectors <= outputs:
            words = best_words(found, vectors, dot)
            for ahead in (False, True)[:1 + (rows * vectors < _AHEAD)]:
                yield Tile(rows, vectors, words, joined, dot, ahead)
                if vectors < outputs and rows < len(strips):
                    yield Tile(rows, vectors, words, joined, dot, ahead, by_strip=True)


def cycles(found: Lines, tile: Tile, strips: Sequence[Strip], step: Conv, source: Layout) -> float:
    """Of one image, by the model: a product takes as many cycles as a matrix has rows."""
    blocks, total = cuts(len(strips), tile.strips), 0.0
    per_vector = _STORE + (0.0 if step.residual is None else _RESIDUAL)
    pixels = sum(strip.pixels for strip in strips) / len(strips)
    row = _ROW + _SPLIT * split(found, tile, strips, step, source)
    for vectors, items in count(found, tile.vectors, tile.words, tile.dot):
        for lo, hi in blocks:
            products = (hi - lo) * vectors * max(pixels, tile.words)
            loads = (hi - lo) * pixels * row + vectors * tile.words * _ROW
            total += items * max(products, loads, _LATENCY if items > 1 else 0.0) + (hi - lo) * vectors * pixels * per_vector
            total += _CALL + (0.0 if tile.ahead else _LATENCY)
    few = found.weights.size < len(strips) * ROWS  # weights, by pixels
    return total * (1.0 if tile.by_strip == few else 1.005)


def split(found: Lines, tile: Tile, strips: Sequence[Strip], step: Conv, source: Layout) -> float:
    """Share of the pixels' rows that lie in two lines of the cache, of a few strips."""
    starts, (dy, dx) = begins(found, tile.vectors, tile.words, tile.dot), step.conv.dilations
    if not len(starts):
        return 0.0
    lines = np.array([y * dy * source.row + x * dx * source.column for y, x in found.places])
    pixels = np.array([strip.source + k * step.conv.strides[1] * source.column
                       for strip in strips[:_SAMPLE] for k in range(strip.pixels)])
    first = (lines[starts[:, 0]] + starts[:, 1])[:, None] + pixels
    return float(np.mean(first * source.value.dtype.bytes % _LINE + 4 * tile.words > _LINE))


def executed(found: Lines, tile: Tile, strips: Sequence[Strip]) -> int:
    """Multiply-accumulates of one image."""
    pixels = sum(strip.pixels for strip in strips)
    products = sum(v * n for v, n in count(found, tile.vectors, tile.words, tile.dot))
    return pixels * products * tile.words * tile.dot.word * COLUMNS
