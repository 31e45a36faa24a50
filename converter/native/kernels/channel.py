"""Direct convolution with vectors of output channels: for branches of many outputs, small planes, any stride.

A tile is a few vectors of output channels of one branch times some output pixels (rows x columns), held in registers.
Every input pixel is read as a scalar, through a table of offsets (branch channel and tap), and multiplied with the
vectors of weights, which stream past in the order of reading. The source may lie in any layout; a channels-last target
takes whole vectors, others are scattered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import FUNCTION, SIGNATURE, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.taps import used, with_rest
from gkp.converter.native.program import Activation, Conv

_Words = npt.NDArray[np.uint32]
_JOB = 6
_LARGE = 1 << 16
"""Weights of a layer that does not stay in the caches: the next panel's are fetched while this one's are used."""


@dataclass(frozen=True)
class ChannelTile:
    """vectors: vectors of output channels per tile. rows, columns: output pixels per tile (a flat plane has one row).
    by_tile: all output channels of some pixels before the next pixels (inputs stay in L1), else all pixels of some
    output channels (their weights stay in cache)."""

    vectors: int
    rows: int
    columns: int
    by_tile: bool

    @property
    def label(self) -> str:
        return f"channel {self.vectors}x{self.rows}x{self.columns}{' by tile' if self.by_tile else ''}"


def channel_kernel(step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout | None,
                   cpu: Cpu) -> Recipe:
    """The kernel of a convolution. The source's halo covers the pads. A residual has the target's kind of layout."""
    return _Writer(step, tile, source, target, residual or target, cpu).recipe()


def is_flat(step: Conv, *layouts: Layout) -> bool:
    """May the plane be taken as one row of pixels?"""
    c = step.conv
    return (c.kernel_shape == (1, 1) and c.strides == (1, 1) and not any(c.pads)
            and all(at.row == at.value.width * at.column for at in layouts))


class _Writer:
    def __init__(self, step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout,
                 cpu: Cpu) -> None:
        self.step, self.tile, self.source, self.target, self.lanes = step, tile, source, target, cpu.lanes
        self.residual = residual
        self.height: int
        self.width: int
        flat = is_flat(step, source, target, residual)
        v = target.value
        self.height, self.width = (1, v.pixels) if flat else (v.height, v.width)
        sy, sx = step.conv.strides
        self.step_y, self.step_x = sy * source.row, sx * source.column
        self.branches = with_rest(step.conv)
        self.offsets = [self._offsets(b) for b in self.branches]
        self.straight = all((np.diff(offsets) == 1).all() for offsets in self.offsets)
        zero = all(k in (Activation.NONE, Activation.RELU, Activation.RELU6, Activation.SILU, Activation.HARDSWISH)
                   for k in (step.activation, step.final))
        weights = sum(len(offsets) * len(b.out_index) for b, offsets in zip(self.branches, self.offsets, strict=True))
        self.ahead = not tile.by_tile and weights > _LARGE
        self.whole = target.channel == 1 and all(self._contiguous(b, zero) for b in self.branches)

    def _contiguous(self, b: Branch, zero: bool) -> bool:
        """Whole vectors of the target: consecutive channels, and what lies in the last vector's spare lanes is padding."""
        n, first = len(b.out_index), int(b.out_index[0])
        if not (b.out_index == np.arange(first, first + n)).all():
            return False
        return n % self.lanes == 0 or (zero and first + n == self.target.value.channels and first % self.lanes == 0)

    def _order(self, b: Branch) -> npt.NDArray[np.int64]:
        """Rows (input, ky, kx) of the taps that count, in the order of reading: channels innermost where they lie side by
        side."""
        taps = used(b)
        return taps[np.lexsort((taps[:, 0], taps[:, 2], taps[:, 1]))] if self.source.channel == 1 else taps

    def _offsets(self, b: Branch) -> npt.NDArray[np.int64]:
        (dy, dx), s = self.step.conv.dilations, self.source
        c, ky, kx = self._order(b).T
        offsets: npt.NDArray[np.int64] = s.channel_offsets(b.in_index[c]) + ky * dy * s.row + kx * dx * s.column
        return offsets

    # ---- data ---------------------------------------------------------------------------------------------------
    def recipe(self) -> Recipe:
        panels = [(b, offsets, lo, hi) for b, offsets in zip(self.branches, self.offsets, strict=True)
                  for lo, hi in self._cuts(b)]
        counts = [((hi - lo) // self.lanes, len(offsets)) for _, offsets, lo, hi in panels]
        return Recipe(self._source(sorted({n for n, _ in counts}), len(panels)), repr(counts), lambda: self._data(panels))

    def _cuts(self, b: Branch) -> list[tuple[int, int]]:
        """Panels of output lanes of a branch, of at most the tile's vectors, as equal as they can be."""
        vectors = -(-len(b.out_index) // self.lanes)
        parts = -(-vectors // self.tile.vectors)
        return list(pairwise(vectors * k // parts * self.lanes for k in range(parts + 1)))

    def _data(self, panels: Sequence[tuple[Branch, npt.NDArray[np.int64], int, int]]) -> bytes:
        """Job table, then per branch its offsets, per panel its weights [taps, lanes], bias and output offsets (4-byte
        words; every array begins at a cache line)."""
        words: list[_Words] = []
        start = at = -(-_JOB * len(panels) // 16) * 16

        def put(values: object, kind: type) -> int:
            nonlocal at
            array = np.ascontiguousarray(values, kind).ravel().view(np.uint32)
            words.extend([array, np.zeros(-array.size % 16, np.uint32)])
            at += array.size + words[-1].size
            return at - array.size - words[-1].size

        table: list[list[int]] = []
        tables: dict[int, int] = {}
        for b, offsets, lo, hi in panels:
            if id(b) not in tables:
                tables[id(b)] = int(offsets[0]) if self.straight and len(offsets) else put(offsets, np.int32)
            outs = b.out_index[lo:hi]
            n = len(outs)
            c, ky, kx = self._order(b).T
            panel = np.zeros((len(offsets), hi - lo), np.float32)
            panel[:, :n] = b.weight[lo:hi][:, c, ky, kx].T
            bias = np.zeros(hi - lo, np.float32)
            bias[:n] = self.step.conv.bias[outs]
            size = (hi - lo) // self.lanes + (0 if self.whole else n << 8)
            table.append([size, len(offsets), tables[id(b)], put(panel, np.float32), put(bias, np.float32),
                          int(self.target.channel_offsets(outs[:1])[0]) if self.whole
                          else put(self.target.channel_offsets(outs), np.int32)])
        head = np.zeros(start, np.uint32)
        head[:_JOB * len(panels)] = np.asarray(table, np.int32).ravel().view(np.uint32)
        return np.concatenate([head, *words]).tobytes()

    # ---- source -------------------------------------------------------------------------------------------------
    def _shapes(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Tile shapes (rows, columns) with the first pixels (row, column) of their tiles: the plane cut evenly."""
        def cut(n: int, size: int) -> list[tuple[int, int]]:
            parts = -(-n // size)
            cuts = [n * k // parts for k in range(parts + 1)]
            return list(pairwise(cuts))

        shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for y0, y1 in cut(self.height, self.tile.rows):
            for x0, x1 in cut(self.width, self.tile.columns):
                shapes.setdefault((y1 - y0, x1 - x0), []).append((y0, x0))
        return [(r, c, at) for (r, c), at in shapes.items()]

    def _source(self, sizes: list[int], panels: int) -> str:
        v, c = self.target.value, self.step.conv
        kh, kw = c.kernel_shape
        shapes = self._shapes()
        lines = ['#include "gkp.h"',
                 f"// {kh}x{kw} convolution, {c.in_channels} -> {c.out_channels} channels, output {v.height}x{v.width},",
                 f"// tile: {self.tile.label}.",
                 "struct Job { int size, taps, in, weights, bias, out; };  // positions in words of the data", ""]
        if not self.whole:
            lines.append(_SCATTER)
        lines += [self._function(n, r, w) for r, w, _ in shapes for n in sizes]
        lines += [f'extern "C" void {FUNCTION}({SIGNATURE}) {{',
                  "  const int* words = reinterpret_cast<const int*>(data);",
                  "  const float* floats = reinterpret_cast<const float*>(data);",
                  "  const Job* jobs = reinterpret_cast<const Job*>(data);",
                  f"  const int begin = first_of({panels}, part, parts), end = first_of({panels}, part + 1, parts);",
                  f"  x += {self._origin()};", f"  y += {self.target.origin};"]
        if self.step.residual is not None:
            lines.append(f"  r += {self.residual.origin};")
        if self.ahead:
            lines.append("  int turn = 0;")
        for number, (r, w, starts) in enumerate(shapes):
            flat = ", ".join(f"{{{y * self.step_y + x * self.step_x}, {y * self.target.row + x * self.target.column}, "
                             f"{y * self.residual.row + x * self.residual.column}}}" for y, x in starts)
            lines.append(f"  static const struct {{ int in, out, residual; }} at_{number}[] = {{{flat}}};")
            job, pixels = "  for (int j = begin; j < end; ++j)", f"  for (const auto& at : at_{number})"
            loops = [pixels, job] if self.tile.by_tile else [job, pixels]
            lines += [loops[0], "  " + loops[1] + " {", "      const Job& job = jobs[j];"]
            if self.ahead:
                lines += [f"      const int vector = turn++ % {len(starts)};  // of the next panel, fetched meanwhile",
                          "      const bool more = j + 1 < end && vector < (job.size & 255);",
                          "      const float* ahead = floats + (more ? jobs[j + 1].weights + vector * LANES : job.weights);"]
            lines.append("      switch (job.size & 255) {")
            lines += [f"        case {n}: tile_{n}_{r}_{w}({self._arguments()}); break;" for n in sizes]
            lines += ["      }", "    }"]
        return "\n".join([*lines, "}", ""])

    def _origin(self) -> int:
        return self.source.origin - self.step.conv.pads[0] * self.source.row - self.step.conv.pads[1] * self.source.column

    def _arguments(self) -> str:
        table = "job.in" if self.straight else "words + job.in"
        out = "job.out" if self.whole else "words + job.out, job.size >> 8"
        return (f"x + at.in, {table}, job.taps, floats + job.weights, floats + job.bias, y + at.out, {out}"
                + (", r + at.residual" if self.step.residual is not None else "") + (", ahead" if self.ahead else ""))

    def _function(self, n: int, rows: int, columns: int) -> str:
        pixels = [(r, c) for r in range(rows) for c in range(columns)]
        table = "int first" if self.straight else "const int* in"
        out = "int out" if self.whole else "const int* out, int outputs"
        lines = [f"static void tile_{n}_{rows}_{columns}(const float* x, {table}, int taps, const float* w, "
                 f"const float* bias, float* y, {out}{', const float* r' if self.step.residual is not None else ''}"
                 f"{', const float* ahead' if self.ahead else ''}) {{"]
        if self.whole:
            lines.append("  y += out;")
        lines += [f"  V a{p}_{v} = load(bias + {v * self.lanes});" for p in range(len(pixels)) for v in range(n)]
        lines.append(f"  for (int i = 0; i < taps; ++i, w += {n * self.lanes}) {{")
        lines.append(f"    const float* p = x + {'first + i' if self.straight else 'in[i]'};")
        if self.ahead:
            lines.append(f"    __builtin_prefetch(ahead + i * {n * self.lanes}, 0, 2);")
        lines += [f"    const V w{v} = load(w + {v * self.lanes});" for v in range(n)]
        for p, (r, c) in enumerate(pixels):
            at = r * self.step_y + c * self.step_x
            lines.append("    " + " ".join(f"a{p}_{v} += w{v} * p[{at}];" for v in range(n)))
        lines.append("  }")
        return "\n".join([*lines, *self._stores(n, pixels), "}", ""])

    def _stores(self, n: int, pixels: list[tuple[int, int]]) -> list[str]:
        residual = self.step.residual is not None
        lines = ["  r += out;"] if self.whole and residual else []
        for p, (row, column) in enumerate(pixels):
            at = row * self.target.row + column * self.target.column
            there = row * self.residual.row + column * self.residual.column
            for v in range(n):
                value, o = activation(self.step.activation, f"a{p}_{v}"), v * self.lanes
                if residual:
                    added = f"load(r + {there + o})" if self.whole else f"gather(r + {there}, out + {o}, outputs - {o})"
                    value = activation(self.step.final, f"{value} + {added}")
                lines.append(f"  store(y + {at + o}, {value});" if self.whole
                             else f"  scatter(y + {at}, out + {o}, outputs - {o}, {value});")
        return lines


_SCATTER = """// The first n lanes to or from places of their own.
static inline void scatter(float* y, const int* at, int n, V v) {
  for (int i = 0; i < LANES && i < n; ++i) y[at[i]] = v[i];
}
static inline V gather(const float* r, const int* at, int n) {
  V v{};
  for (int i = 0; i < LANES && i < n; ++i) v[i] = r[at[i]];
  return v;
}
"""
