"""Between the user's contiguous arrays and our layouts."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.convert import convert
from gkp.converter.native.program import Value


def contiguous(value: Value) -> Layout:
    """A [C, H, W] array without any slack; its address is a multiple of 4 bytes only."""
    return Layout(value, value.pixels, value.width, 1, 0, value.size, value.channels)


def pack(value: Value, layout: Layout, cpu: Cpu) -> Kernel:
    """x: the user's contiguous [C, H, W] array, of which nothing else is read; y: the layout's buffer."""
    return convert(contiguous(value), layout, cpu)


def unpack(layout: Layout, cpu: Cpu) -> Kernel:
    """x: the layout's buffer; y: the user's contiguous [C, H, W] array, beyond which nothing is written."""
    return convert(layout, contiguous(layout.value), cpu)
