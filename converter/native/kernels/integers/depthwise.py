"""Convolution of every channel of integers by itself, channels last.

A tile is one vector of channels times some pixels. Where the processor sums four products of bytes at once, four neighbours
of a row are brought together for every channel, and used by all pixels of the tile that see them; elsewhere the integers are
computed with as floats, which is exact below 2^24.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.dtypes import FLOAT32, UINT8
from gkp.converter.native.kernels.cpu import PERMUTE, VNNI, Cpu
from gkp.converter.native.kernels.emit import at, block, fill, loop, share, unit
from gkp.converter.native.kernels.integers.dots import PICK_64
from gkp.converter.native.kernels.integers.scales import Scales, scales
from gkp.converter.native.kernels.integers.store import Store
from gkp.converter.native.kernels.jobs import Words, part_sizes
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Conv, Depthwise, Grid

_QUAD = 4
_FAR = 1 << 10
Pixel = tuple[int, int]


def _integers(step: Depthwise, grid: Grid) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(weights [F, kh, kw], what is added to the sum of q * weight), whole numbers."""
    scale = np.asarray(step.scale, np.float64)
    weight = np.rint(step.weight / scale[:, None, None])
    return weight, np.rint(step.bias / (np.float64(grid.scale) * scale)) - grid.zero * weight.sum((1, 2))


