"""Direct convolution with vectors of pixels: planar layouts, any branch, stride 1.

A tile is a few output channels of one branch times a few vectors of pixels, held in registers. The input channels are
read through the branch's index list; weights lie in the order in which the tile reads them. A vector covers pixels of
one row, several whole rows (where rows are short), or a stretch of the plane taken as one line, halo cells included
(computed in vain and stored as zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from gkp.branched import Branch
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import FUNCTION, SIGNATURE, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.taps import is_sparse, used, with_rest
from gkp.converter.native.program import Conv


@dataclass(frozen=True)
class PixelTile:
    """outputs: most output channels per tile. vectors: vectors of pixels per tile (rows mode: rows of vectors).
    line: the plane is one line of pixels; else a tile covers whole rows. by_tile: all output channels of one tile of
    pixels before the next (inputs stay in L1), else all pixels of one group of output channels (weights stay in L1)."""

    outputs: int
    vectors: int
    line: bool
    by_tile: bool

    @property
    def label(self) -> str:
        return (f"pixel {self.outputs}x{self.vectors}{' line' if self.line else ' rows'}"
                f"{' by tile' if self.by_tile else ''}")


def pixel_kernel(step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> Recipe:
    """The kernel of a convolution with stride 1. The source's halo covers the pads; in line mode both planes have the
    same row pitch. A residual has the target's layout."""
    return _Writer(step, tile, source, target, cpu).recipe()


