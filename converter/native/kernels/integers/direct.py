"""Direct convolution by sums of products, channels last on both sides: of integers, four products in one instruction.

A tile is a few vectors of output channels times some output pixels, held in registers as sums of 32 bits. The inner loop
runs over the items of the panel (a word of channels for every lane) and the parts of the window; weights stream past in the
order of reading. Sums become elements of the target in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gkp.converter.native.dtypes import FLOAT32
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.integers.dots import Dot, dots
from gkp.converter.native.kernels.integers.panels import Panel, joined, packed, panels, row_elements
from gkp.converter.native.kernels.integers.scales import weights
from gkp.converter.native.kernels.integers.store import PanelStore
from gkp.converter.native.kernels.integers.tiles import Tile, cycles, executed, groups, places, shapes, tiles
from gkp.converter.native.kernels.jobs import Words
from gkp.converter.native.kernels.kernel import Draft, Recipe
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv

_Items = list[tuple[int, int, npt.NDArray[Any]]]
"""(elements from the window's first one, which item of the panel, weights [taps, vectors, lanes, word])."""


class Storing(Protocol):
    """What becomes of the sums of a tile; made of (step, dot, source, target, residual, lanes)."""

    def panel(self, words: Words, first: int, vectors: int) -> int:
        """Puts the constants of so many vectors of outputs; their position. What the sums begin with comes first."""

    def functions(self) -> str:
        """C++ in front of the kernel."""

    def statements(self, n: int, pixels: list[tuple[int, int]]) -> Iterator[str]:
        """C++ that stores the sums a<pixel>_<vector> of a tile of n vectors."""


MakeStore = Callable[[Conv, Dot, Layout, Layout, Layout | None, int], Storing]


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 6) -> Iterator[Way]:
    """The family, for sources with a grid: the `most` best tiles of each sort by the model."""
    if source.value.grid is not None and step.conv.scale is not None:
        largest = int(np.abs(weights(step.conv).astype(int)).max(initial=0))
        yield from tiled(step, source, target, residual, cpu, dots(cpu, largest), PanelStore, most)


def tiled(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, offered: Sequence[Dot],
          store: MakeStore, most: int = 6) -> Iterator[Way]:
    """The ways by these sums of products, if target and residual hold whole vectors of a pixel's channels."""
    if not all(at.channel == 1 and at.block is None for at in (target, residual) if at):
        return
    plane, whole = plane_of(step, source, target, residual), step.conv
    pixel = source.padded
    forms = [(dot, whole, False) for dot in offered if _worth(dot, offered, whole.in_channels)]
    if whole.kernel_shape[1] > 1:
        row = row_elements(whole, pixel)
        forms += [(dot, joined(whole, pixel), True) for dot in offered if row <= dot.window and _worth(dot, offered, row)]
    for dot, conv, is_joined in forms:
        for tile in tiles(conv, plane, dot, is_joined, cpu, most):
            recipe = Recipe(partial(_draft, step, tile, source, target, residual, cpu, store), dot.needs)
            trial = Trial(recipe, source, residual, target, cycles(conv, tile, plane, cpu))
            yield Way(layer_name(step), tile.label, trial, executed(conv, tile, target.value.pixels, cpu), tile.sort)


def _worth(dot: Dot, offered: Sequence[Dot], channels: int) -> bool:
    """A wider window only where a narrower one does not hold a pixel."""
    return not any(0 < other.window < dot.window and channels <= other.window for other in offered)


def plane_of(step: Conv, source: Layout, target: Layout, residual: Layout | None) -> tuple[int, int]:
    """Rows and columns of the target as the tiles see them: one row where all lie without gaps."""
    c, v = step.conv, target.value
    flat = (c.kernel_shape == (1, 1) and c.strides == (1, 1) and not any(c.pads)
            and all(at.row == at.value.width * at.column for at in (source, target, residual) if at))
    return (1, v.pixels) if flat else (v.height, v.width)


