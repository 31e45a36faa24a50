"""What a tile multiplies: which four channels of a pixel meet which weights.

A panel is a few vectors of the target's channels. Its items are steps of the inner loop: for every lane four channels of
the source, the same for all vectors of the panel. Broadcast, all lanes see the same four bytes side by side. Picked, every
lane sees channels that its own outputs use, out of a window of the pixel: outputs of narrow branches lie in one vector, and
none multiplies what it does not read. What an output uses is told by its weights, so that branches of the form, merged or
not, need not be known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gkp.branched import BranchedConv
from gkp.converter.native.kernels.integers.scales import weights
from gkp.converter.native.kernels.jobs import cuts

QUAD = 4
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Panel:
    """first: its first output; vectors: of how many; starts: [items] the first channel of what an item reads: four channels,
    or a window; channels: [items, lanes, 4] of the source, -1: none (picked), or [items, 1, 4]."""

    first: int
    vectors: int
    starts: Ints
    channels: Ints

    @property
    def items(self) -> int:
        return len(self.starts)


@lru_cache(maxsize=256)
def panels(conv: BranchedConv, vectors: int, lanes: int, window: int) -> tuple[Panel, ...]:
    """The layer cut into panels of at most so many vectors. window: bytes; 0: broadcast."""
    reads = _reads(conv)
    found = []
    for lo, hi in cuts(-(-conv.out_channels // lanes), vectors):
        own = np.zeros(((hi - lo) * lanes, conv.in_channels), bool)
        part = reads[lo * lanes:hi * lanes]
        own[:len(part)] = part
        by_lane = np.asarray(own.reshape(hi - lo, lanes, -1).any(0))
        starts, channels = _picked(by_lane, window) if window else _broadcast(np.asarray(by_lane.any(0)))
        found.append(Panel(lo * lanes, hi - lo, starts, channels))
    return tuple(found)


@lru_cache(maxsize=256)
def _reads(conv: BranchedConv) -> npt.NDArray[np.bool_]:
    """[F, C]: does the output use the channel?"""
    return np.asarray((weights(conv) != 0).any((2, 3)))


def _broadcast(used: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Four channels side by side from the first one on that is not covered."""
    starts, end = list[int](), 0
    for c in np.flatnonzero(used):
        if c >= end:
            starts.append(int(c))
            end = int(c) + QUAD
    first = np.array(starts, np.int64)
    return first, first[:, None, None] + np.arange(QUAD)


def _picked(used: npt.NDArray[np.bool_], window: int) -> tuple[Ints, Ints]:
    """Of every window, as many items as its busiest lane needs."""
    starts, items = list[int](), list[Ints]()
    for start in range(0, used.shape[1], window):
        lists = [np.flatnonzero(lane) + start for lane in used[:, start:start + window]]
        count = -(-max(map(len, lists)) // QUAD)
        chosen = np.full((len(lists), count * QUAD), -1, np.int64)
        for lane, found in zip(chosen, lists, strict=True):
            lane[:len(found)] = found
        items += list(chosen.reshape(len(lists), count, QUAD).transpose(1, 0, 2))
        starts += [start] * count
    return np.array(starts, np.int64), np.array(items, np.int64).reshape(-1, len(used), QUAD)


def packed(conv: BranchedConv, panel: Panel, lanes: int, taps: Sequence[tuple[int, int]]) -> npt.NDArray[np.int8]:
    """[items, taps, vectors, lanes, 4]: the weights in the order of reading, of the given taps (ky, kx)."""
    dense = weights(conv)
    outputs = np.arange(panel.first, panel.first + panel.vectors * lanes).reshape(panel.vectors, lanes)
    there = (panel.channels >= 0) & (panel.channels < conv.in_channels)
    c = np.where(there, panel.channels, 0)[:, None]
    f = np.minimum(outputs, conv.out_channels - 1)[None, :, :, None]
    kept = there[:, None] & (outputs < conv.out_channels)[None, :, :, None]
    return np.stack([np.where(kept, dense[f, c, ky, kx], 0) for ky, kx in taps], axis=1).astype(np.int8)
