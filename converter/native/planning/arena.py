"""Where every buffer lies in the arena: buffers that are alive at different times share memory."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

ALIGN = 64
"""Bytes of a cache line."""
_PAGE, _STAGGER = 4096, 9 * ALIGN
"""Bytes. Buffers that begin at the same place of a page slow each other down (loads wait for stores that only
look the same), so their beginnings are spread."""


@dataclass(frozen=True)
class Life:
    """A buffer of `size` bytes, written first by call `first` and read last by call `last`. zeros: what its cells of
    zeros look like (a layout with a halo or padded channels), or None; it shares memory only with buffers of equal
    zeros, because nobody writes those cells again."""

    size: int
    first: int
    last: int
    zeros: Hashable | None = None

    def meets(self, other: Life) -> bool:
        return self.first <= other.last and other.first <= self.last


def arrange(lives: Sequence[Life]) -> tuple[list[int], int]:
    """First byte of each buffer (a multiple of ALIGN), and the bytes of the whole arena. Largest first, each at the
    lowest place that is free throughout its life."""
    slots: list[list[int]] = []  # buffers with equal zeros, one after another in the same memory
    for k in sorted(range(len(lives)), key=lambda k: lives[k].first):
        life = lives[k]
        home = next((s for s in slots if life.zeros is not None and lives[s[0]].zeros == life.zeros
                     and not any(life.meets(lives[j]) for j in s)), None)
        if home is None:
            slots.append([k])
        else:
            home.append(k)
    always = max((life.last for life in lives), default=0)
    blocks = [(max(lives[k].size for k in s), s) for s in slots]
    blocks.sort(key=lambda b: -b[0])
    placed: list[tuple[int, int, Life]] = []
    at = [0] * len(lives)
    for size, members in blocks:
        size = -(-max(0, size - _STAGGER) // _PAGE) * _PAGE + _STAGGER
        first = lives[members[0]]
        whole = first if first.zeros is None else Life(size, 0, always)
        start = 0
        for begin, end, other in sorted(placed, key=lambda p: p[0]):
            if whole.meets(other) and begin < start + size and start < end:
                start = end
        placed.append((start, start + size, whole))
        for k in members:
            at[k] = start
    return at, max((end for _, end, _ in placed), default=0)
