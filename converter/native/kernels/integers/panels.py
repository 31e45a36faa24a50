"""What a tile multiplies: which channels of a pixel meet which weights.

A panel is a few vectors of the target's channels. Its items are steps of the inner loop: for every lane as many
channels of the source as a word of the processor's dot product holds, the same for all vectors of the panel. Broadcast, all
lanes see the same channels, which lie side by side. Picked, every
lane sees channels that its own outputs use, out of a window of the pixel: outputs of narrow branches lie in one vector, and
none multiplies what it does not read. What an output uses is told by its weights, so that branches of the form, merged or
not, need not be known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from gkp.branched import Branch, BranchedConv
from gkp.converter.native.kernels.integers.dots import Dot
from gkp.converter.native.kernels.jobs import cuts

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Panel:
    """first: its first output; vectors: of how many; starts: [items] the first channel of what an item reads: as many as a
    word holds, or a window; channels: [items, lanes, word] of the source, -1: none (picked), or [items, 1, word]."""

    first: int
    vectors: int
    starts: Ints
    channels: Ints

    @property
    def items(self) -> int:
        return len(self.starts)


@lru_cache(maxsize=64)
def joined(conv: BranchedConv, pixel: int) -> BranchedConv:
    """The convolution whose window is a column: the pixels of a row of the window are one pixel of more channels, `pixel`
    of them from one to the next. A branch of 9 channels then fills 7 items for a row of 3 taps, not 9."""
    (kh, kw), (dy, dx), dense = conv.kernel_shape, conv.dilations, conv.to_dense()
    weight = np.zeros((conv.out_channels, row_elements(conv, pixel), kh, 1), np.float32)
    for k in range(kw):
        weight[:, k * dx * pixel:k * dx * pixel + conv.in_channels, :, 0] = dense[:, :, :, k]
    every = Branch(np.arange(weight.shape[1]), np.arange(conv.out_channels), weight)
    return replace(conv, in_channels=weight.shape[1], branches=(every,), kernel_shape=(kh, 1), dilations=(dy, 1))


def row_elements(conv: BranchedConv, pixel: int) -> int:
    """From the first to the last channel of a row of the window."""
    return (conv.kernel_shape[1] - 1) * conv.dilations[1] * pixel + conv.in_channels


@lru_cache(maxsize=256)
def panels(conv: BranchedConv, vectors: int, lanes: int, dot: Dot) -> tuple[Panel, ...]:
    """The layer cut into panels of at most so many vectors."""
    reads = _reads(conv, dot.weights)
    found = []
    for lo, hi in cuts(-(-conv.out_channels // lanes), vectors):
        own = np.zeros(((hi - lo) * lanes, conv.in_channels), bool)
        part = reads[lo * lanes:hi * lanes]
        own[:len(part)] = part
        by_lane = np.asarray(own.reshape(hi - lo, lanes, -1).any(0))
        starts, channels = _picked(by_lane, dot) if dot.window else _broadcast(np.asarray(by_lane.any(0)), dot)
        found.append(Panel(lo * lanes, hi - lo, starts, channels))
    return tuple(found)


@lru_cache(maxsize=256)
def _reads(conv: BranchedConv, weights: Callable[[BranchedConv], npt.NDArray[Any]]) -> npt.NDArray[np.bool_]:
    """[F, C]: does the output use the channel?"""
    return np.asarray((weights(conv) != 0).any((2, 3)))


def _broadcast(used: npt.NDArray[np.bool_], dot: Dot) -> tuple[Ints, Ints]:
    """Channels side by side from the first one on that is not covered."""
    starts, end = list[int](), 0
    for c in np.flatnonzero(used):
        if c >= end:
            starts.append(int(c))
            end = int(c) + dot.word
    first = np.array(starts, np.int64)
    return first, first[:, None, None] + np.arange(dot.word)


def _picked(used: npt.NDArray[np.bool_], dot: Dot) -> tuple[Ints, Ints]:
    """Of every window, as many items as its busiest lane needs."""
    starts, items = list[int](), list[Ints]()
    for start in range(0, used.shape[1], dot.window):
        lists = [np.flatnonzero(lane) + start for lane in used[:, start:start + dot.window]]
        count = -(-max(map(len, lists)) // dot.word)
        chosen = np.full((len(lists), count * dot.word), -1, np.int64)
        for lane, found in zip(chosen, lists, strict=True):
            lane[:len(found)] = found
        items += list(chosen.reshape(len(lists), count, dot.word).transpose(1, 0, 2))
        starts += [start] * count
    return np.array(starts, np.int64), np.array(items, np.int64).reshape(-1, len(used), dot.word)


def packed(conv: BranchedConv, panel: Panel, lanes: int, taps: Sequence[tuple[int, int]], dot: Dot) -> npt.NDArray[Any]:
    """[items, taps, vectors, lanes, word]: the weights in the order of reading, of the given taps (ky, kx)."""
    dense = dot.weights(conv)
    outputs = np.arange(panel.first, panel.first + panel.vectors * lanes).reshape(panel.vectors, lanes)
    there = (panel.channels >= 0) & (panel.channels < conv.in_channels)
    c = np.where(there, panel.channels, 0)[:, None]
    f = np.minimum(outputs, conv.out_channels - 1)[None, :, :, None]
    kept = there[:, None] & (outputs < conv.out_channels)[None, :, :, None]
    return np.stack([np.where(kept, dense[f, c, ky, kx], 0) for ky, kx in taps], axis=1).astype(f"int{32 // dot.word}")
