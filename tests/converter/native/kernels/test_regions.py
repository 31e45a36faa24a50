"""Regions of a plane: every pixel once, and of its window just what lies inside the source."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from conv_kit import random_conv, random_plane

from gkp.branched import BranchedConv
from gkp.converter.native.kernels import channel
from gkp.converter.native.kernels.cpu import CPUS
from gkp.converter.native.kernels.layout import channels_last
from gkp.converter.native.kernels.regions import regions, share
from gkp.converter.native.kernels.taps import used
from gkp.converter.native.program import Conv, Value


def inside(conv: BranchedConv, source: Value, pixel: tuple[int, int]) -> set[tuple[int, int]]:
    """By the definition of a convolution."""
    taps = product(*map(range, conv.kernel_shape))
    return {(ky, kx) for ky, kx in taps if all(
        0 <= at * s + k * d - p < size for at, s, k, d, p, size in zip(
            pixel, conv.strides, (ky, kx), conv.dilations, conv.pads[:2], (source.height, source.width), strict=True))}


@pytest.mark.parametrize("seed", range(40))
def test_every_pixel_lies_in_one_region_which_knows_its_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    conv = random_conv(rng)
    plane = random_plane(rng, conv)
    source, target = Value(conv.in_channels, *plane), Value(conv.out_channels, *conv.out_shape(plane))
    found, seen = regions(conv, source, target), np.zeros((target.height, target.width), int)
    for region in found:
        seen[slice(*region.rows), slice(*region.columns)] += 1
        window = set(product(range(*region.down), range(*region.across)))
        for pixel in product(range(*region.rows), range(*region.columns)):
            assert window == inside(conv, source, pixel)
    assert (seen == 1).all()
    kept = sum(len(inside(conv, source, pixel)) for pixel in product(range(target.height), range(target.width)))
    assert share(conv, found) == pytest.approx(kept / (target.pixels * conv.kernel_shape[0] * conv.kernel_shape[1]))


def test_runs_are_the_taps_of_the_window_in_order() -> None:
    conv = BranchedConv.from_dense(np.ones((4, 3, 3, 3), np.float32), pads=(1, 1, 1, 1))
    taps = used(conv.branches[0])
    taps = taps[np.lexsort((taps[:, 0], taps[:, 2], taps[:, 1]))]
    corner = regions(conv, Value(3, 5, 5), Value(4, 5, 5))[0]
    assert (corner.rows, corner.columns, corner.down, corner.across) == ((0, 1), (0, 1), (1, 3), (1, 3))
    runs = corner.runs(taps)
    assert [tap for first, end in runs for tap in taps[first:end].tolist()] == \
        [[c, ky, kx] for ky in (1, 2) for kx in (1, 2) for c in range(3)]
    assert len(runs) == 2


def test_what_lies_in_the_pads_is_not_multiplied() -> None:
    """A 3x3 convolution of dilation 12 on a 20x20 plane (DeepLabV3) needs 36 % of its products."""
    conv = BranchedConv.from_dense(np.ones((16, 8, 3, 3), np.float32), pads=(12,) * 4, dilations=(12, 12))
    cpu, source, target = CPUS["x86-64-v3"], Value(8, 20, 20), Value(16, 20, 20)
    found = list(channel.ways(Conv(0, 1, conv), channels_last(source, (12,) * 4, 8), channels_last(target, lanes=8), None, cpu))
    whole, parts = ([w for w in found if ("in regions" in w.tile) == cut] for cut in (False, True))
    assert {w.macs for w in whole} == {conv.macs((20, 20))}
    assert {w.macs for w in parts} == {conv.macs((20, 20)) * 36 * 36 // (60 * 60)}
    assert min(w.cycles for w in parts) < 0.5 * min(w.cycles for w in whole)


def test_no_regions_where_they_leave_nothing_out() -> None:
    cpu, source = CPUS["x86-64-v3"], channels_last(Value(8, 64, 64), (1, 1, 1, 1), 8)
    conv = BranchedConv.from_dense(np.ones((8, 8, 3, 3), np.float32))
    for pads in ((1, 1, 1, 1), (0, 0, 0, 0)):
        c = replace(conv, pads=pads)
        target = channels_last(Value(8, *c.out_shape((64, 64))), lanes=8)
        assert not any(tile.in_regions for tile in channel.tiles(Conv(0, 1, c), source, target, cpu))
