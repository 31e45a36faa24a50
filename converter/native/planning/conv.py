"""How a convolution may be computed: its tiles, their kernels, and the model that orders them.

The model counts what a core issues per cycle: two vector multiply-adds, two loads (a vector that straddles cache lines
counts twice). It chooses where nothing can be measured (cross-compiling), and elsewhere which tiles are worth measuring.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.channel import ChannelTile, channel_kernel, is_flat
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.kernel import Recipe
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.pixel import PixelTile, fits, pixel_kernel
from gkp.converter.native.kernels.taps import is_sparse, used
from gkp.converter.native.program import Conv, Value

Tile = PixelTile | ChannelTile
_SPARE = 3  # registers for inputs and weights beside the accumulators


def conv_kernel(step: Conv, tile: Tile, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu) -> Recipe:
    """The kernel of the step in this tile."""
    if isinstance(tile, PixelTile):
        return pixel_kernel(step, tile, source, target, cpu)
    return channel_kernel(step, tile, source, target, residual, cpu)


def tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu, most: int = 8) -> list[Tile]:
    """The tiles worth trying for these layouts, best first by the model, at most `most`; empty: none fits."""
    offered = _pixel_tiles(step, source, target, cpu) if target.planar else _channel_tiles(step, source, target, cpu)
    found = [(cycles(step, t, source, target, cpu), t) for t in offered]
    found.sort(key=lambda pair: pair[0])
    return [t for _, t in found[:most]]


def cycles(step: Conv, tile: Tile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model."""
    if isinstance(tile, PixelTile):
        return pixel_cycles(step, tile, source, target, cpu)
    return channel_cycles(step, tile, source, target, cpu)


# ---- vectors of pixels ------------------------------------------------------------------------------------------
def _pixel_tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu) -> list[Tile]:
    widest = max((len(b.out_index) for b in step.conv.branches), default=1)
    plane = target.value
    columns = ceil(plane.width / cpu.lanes) if plane.width >= cpu.lanes else 1
    length = ceil(((plane.height - 1) * target.row + plane.width) / cpu.lanes)
    found: list[Tile] = []
    for outputs in sorted({min(widest, n) for n in (1, 2, 3, 4, 6, 8)}, reverse=True):
        for line in (False, True):
            whole = length if line else max(1, plane.height * plane.width // cpu.lanes) if columns == 1 else plane.height
            fit = max(1, min((cpu.registers - _SPARE) // outputs // (1 if line else columns), whole))
            for n in _sizes(whole, fit):
                tile = PixelTile(outputs, n, line, by_tile=True)
                if fits(step, tile, source, target, cpu):
                    found += [tile, replace(tile, by_tile=False)]
    return found


def _sizes(whole: int, fit: int) -> list[int]:
    """How many vectors (or rows of them) a tile may have, at most `fit`: those that cut the whole evenly, and half."""
    exact = max(n for n in range(1, fit + 1) if whole % n == 0)
    return sorted({exact, *(-(-whole // -(-whole // n)) for n in (fit, max(1, fit * 3 // 4), max(1, fit // 2)))})


def pixel_cycles(step: Conv, tile: PixelTile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model."""
    plane, (kh, kw) = target.value, step.conv.kernel_shape
    straddle = 2.0 if cpu.lanes == 16 else 1.5
    if tile.line:
        vectors = ceil(((plane.height - 1) * target.row + plane.width) / cpu.lanes)
        per_tile = ceil(vectors / ceil(vectors / tile.vectors))
        count, loads = ceil(vectors / per_tile), per_tile * kh * kw * straddle
    else:
        rows = max(1, cpu.lanes // plane.width)
        columns = ceil(plane.width / cpu.lanes) if rows == 1 else 1
        per_tile, count = tile.vectors * columns, ceil(plane.height / (tile.vectors * rows))
        loads = kw * columns * (tile.vectors * rows + (kh - 1)) * (straddle if rows == 1 else 2.0)
    sparse, total = is_sparse(step.conv), 0.0
    for branch in step.conv.branches:
        n = len(branch.out_index)
        parts = ceil(n / tile.outputs)
        share = len(used(branch)) / max(1, kh * kw * len(branch.in_index)) if sparse else 1.0
        for size in (n * (k + 1) // parts - n * k // parts for k in range(parts)):
            spill = 1.5 if size * per_tile + _SPARE > cpu.registers else 1.0
            inner = max(size * per_tile * kh * kw, 4 * kh * kw, loads + size * kh * kw) / 2 * share * spill
            total += count * (inner * len(branch.in_index) + 2 * size * per_tile + 10)
    return total * (1.0 if tile.by_tile == _large_inputs(step, source) else 1.01)


def _large_inputs(step: Conv, source: Layout) -> bool:
    """More input than weights: keep the input in L1, not the weights."""
    return source.size > sum(b.weight.size for b in step.conv.branches)


# ---- vectors of output channels ---------------------------------------------------------------------------------
_SHAPES = ((2, 14), (2, 13), (2, 12), (3, 8), (4, 6), (2, 7), (4, 4), (3, 7), (1, 14), (1, 7), (4, 1), (2, 4), (1, 1))
"""Vectors of channels, pixels: as many accumulators as registers allow; fewer for narrow planes. Cut to the registers."""


def _channel_tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu) -> list[Tile]:
    v = target.value
    flat = is_flat(step, source, target)
    width, height = (v.pixels, 1) if flat else (v.width, v.height)
    widest = max((ceil(len(b.out_index) / cpu.lanes) for b in step.conv.branches), default=1)
    found: set[ChannelTile] = set()
    for vectors, pixels in _SHAPES:
        vectors = min(vectors, widest)
        pixels = min(pixels, (cpu.registers - _SPARE) // vectors - (1 if cpu.registers < 32 else 0))
        columns = min(width, max(1, pixels))
        rows = max(1, min(height, pixels // columns))
        found |= {ChannelTile(vectors, rows, columns, by_tile) for by_tile in (False, True)}
    return list(found)


def channel_cycles(step: Conv, tile: ChannelTile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model."""
    v = target.value
    width, height = (v.pixels, 1) if is_flat(step, source, target) else (v.width, v.height)
    down, across = ceil(height / tile.rows), ceil(width / tile.columns)
    pixels, count = height * width / (down * across), down * across
    total = 0.0
    for branch in step.conv.branches:
        vectors = ceil(len(branch.out_index) / cpu.lanes)
        parts = ceil(vectors / tile.vectors)
        for n in (vectors * (k + 1) // parts - vectors * k // parts for k in range(parts)):
            spill = 1.5 if n * pixels + _SPARE > cpu.registers + 1 else 1.0
            inner = max(n * pixels, 8, n + pixels + 1) / 2 * spill
            total += count * (inner * len(used(branch)) + 2 * n * pixels + 10)
    large = source.size > sum(b.weight.size for b in step.conv.branches)
    return total * (1.0 if tile.by_tile == large else 1.005)


# ---- stride by polyphase ----------------------------------------------------------------------------------------
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
