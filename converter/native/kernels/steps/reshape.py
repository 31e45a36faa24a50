"""The same elements in the same order, under another shape."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, kernel, loop, share
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.convert import conversion
from gkp.converter.native.program import Value


def reshape(source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Order of the elements: channel, row, column. Raises ValueError if the sizes differ."""
    if source.value.size != target.value.size:
        raise ValueError(f"cannot reshape {source.value} to {target.value}")
    if source.value == target.value:
        return kernel(conversion(source, target, cpu.lanes))
    if _contiguous(target):
        return kernel(conversion(source, _view(target, source.value), cpu.lanes))
    if _contiguous(source):
        return kernel(conversion(_view(source, target.value), target, cpu.lanes))
    body = f"y[{_place(target)}] = x[{_place(source)}];\n"
    return kernel(share(target.value.size) + loop("i", "begin", "end", body))


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
