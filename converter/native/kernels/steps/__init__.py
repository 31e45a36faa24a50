"""Generators of the kernels of every step that is not a convolution with branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.integers import depthwise as integers
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.convert import convert, pack, reshape, space_to_depth, unpack
from gkp.converter.native.kernels.steps.copy import copy
from gkp.converter.native.kernels.steps.depthwise import depthwise
from gkp.converter.native.kernels.steps.elementwise import affine, binary, constant_binary
from gkp.converter.native.kernels.steps.functions import map_, prelu
from gkp.converter.native.kernels.steps.normalise import normalise
from gkp.converter.native.kernels.steps.permute import permute
from gkp.converter.native.kernels.steps.place import interleave, paste
from gkp.converter.native.kernels.steps.pool import pool
from gkp.converter.native.kernels.steps.reduce import reduce
from gkp.converter.native.kernels.steps.resize import resize
from gkp.converter.native.kernels.steps.softmax import softmax
from gkp.converter.native.program import (
    Affine,
    Binary,
    ConstantBinary,
    Conv,
    Copy,
    Depthwise,
    Dequantise,
    Interleave,
    Map,
    Normalise,
    Paste,
    Permute,
    Pool,
    PRelu,
    Quantise,
    Reduce,
    Reshape,
    Resize,
    Softmax,
    Step,
    Value,
    reads,
)

__all__ = ["SimpleStep", "convert", "knows_narrow", "pack", "space_to_depth", "step_kernel", "unpack"]

SimpleStep = (Depthwise | Pool | Binary | ConstantBinary | Affine | Copy | Paste | Interleave | Reshape | Resize | Softmax
              | Reduce | Normalise | PRelu | Map | Permute | Quantise | Dequantise)


def step_kernel(step: SimpleStep, values: Sequence[Value], layouts: Mapping[int, Layout], cpu: Cpu) -> Kernel:
    """The kernel of a step; values: the program's; layouts: of those that the step reads and writes, by number. The
    operands of the kernel: x is the source (Binary: a), r the residual (Binary: b), y the target, which overlaps neither.
    Raises ValueError if the values do not fit the step or their layouts."""
    target = layouts[step.target]
    if any(replace(layouts[v].value, dtype=values[v].dtype) != values[v] for v in (*reads(step), step.target)):
        raise ValueError("a layout belongs to a value of another shape")
    if isinstance(step, Binary):
        return binary(step, layouts[step.a], layouts[step.b], target, cpu)
    source = layouts[step.source]
    if isinstance(step, Depthwise):
        make = depthwise if source.value.grid is None else integers.depthwise
        return make(step, source, target, None if step.residual is None else layouts[step.residual], cpu)
    return _KERNELS[type(step)](step, source, target, cpu)


def knows_narrow(step: Step) -> bool:
    """Are there kernels of the step that read and write floats of 16 bits?"""
    return isinstance(step, Conv | Pool | Binary | ConstantBinary | Affine | Copy | Paste | Reshape | PRelu | Map | Permute)


_KERNELS: Mapping[type[SimpleStep], Callable[[Any, Layout, Layout, Cpu], Kernel]] = {
    Pool: pool, Affine: affine, ConstantBinary: constant_binary, Copy: copy, Paste: paste, Interleave: interleave,
    Resize: resize, Reduce: reduce, Normalise: normalise, PRelu: prelu, Map: map_, Permute: permute,
    Quantise: lambda step, source, target, cpu: convert(source, target, cpu),
    Dequantise: lambda step, source, target, cpu: convert(source, target, cpu),
    Reshape: lambda step, source, target, cpu: reshape(source, target, cpu),
    Softmax: lambda step, source, target, cpu: softmax(source, target, cpu),
}
"""Of the steps that read one value."""
