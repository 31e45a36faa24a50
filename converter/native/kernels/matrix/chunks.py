"""Columns of the first matrix, rows of the second: elements of the window that lie side by side, and their weights.

Of a window's row all pixels lie side by side where it is not dilated, so that a chunk may reach over several. A panel's
chunks cover what its outputs use, which the weights tell: narrow branches that read few channels have fewer chunks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.jobs import cuts

BYTES = 64
"""Of a row of a tile register."""
COLUMNS = 16
"""Sums in a row of a tile register."""


@dataclass(frozen=True, eq=False)
class Lines:
    """The layer's window as lines of elements side by side. weights: [F, lines, elements] as they are multiplied; places:
    (row of the window, column) where a line begins."""

    weights: npt.NDArray[Any]
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Chunks:
    """Of one panel of outputs, from the `first` on. words: of 32 bits in a row of a chunk; starts: [chunks, 2] line and
    element; weights: [chunks, vectors, words, 16, elements of a word]."""

    first: int
    vectors: int
    words: int
    starts: npt.NDArray[np.int64]
    weights: npt.NDArray[Any]


@lru_cache(maxsize=64)
def lines(conv: BranchedConv, pixel: int, weights: Callable[[BranchedConv], npt.NDArray[Any]], joined: bool) -> Lines:
    """pixel: elements from one pixel to the next; joined: a row of the window is one line."""
    (kh, kw), every = conv.kernel_shape, weights(conv)
    if not joined:
        flat = every.transpose(0, 2, 3, 1).reshape(conv.out_channels, kh * kw, conv.in_channels)
        return Lines(flat, tuple((y, x) for y in range(kh) for x in range(kw)))
    step = conv.dilations[1] * pixel
    flat = np.zeros((conv.out_channels, kh, (kw - 1) * step + conv.in_channels), every.dtype)
    for x in range(kw):
        flat[:, :, x * step:x * step + conv.in_channels] = every[:, :, :, x].transpose(0, 2, 1)
    return Lines(flat, tuple((y, 0) for y in range(kh)))


@lru_cache(maxsize=256)
def best_words(found: Lines, vectors: int, dot: Dot) -> int:
    """The fewest words in a row of a chunk with which as few chunks are enough as with the most."""
    used = _used(found, vectors)
    counts = {words: sum(len(_cover(line, words * dot.word)) for panel in used for line in panel)
              for words in range(1, BYTES // 4 + 1)}
    return min(words for words, count in counts.items() if count == min(counts.values()))


def chunks(found: Lines, vectors: int, words: int, dot: Dot) -> list[Chunks]:
    """The layer in panels of at most so many vectors of 16 outputs."""
    return [_panel(found, lo, hi - lo, words, dot, used)
            for (lo, hi), used in zip(_parts(found, vectors), _used(found, vectors), strict=True)]


def begins(found: Lines, vectors: int, words: int, dot: Dot) -> npt.NDArray[np.int64]:
    """[chunks, 2]: line and element where those of the first panel begin."""
    starts = [(n, start) for n, line in enumerate(_used(found, vectors)[0])
              for start in _within(line, words * dot.word, found.weights.shape[2])]
    return np.array(starts, np.int64).reshape(-1, 2)


@lru_cache(maxsize=256)
def count(found: Lines, vectors: int, words: int, dot: Dot) -> list[tuple[int, int]]:
    """(vectors, chunks) of each panel."""
    return [(hi - lo, sum(len(_cover(line, words * dot.word)) for line in used))
            for (lo, hi), used in zip(_parts(found, vectors), _used(found, vectors), strict=True)]


def _parts(found: Lines, vectors: int) -> list[tuple[int, int]]:
    return cuts(-(-len(found.weights) // COLUMNS), vectors)


@lru_cache(maxsize=64)
def _used(found: Lines, vectors: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Of each panel and line, the elements that have a weight."""
    kept = found.weights != 0
    return tuple(tuple(tuple(np.flatnonzero(line).tolist()) for line in kept[lo * COLUMNS:hi * COLUMNS].any(0))
                 for lo, hi in _parts(found, vectors))


def _cover(used: tuple[int, ...], size: int) -> list[int]:
    """Where chunks of so many elements begin that cover these."""
    starts, k = list[int](), 0
    while k < len(used):
        starts.append(used[k])
        k = bisect_left(used, used[k] + size, k)
    return starts


def _within(used: tuple[int, ...], size: int, length: int) -> list[int]:
    """The same for chunks that end with the line: beyond it may lie what is no number."""
    return [max(0, min(start, length - size)) for start in _cover(used, size)]


def _panel(found: Lines, lo: int, vectors: int, words: int, dot: Dot, used: tuple[tuple[int, ...], ...]) -> Chunks:
    size, own = words * dot.word, found.weights[lo * COLUMNS:(lo + vectors) * COLUMNS]
    length = own.shape[2]
    padded = np.zeros((vectors * COLUMNS, own.shape[1], length + size), own.dtype)
    padded[:len(own), :, :length] = own
    starts, weights = list[tuple[int, int]](), list[npt.NDArray[Any]]()
    for line, of_line in enumerate(used):
        end = 0
        for begin in _within(of_line, size, length):
            part = padded[:, line, begin:begin + size].copy()
            part[:, :max(0, end - begin)] = 0
            starts.append((line, begin))
            weights.append(part.reshape(vectors, COLUMNS, words, dot.word).transpose(0, 2, 1, 3))
            end = begin + size
    return Chunks(lo * COLUMNS, vectors, words, np.array(starts, np.int64).reshape(-1, 2),
                  np.array(weights, own.dtype).reshape(-1, vectors, words, COLUMNS, dot.word))
