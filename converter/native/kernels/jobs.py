"""Kernels that work off a table of jobs: their data, and how they begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from gkp.converter.native.kernels.emit import fill, share

_ENTRY = '''
    const int* words = reinterpret_cast<const int*>(data);
    const float* floats = reinterpret_cast<const float*>(data);
    const Job* jobs = reinterpret_cast<const Job*>(data);
    @share@
    x += @x@;
    y += @y@;
    $if residual: r += @r@;
    @body@
'''


class Words:
    """4-byte words: a table of jobs, then arrays that the jobs find by the positions that `put` gave. jobs, fields: of the
    table; align: every array begins at a multiple of so many words."""

    def __init__(self, jobs: int, fields: int, align: int = 1) -> None:
        self._table, self._align = jobs * fields, align
        self._arrays: list[npt.NDArray[np.uint32]] = []
        self._end = self._table + -self._table % align

    def put(self, values: object, kind: type) -> int:
        """Append an array as elements of `kind` (int32 or float32); its position."""
        array = np.ascontiguousarray(values, kind).ravel().view(np.uint32)
        padded = np.zeros(array.size + -array.size % self._align, np.uint32)
        padded[:array.size] = array
        self._arrays.append(padded)
        self._end += padded.size
        return self._end - padded.size

    def bytes(self, table: Sequence[Sequence[int]]) -> bytes:
        head = np.zeros(self._table + -self._table % self._align, np.uint32)
        head[:self._table] = np.asarray(table, np.int32).ravel().view(np.uint32)
        return np.concatenate([head, *self._arrays]).tobytes()


def entry(jobs: int, x: int, y: int, r: int | None, body: str) -> str:
    """The kernel's function: x, y and r moved on by so many elements (r: None without a residual), begin and end of this
    part's jobs, then the body."""
    return fill(_ENTRY, share=share(jobs), x=x, y=y, r=r, residual=r is not None, body=body)


def part_sizes(n: int, most: int) -> list[tuple[int, int]]:
    """(size, how many parts have it) of the parts that `cuts` makes."""
    parts = -(-n // most)
    if not parts:
        return []
    small, larger = divmod(n, parts)
    return [(small, parts - larger), *([(small + 1, larger)] if larger else [])]


def cuts(n: int, most: int) -> list[tuple[int, int]]:
    """n things cut into parts of at most `most`, as equal as they can be."""
    parts = -(-n // most)
    return list(pairwise(n * k // parts for k in range(parts + 1))) if parts else []
