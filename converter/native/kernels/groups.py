"""Direct convolution of narrow groups: one vector of output channels holds several branches.

A branch of 4 channels fills half a vector of 8. So a vector takes as many branches as it has room for; the inputs of all of
them lie in one vector of the source, whose lanes are shuffled so that every output lane sees the k-th input of its own
branch. Every pixel of the source is loaded and shuffled once per tile and used by all output pixels of the tile whose window
holds it; the weights stream past as operands in memory. Both sides lie channels last.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil

import numpy as np

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.jobs import Words, cuts, entry
from gkp.converter.native.kernels.kernel import Draft, Recipe, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.taps import is_sparse
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv, zero_at_zero

_SPARE = 3  # registers for inputs and weights beside the accumulators
_MOST_PRODUCTS = 1600
"""Written out in one tile: more do not fit the instruction cache."""
_MOST_PATTERNS = 2
"""Ways to shuffle in one layer: a function is written for each."""
_SHAPES = ((2, 6), (3, 4), (1, 12), (1, 7), (2, 4), (4, 7), (2, 14), (1, 14), (2, 2), (1, 4), (1, 1))
"""Rows and columns of the tiles, cut to registers and plane."""
Pattern = tuple[tuple[int, ...], ...]
"""[k][lane]: which lane of the source's vector is the k-th input of an output lane's branch."""


@dataclass(frozen=True)
class GroupTile:
    """rows, columns: output pixels of one vector of channels; by_tile: all vectors of some pixels before the next pixels,
    else all pixels of a vector (its weights stay in L1)."""

    rows: int
    columns: int
    by_tile: bool

    @property
    def label(self) -> str:
        return f"groups {self.rows}x{self.columns}{' by tile' if self.by_tile else ''}"


@dataclass(frozen=True, eq=False)
class Packed:
    """One vector of output channels. first: its first output; read: the first channel of the source's vector; members: the
    branch and the position in it of every output, in order."""

    first: int
    read: int
    pattern: Pattern
    members: tuple[tuple[Branch, int], ...]


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """The family: the `most` best tiles by the model. For layers whose widest branch leaves lanes empty, if the inputs of a
    vector's branches lie in one vector."""
    if source.channel != 1 or target.channel != 1 or not (zero_at_zero(step.activation) and zero_at_zero(step.final)):
        return
    vectors = packed(step.conv, cpu.lanes)
    vectors = vectors if all(_side_by_side(v, source) for v in vectors) else ()
    for tile in tiles(step, vectors, target, cpu, most) if vectors else []:
        recipe = Recipe(partial(_draft, step, tile, source, target, residual or target, cpu))
        trial = Trial(recipe, source, residual, target, cycles(step, vectors, tile, target))
        executed = target.value.pixels * sum(len(v.pattern) for v in vectors) * cpu.lanes * _taps(step.conv)
        yield Way(layer_name(step), tile.label, trial, executed, "groups")


@lru_cache(maxsize=1024)
def packed(conv: BranchedConv, lanes: int) -> tuple[Packed, ...]:
    """The vectors of a layer; empty where the family does not apply."""
    if len(conv.branches) < 2 or is_sparse(conv) or max(len(b.out_index) for b in conv.branches) >= lanes:
        return ()
    owner: dict[int, tuple[Branch, int]] = {int(o): (b, k) for b in conv.branches for k, o in enumerate(b.out_index)}
    if len(owner) != conv.out_channels:
        return ()
    found = [_vector(first, tuple(owner[o] for o in range(first, min(first + lanes, conv.out_channels))), lanes)
             for first in range(0, conv.out_channels, lanes)]
    kept = tuple(v for v in found if v is not None)
    return kept if len(kept) == len(found) and len({v.pattern for v in kept}) <= _MOST_PATTERNS else ()


def _vector(first: int, members: tuple[tuple[Branch, int], ...], lanes: int) -> Packed | None:
    """None: its branches differ in their number of inputs, or their inputs lie too far apart."""
    inputs = np.array([b.in_index for b, _ in members]) if len({len(b.in_index) for b, _ in members}) == 1 else None
    if inputs is None or not inputs.size or inputs.max() - inputs.min() >= lanes:
        return None
    read = int(inputs.min())
    full = np.concatenate([inputs, np.repeat(inputs[:1], lanes - len(members), axis=0)]) - read  # spare lanes have weight 0
    return Packed(first, read, tuple(tuple(int(i) for i in k) for k in full.T), members)


