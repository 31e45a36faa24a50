"""Planes sampled anew, to any size: the nearest element or between two, along both axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, chunks, fill, get, kernel, loop, pixels, put, share
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Resize, Sampling

_LONGEST_LINE = 8192  # floats of each of two rows kept on the stack
_MOST_PHASES = 8  # elements written from one place of the source without a table


def resize(step: Resize, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """The data are the samplings. Raises ValueError if they do not take the source's shape to the target's."""
    x, y = source.value, target.value
    if x.channels != y.channels or not (_fits(step.rows, x.height, y.height) and _fits(step.columns, x.width, y.width)):
        raise ValueError(f"cannot sample {y} from {x}")
    writer = _Writer(step, source, target, cpu.lanes)
    if source.planar and target.planar and y.width <= _LONGEST_LINE:
        return kernel(_TABLES.format(height=y.height, width=y.width) + writer.planar(), writer.data())
    return kernel(_TABLES.format(height=y.height, width=y.width) + writer.vectors(), writer.data())


def _fits(sampling: Sampling, size: int, count: int) -> bool:
    places = np.concatenate([sampling.low, sampling.high])
    return sampling.low.shape == sampling.high.shape == sampling.weight.shape == (count,) \
        and 0 <= places.min() <= places.max() < size


_TABLES = """\
const int* row_low = reinterpret_cast<const int*>(data);
const int* row_high = row_low + {height};
const float* row_weight = reinterpret_cast<const float*>(row_high + {height});
const int* column_low = row_low + 3 * {height};
const int* column_high = column_low + {width};
const float* column_weight = reinterpret_cast<const float*>(column_high + {width});
"""


@dataclass(frozen=True)
class _Writer:
    step: Resize
    source: Layout
    target: Layout
    lanes: int

    def data(self) -> bytes:
        """What stands alone is the middle between itself and itself: 0 * infinity beside it would be NaN."""
        words = []
        for s in (self.step.rows, self.step.columns):
            alone = (s.weight == 0) & (not s.nearest)
            high, weight = np.where(alone, s.low, s.high), np.where(alone, np.float32(0.5), s.weight)
            words += [part.tobytes() for part in (s.low.astype("<i4"), high.astype("<i4"), weight.astype("<f4"))]
        return b"".join(words)

    # ---- vectors of channels ------------------------------------------------------------------------------------
    def vectors(self) -> str:
        """Any layouts; fast in channels-last."""
        s, t = self.source, self.target
        rows = ("low",) if self.step.rows.nearest else ("low", "high")
        columns = ("low",) if self.step.columns.nearest else ("low", "high")
        pointers = "".join(f"const float* {r}_{c} = " + at("x", s.origin, (f"row_{r}[row]", s.row),
                                                           (f"column_{c}[column]", s.column)) + ";\n"
                           for r in rows for c in columns)
        channels_last = s.channel == t.channel == 1 and s.padded == t.padded
        # zeros behind the channels are written as such
        n = t.padded if channels_last else t.value.channels

        def piece(c: str, m: int) -> str:
            def cell(name: str) -> str:
                return get(at(name, 0, (c, s.channel)), m, self.lanes, s.channel)

            def along(r: str) -> str:
                return cell(f"{r}_low") if len(columns) == 1 else f"between({cell(f'{r}_low')}, {cell(f'{r}_high')}, across)"

            v = along("low") if len(rows) == 1 else f"between({along('low')}, {along('high')}, down)"
            return put(at("t", 0, (c, t.channel)), v, m, self.lanes, t.channel)

        linear = len(rows) + len(columns) > 2
        return (_BETWEEN if linear else "") + pixels(t.value.height, t.value.width, fill('''
            @pointers@
            float* t = @t@;
            $if across: const float across = column_weight[column];
            $if down: const float down = row_weight[row];
            @channels@
        ''', pointers=pointers, t=at("y", t.origin, ("row", t.row), ("column", t.column)), across=len(columns) > 1,
            down=len(rows) > 1, channels=chunks(n, self.lanes, piece, "c")))

    # ---- rows of planes -----------------------------------------------------------------------------------------
    def planar(self) -> str:
        """Rows of the source are sampled along the columns once, then between two of them goes down the rows."""
        s, t = self.source, self.target
        place = at("y", t.origin, ("c", t.channel), ("row", t.row))
        if self.step.rows.nearest:
            body = fill('''
                const int from = row_low[row];
                float* __restrict t = @t@;
                if (from == held) {
                  @again@
                }
                else {
                  const float* __restrict s = @s@;
                  @columns@
                }
                held = from;
            ''', t=place, s=at("x", s.origin, ("c", s.channel), ("from", s.row)), columns=self._columns("t"),
                        again=chunks(t.value.width, self.lanes, lambda i, n: put(
                            f"t + {i}", get(f"t + {i} - {t.row}", n, self.lanes), n, self.lanes)))
            return self._shared("int held = -1;\n", body)
        down = chunks(t.value.width, self.lanes, lambda i, n: put(f"t + {i}", "between({}, {}, row_weight[row])".format(
            *(get(f"{name} + {i}", n, self.lanes) for name in ("low", "high"))), n, self.lanes))
        width = t.value.width
        return _BETWEEN + f"float line_0[{width}], line_1[{width}];\n" + self._shared(
            "float* low = line_0;\nfloat* high = line_1;\nint low_row = -1, high_row = -1;\n", fill('''
                if (low_row != row_low[row] && high_row == row_low[row]) {
                  float* other = low;
                  low = high, high = other;
                  high_row = low_row;
                  low_row = row_low[row];
                }
                @low@
                @high@
                float* t = @t@;
                @down@
            ''', t=place, down=down, low=self._line("low"), high=self._line("high")))

    def _line(self, name: str) -> str:
        """Hold the sampled row `name` of the current row."""
        s = self.source
        return block(f"if ({name}_row != row_{name}[row])", fill('''
            @name@_row = row_@name@[row];
            float* __restrict d = @name@;
            const float* __restrict s = @s@;
            @columns@
        ''', name=name, s=at("x", s.origin, ("c", s.channel), (f"row_{name}[row]", s.row)), columns=self._columns("d")))

    def _shared(self, start: str, body: str) -> str:
        """Loops over c and row, as emit.planes; start: at the begin of each channel."""
        value = self.target.value
        if value.channels >= 8 or value.channels >= value.height:
            return share(value.channels) + loop("c", "begin", "end", start + loop("row", 0, value.height, body))
        return share(value.height) + loop("c", 0, value.channels, start + loop("row", "begin", "end", body))

    def _columns(self, to: str) -> str:
        """A row at s sampled to `to`."""
        columns, width = self.step.columns, self.target.value.width
        phases, begin, end = self._periods()
        if not phases:
            return self._by_table(to, 0, width)
        lines = ""
        for k in range(phases):
            at_low, weight = int(columns.low[begin * phases + k]) - begin, float(columns.weight[begin * phases + k])
            low, high = (f"s[{at('i', at_low + j)}]" for j in (0, 1))
            value = low if weight == 0 else f"{low} * {1 - weight!r}f + {high} * {weight!r}f"
            lines += f"{to}[{at(f'i * {phases}' if phases > 1 else 'i', k)}] = {value};\n"
        return self._by_table(to, 0, begin * phases) + loop("i", begin, end, lines) + self._by_table(to, end * phases, width)

    def _periods(self) -> tuple[int, int, int]:
        """(phases, begin, end): for i in [begin, end) the elements i * phases + k are sampled at i + a constant of k with a
        weight of k; (0, 0, 0) where there is no such pattern."""
        columns, (x, y) = self.step.columns, (self.source.value.width, self.target.value.width)
        phases = y // x
        if phases * x != y or not 1 <= phases <= _MOST_PHASES:
            return 0, 0, 0
        low, high, weight = (a.reshape(x, phases) for a in (columns.low, columns.high, columns.weight))
        middle = x // 2
        offset = low - np.arange(x)[:, None]
        same = ((offset == offset[middle]) & (weight == weight[middle]) & ((high == low + 1) | (weight == 0))).all(axis=1)
        if not same[middle]:
            return 0, 0, 0
        begin = middle - int(np.argmin(np.append(same[middle::-1], False))) + 1
        end = middle + int(np.argmin(np.append(same[middle:], False)))
        return phases, begin, end

    def _by_table(self, to: str, begin: int, end: int) -> str:
        if begin == end:
            return ""
        value = "s[column_low[i]]"
        if not self.step.columns.nearest:
            value += " * (1.0f - column_weight[i]) + s[column_high[i]] * column_weight[i]"
        return loop("i", begin, end, f"{to}[i] = {value};\n")


_BETWEEN = "const auto between = [](V a, V b, float weight) { return a * (1.0f - weight) + b * weight; };\n"
"""Not a + (b - a) * weight: beside an infinity that is NaN."""