def fits(step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> bool:
    """Can this tile compute the step with these layouts?"""
    if step.conv.strides != (1, 1) or not (source.planar and target.planar):
        return False
    w = target.value.width
    if tile.line:
        return source.row == target.row
    if w >= cpu.lanes:
        return -(-w // cpu.lanes) <= 8 and target.value.height >= tile.vectors
    return cpu.lanes % w == 0 and target.value.height * w >= cpu.lanes * tile.vectors


class _Writer:
    def __init__(self, step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> None:
        self.step, self.tile, self.source, self.target, self.lanes = step, tile, source, target, cpu.lanes
        self.kh, self.kw = step.conv.kernel_shape
        self.dy, self.dx = step.conv.dilations
        self.top, self.left = step.conv.pads[0], step.conv.pads[1]
        self.branches = with_rest(step.conv)
        self.sparse = is_sparse(step.conv)  # zero taps: a list of taps instead of whole windows
        plane = target.value
        if tile.line:
            self.length = (plane.height - 1) * target.row + plane.width
            self.columns = [0]
            self.per_vector = 1
        else:
            self.per_vector = max(1, self.lanes // plane.width)
            starts = [*range(0, plane.width - self.lanes, self.lanes), plane.width - self.lanes]
            self.columns = starts if self.per_vector == 1 else [0]
        self.masked = tile.line and target.row > plane.width

    # ---- data ---------------------------------------------------------------------------------------------------
    def _jobs(self) -> list[tuple[Branch, slice]]:
        jobs = []
        for b in self.branches:
            n = len(b.out_index)
            parts = -(-n // self.tile.outputs)
            cuts = [n * k // parts for k in range(parts + 1)]
            jobs += [(b, slice(lo, hi)) for lo, hi in pairwise(cuts)]
        return jobs

    def _data(self, jobs: Sequence[tuple[Branch, slice]]) -> bytes:
        """Job table, then masks, then per job: output offsets, bias, input offsets, weights (4-byte words)."""
        words: list[np.ndarray[tuple[int], np.dtype[np.uint32]]] = []
        at = 5 * len(jobs)

        def put(values: object, kind: type) -> int:
            nonlocal at
            array = np.ascontiguousarray(values, kind).ravel().view(np.uint32)
            words.append(array)
            at += array.size
            return at - array.size

        if self.masked:
            i = np.arange(self.length + self.lanes)
            put(np.where((i % self.target.row < self.target.value.width) & (i < self.length), -1, 0), np.int32)
        table, shared = [], {}
        for b, part in jobs:
            key = id(b)
            if key not in shared:
                shared[key] = put(self._offsets(b), np.int32)
            outs = b.out_index[part]
            out_at = put(outs * self.target.channel, np.int32)
            put(self.step.conv.bias[outs], np.float32)
            weights = put(self._weights(b, part), np.float32)
            table.append([len(outs), len(self._offsets(b)), shared[key], weights, out_at])
        return np.concatenate([np.asarray(table, np.int32).ravel().view(np.uint32), *words]).tobytes()

    def _offsets(self, b: Branch) -> Any:
        """Of what the inner loop runs over: the branch's channels, or its taps that are not zero for all outputs."""
        if not self.sparse:
            return b.in_index * self.source.channel
        c, ky, kx = used(b).T
        return b.in_index[c] * self.source.channel + ky * self.dy * self.source.row + kx * self.dx

    def _weights(self, b: Branch, part: slice) -> Any:
        """In the order of reading: channel, kx, ky, output; or tap, output."""
        if not self.sparse:
            return b.weight[part].transpose(1, 3, 2, 0)
        c, ky, kx = used(b).T
        return b.weight[part][:, c, ky, kx].T

    # ---- source -------------------------------------------------------------------------------------------------
    def recipe(self) -> Recipe:
        jobs = self._jobs()
        sizes = sorted({part.stop - part.start for _, part in jobs})
        tiles = self._tiles()
        variants = sorted({v for v, _ in tiles})
        functions = [self._function(o, v) for v in variants for o in sizes]
        mask_at = 5 * len(jobs)
        source = "\n".join([*self._head(), *functions, self._entry(sizes, tiles, len(jobs), mask_at)])
        counts = [(part.stop - part.start, len(self._offsets(b))) for b, part in jobs]
        return Recipe(source, repr(counts), lambda: self._data(jobs))

    def _head(self) -> list[str]:
        v, c = self.target.value, self.step.conv
        lines = ['#include "gkp.h"',
                 f"// {self.kh}x{self.kw} convolution, {c.in_channels} -> {c.out_channels} channels,",
                 f"// output {v.height}x{v.width}, tile: {self.tile.label}.",
                 f"constexpr int ROW = {self.source.row}, OUT_ROW = {self.target.row};",
                 "struct Job { int outputs, inputs, in, weights, out; };  // positions in words of the data", ""]
        if self.per_vector > 1:
            width = self.target.value.width
            lines += [*join_rows("load_rows", "store_in", "ROW", width, self.per_vector),
                      *join_rows("load_out", "store_rows", "OUT_ROW", width, self.per_vector), ""]
        return lines

    def _tiles(self) -> list[tuple[int, int]]:
        """(vectors, first pixel) of every tile: in line mode a position of the line, else a row."""
        if self.tile.line:
            n = -(-self.length // self.lanes)
            parts = -(-n // self.tile.vectors)
            cuts = [n * k // parts for k in range(parts + 1)]
            return [(hi - lo, max(0, min(lo * self.lanes, self.length - (hi - lo) * self.lanes)))
                    for lo, hi in pairwise(cuts)]
        step = self.tile.vectors * self.per_vector
        h = self.target.value.height
        return [(self.tile.vectors, min(y, h - step)) for y in range(0, h, step)]

    def _entry(self, sizes: list[int], tiles: list[tuple[int, int]], jobs: int, mask_at: int) -> str:
        o = self.source.origin - self.top * self.source.row - self.left
        residual = self.step.residual is not None
        lines = [f'extern "C" void {FUNCTION}({SIGNATURE}) {{',
                 "  const int* words = reinterpret_cast<const int*>(data);",
                 "  const float* floats = reinterpret_cast<const float*>(data);",
                 "  const Job* jobs = reinterpret_cast<const Job*>(data);",
                 f"  const int begin = first_of({jobs}, part, parts), end = first_of({jobs}, part + 1, parts);",
                 f"  x += {o};", f"  y += {self.target.origin};"]
        if residual:
            lines.append(f"  r += {self.target.origin};")
        groups: list[tuple[int, list[int]]] = []
        for v, at in tiles:
            if not groups or groups[-1][0] != v:
                groups.append((v, []))
            groups[-1][1].append(at)
        for number, (_, starts) in enumerate(groups):
            lines.append(f"  static const int start_{number}[] = {{{', '.join(map(str, starts))}}};")
        job, pixels = "  for (int j = begin; j < end; ++j)", "  for (int at : start_{n})"
        for number, (v, _) in enumerate(groups):
            loops = [pixels.format(n=number), job] if self.tile.by_tile else [job, pixels.format(n=number)]
            lines += [loops[0], "  " + loops[1] + " {", "      const Job& job = jobs[j];",
                      *self._at(mask_at), "      switch (job.outputs) {"]
            more = (", pr" if residual else "") + (", mask" if self.masked else "")
            lines += [f"        case {s}: tile_{s}_{v}(px, words + job.in, job.inputs, floats + job.weights, "
                      f"words + job.out, py{more}); break;" for s in sizes]
            lines += ["      }", "    }"]
        return "\n".join([*lines, "}", ""])

    def _at(self, mask_at: int) -> list[str]:
        row, out = ("", "") if self.tile.line else (" * ROW", " * OUT_ROW")
        lines = [f"      const float* px = x + at{row};", f"      float* py = y + at{out};"]
        if self.step.residual is not None:
            lines.append(f"      const float* pr = r + at{out};")
        if self.masked:
            lines.append(f"      const int* mask = words + {mask_at} + at;")
        return lines

    def _function(self, outputs: int, vectors: int) -> str:
        spots = self._spots(vectors)
        residual = ", const float* r" if self.step.residual is not None else ""
        mask = ", const int* mask" if self.masked else ""
        lines = [f"static void tile_{outputs}_{vectors}(const float* x, const int* in, int inputs, const float* w, "
                 f"const int* out, float* y{residual}{mask}) {{",
                 f"  const float* bias = reinterpret_cast<const float*>(out + {outputs});"]
        for o in range(outputs):
            lines.append("  V " + ", ".join(f"a{o}_{s} = splat(bias[{o}])" for s in range(len(spots))) + ";")
        lines.append("  for (int i = 0; i < inputs; ++i) {")
        lines.append("    const float* p = x + in[i];")
        lines += self._taps_body(outputs, spots) if self.sparse else self._window_body(outputs, spots)
        lines.append("  }")
        for o in range(outputs):
            lines += self._stores(o, spots)
        return "\n".join([*lines, "}", ""])

    def _spots(self, vectors: int) -> list[tuple[int, int]]:
        """(row, column) of each vector of a tile, in the plane; in line mode (0, position)."""
        if self.tile.line:
            last = max(0, self.length - self.lanes)  # the last vector overlaps the one before rather than spill
            return [(0, min(k * self.lanes, last)) for k in range(vectors)]
        return [(k * self.per_vector, c) for k in range(vectors) for c in self.columns]

    def _load(self, y: int, x: int) -> str:
        where = f"p + {y} * ROW + {x}" if y else f"p + {x}" if x else "p"
        return f"load_rows({where})" if self.per_vector > 1 else f"load({where})"

    def _taps_body(self, outputs: int, spots: list[tuple[int, int]]) -> list[str]:
        lines = []
        for s, (y, x) in enumerate(spots):
            lines.append(f"    const V x{s} = {self._load(y, x)};")
        for o in range(outputs):
            lines.append(f"    const float w{o} = w[{o}];")
            lines += [f"    a{o}_{s} += x{s} * w{o};" for s in range(len(spots))]
        return [*lines, f"    w += {outputs};"]

    def _window_body(self, outputs: int, spots: list[tuple[int, int]]) -> list[str]:
        lines = []
        for kx in range(self.kw):
            users: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for s, (y, x) in enumerate(spots):
                for ky in range(self.kh):
                    users.setdefault((y + ky * self.dy, x + kx * self.dx), []).append((s, ky))
            lines.append("    {")
            for n, ((y, x), users_here) in enumerate(sorted(users.items())):
                lines.append(f"      const V x{n} = {self._load(y, x)};")
                for s, ky in users_here:
                    for o in range(outputs):
                        lines.append(f"      a{o}_{s} += x{n} * w[{(kx * self.kh + ky) * outputs + o}];")
            lines.append("    }")
        return [*lines, f"    w += {outputs * self.kh * self.kw};"]

    def _stores(self, o: int, spots: list[tuple[int, int]]) -> list[str]:
        lines = [f"  float* y{o} = y + out[{o}];"]
        if self.step.residual is not None:
            lines.append(f"  const float* r{o} = r + out[{o}];")
        for s, (y, x) in enumerate(spots):
            at = f" + {y * self.target.row + x}" if y or x else ""
            value = activation(self.step.activation, f"a{o}_{s}")
            rows = "_rows" if self.per_vector > 1 else ""
            if self.step.residual is not None:
                value = activation(self.step.final, f"{value} + load{rows and '_out'}(r{o}{at})")
            if self.masked:
                value = f"keep({value}, mask + {x})"
            if self.tile.line and self.length < self.lanes:
                lines.append(f"  store_part(y{o}{at}, {value}, {self.length});")
            else:
                lines.append(f"  store{rows}(y{o}{at}, {value});")
        return lines


def join_rows(load: str, store: str, row: str, width: int, rows: int) -> list[str]:
    """C++ functions that load and store a vector of several whole rows of `width` floats, `row` floats apart."""
    lanes = width * rows
    lines = [f"static inline V {load}(const float* p) {{"]
    if rows == 2:
        lines += [f"  typedef float Row __attribute__((vector_size({4 * width}), aligned(4), may_alias));",
                  f"  const Row a = *reinterpret_cast<const Row*>(p), b = *reinterpret_cast<const Row*>(p + {row});",
                  f"  return __builtin_shufflevector(a, b, {', '.join(map(str, range(lanes)))});"]
    else:
        lines += ["  V v;", f"  for (int i = 0; i < {rows}; ++i)",
                  f"    __builtin_memcpy(reinterpret_cast<float*>(&v) + i * {width}, p + i * {row}, {4 * width});",
                  "  return v;"]
    return [*lines, "}", f"static inline void {store}(float* p, V v) {{", f"  for (int i = 0; i < {rows}; ++i)",
            f"    __builtin_memcpy(p + i * {row}, reinterpret_cast<const float*>(&v) + i * {width}, {4 * width});", "}"]
