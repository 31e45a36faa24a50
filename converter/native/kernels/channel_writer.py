"""The kernel of direct convolution with vectors of output channels (gkp.converter.native.kernels.channel).

Large weights come from memory, so they are read once: all tiles of the plane use a block of them, which stays in cache, and
together fetch the next block meanwhile. Where a panel (the weights of one tile's outputs) is larger than a block, the target
holds the sums of the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch
from gkp.converter.native.kernels.channel_tile import FAR, LARGE, ChannelTile, tile_plane, tile_regions
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.jobs import Words, cuts, entry
from gkp.converter.native.kernels.kernel import Draft, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.taps import macs, used, with_rest
from gkp.converter.native.program import Activation, Conv, zero_at_zero
from gkp.types import Floats

_Offsets = npt.NDArray[np.int64]
_LINE = 16
"""Elements of a line of the cache."""
_BLOCK = 1 << 13
"""Most weights of such a layer that the tiles of a plane use in turn before the next ones, in cache meanwhile: larger panels
are cut, and the target holds the sums of the first parts."""
_HEAD = '''
    // @kh@x@kw@ convolution, @conv.in_channels@ -> @conv.out_channels@ channels, output @v.height@x@v.width@,
    // tile: @tile.label@.
    struct Job { int size, taps, in, weights, bias, out; };  // positions in words of the data; taps: how many, or stretches

    @functions@
'''
_SCATTER = '''
    // The first n lanes to or from places of their own.
    static inline void scatter(float* y, const int* at, int n, V v) {
      for (int i = 0; i < LANES && i < n; ++i) y[at[i]] = v[i];
    }
    static inline V gather(const float* r, const int* at, int n) {
      V v{};
      for (int i = 0; i < LANES && i < n; ++i) v[i] = r[at[i]];
      return v;
    }
'''
_TILE = '''
    static @result@ tile_@n@_@r@_@c@(const float* x, @at@, @taps@, const float* bias, float* y, @out@@more@) {
      $if w.whole: y += out;
      $if w.adds_whole: r += out;
      V @sums@;
      @begin@
      @loop@
      @store@
      $if w.ahead: return ahead;
    }
'''
_TAPS = '''
    for (int i = @first@; i < @end@; ++i, w += @step@) {
      const float* p = x + @place@;
      @fetch@
      @weights@
      @products@
    }
'''
_RUNS = '''
    for (const int* run = runs; run < runs + @count@; run += 2) {
      const float* w = weights + run[0] * @step@;
      @loop@
    }
'''
_BEGIN = '''
    if (block == 0) {
      @bias@
    } else {
      @sums@
    }
'''
_END = '''
    if (block == @last@) {
      @results@
    } else {
      @sums@
    }
'''
_STARTS = '''
    static const struct { int in, out, residual@runs@; } at_@number@[] = {@starts@};
'''
_BY_TILE = '''
    for (const auto& at : at_@number@)
      for (int j = begin; j < end; ++j) {
        const Job& job = jobs[j];
        @next@
        @call@
      }
'''
_BY_PANEL = '''
    for (int j = begin * @w.blocks@; j < end * @w.blocks@; ++j) {
      const Job& job = jobs[j];
      $if w.cut: const int block = j % @w.blocks@;
      $if w.ahead: const bool more = j + 1 < end * @w.blocks@;  // else it is the next layer's that lies behind
      $if w.ahead: const float* ahead = floats + (more ? jobs[j + 1].weights : job.bias);
      @tiles@
    }
'''
_OF_SHAPE = '''
    for (const auto& at : at_@number@) {
      @call@
    }
'''
_CALL = '''
    switch (job.size & 255) {
      @cases@
    }
'''


@dataclass(frozen=True, eq=False)
class _Part:
    """Some inputs of a branch. taps: those that count, rows (input, ky, kx) in the order of reading; offsets: where they are
    read."""

    branch: Branch
    taps: _Offsets
    offsets: _Offsets


@dataclass(frozen=True)
class _Stream:
    """Values that are needed soon. at: of the present tile, in C; first: from there to them; size: elements; write: for
    writing (1) or reading (0); near: how near the processor they shall be (2: in L2, 3: in L1)."""

    at: str
    first: int
    size: int
    write: int
    near: int

    def per_tap(self, taps: int) -> int:
        """Elements to fetch for each of so many taps."""
        return ceil(self.size / max(1, taps))


@lru_cache(maxsize=64)
def _parts(step: Conv, source: Layout, by_window: bool, blocks: int) -> tuple[tuple[_Part, ...], ...]:
    """Of every branch, cut into so many parts: channels innermost where they lie side by side, or by_window."""
    (dy, dx), found = step.conv.dilations, list[tuple[_Part, ...]]()
    for b in with_rest(step.conv):
        taps, parts = used(b), list[_Part]()
        if by_window or source.channel == 1:
            taps = taps[np.lexsort((taps[:, 0], taps[:, 2], taps[:, 1]))]
        for k in range(blocks):
            low, high = (len(b.in_index) * n // blocks for n in (k, k + 1))
            c, ky, kx = here = taps[(taps[:, 0] >= low) & (taps[:, 0] < high)].T
            offsets = source.channel_offsets(b.in_index[c]) + ky * dy * source.row + kx * dx * source.column
            parts.append(_Part(b, here.T, offsets))
        found.append(tuple(parts))
    return tuple(found)


def draft(step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout, cpu: Cpu) -> Draft:
    """residual: the target's layout where there is none."""
    return _Writer(step, tile, source, target, residual, cpu).draft()


