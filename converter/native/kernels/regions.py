"""Regions of a plane whose pixels see the same part of the window: what lies in the pads is zero and need not be read.

Of a 3x3 convolution of a 7x7 plane 18 % of the products have a factor in the pads, of one with dilation 12 of a 20x20 plane
64 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.program import Value

Span = tuple[int, int]
"""[first, end)."""


@dataclass(frozen=True)
class Region:
    """Pixels of the target (rows, columns), and the rows and columns of the window (down, across) that lie inside the source
    for all of them."""

    rows: Span
    columns: Span
    down: Span
    across: Span

    @property
    def height(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]

    def runs(self, taps: npt.NDArray[np.int64]) -> list[Span]:
        """Which of the taps (rows (input, ky, kx)) the region needs, as stretches of their order."""
        _, y, x = taps.T
        needed = (y >= self.down[0]) & (y < self.down[1]) & (x >= self.across[0]) & (x < self.across[1])
        edges = np.flatnonzero(np.diff(np.concatenate([[False], needed, [False]]).astype(np.int8)))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


@lru_cache(maxsize=1024)
def _axis(size: int, outputs: int, kernel: int, stride: int, dilation: int, pad: int) -> tuple[tuple[Span, Span], ...]:
    """(outputs, taps) along one axis: stretches of outputs that see the same taps inside an axis of `size`."""
    def seen(at: int) -> Span:
        inside = [k for k in range(kernel) if 0 <= at * stride + k * dilation - pad < size]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    found = []
    for taps, group in groupby(range(outputs), key=seen):
        places = list(group)
        found.append(((places[0], places[-1] + 1), taps))
    return tuple(found)


def whole(conv: BranchedConv, height: int, width: int) -> tuple[Region, ...]:
    """A plane as one region that sees all of the window."""
    return (Region((0, height), (0, width), (0, conv.kernel_shape[0]), (0, conv.kernel_shape[1])),)


def regions(conv: BranchedConv, source: Value, target: Value) -> tuple[Region, ...]:
    """The regions of a plane, 2-D."""
    axes = [_axis(size, out, k, s, d, p) for size, out, k, s, d, p in zip(
        (source.height, source.width), (target.height, target.width), conv.kernel_shape, conv.strides, conv.dilations,
        conv.pads, strict=False)]
    return tuple(Region(rows, columns, down, across) for rows, down in axes[0] for columns, across in axes[1])


def share(conv: BranchedConv, found: tuple[Region, ...]) -> float:
    """Of the pixels times the taps of the window: the part that regions compute."""
    kept = sum(r.height * r.width * (r.down[1] - r.down[0]) * (r.across[1] - r.across[0]) for r in found)
    pixels = sum(r.height * r.width for r in found)
    return kept / max(1, pixels * conv.kernel_shape[0] * conv.kernel_shape[1])
