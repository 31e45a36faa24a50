"""Tiles of vectors of output channels, and the planes that they cover."""

from __future__ import annotations

from dataclasses import dataclass

from gkp.converter.native.kernels.layout import Layout
from gkp.converter.native.kernels.regions import Region, regions, whole
from gkp.converter.native.program import Conv

LARGE = 1 << 16
"""Weights of a layer that does not stay in the caches: the next panel's are fetched while this one's are used."""
FAR = 1 << 20
"""Bytes that L2 does not hold beside others."""


@dataclass(frozen=True)
class ChannelTile:
    """vectors: vectors of output channels per tile. rows, columns: output pixels per tile (a flat plane has one row).
    by_tile: all output channels of some pixels before the next pixels (inputs stay in L1), else all pixels of some
    output channels (their weights stay in cache). in_regions: all pixels of a tile see the same part of the
    window."""

    vectors: int
    rows: int
    columns: int
    by_tile: bool
    in_regions: bool = False

    @property
    def label(self) -> str:
        order, where = " by tile" if self.by_tile else "", " in regions" if self.in_regions else ""
        return f"channel {self.vectors}x{self.rows}x{self.columns}{where}{order}"

    def shape(self, region: Region) -> tuple[int, int]:
        """Rows and columns of the tiles of a region: as many pixels, if it is narrower."""
        if not self.in_regions:
            return self.rows, self.columns
        columns = min(region.width, self.rows * self.columns)
        return max(1, min(region.height, self.rows * self.columns // columns)), columns


def is_flat(step: Conv, *layouts: Layout) -> bool:
    """May the plane be taken as one row of pixels?"""
    c = step.conv
    return (c.kernel_shape == (1, 1) and c.strides == (1, 1) and not any(c.pads)
            and all(at.row == at.value.width * at.column for at in layouts))


def tile_regions(step: Conv, tile: ChannelTile, source: Layout, target: Layout, rows: int,
                 columns: int) -> tuple[Region, ...]:
    """Of the target, whose plane has so many rows and columns."""
    return regions(step.conv, source.value, target.value) if tile.in_regions else whole(step.conv, rows, columns)


def tile_plane(step: Conv, *layouts: Layout) -> tuple[int, int]:
    """Rows and columns of the target, the last of the layouts, as the tiles see them."""
    v = layouts[-1].value
    return (1, v.pixels) if is_flat(step, *layouts) else (v.height, v.width)