def depthwise(step: Depthwise, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Kernel:
    """As gkp.converter.native.kernels.steps.depthwise, of a source with a grid and as many filters as channels. Raises
    ValueError if the shapes or the step do not fit."""
    value = target.value
    if source.value.grid is None or step.scale is None or source.value.channels != value.channels or target.channel != 1 \
            or step.weight.shape[0] != value.channels or (residual is not None and residual.channel != 1):
        raise ValueError(f"no kernel of integers takes {source.value} to {value}")
    close = step.dilations[1] == 1  # else places past the window lie farther apart than layouts have slack
    sums = _Quads if close and cpu.lanes == 16 and {VNNI, PERMUTE} <= set(cpu.instructions) else _Floats
    return sums(step, source, target, residual, cpu.lanes).kernel()


@dataclass(frozen=True)
class _Writer:
    step: Depthwise
    source: Layout
    target: Layout
    residual: Layout | None
    lanes: int

    @cached_property
    def like(self) -> Conv:
        """A convolution with the same scales and functions."""
        s = self.step
        f, kh, kw = s.weight.shape
        form = BranchedConv(f, f, (), s.bias, (kh, kw), s.strides, s.pads, s.dilations, s.scale)
        return Conv(s.source, s.target, form, s.activation, s.residual, s.final)

    @cached_property
    def scales(self) -> Scales:
        return scales(self.like, self.source.value, self.target.value, self.residual.value if self.residual else None)

    @cached_property
    def store(self) -> Store:
        return Store(self.like, self.scales, self.target, self.residual, self.lanes)

    @property
    def tile(self) -> Pixel:
        """Rows and columns, at most."""
        raise NotImplementedError

    def head(self) -> str:
        """C++ before the function."""
        return ""

    begin = ""
    """C++ at its start."""

    def weights(self, part: npt.NDArray[np.float64]) -> npt.NDArray[np.generic]:
        """In the order of reading, from [lanes, kh, kw]."""
        raise NotImplementedError

    def registers(self) -> Iterator[str]:
        """C++ that loads the weights at w."""
        raise NotImplementedError

    def products(self, pixels: list[Pixel]) -> Iterator[str]:
        """C++ that adds to the sums a<pixel>_0 what the pixels see at s."""
        raise NotImplementedError

    start = "words(constants)"
    sum_type = "I"

    def kernel(self) -> Kernel:
        value, vectors = self.target.value, -(-self.target.value.channels // self.lanes)
        parts = part_sizes(value.height, self.tile[0])  # rows of the tiles, and how many have them
        (less, few), (rows, _) = parts[0], parts[-1]
        body = f"const int row = item * {less} + (item > {few} ? item - {few} : 0) * {rows - less};\n"
        body += block(f"if (item < {few})", self._columns(less))
        if len(parts) > 1:
            body += block("else", self._columns(rows))
        body = loop("f", 0, vectors, fill(_VECTOR, lanes=self.lanes, registers=self.registers()) + body)
        text = fill(_ENTRY, begin=self.begin, share=share(sum(count for _, count in parts)),
                    items=loop("item", "begin", "end", body))
        residual = self.residual.value.dtype if self.residual else FLOAT32
        head = fill(_HEAD, store=self.store.functions(), head=self.head())
        return Kernel(unit(text, head, UINT8, residual, value.dtype), self._data(vectors))

    def _columns(self, rows: int) -> str:
        width = self.target.value.width
        columns = min(self.tile[1], width)
        text = ""
        if width % columns:  # the last tile begins early
            text = f"const int column = at < {width - columns} ? at : {width - columns};\n"
        return loop("at" if text else "column", 0, width, text + self._tile(rows, columns), str(columns))

    def _tile(self, rows: int, columns: int) -> str:
        (sy, sx), s = self.step.strides, self.source
        pixels = [(r, c) for r in range(rows) for c in range(columns)]
        return fill('''
            const unsigned char* s = @s@;
            auto* t = @t@;
            $if r: const auto* q = @q@;
            @type@ @sums@;
            @products@
            {
              auto* y = t;
              $if r: const auto* r = q;
              @store@
            }
        ''', s=at("x", s.offset(0, -self.step.pads[0], -self.step.pads[1]), ("f", self.lanes), ("row", sy * s.row),
                  ("column", sx * s.column)),
            t=self._place("y", self.target), r=self.residual is not None, q=self._place("r", self.residual or self.target),
            type=self.sum_type, sums=", ".join(f"a{p}_0 = {self.start}" for p in range(len(pixels))),
            products=self.products(pixels), store=self.store.statements(1, pixels))

    def _place(self, pointer: str, layout: Layout) -> str:
        return at(pointer, layout.origin, ("f", self.lanes), ("row", layout.row), ("column", layout.column))

    def _data(self, vectors: int) -> bytes:
        """Per vector of channels: where its constants and weights are."""
        assert self.source.value.grid is not None
        words, table = Words(vectors, 2, align=self.lanes), list[list[int]]()
        weight, added = _integers(self.step, self.source.value.grid)
        for first in range(0, vectors * self.lanes, self.lanes):
            part = slice(first, first + self.lanes)
            own = np.zeros((self.lanes, *weight.shape[1:]))
            own[:len(weight[part])] = weight[part]
            constants = self.store.constants(words, added[part].astype(np.int32), self.scales.factor[part], self.lanes)
            found = self.weights(own)
            table.append([constants, words.put(found, np.int32 if found.dtype == np.int32 else np.float32)])
        return words.bytes(table)


class _Floats(_Writer):
    """A product at a time."""

    start = "__builtin_convertvector(words(constants), V)"
    sum_type = "V"

    @property
    def tile(self) -> Pixel:
        return (2 if self.step.strides[0] == 1 else 1), 4

    def weights(self, part: npt.NDArray[np.float64]) -> npt.NDArray[np.generic]:
        return np.asarray(part.reshape(self.lanes, -1).T, np.float32)

    def registers(self) -> Iterator[str]:
        yield "const float* w = reinterpret_cast<const float*>(data) + table[2 * f + 1];"
        taps = ", ".join(f"w{k} = load(w + {k * self.lanes})" for k in range(self.step.weight[0].size))
        yield f"const V {taps};"

    def products(self, pixels: list[Pixel]) -> Iterator[str]:
        (sy, sx), (dy, dx), (_, kh, kw) = self.step.strides, self.step.dilations, self.step.weight.shape
        users: dict[Pixel, list[tuple[int, int]]] = {}
        for p, (r, c) in enumerate(pixels):
            for k in range(kh * kw):
                users.setdefault((r * sy + k // kw * dy, c * sx + k % kw * dx), []).append((p, k))
        for (y, x), found in sorted(users.items()):
            sums = " ".join(f"a{p}_0 += v * w{k};" for p, k in found)
            yield f"{{ const V v = integers(s + {y * self.source.row + x * self.source.column}, 0); {sums} }}"


class _Quads(_Writer):
    """Four products at a time: of neighbours in a row, or of every second, third, ... one where taps lie so far apart."""

    begin = "const I order = by_channel();"

    @property
    def tile(self) -> Pixel:
        return self._rows, max(1, (self._groups * _QUAD - int(self.step.weight.shape[2])) // self._apart + 1)

    @property
    def _rows(self) -> int:
        """As many as there are registers for, beside those of the weights."""
        _, kh, kw = self.step.weight.shape
        return 8 if kh * kw <= 9 and self.step.strides == (1, 1) else 4

    @property
    def _apart(self) -> int:
        """Places between the first taps of two neighbours, in steps of a dilation; so far that none is shared: as many as
        make each pixel begin a group of its own."""
        sx, dx = self.step.strides[1], self.step.dilations[1]
        return sx // dx if sx % dx == 0 else _FAR

    @property
    def _groups(self) -> int:
        """Of four places, in a row of the window of the tile."""
        least = -(-int(self.step.weight.shape[2]) // _QUAD)
        room = (least * _QUAD - int(self.step.weight.shape[2])) // self._apart
        return least if room or self._apart >= _QUAD else least + 1

    @property
    def _shifts(self) -> list[int]:
        """From the first place of a group to the first tap of a pixel that sees some of the group."""
        columns = min(self.tile[1], self.target.value.width)
        kw = self.step.weight.shape[2]
        found = {g * _QUAD - c * self._apart for g in range(self._groups) for c in range(columns)}
        return sorted(shift for shift in found if -_QUAD < shift < kw)

    def head(self) -> str:
        return fill(PICK_64.code) + fill(_NEIGHBOURS)

    def weights(self, part: npt.NDArray[np.float64]) -> npt.NDArray[np.generic]:
        """[ky, shift, lane, 4]."""
        _, kh, kw = part.shape
        made = np.zeros((kh, len(self._shifts), self.lanes, _QUAD), np.int8)
        for n, shift in enumerate(self._shifts):
            for j in range(_QUAD):
                if 0 <= shift + j < kw:
                    made[:, n, :, j] = part[:, :, shift + j].T
        return made.reshape(-1).view(np.int32)

    def registers(self) -> Iterator[str]:
        yield "const int* w = table + table[2 * f + 1];"
        count = self.step.weight.shape[1] * len(self._shifts)
        yield f"const I {', '.join(f'w{k} = words(w + {k * self.lanes})' for k in range(count))};"

    def products(self, pixels: list[Pixel]) -> Iterator[str]:
        sy, (dy, dx), kh, shifts = self.step.strides[0], self.step.dilations, self.step.weight.shape[1], self._shifts
        users: dict[Pixel, list[tuple[int, int]]] = {}
        for p, (r, c) in enumerate(pixels):
            for ky in range(kh):
                for g in range(self._groups):
                    if (shift := g * _QUAD - c * self._apart) in shifts:
                        users.setdefault((r * sy + ky * dy, g), []).append((p, ky * len(shifts) + shifts.index(shift)))
        for (y, g), found in sorted(users.items()):
            sums = " ".join(f"a{p}_0 = dot(a{p}_0, v, w{k});" for p, k in found)
            place = y * self.source.row + g * _QUAD * dx * self.source.column
            yield f"{{ const I v = neighbours(s + {place}, {dx * self.source.column}, order); {sums} }}"


_HEAD = '''
    static inline I words(const void* p) {
      typedef int Iu __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
      return *static_cast<const Iu*>(p);
    }
    @store@
    @head@
'''
_NEIGHBOURS = '''
    // For each of 16 channels its bytes at p, p + apart, ... side by side.
    static inline I neighbours(const unsigned char* p, long apart, I order) {
      typedef int Quarter __attribute__((vector_size(16)));
      Quarter a, b, c, d;
      __builtin_memcpy(&a, p, 16);
      __builtin_memcpy(&b, p + apart, 16);
      __builtin_memcpy(&c, p + 2 * apart, 16);
      __builtin_memcpy(&d, p + 3 * apart, 16);
      const auto low = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
      const auto high = __builtin_shufflevector(c, d, 0, 1, 2, 3, 4, 5, 6, 7);
      const I v = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      asm("vpermb %1, %0, %0" : "+v"(order) : "v"(v));
      return order;
    }
    static inline I by_channel() {
      unsigned char places[64];
      for (int i = 0; i < 64; ++i) places[i] = static_cast<unsigned char>(i % 4 * 16 + i / 4);
      return words(places);
    }
'''
_ENTRY = '''
    const int* table = reinterpret_cast<const int*>(data);
    (void)r;
    @begin@
    @share@
    @items@
'''
_VECTOR = '''
    const int* constants = table + table[2 * f];
    @registers@
'''