_HEAD = '''
    // @kh@x@kw@ convolution in @tile.dot.precision@, @conv.in_channels@ -> @conv.out_channels@ channels,
    // output @v.height@x@v.width@, tile: @tile.label@.
    struct Job { int vectors, items, table, weights, constants, out; };  // positions in words of the data

    static inline I words(const void* p) {
      typedef int Iu __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
      return *static_cast<const Iu*>(p);
    }
    @dot@
    @store@

    @functions@
'''
_TILE = '''
    static void tile_@n@_@r@_@c@(const @x@* x, const int* data, const Job& job, @y@* y@more@) {
      const int *constants = data + job.constants, *w = data + job.weights, *at = data + job.table;
      @sums@
      @store@
    }
'''
_SUMS = '''
    @begun@
    for (int i = 0; i < job.items; ++i, w += @step@, at += @fields@) {
      @products@
    }
    @added@
'''
# What is summed in narrow numbers is added to sums of float32 now and then.
_CHAINS = '''
    @begun@
    for (int i = 0; i < job.items;) {
      const int end = i + @most@ < job.items ? i + @most@ : job.items;
      @chains@
      for (; i < end; ++i, w += @step@, at += @fields@) {
        @products@
      }
      @added@
    }
'''
_PRODUCTS = '''
    const @x@* p = x + at[0];
    $if picks: const I order = words(data + at[1]);
    @weights@
    @products@
'''
_ENTRY = '''
    const int* table = reinterpret_cast<const int*>(data);
    const Job* jobs = reinterpret_cast<const Job*>(data);
    (void)r;
    @loops@
'''
_LOOP = '''
    {
      static const struct { int in, out, residual; } at_tile[] = {@starts@};
      const int begin = first_of(@total@, part, parts), end = first_of(@total@, part + 1, parts);
      for (int n = begin; n < end; ++n) {
        const Job& job = jobs[@job@];
        const auto& at = at_tile[@start@];
        switch (job.vectors) {
          @cases@
        }
      }
    }
'''


def _draft(step: Conv, tile: Tile, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu,
           store: MakeStore) -> Draft:
    return _Writer(step, tile, source, target, residual, cpu, store).draft()


