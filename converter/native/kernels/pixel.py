"""Direct convolution with vectors of pixels: planar layouts, any branch, stride 1.

A tile is a few output channels of one branch times a few vectors of pixels, held in registers. The input channels are
read through the branch's index list; weights lie in the order in which the tile reads them. A vector covers pixels of
one row, several whole rows (where rows are short), or a stretch of the plane taken as one line, halo cells included
(computed in vain and stored as zero).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import ceil
from typing import Any

import numpy as np

from gkp.branched import Branch
from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.jobs import Words, cuts, entry, part_sizes
from gkp.converter.native.kernels.kernel import Draft, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.taps import is_sparse, macs, sizes, used, with_rest
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv

Spot = tuple[int, int]
"""Row and column of a vector of a tile."""
_SPARE = 3  # registers for inputs and weights beside the accumulators


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


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 8) -> Iterator[Way]:
    """The family: the `most` best tiles by the model. In line mode both planes have the same row pitch."""
    for tile in tiles(step, source, target, cpu, most):
        recipe = Recipe(partial(_draft, step, tile, source, target, cpu))
        trial = Trial(recipe, source, residual, target, cycles(step, tile, source, target, cpu))
        count = macs(step.conv, windows=not is_sparse(step.conv))
        yield Way(layer_name(step), tile.label, trial, target.value.pixels * count, "pixel")


def _draft(step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> Draft:
    return Writer(step, tile, source, target, cpu).draft()


# ---- tiles ------------------------------------------------------------------------------------------------------
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


def tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu, most: int = 8) -> list[PixelTile]:
    """The tiles worth trying for these layouts, best first by the model, at most `most`; empty: none fits."""
    widest = max((len(b.out_index) for b in step.conv.branches), default=1)
    plane = target.value
    columns = ceil(plane.width / cpu.lanes) if plane.width >= cpu.lanes else 1
    length = ceil(((plane.height - 1) * target.row + plane.width) / cpu.lanes)
    found: list[PixelTile] = []
    for outputs in sorted({min(widest, n) for n in (1, 2, 3, 4, 6, 8)}, reverse=True):
        for line in (False, True):
            whole = length if line else max(1, plane.height * plane.width // cpu.lanes) if columns == 1 else plane.height
            fit = max(1, min((cpu.registers - _SPARE) // outputs // (1 if line else columns), whole))
            for n in _sizes(whole, fit):
                tile = PixelTile(outputs, n, line, by_tile=True)
                if fits(step, tile, source, target, cpu):
                    found += [tile, replace(tile, by_tile=False)]
    return sorted(found, key=lambda tile: cycles(step, tile, source, target, cpu))[:most]


def _sizes(whole: int, fit: int) -> list[int]:
    """How many vectors (or rows of them) a tile may have, at most `fit`: those that cut the whole evenly, and half."""
    exact = max(n for n in range(1, fit + 1) if whole % n == 0)
    return sorted({exact, *(-(-whole // -(-whole // n)) for n in (fit, max(1, fit * 3 // 4), max(1, fit // 2)))})


def cycles(step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model (gkp.converter.native.planning.timer)."""
    plane, (kh, kw) = target.value, step.conv.kernel_shape
    straddle = 2.0 if cpu.lanes >= 16 else 1.5
    if tile.line:
        vectors = ceil(((plane.height - 1) * target.row + plane.width) / cpu.lanes)
        per_tile = ceil(vectors / ceil(vectors / tile.vectors))
        count, loads = ceil(vectors / per_tile), per_tile * kh * kw * straddle
    else:
        rows = max(1, cpu.lanes // plane.width)
        columns = ceil(plane.width / cpu.lanes) if rows == 1 else 1
        per_tile, count = tile.vectors * columns, ceil(plane.height / (tile.vectors * rows))
        loads = kw * columns * (tile.vectors * rows + (kh - 1)) * (straddle if rows == 1 else 2.0)
    sparse, total = is_sparse(step.conv), 0.0
    for (inputs, outputs, taps), branches in sizes(step.conv).items():
        share = taps / max(1, kh * kw * inputs) if sparse else 1.0
        for size, parts in part_sizes(outputs, tile.outputs):
            spill = 1.5 if size * per_tile + _SPARE > cpu.registers else 1.0
            inner = max(size * per_tile * kh * kw, 4 * kh * kw, loads + size * kh * kw) / 2 * share * spill
            total += branches * parts * count * (inner * inputs + 2 * size * per_tile + 10)
    more_input = source.size > macs(step.conv, windows=True)  # than weights: keep the input in L1
    return total * (1.0 if tile.by_tile == more_input else 1.01)


# ---- kernel -----------------------------------------------------------------------------------------------------
_HEAD = '''
    // @w.kh@x@w.kw@ convolution, @conv.in_channels@ -> @conv.out_channels@ channels,
    // output @w.plane.height@x@w.plane.width@, tile: @w.tile.label@.
    constexpr int ROW = @w.source.row@, OUT_ROW = @w.target.row@;
    struct Job { int outputs, inputs, in, weights, out; };  // positions in words of the data

    @functions@
'''
_TILE = '''
    static void tile_@o@_@v@(const @w.element.c@* x, const int* in, int inputs, const @w.weight@* w, const int* out,
                             @w.element.c@* y@more@) {
      const float* bias = reinterpret_cast<const float*>(out + @o@);
      @sums@
      @store@
    }
'''
_SUMS = '''
    @begun@
    for (int i = 0; i < inputs; ++i) {
      const float* p = x + in[i];
      @multiply@
    }
'''
_LOOPS = '''
    @outer@
      @inner@ {
        const Job& job = jobs[j];
        const @w.element.c@* px = x + at@row@;
        @w.element.c@* py = y + at@out_row@;
        $if w.residual: const @w.element.c@* pr = r + at@out_row@;
        $if w.masked: const int* mask = words + @mask_at@ + at;
        switch (job.outputs) {
          @cases@
        }
      }
'''


class Writer:
    element, vector, weight = FLOAT32, "V", "float"
    """Of the values; what C++ calls a vector of them, and a weight."""
    load, load_rows = "load", "load_rows"

    def __init__(self, step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> None:
        self.step, self.tile, self.source, self.target, self.lanes = step, tile, source, target, cpu.lanes
        self.kh, self.kw = step.conv.kernel_shape
        self.dy, self.dx = step.conv.dilations
        self.top, self.left = step.conv.pads[0], step.conv.pads[1]
        self.branches = with_rest(step.conv)
        self.sparse = is_sparse(step.conv)  # zero taps: a list of taps instead of whole windows
        self.residual = step.residual is not None
        self.plane = plane = target.value
        if tile.line:
            self.length = (plane.height - 1) * target.row + plane.width
            self.columns = [0]
            self.per_vector = 1
        else:
            self.per_vector = max(1, self.lanes // plane.width)
            starts = [*range(0, plane.width - self.lanes, self.lanes), plane.width - self.lanes]
            self.columns = starts if self.per_vector == 1 else [0]
        self.masked = tile.line and target.row > plane.width
        self.jobs = [(b, slice(lo, hi)) for b in self.branches for lo, hi in cuts(len(b.out_index), tile.outputs)]

    # ---- data ---------------------------------------------------------------------------------------------------
    def _data(self) -> bytes:
        """Job table, then masks, then per job: output offsets, bias, input offsets, weights (4-byte words)."""
        words = Words(len(self.jobs), 5)
        if self.masked:
            i = np.arange(self.length + self.lanes)
            words.put(np.where((i % self.target.row < self.target.value.width) & (i < self.length), -1, 0), np.int32)
        table, shared = [], dict[int, int]()
        for b, part in self.jobs:
            if id(b) not in shared:
                shared[id(b)] = words.put(self._offsets(b), np.int32)
            outs = b.out_index[part]
            out_at = words.put(outs * self.target.channel, np.int32)
            words.put(self.step.conv.bias[outs], np.float32)
            weights = self._put_weights(words, self._weights(b, part))
            table.append([len(outs), len(self._offsets(b)), shared[id(b)], weights, out_at])
        return words.bytes(table)

    def _put_weights(self, words: Words, weights: Any) -> int:
        return words.put(weights, np.float32)

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
    def draft(self) -> Draft:
        sizes = sorted({part.stop - part.start for _, part in self.jobs})
        starts = self._starts()
        variants = sorted({v for v, _ in starts})
        functions = [*self._rows(), *(self._tile(o, n) for n in variants for o in sizes)]
        head = fill(_HEAD, w=self, conv=self.step.conv, functions="\n".join(functions))
        counts = [(part.stop - part.start, len(used(b) if self.sparse else b.in_index)) for b, part in self.jobs]
        return Draft(unit(self._entry(sizes, starts), head, *[self.element] * 3), repr(counts), self._data)

    def _rows(self) -> list[str]:
        """Loads and stores of vectors that cover several rows."""
        if self.per_vector == 1:
            return []
        width = self.target.value.width
        return [join_rows("load_rows", "store_in", "ROW", width, self.per_vector)
                + join_rows("load_out", "store_rows", "OUT_ROW", width, self.per_vector)]

    def _starts(self) -> list[tuple[int, int]]:
        """(vectors, first pixel) of every tile: in line mode a position of the line, else a row."""
        if self.tile.line:
            n = -(-self.length // self.lanes)
            return [(hi - lo, max(0, min(lo * self.lanes, self.length - (hi - lo) * self.lanes)))
                    for lo, hi in cuts(n, self.tile.vectors)]
        step = self.tile.vectors * self.per_vector
        h = self.target.value.height
        return [(self.tile.vectors, min(y, h - step)) for y in range(0, h, step)]

    def _entry(self, sizes: list[int], starts: list[tuple[int, int]]) -> str:
        groups = [(v, [at for _, at in found]) for v, found in groupby(starts, key=lambda start: start[0])]
        row, out_row = ("", "") if self.tile.line else (" * ROW", " * OUT_ROW")
        more = (", pr" if self.residual else "") + (", mask" if self.masked else "")
        text = "".join(f"static const int start_{n}[] = {{{', '.join(map(str, found))}}};\n"
                       for n, (_, found) in enumerate(groups))
        for number, (v, _) in enumerate(groups):
            order = ["for (int j = begin; j < end; ++j)", f"for (int at : start_{number})"]
            outer, inner = reversed(order) if self.tile.by_tile else order
            weights = f"reinterpret_cast<const {self.weight}*>(words + job.weights)"
            cases = [f"case {s}: tile_{s}_{v}(px, words + job.in, job.inputs, {weights}, words + job.out, py{more}); break;"
                     for s in sizes]
            text += fill(_LOOPS, w=self, outer=outer, inner=inner, row=row, out_row=out_row, mask_at=5 * len(self.jobs),
                         cases=cases)
        first = self.source.origin - self.top * self.source.row - self.left
        return entry(len(self.jobs), first, self.target.origin, self.target.origin if self.residual else None, text)

    def _tile(self, outputs: int, vectors: int) -> str:
        spots = self._spots(vectors)
        more = (f", const {self.element.c}* r" if self.residual else "") + (", const int* mask" if self.masked else "")
        store = [line for o in range(outputs) for line in self._stores(o, spots)]
        return fill(_TILE, w=self, o=outputs, v=vectors, more=more, sums=self._sums(outputs, spots), store=store)

    def _sums(self, outputs: int, spots: list[Spot]) -> str:
        """C++: the sums a<output>_<vector> of a tile."""
        begun = [f"V {', '.join(f'a{o}_{s} = splat(bias[{o}])' for s in range(len(spots)))};" for o in range(outputs)]
        return fill(_SUMS, begun=begun, multiply=self._products("a", outputs, spots))

    def _products(self, sums: str, outputs: int, spots: list[Spot]) -> Iterator[str]:
        """What an input adds to the sums of this name."""
        return self._taps_body(sums, outputs, spots) if self.sparse else self._window_body(sums, outputs, spots)

    def _spots(self, vectors: int) -> list[Spot]:
        """(row, column) of each vector of a tile, in the plane; in line mode (0, position)."""
        if self.tile.line:
            last = max(0, self.length - self.lanes)  # the last vector overlaps the one before rather than spill
            return [(0, min(k * self.lanes, last)) for k in range(vectors)]
        return [(k * self.per_vector, c) for k in range(vectors) for c in self.columns]

    def _load(self, y: int, x: int) -> str:
        where = f"p + {y} * ROW + {x}" if y else f"p + {x}" if x else "p"
        return f"{self.load_rows if self.per_vector > 1 else self.load}({where})"

    def _taps_body(self, sums: str, outputs: int, spots: list[Spot]) -> Iterator[str]:
        for s, (y, x) in enumerate(spots):
            yield f"const {self.vector} x{s} = {self._load(y, x)};"
        for o in range(outputs):
            yield f"const {self.weight} w{o} = w[{o}];"
            yield from (f"{sums}{o}_{s} += x{s} * w{o};" for s in range(len(spots)))
        yield f"w += {outputs};"

    def _window_body(self, sums: str, outputs: int, spots: list[Spot]) -> Iterator[str]:
        for kx in range(self.kw):
            users: dict[Spot, list[tuple[int, int]]] = {}
            for s, (y, x) in enumerate(spots):
                for ky in range(self.kh):
                    users.setdefault((y + ky * self.dy, x + kx * self.dx), []).append((s, ky))
            yield "{"
            for n, ((y, x), users_here) in enumerate(sorted(users.items())):
                yield f"  const {self.vector} x{n} = {self._load(y, x)};"
                yield from (f"  {sums}{o}_{s} += x{n} * w[{(kx * self.kh + ky) * outputs + o}];"
                            for s, ky in users_here for o in range(outputs))
            yield "}"
        yield f"w += {outputs * self.kh * self.kw};"

    def _stores(self, o: int, spots: list[Spot]) -> Iterator[str]:
        yield f"float* y{o} = y + out[{o}];"
        if self.residual:
            yield f"const float* r{o} = r + out[{o}];"
        rows, loaded = ("_rows", "_out") if self.per_vector > 1 else ("", "")
        for s, (y, x) in enumerate(spots):
            at = f" + {y * self.target.row + x}" if y or x else ""
            value = activation(self.step.activation, f"a{o}_{s}")
            if self.residual:
                value = activation(self.step.final, f"{value} + load{loaded}(r{o}{at})")
            if self.masked:
                value = f"keep({value}, mask + {x})"
            if self.tile.line and self.length < self.lanes:
                yield f"store_first<{self.length}>(y{o}{at}, {value});"
            else:
                yield f"store{rows}(y{o}{at}, {value});"


# ---- several rows in a vector -----------------------------------------------------------------------------------
_LOAD_TWO = '''
    static inline @vector@ @name@(const @element@* p) {
      typedef @number@ Row __attribute__((vector_size(@bytes@), aligned(@aligned@), may_alias));
      const Row a = *reinterpret_cast<const Row*>(p), b = *reinterpret_cast<const Row*>(p + @row@);
      return __builtin_shufflevector(a, b, @order@);
    }
'''
_LOAD_MORE = '''
    static inline @vector@ @name@(const @element@* p) {
      @vector@ v;
      for (int i = 0; i < @rows@; ++i)
        __builtin_memcpy(reinterpret_cast<@number@*>(&v) + i * @width@, p + i * @row@, @bytes@);
      return v;
    }
'''
_STORE = '''
    static inline void @name@(@element@* p, @vector@ v) {
      for (int i = 0; i < @rows@; ++i)
        __builtin_memcpy(p + i * @row@, reinterpret_cast<const @number@*>(&v) + i * @width@, @bytes@);
    }
'''


def join_rows(load: str, store: str, row: str, width: int, rows: int, element: DType = FLOAT32, vector: str = "V",
              number: str = "float") -> str:
    """C++ functions that load and store a vector of several whole rows of `width` elements, `row` elements apart."""
    order = ", ".join(map(str, range(width * rows)))
    values = {"row": row, "rows": rows, "width": width, "bytes": element.bytes * width, "order": order, "vector": vector,
              "number": number, "element": element.c, "aligned": element.bytes}
    return fill(_LOAD_TWO if rows == 2 else _LOAD_MORE, name=load, **values) + fill(_STORE, name=store, **values)
