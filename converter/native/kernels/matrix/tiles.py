"""Blocks of strips and vectors of outputs: which are worth trying, by a model of cycles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.jobs import cuts
from gkp.converter.native.kernels.matrix.chunks import COLUMNS, Lines, best_words, count
from gkp.converter.native.kernels.matrix.strips import ROWS, Strip

REGISTERS = 8
_SHAPES = ((2, 2), (1, 4), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1), (1, 1))
_ROW, _STORE, _RESIDUAL, _CALL = 0.6, 2.6, 2.0, 40.0
"""Cycles: to load a row of a register, to make elements of a vector of sums, to add a residual to it, to begin and end a
block."""


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


def cycles(found: Lines, tile: Tile, strips: Sequence[Strip], residual: bool) -> float:
    """Of one image, by the model: a product takes as many cycles as a matrix has rows."""
    blocks, total = cuts(len(strips), tile.strips), 0.0
    per_vector = _STORE + (_RESIDUAL if residual else 0.0)
    pixels = sum(strip.pixels for strip in strips) / len(strips)
    for vectors, items in count(found, tile.vectors, tile.words, tile.dot):
        for lo, hi in blocks:
            products = (hi - lo) * vectors * max(pixels, tile.words)
            rows = (hi - lo) * pixels + vectors * tile.words
            total += items * max(products, rows * _ROW) + (hi - lo) * vectors * pixels * per_vector + _CALL
    few = found.weights.size < len(strips) * ROWS  # weights, by pixels
    return total * (1.0 if tile.by_strip == few else 1.005)


def executed(found: Lines, tile: Tile, strips: Sequence[Strip]) -> int:
    """Multiply-accumulates of one image."""
    pixels = sum(strip.pixels for strip in strips)
    products = sum(v * n for v, n in count(found, tile.vectors, tile.words, tile.dot))
    return pixels * products * tile.words * tile.dot.word * COLUMNS