class _Writer:
    def __init__(self, step: Conv, tile: Tile, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu,
                 store: MakeStore) -> None:
        self.step, self.tile, self.source, self.target, self.residual = step, tile, source, target, residual
        self.lanes, self.conv = cpu.lanes, joined(step.conv, source.padded) if tile.joined else step.conv
        self.plane = plane_of(step, source, target, residual)
        self.panels = panels(self.conv, tile.vectors, cpu.lanes, tile.dot)
        self.store = store(step, tile.dot, source, target, residual, cpu.lanes)

    def draft(self) -> Draft:
        counts = [(p.vectors, p.items) for p in self.panels]
        return Draft(self._source(), repr(counts), self._data)

    # ---- data -------------------------------------------------------------------------------------------------------
    def _data(self) -> bytes:
        """Job table, then per panel: where its items are read (and the orders in which lanes pick), weights, constants."""
        words, table = Words(len(self.panels), 6, align=self.lanes), list[list[int]]()
        for panel in self.panels:
            items = self._items(panel)
            orders = words.put(self._orders(panel).view(np.int32), np.int32) if self.tile.dot.window else 0
            reads = [[at, orders + k * self.lanes] if self.tile.dot.window else [at] for at, k, _ in items]
            at = words.put(reads, np.int32)
            weights = words.put(np.array([w for *_, w in items]).ravel().view(np.int32), np.int32)
            constants = self.store.panel(words, panel.first, panel.vectors)
            table.append([panel.vectors, len(items), at, weights, constants, panel.first])
        return words.bytes(table)

    def _items(self, panel: Panel) -> _Items:
        """In the order of reading, without those whose weights are all zero."""
        found, (dy, dx) = _Items(), self.conv.dilations
        for (y, x), inner in groups(self.conv, self.tile):
            start = y * dy * self.source.row + x * dx * self.source.column
            weights = packed(self.conv, panel, self.lanes, [(y + ty, x + tx) for ty, tx in inner], self.tile.dot)
            found += [(start + int(panel.starts[k]), k, w) for k, w in enumerate(weights) if w.any()]
        return found

    def _orders(self, panel: Panel) -> npt.NDArray[np.uint8]:
        """[items, bytes of a vector]: places in the window; what is above the byte of an element becomes zero. Of elements
        of 2 bytes the places have as many."""
        inside = np.where(panel.channels < 0, 0, panel.channels - panel.starts[:, None, None])
        if self.tile.dot.element.bytes == 2:
            return inside.astype(np.uint16).view(np.uint8).reshape(panel.items, 4 * self.lanes)
        spaced = np.full((*inside.shape, 4 // self.tile.dot.word), 0x80, np.uint8)
        spaced[..., 0] = inside
        return spaced.reshape(panel.items, 4 * self.lanes)

    # ---- source -----------------------------------------------------------------------------------------------------
    def _source(self) -> str:
        sizes, cut, c = sorted({p.vectors for p in self.panels}), shapes(self.tile, self.plane), self.step.conv
        head = fill(_HEAD, kh=c.kernel_shape[0], kw=c.kernel_shape[1], conv=c, v=self.target.value, tile=self.tile,
                    dot=fill(self.tile.dot.code), store=self.store.functions(),
                    functions="\n".join(self._tile(n, *shape) for shape in cut for n in sizes))
        loops = "".join(self._loop(sizes, *shape, starts) for shape, starts in cut.items())
        return unit(fill(_ENTRY, loops=loops), head, self.source.value.dtype,
                    self.residual.value.dtype if self.residual else FLOAT32, self.target.value.dtype)

    def _loop(self, sizes: list[int], rows: int, columns: int, starts: list[tuple[int, int]]) -> str:
        """The tiles of one shape, all panels; the parts share them."""
        (sy, sx), (top, left) = self.conv.strides, self.conv.pads[:2]
        there = self.residual or self.target
        places = ", ".join(f"{{{self.source.offset(0, y * sy - top, x * sx - left)}, {self.target.offset(0, y, x)}, "
                           f"{there.offset(0, y, x)}}}" for y, x in starts)
        more = ", r + at.residual + job.out" if self.residual else ""
        cases = [f"case {n}: tile_{n}_{rows}_{columns}(x + at.in, table, job, y + at.out + job.out{more}); break;"
                 for n in sizes]
        inner = len(self.panels) if self.tile.by_tile else len(starts)
        names = ("start", "job") if self.tile.by_tile else ("job", "start")
        return fill(_LOOP, starts=places, total=len(starts) * len(self.panels), cases=cases,
                    **dict(zip(names, (f"n / {inner}", f"n % {inner}"), strict=True)))

    def _tile(self, n: int, rows: int, columns: int) -> str:
        more = f", const {self.residual.value.dtype.c}* r" if self.residual else ""
        return fill(_TILE, n=n, r=rows, c=columns, x=self.source.value.dtype.c, y=self.target.value.dtype.c, more=more,
                    sums=self._sums(n, rows, columns),
                    store=self.store.statements(n, [(r, c) for r in range(rows) for c in range(columns)]))

    def _sums(self, n: int, rows: int, columns: int) -> str:
        """C++: the sums a<pixel>_<vector> of a tile."""
        taps, dot = self.tile.taps[0] * self.tile.taps[1], self.tile.dot
        spots = [(f"{p}_{v}", v * self.lanes) for p in range(rows * columns) for v in range(n)]
        begun = [f"I a{spot} = words(constants + {at});" for spot, at in spots]
        form, most, chains, added = _SUMS, 0, list[str](), list[str]()
        if dot.chain:
            chains = [f"I h{spot}{{}};" for spot, _ in spots]
            added = [f"a{spot} = (I)((V)a{spot} + total(h{spot}));" for spot, _ in spots]
            form, most = _CHAINS, max(1, dot.chain // taps)
            if max(p.items for p in self.panels) * len(groups(self.conv, self.tile)) <= most:  # one chain
                form, begun, added = _SUMS, chains, [*begun, *added]
        weights = [f"const I w{t}_{v} = words(w + {(t * n + v) * self.lanes});" for t in range(taps) for v in range(n)]
        products = fill(_PRODUCTS, x=self.source.value.dtype.c, picks=bool(dot.window), weights=weights,
                        products=self._products("h" if dot.chain else "a", n, rows, columns))
        return fill(form, begun=begun, most=most, chains=chains, added=added, products=products, step=taps * n * self.lanes,
                    fields=2 if dot.window else 1)

    def _products(self, sums: str, n: int, rows: int, columns: int) -> Iterator[str]:
        """Each product that an item has in a tile, added to a sum of this name."""
        for (y, x), users in places(self.conv, self.tile, rows, columns).items():
            where = f"p + {y * self.source.row + x * self.source.column}"
            value = f"pick(order, {where})" if self.tile.dot.window else f"spread({where})"
            adds = " ".join(f"{sums}{p}_{v} = dot({sums}{p}_{v}, s, w{t}_{v});" for p, t in users for v in range(n))
            yield f"{{ const I s = {value}; {adds} }}"