def _side_by_side(v: Packed, source: Layout) -> bool:
    """Do the channels that it reads lie in one block?"""
    last = v.read + max(max(k) for k in v.pattern)
    return source.block is None or v.read // source.block[0] == last // source.block[0]


def _taps(conv: BranchedConv) -> int:
    return conv.kernel_shape[0] * conv.kernel_shape[1]


# ---- tiles ------------------------------------------------------------------------------------------------------
def tiles(step: Conv, vectors: tuple[Packed, ...], target: Layout, cpu: Cpu, most: int) -> list[GroupTile]:
    """The tiles worth trying, best first by the model."""
    plane, inputs = target.value, max(len(v.pattern) for v in vectors)
    free = cpu.registers - _SPARE - (inputs if _taps(step.conv) == 1 else 0)  # the weights of a 1x1 stay in registers
    pixels = max(1, min(free, _MOST_PRODUCTS // (_taps(step.conv) * inputs)))
    found = set()
    for rows, columns in _SHAPES:
        columns = min(columns, plane.width, pixels)
        rows = max(1, min(rows, plane.height, pixels // columns))
        found |= {GroupTile(rows, columns, by_tile) for by_tile in (False, True)}
    return sorted(found, key=lambda t: cycles(step, vectors, t, target))[:most]


def cycles(step: Conv, vectors: tuple[Packed, ...], tile: GroupTile, target: Layout) -> float:
    """Cycles of one image by the model (gkp.converter.native.planning.timer): every product loads its weights, unless the
    pixels of a tile share them (1x1); shuffles go beside the products, half of them for nothing."""
    plane = target.value
    rows, columns = ceil(plane.height / tile.rows), ceil(plane.width / tile.columns)
    pixels, total = plane.pixels / (rows * columns), 0.0
    read = len(_read(step.conv, tile.rows, tile.columns)) * pixels / (tile.rows * tile.columns)
    for v in vectors:
        n, products = len(v.pattern), pixels * _taps(step.conv) * len(v.pattern)
        loads = read + (n if _taps(step.conv) == 1 else products)
        total += rows * columns * (max(products, loads) / 2 + read * n / 4 + 2 * pixels + 10)
    return total * (1.0 if tile.by_tile == (plane.size > sum(b.weight.size for b in step.conv.branches)) else 1.005)


def _read(conv: BranchedConv, rows: int, columns: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By place in the source (row, column): the (pixel of the tile, tap) that it is a factor of."""
    (kh, kw), (sy, sx), (dy, dx) = conv.kernel_shape, conv.strides, conv.dilations
    users: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for p in range(rows * columns):
        for tap in range(kh * kw):
            place = p // columns * sy + tap // kw * dy, p % columns * sx + tap % kw * dx
            users.setdefault(place, []).append((p, tap))
    return dict(sorted(users.items()))


# ---- kernel -----------------------------------------------------------------------------------------------------
_HEAD = '''
    // @kh@x@kw@ convolution of narrow groups, @conv.in_channels@ -> @conv.out_channels@ channels,
    // output @v.height@x@v.width@, tile: @tile.label@.
    struct Job { int pattern, in, weights, out; };  // weights: position in words of the data

    @functions@
'''
_TILE = '''
    static void tile_@pattern@_@rows@_@columns@(const float* x, const float* w, float* y@more@) {
      V @sums@;
      @products@
      @store@
    }
'''
_LOOPS = '''
    static const struct { int in, out, residual; } at_@number@[] = {@starts@};
    @outer@
      @inner@ {
        const Job& job = jobs[j];
        switch (job.pattern) {
          @cases@
        }
      }
'''


def _draft(step: Conv, tile: GroupTile, source: Layout, target: Layout, residual: Layout, cpu: Cpu) -> Draft:
    return _Writer(step, tile, source, target, residual, cpu.lanes, packed(step.conv, cpu.lanes)).draft()


@dataclass(frozen=True)
class _Writer:
    step: Conv
    tile: GroupTile
    source: Layout
    target: Layout
    residual: Layout  # the target's where there is none
    lanes: int
    vectors: tuple[Packed, ...]

    @property
    def patterns(self) -> list[Pattern]:
        return sorted({v.pattern for v in self.vectors})

    def draft(self) -> Draft:
        return Draft(self._source(), repr((len(self.vectors), self.patterns)), self._data)

    def _data(self) -> bytes:
        """Job table, then per vector bias and weights [tap, input, lane]."""
        words, table, patterns = Words(len(self.vectors), 4, align=16), list[list[int]](), self.patterns
        for v in self.vectors:
            n, count = len(v.pattern), len(v.members)
            panel = np.zeros((1 + _taps(self.step.conv) * n, self.lanes), np.float32)
            panel[0, :count] = self.step.conv.bias[v.first:v.first + count]
            for lane, (b, k) in enumerate(v.members):
                panel[1:, lane] = b.weight[k].reshape(n, -1).T.ravel()
            read, written = (int(layout.channel_offsets(np.array([first]))[0])
                             for layout, first in ((self.source, v.read), (self.target, v.first)))
            table.append([patterns.index(v.pattern), read, words.put(panel, np.float32), written])
        return words.bytes(table)

    def _source(self) -> str:
        v, c = self.target.value, self.step.conv
        shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for y0, y1 in cuts(v.height, self.tile.rows):
            for x0, x1 in cuts(v.width, self.tile.columns):
                shapes.setdefault((y1 - y0, x1 - x0), []).append((y0, x0))
        functions = [self._tile(n, *shape) for shape in shapes for n in range(len(self.patterns))]
        head = fill(_HEAD, kh=c.kernel_shape[0], kw=c.kernel_shape[1], conv=c, v=v, tile=self.tile,
                    functions="\n".join(functions))
        text = "".join(self._loops(number, *shape, starts) for number, (shape, starts) in enumerate(shapes.items()))
        start = self.source.origin - c.pads[0] * self.source.row - c.pads[1] * self.source.column
        added = None if self.step.residual is None else self.residual.origin
        return unit(entry(len(self.vectors), start, self.target.origin, added, text), head)

    def _loops(self, number: int, rows: int, columns: int, starts: list[tuple[int, int]]) -> str:
        """The tiles of one shape."""
        sy, sx = self.step.conv.strides
        places = ", ".join(f"{{{y * sy * self.source.row + x * sx * self.source.column}, "
                           f"{y * self.target.row + x * self.target.column}, "
                           f"{y * self.residual.row + x * self.residual.column}}}" for y, x in starts)
        order = ["for (int j = begin; j < end; ++j)", f"for (const auto& at : at_{number})"]
        outer, inner = reversed(order) if self.tile.by_tile else order
        more = "" if self.step.residual is None else ", r + at.residual + job.out"
        cases = [f"case {n}: tile_{n}_{rows}_{columns}(x + at.in + job.in, floats + job.weights, "
                 f"y + at.out + job.out{more}); break;" for n in range(len(self.patterns))]
        return fill(_LOOPS, number=number, starts=places, outer=outer, inner=inner, cases=cases)

    def _tile(self, number: int, rows: int, columns: int) -> str:
        sums = ", ".join(f"a{p} = load(w)" for p in range(rows * columns))
        return fill(_TILE, pattern=number, rows=rows, columns=columns, sums=sums,
                    more="" if self.step.residual is None else ", const float* r",
                    products=self._products(self.patterns[number], rows, columns), store=self._stores(rows, columns))

    def _products(self, pattern: Pattern, rows: int, columns: int) -> Iterator[str]:
        n = len(pattern)
        for (y, x), users in _read(self.step.conv, rows, columns).items():
            yield f"{{ const V v = load(x + {y * self.source.row + x * self.source.column});"
            for k, order in enumerate(pattern):
                uses = " ".join(f"a{p} += s * load(w + {(1 + tap * n + k) * self.lanes});" for p, tap in users)
                yield f"  {{ const V s = __builtin_shufflevector(v, v, {', '.join(map(str, order))}); {uses} }}"
            yield "}"

    def _stores(self, rows: int, columns: int) -> Iterator[str]:
        for p in range(rows * columns):
            row, column = divmod(p, columns)
            value = activation(self.step.activation, f"a{p}")
            if self.step.residual is not None:
                added = f"load(r + {row * self.residual.row + column * self.residual.column})"
                value = activation(self.step.final, f"{value} + {added}")
            yield f"store(y + {row * self.target.row + column * self.target.column}, {value});"
