"""Maximum and average over windows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, get, kernel, loop, pixels, planes, put, share
from gkp.converter.native.kernels.kernel import Kernel, literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.grids import integers, typed
from gkp.converter.native.program import Pool
from gkp.types import Floats

_LONGEST_LINE = 16384  # floats of a row kept on the stack


def pool(step: Pool, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Windows may reach beyond the plane; the source needs no halo. A window outside the plane gives 0 as average and
    minus infinity as maximum. Maxima leave NaN out, as ONNX Runtime's do. Raises ValueError if the channels differ."""
    if source.value.channels != target.value.channels:
        raise ValueError(f"cannot pool {source.value} to {target.value}")
    plane = (source.value.height, source.value.width)
    if step.kernel == plane and not any(step.pads) and target.value.pixels == 1 and step.dilations == (1, 1):
        return typed(_whole_plane(step, source, target, cpu.lanes), source, target)
    writer = _Windows(step, source, target, cpu.lanes)
    if not source.planar and not target.planar:
        return typed(writer.constants() + writer.channels_last(), source, target, data=writer.data())
    if source.planar and target.planar and writer.line <= _LONGEST_LINE:
        return kernel(writer.constants() + writer.planar(), writer.data())
    return typed(writer.constants() + writer.scalar(), source, target, data=writer.data())


def _whole_plane(step: Pool, source: Layout, target: Layout, lanes: int) -> str:
    """Global pooling."""
    value = source.value
    start, scale = ("-__builtin_inff()", "") if step.maximum else ("0.0f", f" * {1 / value.pixels!r}f")

    def combine(a: str, b: str) -> str:
        return f"maximum({b}, {a})" if step.maximum else f"{a} + {b}"

    if source.planar:
        # a sum may include the halo's zeros
        rows, line = (value.height, value.width) if step.maximum else (1, (value.height - 1) * source.row + value.width)
        inner, sums = _reduction(line, lanes, combine, "a" if step.maximum else "")
        text = fill('''
            V @sums@;
            const float* s = @s@;
            @rows@
            @join@
            *(@place@) = @total@(a)@scale@;
        ''', sums=", ".join(f"{name} = splat({start})" for name in sums), scale=scale,
                    s=at("x", source.origin, ("c", source.channel)), place=at("y", target.origin, ("c", target.channel)),
                    rows=inner if rows == 1 else loop("row", 0, rows, inner + f"s += {source.row};\n"),
                    join=[f"a = {combine('a', name)};" for name in sums[1:]], total="largest" if step.maximum else "sum")
        return share(value.channels) + loop("c", "begin", "end", text)
    read, stored = _between(step, source, target)

    def piece(c: str, n: int) -> str:
        cell = read(get(at("x", source.origin, (c, 1), ("row", source.row), ("column", source.column)), n, lanes))
        inner = loop("row", 0, value.height, loop("column", 0, value.width, f"v = {combine('v', cell)};\n"))
        return f"V v = splat({start});\n" + inner + put(at("y", target.origin, (c, target.channel)), stored(f"v{scale}"), n,
                                                        lanes, target.channel)
    return _vectors(value.channels, lanes, piece)


def _between(step: Pool, source: Layout, target: Layout) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """What is combined of elements as they lie in memory, and what is stored of the result. Integers are combined as such: a
    maximum stays where it is on the grid, and sums are exact."""
    grid, to = source.value.grid, target.value.grid
    if grid is None or (step.maximum and grid == to):
        return lambda v: v, lambda v: v if grid is not None else integers(v, to)
    return lambda v: f"({v} - {literal(grid.zero)})", lambda v: integers(f"{v} * {literal(grid.scale)}", to)


