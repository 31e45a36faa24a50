"""Strides above 1 on planes: the source repacked into its phases, then a convolution with stride 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.native.kernels import pixel
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.layout import Layout, planar
from gkp.converter.native.kernels.steps.convert import space_to_depth
from gkp.converter.native.kernels.way import Way, layer_name, transform
from gkp.converter.native.program import Conv, Value


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Iterator[Way]:
    """The family."""
    if step.conv.strides == (1, 1) or not (source.planar and target.planar):
        return
    inner, offsets = polyphase(step)
    value = polyphase_value(step, target.value)
    phases = planar(value, (0, 0, 0, max(0, target.row - value.width)), cpu.lanes)
    make = partial(space_to_depth, source, phases, step.conv.strides, offsets, cpu)
    before = transform(make, source, None, phases, phases, "phases", cpu)
    for way in pixel.ways(inner, phases, target, residual, cpu):
        yield replace(way, layer=layer_name(step), sort="phases", before=before)


def polyphase(step: Conv) -> tuple[Conv, tuple[int, int]]:
    """The same convolution with stride 1 on the source's phases, and the phases' offsets (y, x).

    Phase (py, px) of channel c is channel (py * sx + px) * C + c of the new source; its element (y, x) is the old
    source's element (y * sy + py - offset_y, x * sx + px - offset_x), zero outside."""
    c = step.conv
    (sy, sx), (dy, dx), (kh, kw) = c.strides, c.dilations, c.kernel_shape
    height, width = (dy * (kh - 1)) // sy + 1, (dx * (kw - 1)) // sx + 1
    phases = sorted({((ky * dy) % sy, (kx * dx) % sx) for ky in range(kh) for kx in range(kw)})
    branches = []
    for b in c.branches:
        o, i = b.weight.shape[:2]
        weight = np.zeros((o, len(phases), i, height, width), np.float32)
        for ky in range(kh):
            for kx in range(kw):
                y, x = ky * dy, kx * dx
                weight[:, phases.index((y % sy, x % sx)), :, y // sy, x // sx] = b.weight[:, :, ky, kx]
        ins = np.concatenate([(py * sx + px) * c.in_channels + b.in_index for py, px in phases])
        branches.append((ins, b.out_index, weight.reshape(o, -1, height, width)))
    conv = BranchedConv.build(c.in_channels * sy * sx, c.out_channels, branches, bias=c.bias, kernel_shape=(height, width))
    return replace(step, conv=conv), (c.pads[0], c.pads[1])


def polyphase_value(step: Conv, target: Value) -> Value:
    """The shape of the new source: as many rows and columns as the convolution reads."""
    c = step.conv
    (sy, sx), (dy, dx), (kh, kw) = c.strides, c.dilations, c.kernel_shape
    return Value(c.in_channels * sy * sx, target.height + (dy * (kh - 1)) // sy, target.width + (dx * (kw - 1)) // sx)
