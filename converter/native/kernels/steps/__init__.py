"""Generators of the kernels of every step that is not a convolution with branches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.convert import convert, pack, reshape, space_to_depth, unpack
from gkp.converter.native.kernels.steps.copy import copy
from gkp.converter.native.kernels.steps.depthwise import depthwise
from gkp.converter.native.kernels.steps.elementwise import affine, binary, constant_binary
from gkp.converter.native.kernels.steps.place import interleave, paste
from gkp.converter.native.kernels.steps.pool import pool
from gkp.converter.native.kernels.steps.resize import resize
from gkp.converter.native.kernels.steps.softmax import softmax
from gkp.converter.native.program import (
    Affine,
    Binary,
    ConstantBinary,
    Copy,
    Depthwise,
    Interleave,
    Paste,
    Pool,
    Reshape,
    Resize,
    Softmax,
    Value,
    reads,
)

__all__ = ["SimpleStep", "convert", "pack", "space_to_depth", "step_kernel", "unpack"]

SimpleStep = (Depthwise | Pool | Binary | ConstantBinary | Affine | Copy | Paste | Interleave | Reshape | Resize
              | Softmax)


def step_kernel(step: SimpleStep, values: Sequence[Value], layouts: Mapping[int, Layout], cpu: Cpu) -> Kernel:
    """The kernel of a step; values: the program's; layouts: of those that the step reads and writes, by number. The
    operands of the kernel: x is the source (Binary: a), r the residual (Binary: b), y the target, which overlaps neither.
    Raises ValueError if the values do not fit the step or their layouts."""
    target = layouts[step.target]
    if any(layouts[v].value != values[v] for v in (*reads(step), step.target)):
        raise ValueError("a layout belongs to a value of another shape")
    if isinstance(step, Binary):
        return binary(step, layouts[step.a], layouts[step.b], target, cpu)
    source = layouts[step.source]
    if isinstance(step, Depthwise):
        return depthwise(step, source, target, None if step.residual is None else layouts[step.residual], cpu)
    if isinstance(step, Pool):
        return pool(step, source, target, cpu)
    if isinstance(step, Affine):
        return affine(step, source, target, cpu)
    if isinstance(step, ConstantBinary):
        return constant_binary(step, source, target, cpu)
    if isinstance(step, Copy):
        return copy(step, source, target, cpu)
    if isinstance(step, Paste):
        return paste(step, source, target, cpu)
    if isinstance(step, Interleave):
        return interleave(step, source, target, cpu)
    if isinstance(step, Resize):
        return resize(step, source, target, cpu)
    if isinstance(step, Reshape):
        return reshape(source, target, cpu)
    return softmax(source, target, cpu)
