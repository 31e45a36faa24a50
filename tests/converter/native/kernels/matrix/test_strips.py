"""Every pixel of the target is in one strip, and a strip's rows are where its pixels' windows begin."""

from __future__ import annotations

import numpy as np
import pytest
from conv_kit import needed_halo, random_conv, random_plane

from gkp.converter.native.dtypes import UINT8
from gkp.converter.native.kernels.layout import integers
from gkp.converter.native.kernels.matrix.strips import ROWS, strips
from gkp.converter.native.program import Conv, Grid, Value


@pytest.mark.parametrize("seed", range(30))
def test_every_pixel_is_in_one_strip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    conv = random_conv(rng)
    grid, (height, width) = Grid(1.0, 3), random_plane(rng, conv)
    rows, columns = conv.out_shape((height, width))
    source, target = Value(conv.in_channels, height, width, UINT8, grid), Value(conv.out_channels, rows, columns, UINT8, grid)
    x, y = integers(source, needed_halo(conv, source, target)), integers(target, (1, 0, 2, 1))
    (sy, sx), (top, left) = conv.strides, conv.pads[:2]
    wanted = {y.offset(0, r, c): x.offset(0, r * sy - top, c * sx - left) for r in range(rows) for c in range(columns)}
    found: dict[int, int] = {}
    for strip in strips(Conv(0, 1, conv), (rows, columns), x, y, None):
        assert 0 < strip.pixels <= ROWS
        for run in strip.runs:
            assert run.first + run.count <= strip.pixels
            assert run.target == run.residual
            for k in range(run.count):
                assert run.target + k * y.column not in found
                found[run.target + k * y.column] = strip.source + (run.first + k) * sx * x.column
    assert found == wanted


def test_small_planes_share_strips() -> None:
    """7 x 7 pixels with a halo: four strips, not seven."""
    conv = random_conv(np.random.default_rng(0), (3, 3), (1, 1), ins=16, outs=16)
    grid = Grid(1.0, 0)
    value = Value(16, 7, 7, UINT8, grid)
    found = strips(Conv(0, 1, conv), (7, 7), integers(value, (1, 1, 1, 1)), integers(value), None)
    assert len(found) == 4
