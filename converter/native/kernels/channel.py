"""Direct convolution with vectors of output channels: for branches of many outputs, small planes, any stride.

A tile is a few vectors of output channels of one branch times some output pixels (rows x columns), held in registers.
Every input pixel is read as a scalar, through a table of offsets (branch channel and tap), and multiplied with the
vectors of weights, which stream past in the order of reading. The source may lie in any layout; a channels-last target
takes whole vectors, others are scattered. In regions, the taps that lie in the pads are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import ceil

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.jobs import Words, cuts, entry, part_sizes
from gkp.converter.native.kernels.kernel import Draft, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.regions import Region, regions, share, whole
from gkp.converter.native.kernels.taps import macs, used, with_rest
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv, zero_at_zero
from gkp.types import Floats

_Offsets = npt.NDArray[np.int64]
_LARGE = 1 << 16
"""Weights of a layer that does not stay in the caches: the next panel's are fetched while this one's are used."""
_FAR = 1 << 20
"""Bytes of a value that L2 does not hold beside others."""
_LINE = 16
"""Elements of a line of the cache."""
_BLOCK = 1 << 13
"""Most weights of such a layer that the tiles of a plane use in turn before the next ones, in cache meanwhile: larger panels
are cut, and the target holds the sums of the first parts."""
_WORTH_IT = 0.97
"""Of the products: regions that leave out less cost more than they save."""
_SPARE = 3  # registers for inputs and weights beside the accumulators
_SHAPES = ((2, 14), (2, 13), (2, 12), (3, 8), (4, 6), (2, 7), (4, 4), (3, 7), (1, 14), (1, 7), (4, 1), (2, 4), (1, 1))
"""Vectors of channels, pixels: as many accumulators as registers allow; fewer for narrow planes. Cut to the registers."""


@dataclass(frozen=True)
class ChannelTile:
    """vectors: vectors of output channels per tile. rows, columns: output pixels per tile (a flat plane has one row).
    by_tile: all output channels of some pixels before the next pixels (inputs stay in L1), else all pixels of some
    output channels (their weights stay in cache). in_regions: all pixels of a tile see the same part of the
    window."""

    vectors: int
    rows: int
    columns: int
    by_tile: bool
    in_regions: bool = False

    @property
    def label(self) -> str:
        order, where = " by tile" if self.by_tile else "", " in regions" if self.in_regions else ""
        return f"channel {self.vectors}x{self.rows}x{self.columns}{where}{order}"

    def shape(self, region: Region) -> tuple[int, int]:
        """Rows and columns of the tiles of a region: as many pixels, if it is narrower."""
        if not self.in_regions:
            return self.rows, self.columns
        columns = min(region.width, self.rows * self.columns)
        return max(1, min(region.height, self.rows * self.columns // columns)), columns


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 8) -> Iterator[Way]:
    """The family: the `most` best tiles by the model. Planes are left to vectors of pixels."""
    for tile in [] if target.planar else tiles(step, source, target, cpu, most):
        recipe = Recipe(partial(_draft, step, tile, source, target, residual or target, cpu))
        trial = Trial(recipe, source, residual, target, cycles(step, tile, source, target, cpu))
        sort = "channel in regions" if tile.in_regions else "channel"
        yield Way(layer_name(step), tile.label, trial, _executed(step, tile, source, target), sort)


def _draft(step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout, cpu: Cpu) -> Draft:
    return _Writer(step, tile, source, target, residual, cpu).draft()


def _executed(step: Conv, tile: ChannelTile, source: Layout, target: Layout) -> int:
    """Multiply-accumulates of one image."""
    if not tile.in_regions:
        return target.value.pixels * macs(step.conv, windows=False)
    return sum(region.height * region.width * sum(_taps(b, region) * len(b.out_index) for b in step.conv.branches)
               for region in regions(step.conv, source.value, target.value))


@lru_cache(maxsize=4096)
def _taps(b: Branch, region: Region) -> int:
    """Of the taps that count, how many a region needs."""
    return sum(end - first for first, end in region.runs(used(b)))


def is_flat(step: Conv, *layouts: Layout) -> bool:
    """May the plane be taken as one row of pixels?"""
    c = step.conv
    return (c.kernel_shape == (1, 1) and c.strides == (1, 1) and not any(c.pads)
            and all(at.row == at.value.width * at.column for at in layouts))


# ---- tiles ------------------------------------------------------------------------------------------------------
def tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu, most: int = 8) -> list[ChannelTile]:
    """The tiles worth trying for these layouts, best first by the model, at most `most`; as many in regions where those
    leave something out."""
    height, width = _plane(step, source, target)
    widest = max((ceil(len(b.out_index) / cpu.lanes) for b in step.conv.branches), default=1)
    found: set[ChannelTile] = set()
    for vectors, pixels in _SHAPES:
        vectors = min(vectors, widest)
        fit = (cpu.registers - _SPARE) // vectors
        for most_pixels in {fit, fit - (1 if cpu.registers < 32 else 0)}:
            columns = min(width, max(1, min(pixels, most_pixels)))
            rows = max(1, min(height, min(pixels, most_pixels) // columns))
            found |= {ChannelTile(vectors, rows, columns, by_tile) for by_tile in (False, True)}
    every = [found]
    if share(step.conv, regions(step.conv, source.value, target.value)) < _WORTH_IT:
        every.append({replace(tile, in_regions=True) for tile in found})
    return [tile for tiles in every for tile in sorted(tiles, key=lambda t: cycles(step, t, source, target, cpu))[:most]]


def cycles(step: Conv, tile: ChannelTile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model (gkp.converter.native.planning.timer)."""
    total = 0.0
    for region in _regions(step, tile, source, target, _plane(step, source, target)):
        rows, columns = tile.shape(region)
        count = ceil(region.height / rows) * ceil(region.width / columns)
        pixels = region.height * region.width / count
        for branch in step.conv.branches:
            taps, vectors = _taps(branch, region), ceil(len(branch.out_index) / cpu.lanes)
            for n, parts in part_sizes(vectors, tile.vectors):
                spill = 1.5 if n * pixels + _SPARE > cpu.registers + 1 else 1.0
                inner = max(n * pixels, 8, n + pixels + 1) / 2 * spill
                total += parts * count * (inner * taps + 2 * n * pixels + 10)
    large = source.size > sum(b.weight.size for b in step.conv.branches)
    return total * (1.0 if tile.by_tile == large else 1.005)


