"""Memory that values are received into, used again when nobody holds the value any more."""

from __future__ import annotations

import sys

import numpy as np

from gkp.types import Array

_SMALL = 32 << 10
"""Bytes of what is not worth keeping: the allocator is as fast, without new pages."""
_KEPT = 16
"""Buffers of each size, at most."""


def _references(buffers: list[Array]) -> list[int]:
    return [sys.getrefcount(buffer) for buffer in buffers]


_UNUSED = _references([np.empty(1, np.uint8)])[0]
"""Of a buffer that only a list refers to: Python's versions count the call differently."""


class Buffers:
    """For one thread, the loop's; what was lent may go anywhere. most: bytes that are kept; kept: now."""

    def __init__(self, most: int = 64 << 20) -> None:
        self._most, self.kept = most, 0
        self._kept: dict[int, list[Array]] = {}

    def lend(self, size: int) -> Array:
        """uint8 [size]. numpy's views of it refer to the buffer itself, however they were made, so it is free when nobody
        refers to it."""
        if size < _SMALL:
            return np.empty(size, np.uint8)
        mine = self._kept.setdefault(size, [])
        for at, count in enumerate(_references(mine)):
            if count == _UNUSED:
                return mine[at]
        made = np.empty(size, np.uint8)
        if len(mine) < _KEPT and self.kept + size <= self._most:
            mine.append(made)
            self.kept += size
        return made
