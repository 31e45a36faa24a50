"""Where the elements of a value lie in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from gkp.converter.native.dtypes import BFLOAT16, FLOAT16, DType
from gkp.converter.native.program import Value

Kind = Literal["planar", "last", "narrow", "narrow planes"]
"""Planes, or channels last; or channels last or planes of the floats of 16 bits that a plan has, whatever the value's own
type."""
NARROW: tuple[Kind, ...] = ("narrow", "narrow planes")
_OF_16_BITS = (BFLOAT16, FLOAT16)


@dataclass(frozen=True)
class Layout:
    """Element (c, y, x) of a value is element `origin + c * channel + y * row + x * column` of its buffer.

    Planar: column = 1, one plane per channel. Channels-last: channel = 1, and the channels are padded to a multiple of
    the vector. Both have a halo of zeros around the plane (top, left, bottom, right), which the buffer is born with and
    no kernel may overwrite with anything but zeros; in planar layout the right halo of a row and the left halo of the
    next are the same cells. block (channels, elements): the channels come in blocks of so many, which begin so many
    elements apart. padded: channels stored per pixel (channels-last) or planes. size: elements of the buffer, with slack for
    vectors that reach past the end."""

    value: Value
    channel: int
    row: int
    column: int
    origin: int
    size: int
    padded: int
    block: tuple[int, int] | None = None

    @property
    def planar(self) -> bool:
        return self.column == 1 and self.padded == self.value.channels

    @property
    def bytes(self) -> int:
        return self.size * self.value.dtype.bytes

    @property
    def halo(self) -> bool:
        """Of integers: is there any?"""
        return self.size - _SLACK - _PIXELS * self.padded != self.padded * self.value.pixels

    @property
    def words(self) -> bool:
        """Of integers: is a pixel one word?"""
        return self.value.grid is not None and self.channel == 1 and self.padded == self.column == WORD

    @property
    def kind(self) -> Kind:
        if self.value.dtype in _OF_16_BITS:
            return "narrow planes" if self.planar else "narrow"
        return "planar" if self.planar else "last"

    def channel_offsets(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Elements from channel 0 to the channels `index`."""
        if self.block is None:
            return index * self.channel
        channels, apart = self.block
        return index // channels * apart + index % channels * self.channel

    def offset(self, c: int, y: int, x: int) -> int:
        return self.origin + c * self.channel + y * self.row + x * self.column


Halo = tuple[int, int, int, int]
"""top, left, bottom, right."""


def planar(value: Value, halo: Halo = (0, 0, 0, 0), lanes: int = 16, pitch: int | None = None) -> Layout:
    """One plane per channel. pitch: elements from row to row, at least the width and the larger side of the halo."""
    top, left, bottom, right = halo
    row = pitch or value.width + max(left, right)
    plane = row * (value.height + top + bottom)
    return Layout(value, plane, row, 1, top * row + left, value.channels * plane + left + right + 2 * lanes,
                  value.channels)


BYTES = 16
"""Channels of integers are padded to a multiple of so many: what one vector of 16 sums is stored as."""
WORD = 4
"""Or, where there are no more and no such vector is stored, to so many: a word of the sums of products."""


_SLACK, _PIXELS = 128, 3


def integers(value: Value, halo: Halo = (0, 0, 0, 0), pixel: int = BYTES) -> Layout:
    """Channels last, of a value with a grid. The halo holds its zero point; what lies where no channel is has no meaning,
    but is initialised. Past the last pixel may be read 128 bytes and three pixels. pixel: channels are padded to a multiple
    of so many, BYTES or WORD."""
    return channels_last(value, halo, pixel)


def narrowed(value: Value, dtype: DType, halo: Halo = (0, 0, 0, 0), lanes: int = 16) -> Layout:
    """Channels last in floats of 16 bits, of a value of float32. Lanes that hold no channel are zero."""
    return channels_last(replace(value, dtype=dtype), halo, lanes)


def narrow_planes(value: Value, dtype: DType, halo: Halo = (0, 0, 0, 0)) -> Layout:
    """One plane per channel, in floats of 16 bits, of a value of float32."""
    return planar(replace(value, dtype=dtype), halo, _SLACK // 4)


def slack(value: Value, lanes: int) -> int:
    """Elements behind the last pixel of floats, for vectors that reach past the end."""
    return _SLACK // value.dtype.bytes if value.dtype in _OF_16_BITS else 2 * lanes


def channels_last(value: Value, halo: Halo = (0, 0, 0, 0), lanes: int = 16) -> Layout:
    """All channels of a pixel side by side, padded to whole vectors. Lanes that hold no channel are zero."""
    top, left, bottom, right = halo
    padded = -(-value.channels // lanes) * lanes
    row = padded * (value.width + left + right)
    more = slack(value, lanes) if value.grid is None else _SLACK + _PIXELS * padded
    return Layout(value, 1, row, padded, top * row + left * padded, row * (value.height + top + bottom) + more, padded)
