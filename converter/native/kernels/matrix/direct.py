"""Direct convolution by products of matrices, channels last on both sides: up to 16 pixels times 64 bytes of their windows,
times the weights of 16 outputs.

Registers of tiles hold pixels, weights and sums of 32 bits. Pixels are read where they lie, at one distance from each other;
weights stream past in the order of reading. Sums go through memory that the first cache holds, to become elements of the
target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from gkp.converter.native.dtypes import BFLOAT16, FLOAT32, UINT8
from gkp.converter.native.kernels.bfloats import elements
from gkp.converter.native.kernels.bfloats.direct import Store
from gkp.converter.native.kernels.cpu import AMX_BF16, AMX_INT8, VECTORS, Cpu
from gkp.converter.native.kernels.emit import fill, unit
from gkp.converter.native.kernels.integers.direct import MakeStore, plane_of
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.integers.store import PanelStore
from gkp.converter.native.kernels.jobs import Words, cuts
from gkp.converter.native.kernels.kernel import Draft, Recipe
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.matrix.chunks import BYTES, Chunks, chunks, lines
from gkp.converter.native.kernels.matrix.strips import Strip, strips
from gkp.converter.native.kernels.matrix.tiles import REGISTERS, Tile, cycles, executed, tiles
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv

_LANES = 16
BYTE_MATRICES = Dot("tdpbusd", (VECTORS, AMX_INT8), (_LANES,), 4, 0, "")
BFLOAT_MATRICES = Dot("tdpbf16ps", (VECTORS, AMX_BF16), (_LANES,), 2, 0, fill(elements.ELEMENTS), element=BFLOAT16,
                      weights=elements.weights)


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 4) -> Iterator[Way]:
    """The family, for sources with a grid or in bfloat16: the `most` best tiles of each sort by the model."""
    if source.value.grid is not None and source.value.dtype == UINT8 and step.conv.scale is not None:
        yield from _tiled(step, source, target, residual, cpu, BYTE_MATRICES, PanelStore, most)
    elif source.value.dtype == BFLOAT16:
        yield from _tiled(step, source, target, residual, cpu, BFLOAT_MATRICES, Store, most)


def _tiled(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, dot: Dot, store: MakeStore,
           most: int) -> Iterator[Way]:
    if not dot.runs_on(cpu) or not all(at.channel == 1 and at.block is None for at in (source, target, residual) if at):
        return
    plane = plane_of(step, source, target, residual)
    cut = strips(step, plane, source, target, residual)
    for joined in (False, True) if step.conv.kernel_shape[1] > 1 and step.conv.dilations[1] == 1 else (False,):
        found = lines(step.conv, source.padded, dot.weights, joined)
        times = {tile: cycles(found, tile, cut, step, source) for tile in tiles(found, joined, dot, cut)}
        for tile in sorted(times, key=lambda tile: times[tile])[:most]:
            recipe = Recipe(partial(_draft, step, tile, cut, source, target, residual, store), dot.needs)
            trial = Trial(recipe, source, residual, target, times[tile])
            yield Way(layer_name(step), tile.label, trial, executed(found, tile, cut), tile.sort)


_HEAD = '''
    // @kh@x@kw@ convolution in @tile.dot.precision@, @conv.in_channels@ -> @conv.out_channels@ channels,
    // output @v.height@x@v.width@, tile: @tile.label@.
    struct Job { int vectors, items, table, weights, constants, out; };  // positions in words of the data
    struct Run { int first, count, target, residual; };

    static inline I words(const void* p) {
      typedef int Iu __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
      return *static_cast<const Iu*>(p);
    }
    // Of registers of tiles, which are sums, then what is multiplied.
    struct alignas(64) Shapes {
      unsigned char palette, start, unused[14];
      unsigned short bytes[16];
      unsigned char rows[16];
    };
    @dot@
    @store@

    @functions@
'''
_SUMS = '''
    // Sums of strips x and vectors of outputs, in registers.
    static inline void multiply_@a@_@n@_@half@(@sources@, const int* data, const Job& job) {
      asm volatile("" : : : "memory");  // what is loaded below has been stored
      const int *constants = data + job.constants, *w = data + job.weights, *at = data + job.table;
      @begin@
      for (int i = 0; i < job.items; ++i, w += @step@) {
        const long from = at[i];
        @products@
      }
    }
'''
_STORED = '''
    // Into the array: strips, pixels, outputs.
    static inline void keep_@a@_@n@_@rows@_@half@(int* sums) {
      @stores@
    }
'''
_FINISH = '''
    // What becomes of the sums of pixels side by side.
    static inline void finish_@n@(const int* sums, int count, const int* constants, @y@* y@more@) {
      for (; count >= @group@; count -= @group@) {
        @many@
        sums += @group@ * @words@; y += @group@ * @column@;@next_many@
      }
      for (; count > 0; --count) {
        @one@
        sums += @words@; y += @column@;@next_one@
      }
    }
'''
_ENTRY = '''
    const int* table = reinterpret_cast<const int*>(data);
    const Job* jobs = reinterpret_cast<const Job*>(data);
    alignas(64) int sums[2][@most@];
    (void)r;
    @loops@
    asm volatile("tilerelease");
'''
_LOOP = '''
    {
      static const struct { int in[@a@], runs[@a_1@]; } blocks[] = {@blocks@};
      static const Run runs[] = {@runs@};
      static const Shapes shapes = {1, 0, {}, {@bytes@}, {@rows@}};
      asm volatile("ldtilecfg %0" : : "m"(shapes));
      const auto multiply = [&](int n) {
        const Job& job = jobs[@job@];
        const int* in = blocks[@block@].in;
        switch (@case@) {
          @multiplied@
        }
      };
      const auto keep = [&](int n) {
        const Job& job = jobs[@job@];
        switch (@case@) {
          @kept@
        }
      };
      const auto finish = [&](int n) {
        const Job& job = jobs[@job@];
        const int* first = blocks[@block@].runs;
        const int* from = sums[n % 2];
        switch (job.vectors) {
          @finished@
        }
      };
      // Sums are stored when the next ones are on their way, where registers hold both, because what works on tiles does so
      // in order; and finished beside that.
      const int begin = first_of(@total@, part, parts), end = first_of(@total@, part + 1, parts);
      for (int n = begin; n < end + @delay@ + 1; ++n) {
        if (n < end) multiply(n);
        if (n - @delay@ >= begin && n - @delay@ < end) keep(n - @delay@);
        if (n - @delay@ - 1 >= begin) finish(n - @delay@ - 1);
      }
    }
'''
_FINISHED = '''
    case @n@:
      for (int strip = 0; strip < @a@; ++strip)
        for (int k = first[strip]; k < first[strip + 1]; ++k)
          finish_@n@(from + (strip * @pixels@ + runs[k].first) * @words@, runs[k].count, table + job.constants,
                     y + runs[k].target + job.out@more@);
      break;
'''


def _draft(step: Conv, tile: Tile, cut: Sequence[Strip], source: Layout, target: Layout, residual: Layout | None,
           store: MakeStore) -> Draft:
    return _Writer(step, tile, cut, source, target, residual, store).draft()


class _Writer:
    def __init__(self, step: Conv, tile: Tile, cut: Sequence[Strip], source: Layout, target: Layout, residual: Layout | None,
                 store: MakeStore) -> None:
        self.step, self.tile, self.cut = step, tile, cut
        self.source, self.target, self.residual = source, target, residual
        self.lines = lines(step.conv, source.padded, tile.dot.weights, tile.joined)
        self.panels = chunks(self.lines, tile.vectors, tile.words, tile.dot)
        self.sizes = sorted({p.vectors for p in self.panels})
        self.store = store(step, tile.dot, source, target, residual, _LANES)

    def draft(self) -> Draft:
        counts = [(p.vectors, len(p.starts)) for p in self.panels]
        return Draft(self._source(), repr(counts), self._data)

    # ---- data -------------------------------------------------------------------------------------------------------
    def _data(self) -> bytes:
        """Job table, then per panel: where its chunks are read, weights, constants."""
        words, table = Words(len(self.panels), 6, align=_LANES), list[list[int]]()
        for panel in self.panels:
            at = words.put(self._places(panel), np.int32)
            weights = words.put(panel.weights.ravel().view(np.int32), np.int32)
            table.append([panel.vectors, len(panel.starts), at, weights,
                          self.store.panel(words, panel.first, panel.vectors), panel.first])
        return words.bytes(table)

    def _places(self, panel: Chunks) -> list[int]:
        """Elements from the window's first one to each chunk."""
        dy, dx = self.step.conv.dilations
        begins = [y * dy * self.source.row + x * dx * self.source.column for y, x in self.lines.places]
        return [begins[line] + int(element) for line, element in panel.starts]

    # ---- source -----------------------------------------------------------------------------------------------------
    def _source(self) -> str:
        blocks, c = self._blocks(), self.step.conv
        shapes, halves = dict.fromkeys(a for a, _ in blocks), range(self.tile.ahead + 1)
        functions = [self._multiply(a, n, half) for a in shapes for n in self.sizes for half in halves]
        functions += [self._keep(a, n, pixels, half) for a, pixels in blocks for n in self.sizes for half in halves]
        head = fill(_HEAD, kh=c.kernel_shape[0], kw=c.kernel_shape[1], conv=c, v=self.target.value, tile=self.tile,
                    dot=self.tile.dot.code, store=self.store.functions(),
                    functions="\n".join([*functions, *map(self._finish, self.sizes)]))
        loops = "".join(self._loop(a, pixels, found) for (a, pixels), found in blocks.items())
        most = max(a * pixels for a, pixels in blocks) * max(self.sizes) * _LANES
        return unit(fill(_ENTRY, loops=loops, most=most), head, self.source.value.dtype,
                    self.residual.value.dtype if self.residual else FLOAT32, self.target.value.dtype)

    def _blocks(self) -> dict[tuple[int, int], list[Sequence[Strip]]]:
        """By (strips, pixels in each): the strips of each block."""
        found: dict[tuple[int, int], list[Sequence[Strip]]] = {}
        for pixels in sorted({strip.pixels for strip in self.cut}):
            same = [strip for strip in self.cut if strip.pixels == pixels]
            for lo, hi in cuts(len(same), self.tile.strips):
                found.setdefault((hi - lo, pixels), []).append(same[lo:hi])
        return found

    def _loop(self, a: int, pixels: int, blocks: list[Sequence[Strip]]) -> str:
        """The blocks of one shape, all panels; the parts share them."""
        runs, rows = list[str](), list[str]()
        for block in blocks:
            begins = []
            for strip in block:
                begins.append(len(runs))
                runs += [f"{{{r.first}, {r.count}, {r.target}, {r.residual}}}" for r in strip.runs]
            begins.append(len(runs))
            rows.append(f"{{{{{_listed(s.source for s in block)}}}, {{{_listed(begins)}}}}}")
        more = ", r + runs[k].residual + job.out" if self.residual else ""
        sources = ", ".join(f"x + in[{k}]" for k in range(a))
        ahead = self.tile.ahead
        halves = [(n, half, 2 * n + half if ahead else n) for n in self.sizes for half in range(ahead + 1)]
        multiplied = [f"case {k}: multiply_{a}_{n}_{half}({sources}, table, job); break;" for n, half, k in halves]
        kept = [f"case {k}: keep_{a}_{n}_{pixels}_{half}(sums[n % 2]); break;" for n, half, k in halves]
        finished = [fill(_FINISHED, n=n, a=a, pixels=pixels, words=n * _LANES, more=more) for n in self.sizes]
        inner = len(self.panels) if self.tile.by_strip else len(blocks)
        names = ("block", "job") if self.tile.by_strip else ("job", "block")
        sums, left, right = self._registers(a)
        shape = {**dict.fromkeys(sums, (pixels, BYTES)), **dict.fromkeys(left, (pixels, 4 * self.tile.words)),
                 **dict.fromkeys(right, (self.tile.words, BYTES))}
        return fill(_LOOP, blocks=", ".join(rows), runs=", ".join(runs), a=a, a_1=a + 1, multiplied=multiplied, kept=kept,
                    case="2 * job.vectors + n % 2" if ahead else "job.vectors", delay=int(ahead),
                    finished="".join(finished), total=len(blocks) * len(self.panels),
                    bytes=_listed(shape.get(k, (0, 0))[1] for k in range(REGISTERS)),
                    rows=_listed(shape.get(k, (0, 0))[0] for k in range(REGISTERS)),
                    **dict(zip(names, (f"n / {inner}", f"n % {inner}"), strict=True)))

    def _registers(self, a: int) -> tuple[range, list[int], list[int]]:
        """Which hold sums, which hold pixels, which hold weights: of what there is less of, all at once."""
        most = max(self.sizes)
        sums = a * most * (self.tile.ahead + 1)
        free, few = list(range(sums, REGISTERS)), min(a, most)
        return range(sums), *((free[few:], free[:few]) if most <= a else (free[:few], free[few:]))

    def _multiply(self, a: int, n: int, half: int) -> str:
        x = self.source.value.dtype.c
        begin = [_load(self._sum(a, k, v, half), f"constants + {v * _LANES}", 0) for k in range(a) for v in range(n)]
        return fill(_SUMS, a=a, n=n, half=half, sources=", ".join(f"const {x}* x{k}" for k in range(a)), begin=begin,
                    step=n * self.tile.words * _LANES, products=list(self._products(a, n, half)))

    def _keep(self, a: int, n: int, pixels: int, half: int) -> str:
        stores = [f'asm volatile("tilestored %%tmm{self._sum(a, k, v, half)}, (%0,%1,1)" : : '
                  f'"r"(sums + {(k * pixels * n + v) * _LANES}), "r"({4 * n * _LANES}L) : "memory");'
                  for k in range(a) for v in range(n)]
        return fill(_STORED, a=a, n=n, rows=pixels, half=half, stores=stores)

    def _sum(self, a: int, strip: int, vector: int, half: int) -> int:
        return (half * a + strip) * max(self.sizes) + vector

    def _products(self, a: int, n: int, half: int) -> Iterator[str]:
        """Of one chunk; each register is loaded where it is used first."""
        _, left, right = self._registers(a)
        distance = self.step.conv.strides[1] * self.source.column * self.source.value.dtype.bytes
        by_strip = max(self.sizes) <= a
        order = [(k, v) for k in range(a) for v in range(n)] if by_strip else [(k, v) for v in range(n) for k in range(a)]
        loaded = set[str]()
        for k, v in order:
            pixels, weights = left[k % len(left)], right[v % len(right)]
            for text in (_load(weights, f"w + {v * self.tile.words * _LANES}", BYTES),
                         _load(pixels, f"x{k} + from", distance)):
                if text not in loaded:
                    loaded.add(text)
                    yield text
            yield f'asm volatile("{self.tile.dot.name} %%tmm{weights}, %%tmm{pixels}, %%tmm{self._sum(a, k, v, half)}" : :);'

    def _finish(self, n: int) -> str:
        group, y = 4 if n < 4 else 1, self.target.value.dtype.c
        more = f", const {self.residual.value.dtype.c}* r" if self.residual else ""

        def step(pixels: int) -> str:
            return f" r += {pixels * self.residual.column};" if self.residual else ""

        return fill(_FINISH, n=n, y=y, more=more, group=group, many=self._stored(n, group), one=self._stored(n, 1),
                    words=n * _LANES, column=self.target.column, next_many=step(group), next_one=step(1))

    def _stored(self, n: int, pixels: int) -> list[str]:
        loads = ", ".join(f"a{p}_{v} = words(sums + {(p * n + v) * _LANES})" for p in range(pixels) for v in range(n))
        return ["{", f"const I {loads};", *self.store.statements(n, [(0, p) for p in range(pixels)]), "}"]


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _load(register: int, address: str, distance: int) -> str:
    """C++: a register from rows so many bytes apart."""
    return f'asm volatile("tileloadd (%0,%1,1), %%tmm{register}" : : "r"({address}), "r"({distance}L));'
