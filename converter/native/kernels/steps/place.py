"""Planes put together from smaller ones: side by side (Concat of rows or columns), or interleaved (depth to space)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.emit import at, block, fill, kernel, loop, planes
from gkp.converter.native.kernels.kernel import Kernel
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.steps.elementwise import elementwise, whole
from gkp.converter.native.kernels.steps.grids import typed
from gkp.converter.native.program import Interleave, Paste


def paste(step: Paste, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Writes the source's rows and columns of the target and nothing else. Raises ValueError if it does not fit in."""
    (y, x), small, large = step.offset, source.value, target.value
    if small.grid != large.grid or min(y, x) < 0 or small.channels != large.channels or y + small.height > large.height \
            or x + small.width > large.width:
        raise ValueError(f"{small} does not fit into {large} at {step.offset}")
    to = replace(whole("y", target), origin=target.offset(0, y, x))
    return typed(elementwise(to, [whole("x", source)], small.shape, lambda v: v[0], False, cpu.lanes), source, target)


def interleave(step: Interleave, source: Layout, target: Layout, cpu: Cpu) -> Kernel:
    """Phase by phase; in planes with several phases per row, row by row. Raises ValueError if the shapes do not fit."""
    (sy, sx), (oy, ox), value, phases = step.strides, step.offsets, target.value, source.value
    if phases.grid != value.grid or min(sy, sx) < 1 or min(oy, ox) < 0 or phases.channels != value.channels * sy * sx \
            or (value.height - 1 + oy) // sy >= phases.height or (value.width - 1 + ox) // sx >= phases.width:
        raise ValueError(f"{phases} does not interleave to {value} with strides {step.strides}")
    if sx > 1 and source.planar and target.planar:
        return kernel(_rows(step, source, target))
    text = ""
    for py, px in np.ndindex(sy, sx):
        row, column = (py - oy) % sy, (px - ox) % sx  # the first ones of this phase
        shape = (value.channels, -(-(value.height - row) // sy), -(-(value.width - column) // sx))
        if min(shape) < 1:
            continue
        to = replace(whole("y", target), origin=target.offset(0, row, column),
                     strides=(target.channel, target.row * sy, target.column * sx))
        of = replace(whole("x", source), origin=source.offset((py * sx + px) * value.channels, (row + oy) // sy,
                                                              (column + ox) // sx))
        text += block("", elementwise(to, [of], shape, lambda v: v[0], False, cpu.lanes))
    return typed(text, source, target)


def _rows(step: Interleave, s: Layout, t: Layout) -> str:
    """A row of the target from one row of each of its phases."""
    (sy, sx), (oy, ox), value = step.strides, step.offsets, t.value
    rows = ["const float* __restrict s{} = {};\n".format(k, at(
        "x", s.offset((ox + k) % sx * value.channels, 0, (ox + k) // sx), ("c", s.channel), ("from", s.row),
        ("phase", sx * value.channels * s.channel))) for k in range(sx)]
    full, rest = value.width // sx, value.width % sx
    inner = loop("i", 0, full, "".join(f"t[{at(f'i * {sx}', k)}] = s{k}[i];\n" for k in range(sx))) if full else ""
    last = "".join(f"t[{full * sx + k}] = s{k}[{full}];\n" for k in range(rest))
    return planes(value.channels, value.height, fill('''
        const int from = (row + @oy@) / @sy@, phase = (row + @oy@) % @sy@;
        @rows@
        float* __restrict t = @t@;
        @inner@
        @last@
    ''', oy=oy, sy=sy, rows="".join(rows), t=at("y", t.origin, ("c", t.channel), ("row", t.row)), inner=inner, last=last))
