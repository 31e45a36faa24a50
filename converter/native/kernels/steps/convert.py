"""The same elements elsewhere: in another layout, in the user's array, under another shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gkp.converter.native.dtypes import FLOAT32, DType
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, kernel, loop, planes, put, share
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps import words
from gkp.converter.native.kernels.steps.elementwise import elementwise, whole
from gkp.converter.native.kernels.steps.grids import between, regridded, typed
from gkp.converter.native.program import Grid, Value


def convert(source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """The kernel that copies a value from one layout to another, or to another grid. Reads and writes no cell but the
    value's own, where a buffer has no slack."""
    return typed(conversion(source, target, cpu.lanes), source, target)


def conversion(source: Layout, target: Layout, lanes: int) -> str:
    """The body of convert's kernel."""
    value = target.value
    if source.value.shape != value.shape:
        raise ValueError(f"cannot convert a value of shape {source.value} to {value}")
    if words.fits(source, target):
        return words.from_planes(source, target, lanes)
    if source.planar == target.planar or value.pixels == 1 or value.channels == 1:
        return elementwise(whole("y", target), [whole("x", source)], value.shape, lambda v: v[0], True, lanes)
    return _Transposition(source, target, lanes).body()


class _Transposition:
    """Between planar and channels-last, by square blocks in registers: a vector of channels times a vector of pixels.
    A vector of pixels is a stretch of a row, or several whole rows side by side where rows are short."""

    def __init__(self, source: Layout, target: Layout, lanes: int) -> None:
        self.source, self.target, self.lanes = source, target, lanes
        value = source.value
        self.channels, self.height, self.width = value.channels, value.height, value.width
        if all(a.row == a.column * value.width for a in (source, target)):
            self.height, self.width = 1, value.pixels
        self.slot = lanes  # lanes per row
        while self.height > 1 and self.slot >= 2 * self.width:
            self.slot //= 2

    def body(self) -> str:
        rows = self.lanes // self.slot  # per vector
        per_row = -(-self.width // self.lanes)
        groups = -(-self.height // rows)
        self.per_row = per_row
        items = groups * per_row
        if rows > 1:
            where = f"const int row = item * {rows};\n"
            kinds = [(rows, self.width), (self.height % rows, self.width)]
            whole_blocks, test = self.height // rows, f"item < {self.height // rows}"
        else:
            where = f"const int row = item / {per_row}, column = item % {per_row} * LANES;\n" if per_row > 1 \
                else "const int row = item;\n"
            kinds = [(1, self.lanes), (1, self.width % self.lanes)]
            whole_blocks, test = self.width // self.lanes, f"column <= {self.width - self.lanes}"

        def piece(rows: int, width: int) -> str:
            return chunks(self.channels, self.lanes, lambda c, n: self._block(c, n, rows, width), "c")

        full, rest = (piece(r, w) if r and w else "" for r, w in kinds)
        if not whole_blocks or not rest:
            inner = full if whole_blocks else rest
        else:
            inner = block(f"if ({test})", full) + block("else", rest)
        return share(items) + loop("item", "begin", "end", where + inner)

    def _block(self, c: str, channels: int, rows: int, width: int) -> str:
        s, t = self.source, self.target
        column = "column" if self.per_row > 1 else "0"
        s_at, t_at = (at(pointer, a.origin, (c, a.channel), ("row", a.row), (column, a.column))
                      for pointer, a in (("x", s), ("y", t)))
        planes = self._planes(channels, rows, width, s.planar)
        pixels = self._pixels(channels, rows, width, c, not s.planar)
        other = between(lambda v: v[0], ["v[k]"], [s.value.grid], t.value.grid)
        onto = "" if other == "v[k]" else loop("k", 0, channels, f"v[k] = {other};\n")
        return fill('''
            const auto* s = @s@;
            auto* t = @t@;
            V v[LANES] = {};
            @load@
            @store@
        ''', s=s_at, t=t_at, load=f"{planes}{onto}transpose(v);\n" if s.planar else pixels,
                    store=pixels if s.planar else f"transpose(v);\n{onto}{planes}")

    def _planes(self, channels: int, rows: int, width: int, loads: bool) -> str:
        """Vectors of pixels, one per channel."""
        layout = self.source if loads else self.target
        last = layout.offset(layout.value.channels - 1, layout.value.height - 1, layout.value.width - 1)
        if loads and layout.size - last > self.slot:  # lanes behind the row are dropped later
            width = self.slot
        lines = ""
        for j in range(rows):
            address = at("s" if loads else "t", j * layout.row, ("k", layout.channel))
            if rows > 1:
                lines += (f"load_lanes<{j * self.slot}, {width}>(v[k], {address});\n" if loads
                          else f"store_lanes<{j * self.slot}, {width}>({address}, v[k]);\n")
            elif loads:
                lines += f"v[k] = load({address});\n" if width == self.lanes else f"v[k] = load_first<{width}>({address});\n"
            else:
                lines += put(address, "v[k]", width, self.lanes)
        return loop("k", 0, channels, lines)

    def _pixels(self, channels: int, rows: int, width: int, c: str, loads: bool) -> str:
        """Vectors of channels, one per pixel."""
        layout = self.source if loads else self.target
        fits = channels == self.lanes or int(c) + self.lanes <= layout.padded
        n = self.lanes if fits else channels
        lines = ""
        for j in range(rows):
            address = at("s" if loads else "t", j * layout.row, ("k", layout.column))
            lane = f"v[{j * self.slot} + k]" if j else "v[k]"
            if loads:
                lines += f"{lane} = {'load' if n == self.lanes else f'load_first<{n}>'}({address});\n"
            else:
                lines += put(address, lane, n, self.lanes)
        return loop("k", 0, width, lines)


def space_to_depth(source: Layout, target: Layout, strides: Sequence[int], offsets: Sequence[int], cpu: Cpu) -> Kernel:
    """Polyphase order: channel (py * sx + px) * C + c of the target at (y, x) is channel c of the source at
    (y * sy + py - oy, x * sx + px - ox), or zero where that lies outside the plane. Both layouts are planar.

    strides: (sy, sx); offsets: (oy, ox). Raises ValueError for other layouts or another number of channels."""
    (sy, sx), (oy, ox) = strides, offsets
    channels, height, width = source.value.channels, source.value.height, source.value.width
    if not (source.planar and target.planar) or target.value.channels != channels * sy * sx:
        raise ValueError("polyphase order needs planar layouts and strides[0] * strides[1] times the channels")

    def phases(py: int) -> str:
        places = [at("y", target.offset((py * sx + px) * channels, 0, 0), ("c", target.channel), ("row", target.row))
                  for px in range(sx)]
        return fill('''
            {
              const int from = row * @sy@@first@;
              @targets@
              if (from < 0 || from >= @height@) {
                @zeros@
              }
              else {
                const float* s = @s@;
                @inside@
              }
            }
        ''', sy=sy, first=f"{py - oy:+d}", height=height, targets=[f"float* t{px} = {p};" for px, p in enumerate(places)],
                    zeros=loop("i", 0, target.value.width, "".join(f"t{px}[i] = 0.0f;\n" for px in range(sx))),
                    s=at("x", source.origin, ("c", source.channel), ("from", source.row)),
                    inside=(_halves if sx == 2 else _phases)(width, target.value.width, sx, ox, cpu.lanes))

    text = "".join(map(phases, range(sy)))
    return kernel(share(target.value.height) + loop("row", "begin", "end", loop("c", 0, channels, text)))


def _phases(width: int, out: int, sx: int, ox: int, lanes: int) -> str:
    """Rows of every phase, for any stride."""
    text = ""
    for px in range(sx):
        low = min(max(-((px - ox) // sx), 0), out)
        high = max(min((width - 1 + ox - px) // sx + 1, out), low)
        text += loop("i", 0, low, f"t{px}[i] = 0.0f;\n") if low else ""
        text += loop("i", low, high, f"t{px}[i] = s[{at(f'i * {sx}', px - ox)}];\n") if high > low else ""
        text += loop("i", high, out, f"t{px}[i] = 0.0f;\n") if out > high else ""
    return text


def _halves(width: int, out: int, sx: int, ox: int, lanes: int) -> str:
    """Both phases of a row with stride 2: two vectors of the source become one of each."""
    low = min(max(-(-ox // 2), 0), out)  # from here on both phases lie in the source, up to high
    high = max(min((width + ox) // 2, out), low)

    def edge(begin: int, end: int) -> str:
        if begin == end:
            return ""
        values = "".join(f"t{px}[i] = {f} >= 0 && {f} < {width} ? s[{f}] : 0.0f;\n"
                         for px, f in enumerate((at("2 * i", -ox), at("2 * i", 1 - ox))))
        return loop("i", begin, end, values)

    def piece(position: str, n: int) -> str:
        s = at("s", 2 * low - ox, (position, 2))
        first, second = min(2 * n, lanes), max(2 * n - lanes, 0)
        a = f"load({s})" if first == lanes else f"load_first<{first}>({s})"
        b = f"load({s} + LANES)" if second == lanes else f"load_first<{second}>({s} + LANES)" if second else "V{}"
        return f"const V a = {a}, b = {b};\n" + "".join(
            put(at(f"t{px}", low, (position, 1)), f"{name}(a, b)", n, lanes) for px, name in enumerate(("even", "odd")))

    n = high - low
    if n >= lanes:  # the last vector overlaps the one before it
        last = n - lanes
        where = f"const int at = i < {last} ? i : {last};\n"
        middle = loop("i", 0, n, where + piece("at", lanes), "LANES")
    else:
        middle = block("", piece("0", n)) if n else ""
    return edge(0, low) + middle + edge(high, out)


# ---- the user's arrays ------------------------------------------------------------------------------------------
def contiguous(value: Value, dtype: DType = FLOAT32) -> Layout:
    """A [C, H, W] array without any slack; its address is a multiple of an element's bytes only."""
    plain = replace(value, dtype=dtype, grid=None)
    return Layout(plain, value.pixels, value.width, 1, 0, value.size, value.channels)


def pack(dtype: DType, layout: Layout, cpu: Cpu) -> Kernel:
    """x: the user's contiguous [C, H, W] array of this type, of which nothing else is read; y: the layout's buffer: the same
    numbers, or on a grid, or rounded."""
    given = contiguous(layout.value, dtype)
    if dtype == FLOAT32 or words.fits(given, layout):
        return convert(given, layout, cpu)
    value, grid = layout.value, layout.value.grid
    body = planes(value.channels, value.height, fill('''
        const auto* s = @s@;
        auto* t = @t@;
        for (int column = 0; column < @width@; ++column) @place@ = @number@;
    ''', s=at("x", 0, ("c", given.channel), ("row", given.row)), width=value.width,
        t=at("y", layout.origin, ("c", layout.channel), ("row", layout.row)),
        place="t[column]" if layout.column == 1 else f"t[column * {layout.column}]",
        number="static_cast<float>(s[column])" if grid is None else "data[s[column]]"))
    table = b"" if grid is None else regridded(Grid(1.0, 0), grid)
    return typed(body, given, layout, data=table)


def unpack(layout: Layout, cpu: Cpu) -> Kernel:
    """x: the layout's buffer; y: the user's contiguous [C, H, W] array of float32, beyond which nothing is written."""
    return convert(layout, contiguous(layout.value), cpu)


# ---- another shape ----------------------------------------------------------------------------------------------
def reshape(source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Order of the elements: channel, row, column. Raises ValueError if the sizes differ."""
    if source.value.size != target.value.size or source.value.grid != target.value.grid:
        raise ValueError(f"cannot reshape {source.value} to {target.value}")
    if source.value.shape == target.value.shape:
        return typed(conversion(source, target, cpu.lanes), source, target)
    if _contiguous(target):
        return typed(conversion(source, _view(target, source.value), cpu.lanes), source, target)
    if _contiguous(source):
        return typed(conversion(_view(source, target.value), target, cpu.lanes), source, target)
    body = f"y[{_place(target)}] = x[{_place(source)}];\n"
    return typed(share(target.value.size) + loop("i", "begin", "end", body), source, target)


def _contiguous(layout: Layout) -> bool:
    expected, value = 1, layout.value
    for n, stride in ((value.width, layout.column), (value.height, layout.row), (value.channels, layout.channel)):
        if n > 1 and stride != expected:
            return False
        expected *= n
    return True


def _view(layout: Layout, value: Value) -> Layout:
    """A contiguous value under another shape."""
    return Layout(value, value.pixels, value.width, 1, layout.origin, layout.size, value.channels)


def _place(layout: Layout) -> str:
    value = layout.value
    return at(str(layout.origin), 0, (f"i / {value.pixels}", layout.channel),
              (f"i / {value.width} % {value.height}", layout.row), (f"i % {value.width}", layout.column))
