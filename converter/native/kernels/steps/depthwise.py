"""Convolution of every channel by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, get, kernel, loop, pixels, put, share
from gkp.converter.native.kernels.kernel import Kernel, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Depthwise

_UNROLLED = 49  # most taps that are written out one by one
_LINE, _SETS, _WAYS = 64, 64, 8
"""Of a first-level cache of 32 kB."""


def depthwise(step: Depthwise, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Kernel:
    """x: source, whose halo covers the pads (top and left at least; bottom and right as far as the windows reach);
    r: the residual (its layout is None where there is none), fast in the target's kind of layout. Raises ValueError if
    the shapes do not fit or the source's buffer has not the slack for vectors that reach past its end."""
    filters = step.weight.shape[0]
    if filters != target.value.channels or filters % source.value.channels or step.bias.shape != (filters,):
        raise ValueError(f"{filters} filters and {step.bias.size} biases do not take {source.value} to {target.value}")
    if (residual is None) != (step.residual is None) or (residual and residual.value != target.value):
        raise ValueError(f"the residual {residual and residual.value} is not of the target's shape {target.value}")
    writer = _Writer(step, source, target, residual or target, cpu.lanes)
    kinds = {a.planar for a in (source, target, writer.residual)}
    if kinds == {True}:
        return writer.lines() if writer.by_line else writer.rows()
    if kinds == {False}:
        return writer.channels_last()
    return writer.scalar()


