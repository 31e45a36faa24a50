"""Functions of single elements that no convolution computes on its way to memory."""

from __future__ import annotations

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import Operand, elementwise, whole
from gkp.converter.native.kernels.steps.grids import typed
from gkp.converter.native.program import Map, PRelu

_FUNCTIONS = {"abs": "magnitude({0})", "exp": "exponential({0})", "reciprocal": "1.0f / {0}", "sqrt": "square_root({0})"}


def map_(step: Map, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Raises ValueError if the shapes differ."""
    value = target.value
    if source.value.shape != value.shape:
        raise ValueError(f"{step.function} of {source.value} does not give {value}")
    return typed(elementwise(whole("y", target), [whole("x", source)], value.shape,
                             lambda v: _FUNCTIONS[step.function].format(v[0]), False, cpu.lanes), source, target)


def prelu(step: PRelu, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """The data are the slopes. Raises ValueError if the shapes differ."""
    value = target.value
    if source.value.shape != value.shape or step.slope.shape != (value.channels,):
        raise ValueError(f"{step.slope.size} slopes for {source.value} giving {value}")
    operands = [whole("x", source), Operand("slope", 0, (1, 0, 0))]
    body = elementwise(whole("y", target), operands, value.shape,
                       lambda v: f"leaky_relu({v[0]}, {v[1]})", False, cpu.lanes)
    return typed("const float* slope = reinterpret_cast<const float*>(data);\n" + body, source, target,
                 data=step.slope.astype("<f4").tobytes())
