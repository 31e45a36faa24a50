"""The stock forms a BranchedConv can take: dense, one grouped convolution (branches merged or padded), n convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.types import Array

Index = npt.NDArray[np.int64]
DENSE_PADDED = "dense-padded"
PAD = -1
"""Stands for "no channel" in index lists: its weights are zero."""


@dataclass(frozen=True, eq=False)
class Group:
    """One group of a lowered convolution. in_index [I], out_index [O]: channels of `conv`, PAD where the group was padded.

    It holds no weights: all forms of all layers together would take many times the network's memory."""

    in_index: Index
    out_index: Index
    conv: BranchedConv

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out_index.size, self.in_index.size, *self.conv.kernel_shape)

    def weight(self) -> Array:
        """[O, I, *kernel], made anew at each call; zero in holes and padding."""
        weight = np.zeros(self.shape, self.conv.dtype)
        rows, columns = _places(self.out_index, self.conv.out_channels), _places(self.in_index, self.conv.in_channels)
        for b in self.conv.branches:
            to_row, to_column = rows[b.out_index], columns[b.in_index]
            if (to_row >= 0).all() and (to_column >= 0).all():  # without a copy of the branch
                weight[np.ix_(to_row, to_column)] = b.weight
            elif (to_row >= 0).any():
                kept, read = to_row >= 0, to_column >= 0
                weight[np.ix_(to_row[kept], to_column[read])] = b.weight[np.ix_(kept, read)]
        return weight


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to compute a BranchedConv with stock operators.

    name: `dense`, `dense-padded` (output channels rounded up to the runtime's vector block), `grouped-G`,
    `grouped-G-padded` or `split-G`. groups: what each group reads and writes (dense: one group in original order).
    parallel: G convolutions of their own instead of one grouped convolution.
    """

    name: str
    groups: tuple[Group, ...]
    parallel: bool = False

    @property
    def is_dense(self) -> bool:
        return self.name in ("dense", DENSE_PADDED)

    def macs(self, plane: Sequence[int]) -> int:
        """Multiply-accumulates that the convolutions really execute for one image, padding included."""
        return sum(prod(g.shape) for g in self.groups) * prod(plane)


def dense(conv: BranchedConv) -> Candidate:
    """One ordinary convolution with zeros in the holes."""
    return Candidate("dense", (Group(np.arange(conv.in_channels), np.arange(conv.out_channels), conv),))


def dense_padded(conv: BranchedConv, block: int) -> Candidate | None:
    """Dense, with zero filters up to a multiple of `block` outputs, where only convolutions read them: the runtimes'
    blocked kernels are slower on a remainder. None when there is no remainder."""
    width = _round_up(conv.out_channels, block)
    if width == conv.out_channels or conv.is_copy:
        return None
    return Candidate(DENSE_PADDED, (Group(np.arange(conv.in_channels), _pad(np.arange(conv.out_channels), width), conv),))


def grouped(conv: BranchedConv, groups: int, block: int = 1) -> Candidate | None:
    """One grouped convolution: branches merged into `groups` groups (similar inputs together), each padded to the
    largest and to a multiple of `block` channels in and out. None when that many groups cannot be formed."""
    merged = merge_to(conv, groups)
    if merged is None or groups < 2:
        return None
    parts = _spread_unwritten(merged)
    n_in = _round_up(max(i.size for i, _ in parts), block)
    n_out = _round_up(max(o.size for _, o in parts), block)
    padded = tuple(Group(_pad(i, n_in), _pad(o, n_out), conv) for i, o in parts)
    return Candidate(f"grouped-{groups}" + ("-padded" if block > 1 else ""), padded)


def split(conv: BranchedConv, groups: int) -> Candidate | None:
    """`groups` ordinary convolutions and a Concat, unequal where the branches are."""
    merged = merge_to(conv, groups)
    if merged is None or groups < 2:
        return None
    parts = tuple(Group(i, o, conv) for i, o in _spread_unwritten(merged))
    return Candidate(f"split-{groups}", parts, parallel=True)


def candidates(conv: BranchedConv, block: int, plane: Sequence[int], slack: float = 0.0) -> tuple[Candidate, ...]:
    """The default first: dense, or dense padded to the block where that adds at most a share `slack` of filters; then
    the other one, then every grouped and split form that executes fewer multiply-accumulates than dense.

    block: channels per vector of the runtime's fast kernels; forms are offered exact and padded to it."""
    first, wide = dense(conv), dense_padded(conv, block)
    basic: tuple[Candidate, ...] = (first,)
    if wide is not None:
        padding = wide.groups[0].out_index.size / conv.out_channels - 1
        basic = (wide, first) if padding <= slack else (first, wide)
    n = len(conv.branches)
    if conv.is_copy or n < 2:
        return basic
    counts = [n]
    while counts[-1] % 2 == 0 and counts[-1] > 2:
        counts.append(counts[-1] // 2)
    counts += [2] if n > 2 and 2 not in counts else []
    found: list[Candidate] = []
    for count in counts:
        exact, aligned = grouped(conv, count), grouped(conv, count, block)
        found += [c for c in (exact,) if c is not None]
        if aligned is not None and exact is not None and aligned.groups[0].shape != exact.groups[0].shape:
            found.append(aligned)
        if count <= 8:
            found += [c for c in (split(conv, count),) if c is not None]
    limit = first.macs(plane)
    return (*basic, *(c for c in found if c.macs(plane) < limit))


def merge_to(conv: BranchedConv, groups: int) -> BranchedConv | None:
    """Merge the branches into `groups` groups of equally many branches, those with the most similar inputs together;
    None when the branches do not divide."""
    n = len(conv.branches)
    if groups < 1 or n % groups:
        return None
    if groups == n:
        return conv
    reads = np.zeros((n, conv.in_channels), dtype=bool)
    for row, b in zip(reads, conv.branches, strict=True):
        row[b.in_index] = True
    free, parts = list(range(n)), []
    while free:
        part = [free.pop(0)]
        union = reads[part[0]].copy()
        while len(part) < n // groups:
            closest = min(free, key=lambda k: int((reads[k] & ~union).sum()))
            free.remove(closest)
            part.append(closest)
            union |= reads[closest]
        parts.append(part)
    return conv.merge(parts)


def _spread_unwritten(conv: BranchedConv) -> list[tuple[Index, Index]]:
    """(in, out) per branch, with the outputs that no branch writes given to the smallest branches as zero filters, so that
    the branches cover every output."""
    outs = [list(b.out_index) for b in conv.branches]
    for channel in np.flatnonzero(~conv.written):
        min(outs, key=len).append(channel)
    return [(b.in_index, np.asarray(o, np.int64)) for b, o in zip(conv.branches, outs, strict=True)]


def _round_up(n: int, block: int) -> int:
    return -(-n // block) * block


def _pad(index: Index, n: int) -> Index:
    return np.concatenate([index, np.full(n - index.size, PAD, np.int64)])


def _places(index: Index, channels: int) -> Index:
    """Where each channel stands in a list of channels, -1 for one that does not."""
    places = np.full(channels, -1, np.int64)
    listed = np.flatnonzero(index != PAD)
    places[index[listed]] = listed
    return places
