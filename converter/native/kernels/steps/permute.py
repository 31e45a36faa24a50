"""The axes of a value in another order."""

from __future__ import annotations

from dataclasses import replace

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import elementwise, whole
from gkp.converter.native.kernels.steps.grids import typed
from gkp.converter.native.program import Permute


def permute(step: Permute, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Raises ValueError if the shapes do not fit."""
    sizes, wanted = source.value.shape, target.value.shape
    same = source.value.grid == target.value.grid
    if not same or sorted(step.order) != [0, 1, 2] or tuple(sizes[k] for k in step.order) != wanted:
        raise ValueError(f"the axes {step.order} of {source.value} do not give {target.value}")
    strides = source.channel, source.row, source.column
    c, row, column = (strides[k] for k in step.order)
    turned = replace(whole("x", source), strides=(c, row, column))
    return typed(elementwise(whole("y", target), [turned], wanted, lambda v: v[0], False, cpu.lanes), source, target)