class _Writer:
    def __init__(self, step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout,
                 cpu: Cpu) -> None:
        self.step, self.tile, self.source, self.target, self.lanes = step, tile, source, target, cpu.lanes
        self.residual, self.has_residual = residual, step.residual is not None
        self.height, self.width = tile_plane(step, source, residual, target)
        sy, sx = step.conv.strides
        self.step_y, self.step_x = sy * source.row, sx * source.column
        zero = zero_at_zero(step.activation) and zero_at_zero(step.final)
        branches = with_rest(step.conv)
        self.ahead = not tile.by_tile and macs(step.conv, windows=False) > LARGE
        self.whole = target.channel == 1 and all(self._contiguous(b, zero) for b in branches)
        panel = max(len(used(b)) * min(tile.vectors * self.lanes, len(b.out_index)) for b in branches)
        self.adds_whole = self.whole and self.has_residual
        early = not self.has_residual or step.activation is Activation.NONE  # the residual, which the target may lie over
        self.blocks = max(1, round(panel / _BLOCK)) if self.ahead and self.whole and early else 1
        self.cut = self.blocks > 1
        self.parts = _parts(step, source, tile.in_regions, self.blocks)
        self.straight = all((np.diff(part.offsets) == 1).all() for parts in self.parts for part in parts)
        self.regions = tile_regions(step, tile, source, target, self.height, self.width)
        self.split = tile.in_regions
        self.runs = {part: [region.runs(part.taps) for region in self.regions] for parts in self.parts for part in parts
                     } if self.split else {}
        self.most_runs = max((len(runs) for found in self.runs.values() for runs in found), default=0)
        self.passes = self._passes()
        self.panels = [(part, lo * self.lanes, hi * self.lanes) for parts in self.parts
                       for lo, hi in cuts(-(-len(parts[0].branch.out_index) // self.lanes), tile.vectors)
                       for part in parts]
        self.taps = sum(len(part.taps) for part, _, _ in self.panels)
        self.streams = self._streams()

    def _passes(self) -> float:
        """How often the tiles read a panel of weights, parts of it counted as such."""
        kh, kw = self.step.conv.kernel_shape
        return sum(ceil(region.height / rows) * ceil(region.width / columns)
                   * (region.down[1] - region.down[0]) * (region.across[1] - region.across[0]) / (kh * kw)
                   for region in self.regions for rows, columns in [self.tile.shape(region)])

    def _streams(self) -> tuple[_Stream, ...]:
        """While a tile is computed: what lies behind its results, and of the source what lies behind its pixels, or (windows
        and strides) the rows that only the tiles below read."""
        if not self.tile.by_tile or self.tile.in_regions or self.tile.rows > 1:
            return ()
        c, results = self.step.conv, [("y", "out", self.target)]
        if self.has_residual:
            results.append(("r", "residual", self.residual))
        found = [_Stream(f"{name} + at.{at}", span, span, write=int(name == "y"), near=3) for name, at, layout in results
                 if layout.bytes > FAR for span in [self.tile.columns * layout.column]]
        if self.source.bytes > FAR and c.dilations == (1, 1):
            high, down, span = c.kernel_shape[0], c.strides[0], self.tile.columns * self.step_x
            rows = [_Stream("x + at.in", row * self.source.row, span, write=0, near=2)
                    for row in range(max(high, down), high + down)]
            found += rows if max(high, down) > 1 else [_Stream("x + at.in", span, span, write=0, near=3)]
        return tuple(found)

    def _contiguous(self, b: Branch, zero: bool) -> bool:
        """Whole vectors of the target: consecutive channels, and what lies in the last vector's spare lanes is padding."""
        n, first = len(b.out_index), int(b.out_index[0])
        if not (b.out_index == np.arange(first, first + n)).all():
            return False
        return n % self.lanes == 0 or (zero and first + n == self.target.value.channels and first % self.lanes == 0)

    # ---- data ---------------------------------------------------------------------------------------------------
    def draft(self) -> Draft:
        counts = [((hi - lo) // self.lanes, len(part.taps)) for part, lo, hi in self.panels]
        return Draft(self._source(sorted({n for n, _ in counts})), repr(counts), self._data)

    def _data(self) -> bytes:
        """Job table, then per part of a branch its offsets (in regions: and the runs of its taps, [regions, runs, 2]), per
        panel its weights [taps, lanes], bias and output offsets (every array begins at a cache line)."""
        words = Words(len(self.panels), 6, align=16)
        table: list[list[int]] = []
        tables: dict[_Part, tuple[int, int]] = {}
        weights: dict[_Part, Floats] = {}  # in the order of reading
        for part, lo, hi in self.panels:
            b, taps = part.branch, len(part.taps)
            if part not in tables:
                runs = words.put([[*runs, *[(0, 0)] * (self.most_runs - len(runs))] for runs in self.runs[part]],
                                 np.int32) if self.split else taps
                tables[part] = (runs, int(part.offsets[0]) if self.straight and taps else words.put(part.offsets, np.int32))
                flat = np.ravel_multi_index(tuple(part.taps.T), b.weight.shape[1:])
                weights[part] = b.weight.reshape(len(b.out_index), -1).take(flat, axis=1)
            outs = b.out_index[lo:hi]
            n = len(outs)
            panel = np.zeros((taps, hi - lo), np.float32)
            panel[:, :n] = weights[part][lo:hi].T
            bias = np.zeros(hi - lo, np.float32)
            bias[:n] = self.step.conv.bias[outs]
            size = (hi - lo) // self.lanes + (0 if self.whole else n << 8)
            table.append([size, *tables[part], words.put(panel, np.float32), words.put(bias, np.float32),
                          int(self.target.channel_offsets(outs[:1])[0]) if self.whole
                          else words.put(self.target.channel_offsets(outs), np.int32)])
        return words.bytes(table)

    # ---- source -------------------------------------------------------------------------------------------------
    def _shapes(self) -> list[tuple[int, int, list[tuple[int, int, int]]]]:
        """Tile shapes (rows, columns) with the first pixels (row, column) of their tiles and the number of their region:
        every region cut evenly."""
        shapes: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for number, region in enumerate(self.regions):
            rows, columns = self.tile.shape(region)
            for y0, y1 in cuts(region.height, rows):
                for x0, x1 in cuts(region.width, columns):
                    at = region.rows[0] + y0, region.columns[0] + x0, number
                    shapes.setdefault((y1 - y0, x1 - x0), []).append(at)
        return [(r, c, at) for (r, c), at in shapes.items()]

    def _source(self, sizes: list[int]) -> str:
        v, c, shapes = self.target.value, self.step.conv, self._shapes()
        functions = [*([] if self.whole else [fill(_SCATTER)]), *(self._tile(n, r, w) for r, w, _ in shapes for n in sizes)]
        head = fill(_HEAD, kh=c.kernel_shape[0], kw=c.kernel_shape[1], conv=c, v=v, tile=self.tile,
                    functions="\n".join(functions))
        start = self.source.origin - c.pads[0] * self.source.row - c.pads[1] * self.source.column
        text = "".join(self._starts(number, starts) for number, (_, _, starts) in enumerate(shapes))
        calls = [fill(_CALL, cases=[self._case(n, rows, columns) for n in sizes]) for rows, columns, _ in shapes]
        if self.tile.by_tile:
            text += "".join(fill(_BY_TILE, number=number, call=call, next=self._next())
                            for number, call in enumerate(calls))
        else:
            tiles = "".join(fill(_OF_SHAPE, number=number, call=call) for number, call in enumerate(calls))
            text += fill(_BY_PANEL, w=self, tiles=tiles)
        added = self.residual.origin if self.has_residual else None
        return unit(entry(len(self.panels) // self.blocks, start, self.target.origin, added, text), head)

    def _starts(self, number: int, starts: list[tuple[int, int, int]]) -> str:
        """Where the tiles of one shape lie."""
        places = ", ".join(f"{{{y * self.step_y + x * self.step_x}, {y * self.target.row + x * self.target.column}, "
                           f"{y * self.residual.row + x * self.residual.column}"
                           f"{f', {2 * self.most_runs * region}' if self.split else ''}}}" for y, x, region in starts)
        return fill(_STARTS, number=number, starts=places, runs=", runs" if self.split else "")

    def _case(self, n: int, rows: int, columns: int) -> str:
        """Computes a tile with n vectors of channels."""
        table = "job.in" if self.straight else "words + job.in"
        out = ("job.out" if self.whole else "words + job.out, job.size >> 8") + (", block" if self.cut else "")
        more = (", r + at.residual" if self.has_residual else "") + (", ahead" if self.ahead else "")
        taps = "words + job.taps + at.runs" if self.split else "job.taps"
        more += "".join(f", next_{k}" for k in range(len(self.streams)))
        return (f"case {n}: {'ahead = ' if self.ahead else ''}tile_{n}_{rows}_{columns}(x + at.in, {table}, {taps}, "
                f"floats + job.weights, floats + job.bias, y + at.out, {out}{more}); break;")

    def _next(self) -> list[str]:
        """Where a panel's share of the streams begins."""
        return [f"const float* next_{k} = {s.at} + {s.first} + (j - begin) * {s.per_tap(self.taps)} * job.taps;"
                for k, s in enumerate(self.streams)]

    def _fetch(self, n: int) -> list[str]:
        """Fetches what is needed after a tile, evenly over its taps: of the streams, or of the next block of weights, which
        all tiles together fetch."""
        found = [line for k, s in enumerate(self.streams) for line in (
            f"__builtin_prefetch(next_{k}, {s.write}, {s.near});", f"next_{k} += {s.per_tap(self.taps)};")]
        if self.ahead:
            step = ceil(n * self.lanes / self.passes)
            found += [*(f"__builtin_prefetch(ahead + {at}, 0, 2);" for at in range(0, step, _LINE)), f"ahead += {step};"]
        return found

    def _tile(self, n: int, rows: int, columns: int) -> str:
        pixels = [(r, c) for r in range(rows) for c in range(columns)]
        products = (" ".join(f"a{p}_{v} += w{v} * p[{r * self.step_y + c * self.step_x}];" for v in range(n))
                    for p, (r, c) in enumerate(pixels))
        more = (", const float* r" if self.has_residual else "") + (", const float* ahead" if self.ahead else "")
        more += "".join(f", const float* next_{k}" for k in range(len(self.streams)))
        out = ("int out" if self.whole else "const int* out, int outputs") + (", int block" if self.cut else "")
        step = n * self.lanes
        loop = fill(_TAPS, fetch=self._fetch(n), step=step, first="run[0]" if self.split else 0,
                    end="run[1]" if self.split else "taps", place="first + i" if self.straight else "in[i]",
                    products=products, weights=[f"const V w{v} = load(w + {v * self.lanes});" for v in range(n)])
        if self.split:
            loop = fill(_RUNS, count=2 * self.most_runs, step=step, loop=loop)
        sums = ", ".join(f"a{p}_{v}" for p in range(len(pixels)) for v in range(n))
        return fill(_TILE, w=self, result="const float*" if self.ahead else "void", n=n, r=rows, c=columns,
                    at="int first" if self.straight else "const int* in",
                    taps="const int* runs, const float* weights" if self.split else "int taps, const float* w",
                    out=out, more=more, loop=loop, sums=sums, begin=self._begin(n, pixels), store=self._end(n, pixels))

    def _begin(self, n: int, pixels: list[tuple[int, int]]) -> str:
        """The sums before the first tap: the bias (in blocks: and the residual), or what the blocks before have left in the
        target."""
        bias = [f"a{p}_{v} = load(bias + {v * self.lanes});" for p in range(len(pixels)) for v in range(n)]
        if not self.cut:
            return "\n".join(bias)
        if self.has_residual:
            bias += [f"a{p}_{v} += load(r + {at});" for p, v, at in self._places(n, pixels, self.residual)]
        sums = [f"a{p}_{v} = load(y + {at});" for p, v, at in self._places(n, pixels, self.target)]
        return fill(_BEGIN, bias=bias, sums=sums)

    def _end(self, n: int, pixels: list[tuple[int, int]]) -> str:
        results = list(self._stores(n, pixels))
        if not self.cut:
            return "\n".join(results)
        sums = [f"store(y + {at}, a{p}_{v});" for p, v, at in self._places(n, pixels, self.target)]
        return fill(_END, last=self.blocks - 1, results=results, sums=sums)

    def _places(self, n: int, pixels: list[tuple[int, int]], at: Layout) -> Iterator[tuple[int, int, int]]:
        """Of pixel p and vector v, in a value that takes whole vectors."""
        for p, (row, column) in enumerate(pixels):
            yield from ((p, v, row * at.row + column * at.column + v * self.lanes) for v in range(n))

    def _stores(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        if self.whole:
            there = {(p, v): at for p, v, at in self._places(n, pixels, self.residual)}
            for p, v, at in self._places(n, pixels, self.target):
                value = activation(self.step.activation, f"a{p}_{v}")
                if self.has_residual:
                    value = activation(self.step.final, value if self.cut else f"{value} + load(r + {there[p, v]})")
                yield f"store(y + {at}, {value});"
            return
        for p, (row, column) in enumerate(pixels):
            to, by = (row * a.row + column * a.column for a in (self.target, self.residual))
            for v in range(n):
                value, o = activation(self.step.activation, f"a{p}_{v}"), v * self.lanes
                if self.has_residual:
                    value = activation(self.step.final, f"{value} + gather(r + {by}, out + {o}, outputs - {o})")
                yield f"scatter(y + {to}, out + {o}, outputs - {o}, {value});"
