"""Sum, mean and maximum over channels, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, chunks, fill, get, kernel, loop, pixels, planes, put
from gkp.converter.native.kernels.kernel import Kernel, literal
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.program import Reduce


def reduce(step: Reduce, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Maxima leave NaN out. Raises ValueError if the target is not the source with one channel in the place of `count`."""
    s, t = source.value, target.value
    if s.channels != t.channels * step.count or t.channels % step.inner or (s.height, s.width) != (t.height, t.width):
        raise ValueError(f"the {step.kind} over {step.count} channels of {s} does not give {t}")
    writer = _Reduction(step, source, target, cpu.lanes)
    if source.planar and t.width > 1:
        return kernel(planes(t.channels, t.height, writer.row()))
    groups = loop("o", 0, t.channels // step.inner, writer.channels() if step.inner > 1 else writer.group())
    return kernel(pixels(t.height, t.width, groups))


@dataclass(frozen=True)
class _Reduction:
    step: Reduce
    source: Layout
    target: Layout
    lanes: int

    @property
    def start(self) -> str:
        return "-__builtin_inff()" if self.step.kind == "max" else "0.0f"

    @property
    def scale(self) -> str:
        return f" * {literal(1 / self.step.count)}" if self.step.kind == "mean" else ""

    def combine(self, a: str, b: str) -> str:
        return f"maximum({b}, {a})" if self.step.kind == "max" else f"{a} + {b}"

    def row(self) -> str:
        """Planar: vectors of the pixels of one row of target channel c."""
        s, t, inner = self.source, self.target, self.step.inner

        def piece(column: str, n: int) -> str:
            cell = get(at("s", 0, ("k", inner * s.channel), (column, 1)), n, self.lanes)
            return (f"V v = splat({self.start});\n" + loop("k", 0, self.step.count, f"v = {self.combine('v', cell)};\n")
                    + put(at("t", 0, (column, t.column)), f"v{self.scale}", n, self.lanes, t.column))

        return fill('''
            const float* s = @s@;
            float* t = @t@;
            @columns@
        ''', s=at("x", s.origin, (f"c / {inner} * {inner * self.step.count} + c % {inner}", s.channel), ("row", s.row)),
                    t=at("y", t.origin, ("c", t.channel), ("row", t.row)),
                    columns=chunks(t.value.width, self.lanes, piece, "column"))

    def _places(self) -> str:
        """s and t, at the first channel of group o of one pixel."""
        s, t, inner = self.source, self.target, self.step.inner
        return fill('''
            const float* s = @s@;
            float* t = @t@;
        ''', s=at("x", s.origin, ("row", s.row), ("column", s.column), ("o", inner * self.step.count * s.channel)),
                    t=at("y", t.origin, ("row", t.row), ("column", t.column), ("o", inner * t.channel)))

    def channels(self) -> str:
        """Vectors of the channels that group o leaves of one pixel."""
        s, t, inner = self.source, self.target, self.step.inner

        def piece(i: str, n: int) -> str:
            cell = get(at("s", 0, ("k", inner * s.channel), (i, s.channel)), n, self.lanes, s.channel)
            return (f"V v = splat({self.start});\n" + loop("k", 0, self.step.count, f"v = {self.combine('v', cell)};\n")
                    + put(at("t", 0, (i, t.channel)), f"v{self.scale}", n, self.lanes, t.channel))

        return self._places() + chunks(inner, self.lanes, piece)

    def group(self) -> str:
        """The one channel that group o leaves of one pixel: vectors of its channels, then their lanes."""
        def piece(k: str, n: int) -> str:
            cell = get(at("s", 0, (k, self.source.channel)), n, self.lanes, self.source.channel,
                       "v" if self.step.kind == "max" else "")
            return f"v = {self.combine('v', cell)};\n"

        total = "largest" if self.step.kind == "max" else "sum"
        return (self._places() + f"V v = splat({self.start});\n" + chunks(self.step.count, self.lanes, piece, "k")
                + f"*t = {total}(v){self.scale};\n")