def _reduction(n: int, lanes: int, combine: Callable[[str, str], str], fill: str) -> tuple[str, str]:
    """Statements that add n floats at s to up to four vectors, and the names of these."""
    sums = "aefg"[:min(4, n // lanes)] or "a"
    step = len(sums) * lanes
    whole = n // step * step
    body = "".join(f"{name} = {combine(name, f'load(s + i + {k} * LANES)')};\n" for k, name in enumerate(sums))
    text = loop("i", 0, whole, body, f"{len(sums)} * LANES") if whole else ""
    return text + chunks(n - whole, lanes,
                         lambda i, m: f"a = {combine('a', get(at('s', whole, (i, 1)), m, lanes, 1, fill))};\n"), sums


def _vectors(n: int, lanes: int, piece: Callable[[str, int], str]) -> str:
    """Vectors of channels, shared by the parts."""
    full = n // lanes
    text = (share(full) + loop("c", "begin * LANES", "end * LANES", piece("c", lanes), "LANES")) if full else ""
    return text + (block("if (part == parts - 1)", piece(str(full * lanes), n % lanes)) if n % lanes else "")


@dataclass(frozen=True)
class _Windows:
    step: Pool
    source: Layout
    target: Layout
    lanes: int

    @property
    def start(self) -> str:
        return "-__builtin_inff()" if self.step.maximum else "0.0f"

    @property
    def line(self) -> int:
        """Floats of a source row with the pads, and slack for whole vectors."""
        (_, kw), (_, sx), (_, dx) = self.step.kernel, self.step.strides, self.step.dilations
        return (self.target.value.width + self.lanes) * sx + (kw - 1) * dx + self.step.pads[1] + self.source.value.width

    def combine(self, a: str, b: str) -> str:
        return f"maximum({b}, {a})" if self.step.maximum else f"{a} + {b}"

    def data(self) -> bytes:
        """For averages: 1 / (columns in the window) of every target column, then the same of the rows."""
        if self.step.maximum:
            return b""
        return np.concatenate([self._shares(1), self._shares(0)]).astype("<f4").tobytes()

    def _shares(self, axis: int) -> Floats:
        step = self.step
        k, s, d, before, after = (step.kernel[axis], step.strides[axis], step.dilations[axis], step.pads[axis],
                                  step.pads[2 + axis])
        size, out = ((v.height, v.width)[axis] for v in (self.source.value, self.target.value))
        low, high = (-before, size + after) if step.count_pads else (0, size)
        place = np.arange(out)[:, None] * s - before + np.arange(k) * d
        count = ((place >= low) & (place < high)).sum(axis=1)
        return np.asarray(1.0 / np.maximum(count, 1), np.float32)

    def constants(self) -> str:
        if self.step.maximum:
            return ""
        return ("const float* per_column = reinterpret_cast<const float*>(data);\n"
                f"const float* per_row = per_column + {self.target.value.width};\n")

    def planar(self) -> str:
        """A row of maxima or sums down the window's rows, with the pads at its ends; then along it."""
        s, t, lanes = self.source, self.target, self.lanes
        (kh, kw), (sy, sx), (dy, dx), pads = self.step.kernel, self.step.strides, self.step.dilations, self.step.pads
        find = fill('''
            const int from = row * @sy@ + k * @dy@ - @pad@;
            if (from >= 0 && from < @height@) rows[n++] = @s@;
        ''', sy=sy, dy=dy, pad=pads[0], height=s.value.height, s=at("x", s.origin, ("c", s.channel), ("from", s.row)))

        def down(count: str | int) -> str:
            def piece(i: str, n: int) -> str:
                more = f"v = {self.combine('v', get(at('rows[k]', 0, (i, 1)), n, lanes))};\n"
                if isinstance(count, int):
                    adds = "".join(more.replace("rows[k]", f"rows[{k}]") for k in range(1, count))
                else:
                    adds = loop("k", 1, count, more)
                first = get(at("rows[0]", 0, (i, 1)), n, lanes)
                begin = f"maximum({first}, splat({self.start}))" if self.step.maximum else first  # no NaN
                return (f"V v = {begin};\n" + adds
                        + put(at("line", pads[1], (i, 1)), "v", n, lanes))
            return chunks(s.value.width, lanes, piece)

        empty = loop("i", pads[1], pads[1] + s.value.width, f"line[i] = {self.start};\n")
        some = block("else if (n > 0)", down("n")) + block("else", empty)
        vertical = (block(f"if (n == {kh})", down(kh)) + some) if kh <= 4 else some.removeprefix("else ")

        def along(i: str, n: int) -> str:
            taps = [get(at("line", k * dx, (i, sx)), lanes, lanes, sx) for k in range(kw)]
            if kw > 16:
                tap = get(at("line", 0, (i, sx), ("k", dx)), lanes, lanes, sx)
                sums = f"V v = {taps[0]};\n" + loop("k", 1, kw, f"v = {self.combine('v', tap)};\n")
            else:
                sums = f"V v = {taps[0]};\n" + "".join(f"v = {self.combine('v', tap)};\n" for tap in taps[1:])
            scale = "" if self.step.maximum else f" * ({get(at('per_column', 0, (i, 1)), n, lanes)} * per_row[row])"
            return sums + put(at("t", 0, (i, 1)), f"v{scale}", n, lanes)
        line = f"float line[{self.line}];\n" + loop("i", 0, self.line, f"line[i] = {self.start};\n")
        return line + planes(t.value.channels, t.value.height, fill('''
            const float* rows[@kh@];
            int n = 0;
            @find@
            @vertical@
            float* t = @t@;
            @horizontal@
        ''', kh=kh, find=loop("k", 0, kh, find), vertical=vertical, horizontal=chunks(t.value.width, lanes, along),
            t=at("y", t.origin, ("c", t.channel), ("row", t.row))))

    def _window(self, inner: str) -> str:
        """Loops over the cells (fy, fx) of the window of (row, column) that lie in the plane (true loops even for one pass,
        because of `continue`)."""
        (kh, kw), (sy, sx), (dy, dx), pads = self.step.kernel, self.step.strides, self.step.dilations, self.step.pads
        height, width = self.source.value.height, self.source.value.width
        return fill('''
            for (int ky = 0; ky < @kh@; ++ky) {
              const int fy = row * @sy@ + ky * @dy@ - @pads[0]@;
              if (fy < 0 || fy >= @height@) continue;
              for (int kx = 0; kx < @kw@; ++kx) {
                const int fx = column * @sx@ + kx * @dx@ - @pads[1]@;
                if (fx < 0 || fx >= @width@) continue;
                @inner@
              }
            }
        ''', kh=kh, kw=kw, sy=sy, sx=sx, dy=dy, dx=dx, pads=pads, height=height, width=width, inner=inner)

    def _scale(self) -> str:
        return "" if self.step.maximum else " * (per_row[row] * per_column[column])"

    def channels_last(self) -> str:
        """Vectors of channels, pixel by pixel."""
        s, t = self.source, self.target
        read, stored = _between(self.step, s, t)

        def piece(c: str, n: int) -> str:
            cell = read(get(at("x", s.origin, (c, 1), ("fy", s.row), ("fx", s.column)), n, self.lanes))
            place = at("y", t.origin, (c, 1), ("row", t.row), ("column", t.column))
            return (f"V v = splat({self.start});\n" + self._window(f"v = {self.combine('v', cell)};\n")
                    + put(place, stored(f"v{self._scale()}"), n, self.lanes))
        return pixels(t.value.height, t.value.width, chunks(t.value.channels, self.lanes, piece, "c"))

    def scalar(self) -> str:
        """Any layouts, of which the target's is of floats."""
        s, t = self.source, self.target
        read, stored = _between(self.step, s, t)
        cell = read(f"*({at('x', s.origin, ('c', s.channel), ('fy', s.row), ('fx', s.column))})")
        more = f"const float f = {cell};\n" + ("v = f > v ? f : v;\n" if self.step.maximum else "v += f;\n")
        body = f"float v = {self.start};\n" + self._window(more)
        place = at("y", t.origin, ("c", t.channel), ("row", t.row), ("column", t.column))
        body += f"*({place}) = {stored(f'v{self._scale()}')};\n"
        return pixels(t.value.height, t.value.width, loop("c", 0, t.value.channels, body))