@dataclass(frozen=True)
class _Writer:
    step: Depthwise
    source: Layout
    target: Layout
    residual: Layout  # the target's where there is none
    lanes: int

    @property
    def taps(self) -> list[tuple[int, int]]:
        _, kh, kw = self.step.weight.shape
        return [(ky, kx) for ky in range(kh) for kx in range(kw)]

    @property
    def multiplier(self) -> int:
        return self.target.value.channels // self.source.value.channels

    @property
    def first(self) -> int:
        """Where the first window begins, in the halo."""
        return self.source.offset(0, -self.step.pads[0], -self.step.pads[1])

    @property
    def channel(self) -> str:
        return "f" if self.multiplier == 1 else f"f / {self.multiplier}"

    @property
    def line(self) -> int:
        """Cells from the first pixel of a target plane to the last, halo between the rows included."""
        return (self.target.value.height - 1) * self.target.row + self.target.value.width

    @property
    def by_line(self) -> bool:
        """A plane as one line of cells takes clearly fewer vectors than row by row."""
        t = self.target
        rows = t.value.height * -(-t.value.width // self.lanes)
        pitches = {self.source.row, self.residual.row, t.row}
        return self.step.strides == (1, 1) and len(pitches) == 1 and -(-self.line // self.lanes) < 0.8 * rows

    def result(self, sum_: str, residual: str) -> str:
        text = activation(self.step.activation, sum_)
        return text if self.step.residual is None else activation(self.step.final, f"{text} + {residual}")

    def _places(self, *loops: tuple[str, str]) -> str:
        """t and residual, at the element that the loops have reached. loops: (variable, name of its stride)."""
        def place(pointer: str, layout: Layout) -> str:
            return at(pointer, layout.origin, *((variable, int(getattr(layout, stride))) for variable, stride in loops))
        text = f"float* t = {place('y', self.target)};\n"
        return text if self.step.residual is None else text + f"const float* residual = {place('r', self.residual)};\n"

    def filters(self) -> bytes:
        """Per output channel: bias, then weights."""
        flat = self.step.weight.reshape(len(self.step.bias), -1)
        return np.concatenate([self.step.bias[:, None], flat], axis=1).astype("<f4").tobytes()

    def check_slack(self, last: int) -> None:
        if last > self.source.size:
            raise ValueError(f"the source's buffer of {self.source.size} floats is read up to float {last}")

    def _filter(self) -> str:
        """w: this channel's bias and weights; unrolled ones in registers as far as there are enough."""
        count = len(self.taps)
        text = f"const float* w = reinterpret_cast<const float*>(data) + f * {1 + count};\n"
        if count <= _UNROLLED:
            text += "const V " + ", ".join(f"w{k} = splat(w[{k + 1}])" for k in range(count)) + ";\n"
        return text

    def rows(self) -> Kernel:
        """Planar: a few rows times one vector of pixels at a time."""
        value, (sy, sx), (dy, dx) = self.target.value, self.step.strides, self.step.dilations
        _, kh, kw = self.step.weight.shape
        tail = value.width // self.lanes * self.lanes if value.width % self.lanes else value.width - self.lanes
        corner = self.first + (self.source.value.channels - 1) * self.source.channel \
            + ((value.height - 1) * sy + (kh - 1) * dy) * self.source.row
        self.check_slack(corner + tail * sx + (kw - 1) * dx + self.lanes * (sx if sx < 3 else 1))
        height = min(4 if sy == 1 else 2, value.height) if len(self.taps) <= _UNROLLED else 1
        several = block(f"for (; row + {height} <= last; row += {height})", self._row_block(height)) if height > 1 else ""
        body = fill('''
            @filter@
            int row = first;
            @several@
            for (; row < last; ++row) {
              @one@
            }
        ''', filter=self._filter(), several=several, one=self._row_block(1))
        if value.channels >= 8 or value.channels >= value.height:
            where = share(value.channels) + f"const int first = 0, last = {value.height};\n"
            return kernel(where + loop("f", "begin", "end", body), self.filters())
        where = share(value.height) + "const int first = begin, last = end;\n"
        return kernel(where + loop("f", 0, value.channels, body), self.filters())

    def _row_block(self, height: int) -> str:
        s, t, sy = self.source, self.target, self.step.strides[0]
        names = "abcd"[:height]

        def piece(i: str, n: int) -> str:
            text = f"V {', '.join(f'{name} = splat(w[0])' for name in names)};\n" + self._sum(i, n, names)
            for k, name in enumerate(names):
                residual = get(at("residual", k * self.residual.row, (i, 1)), n, self.lanes)
                text += put(at("t", k * t.row, (i, 1)), self.result(name, residual), n, self.lanes)
            return text

        return fill('''
            const float* s = @s@;
            @places@
            @row@
        ''', s=at("x", self.first, (self.channel, s.channel), ("row", s.row * sy)),
                    places=self._places(("f", "channel"), ("row", "row")), row=chunks(t.value.width, self.lanes, piece))

    def _sum(self, i: str, n: int, names: str) -> str:
        return self._unrolled(i, n, names) if len(self.taps) <= _UNROLLED else self._looped(i, n)

    def _looped(self, i: str, n: int) -> str:
        (_, kh, kw), sx, (dy, dx) = self.step.weight.shape, self.step.strides[1], self.step.dilations
        cell = at("s", 0, (i, sx), ("ky", dy * self.source.row), ("kx", dx))
        cell = get(cell, self.lanes if sx < 3 else n, self.lanes, sx)
        return loop("ky", 0, kh, loop("kx", 0, kw, f"a += {cell} * w[1 + ky * {kw} + kx];\n"))

    def _unrolled(self, i: str, n: int, names: str) -> str:
        """Each cell of the source is loaded once and used by every row that reads it."""
        (_, kh, kw), (sy, sx), (dy, dx) = self.step.weight.shape, self.step.strides, self.step.dilations
        text = ""
        for line in sorted({k * sy + ky * dy for k in range(len(names)) for ky in range(kh)}):
            users = [(name, ky) for k, name in enumerate(names) for ky in range(kh) if k * sy + ky * dy == line]
            kx = 0
            while kx < kw:
                cell = at("s", line * self.source.row + kx * dx, (i, sx))
                if sx == 2 and dx == 1 and kx + 1 < kw:
                    text += f"{{ const V p = load({cell}), q = load({cell} + LANES), v = even(p, q), u = odd(p, q);\n"
                    uses = [("v", kx), ("u", kx + 1)]
                else:
                    text += f"{{ const V v = {get(cell, self.lanes if sx < 3 else n, self.lanes, sx)};\n"
                    uses = [("v", kx)]
                text += "  " + " ".join(f"{name} += {v} * w{ky * kw + x};" for v, x in uses for name, ky in users) + " }\n"
                kx += len(uses)
        return text

    def lines(self) -> Kernel:
        """Planar, short rows, stride 1, same pitch: the cells between the rows are computed in vain and stored as zero."""
        s, t, (dy, dx) = self.source, self.target, self.step.dilations
        _, kh, kw = self.step.weight.shape
        start = (self.line - 1) // self.lanes * self.lanes
        self.check_slack(self.first + (s.value.channels - 1) * s.channel + start + (kh - 1) * dy * s.row + (kw - 1) * dx
                         + self.lanes)
        cells = np.arange(-(-self.line // self.lanes) * self.lanes)
        mask = np.where(cells % t.row < t.value.width, -1, 0).astype("<i4").tobytes()

        def piece(i: str, n: int) -> str:
            value = self.result("a", get(at("residual", 0, (i, 1)), n, self.lanes))
            store = put(at("t", 0, (i, 1)), f"keep({value}, {at('mask', 0, (i, 1))})", n, self.lanes)
            return "V a = splat(w[0]);\n" + self._sum(i, n, "a") + store

        body = fill('''
            @filter@
            const float* s = @s@;
            @places@
            @line@
        ''', filter=self._filter(), s=at("x", self.first, (self.channel, s.channel)), places=self._places(("f", "channel")),
                    line=chunks(self.line, self.lanes, piece))
        filters = self.filters()
        table = f"const int* mask = reinterpret_cast<const int*>(data) + {len(filters) // 4};\n"
        return kernel(table + share(t.value.channels) + loop("f", "begin", "end", body), filters + mask)

    def channels_last(self) -> Kernel:
        """Vectors of channels, the weights in registers, a few pixels of a row at a time."""
        value, lanes = self.target.value, self.lanes
        padded = -(-value.channels // lanes) * lanes
        data = np.zeros((1 + len(self.taps), padded), "<f4")
        data[0, :value.channels] = self.step.bias
        data[1:, :value.channels] = self.step.weight.reshape(value.channels, -1).T

        unrolled = len(self.taps) <= _UNROLLED
        width = 4 if value.width >= 4 and unrolled and self.multiplier == 1 else 1

        def columns(piece: Callable[[int], str]) -> str:
            """piece(n) for n pixels of a row at a time."""
            text = "int column = 0;\n"
            if width > 1:
                text += block(f"for (; column + {width} <= {value.width}; column += {width})", piece(width))
            if value.width % width or width == 1:
                text += block(f"for (; column < {value.width}; ++column)", piece(1))
            return text

        def channels(pixels: Callable[[str, int], str]) -> str:
            """pixels(f, n) for n channels from f at a time, their weights at hand."""
            return chunks(value.channels, lanes, lambda f, n: fill('''
                const float* w = @w@;
                const V bias = load(w);
                $if unrolled: const V @taps@;
                @pixels@
            ''', w=at("weights", 0, (f, 1)), unrolled=unrolled, pixels=pixels(f, n),
                taps=", ".join(f"w{k} = load(w + {(k + 1) * padded})" for k in range(len(self.taps)))), "f")

        text = "const float* weights = reinterpret_cast<const float*>(data);\n" + share(value.height)
        if not self._stays_near():
            body = columns(lambda width: channels(lambda f, n: self._pixels(f, n, width, padded)))
            return kernel(text + loop("row", "begin", "end", body), data.tobytes())
        body = channels(lambda f, n: loop("row", "begin", "end", columns(lambda width: self._pixels(f, n, width, padded))))
        return kernel(text + body, data.tobytes())

    def _stays_near(self) -> bool:
        """Do the rows of one window stay in the first-level cache while one vector of channels passes over them? Every pixel
        takes a line of its own there, and lines a power of two apart compete for the same places. If not, all channels of a
        few pixels are computed before the next pixels: the source is read as it lies."""
        s = self.source
        apart = -(-s.column * s.value.dtype.bytes // _LINE)
        rows = int(self.step.weight.shape[1])
        return rows * (s.row // s.column) <= _SETS // gcd(_SETS, apart) * _WAYS * 2 // 3

    def _cell(self, address: str, f: str, n: int) -> str:
        """The statement that loads n channels of a pixel as v."""
        m = self.multiplier
        if m == 1:
            return f"const V v = {get(at(address, 0, (f, 1)), n, self.lanes)};\n"
        return "V v{};\n" + loop("k", 0, n, f"v[k] = *({address} + ({f} + k) / {m});\n")

    def _pixels(self, f: str, n: int, width: int, padded: int) -> str:
        s, t, (sy, sx), (dy, dx) = self.source, self.target, self.step.strides, self.step.dilations
        _, kh, kw = self.step.weight.shape
        text = f"const float* s = {at('x', self.first, ('row', sy * s.row), ('column', sx * s.column))};\n"
        text += self._places((f, "channel"), ("row", "row"), ("column", "column"))
        names = "abcd"[:width]
        text += f"V {', '.join(f'{name} = bias' for name in names)};\n"
        if len(self.taps) > _UNROLLED:
            cell = at("s", 0, ("ky", dy * s.row), ("kx", dx * s.column))
            text += loop("ky", 0, kh, loop("kx", 0, kw, self._cell(cell, f, n)
                                           + f"a += v * load(w + (1 + ky * {kw} + kx) * {padded});\n"))
        else:
            for ky in range(kh):
                for x in sorted({p * sx + kx * dx for p in range(width) for kx in range(kw)}):
                    users = [(name, kx) for p, name in enumerate(names) for kx in range(kw) if p * sx + kx * dx == x]
                    uses = " ".join(f"{name} += v * w{ky * kw + kx};" for name, kx in users)
                    text += block("", self._cell(at("s", ky * dy * s.row + x * s.column), f, n) + uses + "\n")
        for p, name in enumerate(names):
            residual = get(at("residual", p * self.residual.column), n, self.lanes)
            text += put(at("t", p * t.column), self.result(name, residual), n, self.lanes)
        return text

    def scalar(self) -> Kernel:
        """Any layouts."""
        s, t, (sy, sx), (dy, dx) = self.source, self.target, self.step.strides, self.step.dilations
        _, kh, kw = self.step.weight.shape
        cell = at("x", self.first, (self.channel, s.channel), (f"row * {sy} + ky * {dy}", s.row),
                  (f"column * {sx} + kx * {dx}", s.column))
        body = fill('''
            const float* w = reinterpret_cast<const float*>(data) + f * @size@;
            float sum = w[0];
            @taps@
            @places@
            const V v = @result@;
            *t = v[0];
        ''', size=1 + kh * kw, result=self.result("splat(sum)", "splat(*residual)"),
                    taps=loop("ky", 0, kh, loop("kx", 0, kw, f"sum += *({cell}) * w[1 + ky * {kw} + kx];\n")),
                    places=self._places(("f", "channel"), ("row", "row"), ("column", "column")))
        return kernel(pixels(t.value.height, t.value.width, loop("f", 0, t.value.channels, body)), self.filters())
