"""Arithmetic of two values."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import kernel
from gkp.converter.native.kernels.kernel import Kernel, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import elementwise, per_channel, single, whole
from gkp.converter.native.program import ZERO_AT_ZERO, Binary

_OPERATORS = {"add": "+", "sub": "-", "mul": "*"}


def binary(step: Binary, a: Layout, b: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """x: a; r: b, of a's shape, [C, 1, 1] or [1, 1, 1]. Raises ValueError for any other shape."""
    value = target.value
    shape = (value.channels, value.height, value.width)
    if b.value == value:
        second = whole("r", b)
    elif b.value.size == 1:
        second = single("r", b)
    elif b.value.size == b.value.channels == value.channels:
        second = per_channel("r", b)
    else:
        raise ValueError(f"cannot broadcast {b.value} to {value}")
    if a.value != value:
        raise ValueError(f"a value of shape {a.value} does not give {value}")
    keeps_zero = step.activation in ZERO_AT_ZERO and b.value == value
    return kernel(elementwise(
        whole("y", target), [whole("x", a), second], shape,
        lambda v: activation(step.activation, f"{v[0]} {_OPERATORS[step.op]} {v[1]}"), keeps_zero, cpu.lanes))
