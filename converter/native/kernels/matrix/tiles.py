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
_ROW, _SPLIT, _STORE, _RESIDUAL, _CALL = 0.55, 3.0, 3.5, 4.0, 40.0
"""Cycles: to load a row of a register, and if it lies in two lines of the cache; to make elements of a vector of sums, to add
a residual to it, to begin and end a block."""
_LINE, _SAMPLE = 64, 4


@dataclass(frozen=True)
class Tile:
    """What is summed at once: strips x vectors registers of sums. words: of 32 bits in a row of a chunk; joined: a row of
    the window is one line (chunks.lines). by_strip: all outputs of some strips before the next strips."""

    strips: int
    vectors: int
    words: int
    joined: bool
    dot: Dot
    by_strip: bool = False

    @property
    def label(self) -> str:
        return (f"{self.dot.precision} {self.sort} {self.strips}x{self.vectors} words {self.words}"
                f"{' by strip' if self.by_strip else ''}")

    @property
    def sort(self) -> str:
        return f"matrix{' rows' if self.joined else ''}"


def tiles(found: Lines, joined: bool, dot: Dot, strips: Sequence[Strip]) -> Iterator[Tile]:
    """Those that the layer is large enough for."""
    outputs = -(-len(found.weights) // COLUMNS)
    for rows, vectors in _SHAPES:
        if rows <= len(strips) and vectors <= outputs:
            words = best_words(found, vectors, dot)
            yield Tile(rows, vectors, words, joined, dot)
            if vectors < outputs and rows < len(strips):
                yield Tile(rows, vectors, words, joined, dot, by_strip=True)


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
            total += items * max(products, loads) + (hi - lo) * vectors * pixels * per_vector + _CALL
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
