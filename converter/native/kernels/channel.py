"""Direct convolution with vectors of output channels: for branches of many outputs, small planes, any stride.

A tile is a few vectors of output channels of one branch times some output pixels (rows x columns), held in registers.
Every input pixel is read as a scalar, through a table of offsets (branch channel and tap), and multiplied with the
vectors of weights, which stream past in the order of reading. The source may lie in any layout; a channels-last target
takes whole vectors, others are scattered. In regions, the taps that lie in the pads are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.channel_tile import FAR, LARGE, ChannelTile, tile_plane, tile_regions
from gkp.converter.native.kernels.channel_writer import draft
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.jobs import part_sizes
from gkp.converter.native.kernels.kernel import Recipe
from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.regions import Region, regions, share
from gkp.converter.native.kernels.taps import macs, sizes, used
from gkp.converter.native.kernels.way import Trial, Way, layer_name
from gkp.converter.native.program import Conv

_FROM_MEMORY, _FROM_L3 = 4.0, 8.0
"""Bytes per cycle."""
_WORTH_IT = 0.97
"""Of the products: regions that leave out less cost more than they save."""
_SPARE = 3  # registers for inputs and weights beside the accumulators
_SHAPES = ((2, 14), (2, 13), (2, 12), (3, 8), (4, 6), (2, 7), (4, 4), (3, 7), (1, 14), (1, 7), (4, 1), (2, 4), (1, 1))
"""Vectors of channels, pixels: as many accumulators as registers allow; fewer for narrow planes. Cut to the registers."""


def ways(step: Conv, source: Layout, target: Layout, residual: Layout | None, cpu: Cpu, most: int = 8) -> Iterator[Way]:
    """The family: the `most` best tiles by the model. Planes are left to vectors of pixels."""
    for tile in [] if target.planar else tiles(step, source, target, cpu, most):
        recipe = Recipe(partial(draft, step, tile, source, target, residual or target, cpu))
        trial = Trial(recipe, source, residual, target, cycles(step, tile, source, target, cpu))
        sort = "channel in regions" if tile.in_regions else "channel"
        yield Way(layer_name(step), tile.label, trial, _executed(step, tile, source, target), sort)


def _executed(step: Conv, tile: ChannelTile, source: Layout, target: Layout) -> int:
    """Multiply-accumulates of one image."""
    if not tile.in_regions:
        return target.value.pixels * macs(step.conv, windows=False)
    return sum(region.height * region.width * taps * outputs * branches
               for region in regions(step.conv, source.value, target.value)
               for (taps, outputs), branches in _needed(step.conv, region).items())


@lru_cache(maxsize=1024)
def _needed(conv: BranchedConv, region: Region) -> Counter[tuple[int, int]]:
    """(taps that count and that the region needs, outputs) of the branches, and how many are so."""
    return Counter((sum(end - first for first, end in region.runs(used(b))), len(b.out_index)) for b in conv.branches)


# ---- tiles ------------------------------------------------------------------------------------------------------
def tiles(step: Conv, source: Layout, target: Layout, cpu: Cpu, most: int = 8) -> list[ChannelTile]:
    """The tiles worth trying for these layouts, best first by the model, at most `most`; as many in regions where those
    leave something out."""
    height, width = tile_plane(step, source, target)
    widest = max((ceil(len(b.out_index) / cpu.lanes) for b in step.conv.branches), default=1)
    found: set[ChannelTile] = set()
    for vectors, pixels in _SHAPES:
        vectors = min(vectors, widest)
        fit = (cpu.registers - _SPARE) // vectors
        for most_pixels in {fit, fit - (1 if cpu.registers < 32 else 0)}:
            columns = min(width, max(1, min(pixels, most_pixels)))
            rows = max(1, min(height, min(pixels, most_pixels) // columns))
            found |= {ChannelTile(vectors, rows, columns, by_tile) for by_tile in (False, True)}
    every = [found]
    if share(step.conv, regions(step.conv, source.value, target.value)) < _WORTH_IT:
        every.append({replace(tile, in_regions=True) for tile in found})
    return [tile for tiles in every for tile in sorted(tiles, key=lambda t: cycles(step, t, source, target, cpu))[:most]]


def cycles(step: Conv, tile: ChannelTile, source: Layout, target: Layout, cpu: Cpu) -> float:
    """Cycles of one image by the model (gkp.converter.native.planning.timer): what takes longer, products or memory, and a
    part of the other, for they do not overlap perfectly."""
    total, tiles = 0.0, 0
    for region in tile_regions(step, tile, source, target, *tile_plane(step, source, target)):
        rows, columns = tile.shape(region)
        count = ceil(region.height / rows) * ceil(region.width / columns)
        pixels = region.height * region.width / count
        tiles += count
        for (taps, outputs), branches in _needed(step.conv, region).items():
            for n, parts in part_sizes(ceil(outputs / cpu.lanes), tile.vectors):
                spill = 1.5 if n * pixels + _SPARE > cpu.registers + 1 else 1.0
                inner = max(n * pixels, 8, n + pixels + 1) / 2 * spill
                total += branches * parts * count * (inner * taps + 2 * n * pixels + 10)
    large = source.size > macs(step.conv, windows=True)
    less, more = sorted((total, _memory(step, tile, source, tiles, cpu)))
    return (more + less / 8) * (1.0 if tile.by_tile == large else 1.005)


def _memory(step: Conv, tile: ChannelTile, source: Layout, tiles: int, cpu: Cpu) -> float:
    """Cycles for what comes from beyond L2: large weights once from memory, then what the loops read again."""
    weights = macs(step.conv, windows=False)
    panels = max((ceil(outputs / (tile.vectors * cpu.lanes)) for _, outputs, _ in sizes(step.conv)), default=1)
    read = max((inputs for inputs, _, _ in sizes(step.conv)), default=0) / source.padded * source.bytes  # of one branch
    again = (tiles - 1) * 4 * weights if tile.by_tile else (panels - 1) * source.bytes
    far = (4 * weights if tile.by_tile else read) > FAR
    return (4 * weights / _FROM_MEMORY if weights > LARGE else 0.0) + (again / _FROM_L3 if far else 0.0)
