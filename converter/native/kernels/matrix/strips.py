"""Rows of the first matrix: pixels of the target at one distance from each other in the source."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.native.kernels.jobs import cuts
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Conv

ROWS = 16
"""Of a tile register."""


@dataclass(frozen=True)
class Run:
    """Pixels of a strip that are pixels of the target: from the `first` of the strip on, `count` side by side in a row.
    target, residual: elements from the buffer's begin to the first."""

    first: int
    count: int
    target: int
    residual: int


@dataclass(frozen=True)
class Strip:
    """pixels: rows of the matrix; source: elements from the buffer's begin to the first one's window."""

    pixels: int
    source: int
    runs: tuple[Run, ...]


def strips(step: Conv, plane: tuple[int, int], source: Layout, target: Layout, residual: Layout | None) -> list[Strip]:
    """The target's pixels, each in one strip. plane: rows and columns of the target as they lie in memory. A strip lies
    within a row, or goes on into the next ones, over what lies between them, where fewer strips are enough then."""
    there = residual or target
    rows = [_strip(step, [(y, x0, x1 - x0)], x1 - x0, source, target, there)
            for y in range(plane[0]) for x0, x1 in cuts(plane[1], ROWS)]
    (sy, sx), pitch = step.conv.strides, source.row // source.column
    if sy != sx or plane[0] == 1:
        return rows
    across = _across(step, plane, pitch, source, target, there)
    return across if len(across) < len(rows) else rows


def _across(step: Conv, plane: tuple[int, int], pitch: int, source: Layout, target: Layout, there: Layout) -> list[Strip]:
    """From the first pixel that is in none yet, as far as a strip reaches. pitch: pixels from row to row."""
    height, width = plane
    found, y, x = list[Strip](), 0, 0
    while y < height:
        begin, parts, end = y * pitch + x, list[tuple[int, int, int]](), 0
        while y < height and y * pitch + x < begin + ROWS:
            count = min(width - x, begin + ROWS - (y * pitch + x))
            parts.append((y, x, count))
            end = y * pitch + x + count
            y, x = (y, x + count) if x + count < width else (y + 1, 0)
        found.append(_strip(step, parts, end - begin, source, target, there))
    return found


def _strip(step: Conv, parts: list[tuple[int, int, int]], pixels: int, source: Layout, target: Layout,
           there: Layout) -> Strip:
    """parts: (row, first column, columns) of the target."""
    (sy, sx), (top, left) = step.conv.strides, step.conv.pads[:2]
    pitch = source.row // source.column
    (y0, x0, _), begin = parts[0], parts[0][0] * pitch + parts[0][1]
    runs = tuple(Run(y * pitch + x - begin, count, target.offset(0, y, x), there.offset(0, y, x)) for y, x, count in parts)
    return Strip(pixels, source.offset(0, y0 * sy - top, x0 * sx - left), runs)
