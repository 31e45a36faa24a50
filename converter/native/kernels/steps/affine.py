"""A scale and a shift per channel."""

from __future__ import annotations

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import kernel
from gkp.converter.native.kernels.kernel import Kernel, activation
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import Operand, elementwise, whole
from gkp.converter.native.program import Affine


def affine(step: Affine, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """x: source; the data are scale, then shift."""
    value = target.value
    if source.value != value or step.scale.shape != (value.channels,) or step.shift.shape != (value.channels,):
        raise ValueError(f"{step.scale.size} scales and {step.shift.size} shifts for {source.value} giving {value}")
    constants = "const float* scale = reinterpret_cast<const float*>(data);\n" \
        + f"const float* shift = scale + {value.channels};\n"
    operands = [whole("x", source), Operand("scale", 0, (1, 0, 0)), Operand("shift", 0, (1, 0, 0))]
    body = elementwise(whole("y", target), operands, (value.channels, value.height, value.width),
                       lambda v: activation(step.activation, f"{v[0]} * {v[1]} + {v[2]}"), False, cpu.lanes)
    data = np.concatenate([step.scale, step.shift]).astype("<f4").tobytes()
    return kernel(constants + body, data)
