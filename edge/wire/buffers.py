"""Memory that values are received into, used again when nobody holds the value any more."""

from __future__ import annotations

import sys

import numpy as np

from gkp.types import Array

_SMALL = 32 << 10
"""Bytes of what is not worth keeping: the allocator is as fast, without new pages."""
_KEPT = 16
"""Buffers of each size, at most."""
_UNUSED = 3
"""References to a buffer that nobody has: the list's, the loop variable's, and the count's own."""


class Buffers:
    """For one thread, the loop's; what was lent may go anywhere. most: bytes that are kept."""

    def __init__(self, most: int = 64 << 20) -> None:
        self._most, self._bytes = most, 0
        self._kept: dict[int, list[Array]] = {}

    def lend(self, size: int) -> Array:
        """uint8 [size]. numpy's views of it refer to the buffer itself, however they were made, so it is free when nobody
        refers to it."""
        if size < _SMALL:
            return np.empty(size, np.uint8)
        mine = self._kept.setdefault(size, [])
        for buffer in mine:
            if sys.getrefcount(buffer) == _UNUSED:
                return buffer
        made = np.empty(size, np.uint8)
        if len(mine) < _KEPT and self._bytes + size <= self._most:
            mine.append(made)
            self._bytes += size
        return made