def _regions(step: Conv, tile: ChannelTile, source: Layout, target: Layout, plane: tuple[int, int]) -> tuple[Region, ...]:
    """Of the target, whose rows and columns are `plane`."""
    return regions(step.conv, source.value, target.value) if tile.in_regions else whole(step.conv, *plane)


def _plane(step: Conv, *layouts: Layout) -> tuple[int, int]:
    """Rows and columns of the target, the last of the layouts, as the tiles see them."""
    v = layouts[-1].value
    return (1, v.pixels) if is_flat(step, *layouts) else (v.height, v.width)


# ---- kernel -----------------------------------------------------------------------------------------------------
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


class _Writer:
    def __init__(self, step: Conv, tile: ChannelTile, source: Layout, target: Layout, residual: Layout,
                 cpu: Cpu) -> None:
        self.step, self.tile, self.source, self.target, self.lanes = step, tile, source, target, cpu.lanes
        self.residual, self.has_residual = residual, step.residual is not None
        self.height, self.width = _plane(step, source, residual, target)
        sy, sx = step.conv.strides
        self.step_y, self.step_x = sy * source.row, sx * source.column
        zero = zero_at_zero(step.activation) and zero_at_zero(step.final)
        branches = with_rest(step.conv)
        self.ahead = not tile.by_tile and macs(step.conv, windows=False) > _LARGE
        self.whole = target.channel == 1 and all(self._contiguous(b, zero) for b in branches)
        panel = max(len(used(b)) * min(tile.vectors * self.lanes, len(b.out_index)) for b in branches)
        self.blocks = max(1, round(panel / _BLOCK)) if self.ahead and self.whole else 1
        self.cut = self.blocks > 1
        self.parts = _parts(step, source, tile.in_regions, self.blocks)
        self.straight = all((np.diff(part.offsets) == 1).all() for parts in self.parts for part in parts)
        self.regions = _regions(step, tile, source, target, (self.height, self.width))
        self.split = tile.in_regions
        self.runs = {part: [region.runs(part.taps) for region in self.regions] for parts in self.parts for part in parts
                     } if self.split else {}
        self.most_runs = max((len(runs) for found in self.runs.values() for runs in found), default=0)
        self.passes = self._passes()
        self.streams = self._streams()
        self.panels = [(part, lo * self.lanes, hi * self.lanes) for parts in self.parts
                       for lo, hi in cuts(-(-len(parts[0].branch.out_index) // self.lanes), tile.vectors)
                       for part in parts]

    def _passes(self) -> float:
        """How often the tiles read a panel of weights, parts of it counted as such."""
        kh, kw = self.step.conv.kernel_shape
        return sum(ceil(region.height / rows) * ceil(region.width / columns)
                   * (region.down[1] - region.down[0]) * (region.across[1] - region.across[0]) / (kh * kw)
                   for region in self.regions for rows, columns in [self.tile.shape(region)])

    def _streams(self) -> dict[str, Layout]:
        """Far values that tiles read or write from the first byte to the last, by their pointers: while a tile is computed,
        those of the next one are fetched."""
        flat = is_flat(self.step, self.source, self.residual, self.target)
        if not (flat and self.tile.by_tile and self.straight and self.whole):
            return {}
        values = {"x": self.source, "y": self.target, **({"r": self.residual} if self.has_residual else {})}
        return {name: at for name, at in values.items() if at.bytes > _FAR}

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
            text += "".join(fill(_BY_TILE, number=number, call=call, next=self._next(shapes[number][1]))
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
        more += "".join(f", next_{name}" for name in self.streams)
        return (f"case {n}: {'ahead = ' if self.ahead else ''}tile_{n}_{rows}_{columns}(x + at.in, {table}, {taps}, "
                f"floats + job.weights, floats + job.bias, y + at.out, {out}{more}); break;")

    def _per_tap(self, name: str, columns: int) -> int:
        """Elements of a stream that are fetched while a tile of so many pixels reads one tap."""
        return ceil(columns * self.streams[name].padded / max(1, sum(len(part.taps) for part, _, _ in self.panels)))

    def _next(self, columns: int) -> list[str]:
        """Where the streams go on behind a tile, and a panel's share of that."""
        begin = {"x": "x + at.in", "y": "y + at.out", "r": "r + at.residual"}
        return [f"const float* next_{name} = {begin[name]} + {columns * at.column} + "
                f"(j - begin) * {self._per_tap(name, columns)} * job.taps;" for name, at in self.streams.items()]

    def _fetch(self, n: int, columns: int) -> list[str]:
        """Fetches what is needed after a tile, evenly over its taps: of the streams, or of the next panel, which all tiles
        together fetch."""
        found = [line for name in self.streams for line in (
            f"__builtin_prefetch(next_{name}, {int(name == 'y')});", f"next_{name} += {self._per_tap(name, columns)};")]
        if self.ahead:
            step = ceil(n * self.lanes / self.passes)
            found += [*(f"__builtin_prefetch(ahead + {at}, 0, 2);" for at in range(0, step, _LINE)), f"ahead += {step};"]
        return found

    def _tile(self, n: int, rows: int, columns: int) -> str:
        pixels = [(r, c) for r in range(rows) for c in range(columns)]
        products = (" ".join(f"a{p}_{v} += w{v} * p[{r * self.step_y + c * self.step_x}];" for v in range(n))
                    for p, (r, c) in enumerate(pixels))
        more = (", const float* r" if self.has_residual else "") + (", const float* ahead" if self.ahead else "")
        more += "".join(f", const float* next_{name}" for name in self.streams)
        out = ("int out" if self.whole else "const int* out, int outputs") + (", int block" if self.cut else "")
        step = n * self.lanes
        loop = fill(_TAPS, fetch=self._fetch(n, columns), step=step, first="run[0]" if self.split else 0,
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
        """The sums before the first tap: the bias, or what the blocks before have left in the target."""
        bias = [f"a{p}_{v} = load(bias + {v * self.lanes});" for p in range(len(pixels)) for v in range(n)]
        return fill(_BEGIN, bias=bias, sums=[f"a{p}_{v} = load(y + {at});" for p, v, at in self._places(n, pixels)]
                    ) if self.cut else "\n".join(bias)

    def _end(self, n: int, pixels: list[tuple[int, int]]) -> str:
        results = list(self._stores(n, pixels))
        return fill(_END, last=self.blocks - 1, results=results,
                    sums=[f"store(y + {at}, a{p}_{v});" for p, v, at in self._places(n, pixels)]
                    ) if self.cut else "\n".join(results)

    def _places(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Of pixel p and vector v, in a target that takes whole vectors."""
        for p, (row, column) in enumerate(pixels):
            yield from ((p, v, row * self.target.row + column * self.target.column + v * self.lanes) for v in range(n))

    def _stores(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        if self.whole and self.has_residual:
            yield "r += out;"
        for p, (row, column) in enumerate(pixels):
            at = row * self.target.row + column * self.target.column
            there = row * self.residual.row + column * self.residual.column
            for v in range(n):
                value, o = activation(self.step.activation, f"a{p}_{v}"), v * self.lanes
                if self.has_residual:
                    added = f"load(r + {there + o})" if self.whole else f"gather(r + {there}, out + {o}, outputs - {o})"
                    value = activation(self.step.final, f"{value} + {added}")
                yield (f"store(y + {at + o}, {value});" if self.whole
                       else f"scatter(y + {at}, out + {o}, outputs - {o}, {value});")
