"""Parts of one branched convolution: the filters of some output channels, over input channels in any order."""

from __future__ import annotations

from math import prod

import numpy as np

from gkp.branched import BranchedConv
from gkp.converter import node as branched_node
from gkp.converter.cost import BYTES_PER_MS, EFFICIENCY_FULL, PEAK_MACS_PER_MS, estimate_ms
from gkp.converter.graph import Node
from gkp.converter.lower.candidates import Candidate, Group, dense, split

_BLOCK = 16
Channels = tuple[int, ...]


class Branches:
    """A BranchedConv node of the network, and its parts so far (devices with the same part share its weights)."""

    def __init__(self, node: Node) -> None:
        self.conv: BranchedConv = branched_node.read(node)
        self._all = tuple(range(self.conv.out_channels))
        self._parts: dict[tuple[Channels, Channels], tuple[BranchedConv, Candidate]] = {}

    def reads(self, out: Channels) -> Channels:
        """Input channels that the given output channels read; one where they read none, because a device must know the
        shape of what it fills with biases."""
        wanted, found = set(out), np.zeros(self.conv.in_channels, dtype=bool)
        for b in self.conv.branches:
            if not wanted.isdisjoint(b.out_index.tolist()):
                found[b.in_index] = True
        return tuple(np.flatnonzero(found).tolist()) or (0,)

    def part(self, out: Channels, order: Channels, plane: tuple[int, ...]) -> tuple[BranchedConv, Candidate]:
        """The filters of the output channels `out` over an input whose channels are the network's in this order, and the
        form to lower them in. plane: of the output."""
        key = out, order
        if key not in self._parts:
            part = self.conv if out == self._all else self.conv.take_outputs(out)
            if order != tuple(range(part.in_channels)):
                place = np.full(part.in_channels, -1, np.int64)
                place[list(order)] = np.arange(len(order))
                part = part.gather_inputs(place, len(order))
            self._parts[key] = part, cheapest(part, plane)
        return self._parts[key]


def cheapest(conv: BranchedConv, plane: tuple[int, ...]) -> Candidate:
    """The form of standard convolutions that the stated cost model (gkp.converter.cost) likes best: one convolution with
    zeros in the holes, one over just the channels that are read, or one per branch or merged branches."""
    forms = [(_one_ms(conv, conv.in_channels, plane), dense(conv))]
    reads = int(conv.read.sum())
    if 0 < reads < conv.in_channels:
        forms.append((_one_ms(conv, reads, plane, copied=True), _compact(conv)))
    count = len(conv.branches)
    while count >= 2 and not conv.is_copy:
        form = split(conv, count)
        if form is not None:
            forms.append((estimate_ms(conv, form, plane, _BLOCK), form))
        count = count // 2 if count % 2 == 0 else 0
    return min(forms, key=lambda f: f[0])[1]


def _one_ms(conv: BranchedConv, reads: int, plane: tuple[int, ...], copied: bool = False) -> float:
    macs = reads * conv.out_channels * prod(conv.kernel_shape) * prod(plane)
    in_plane = prod(n * s for n, s in zip(plane, conv.strides, strict=True))
    return macs / (PEAK_MACS_PER_MS * EFFICIENCY_FULL) + (4 * reads * in_plane / BYTES_PER_MS if copied else 0.0)


def _compact(conv: BranchedConv) -> Candidate:
    read = np.flatnonzero(conv.read)
    group = Group(read, np.arange(conv.out_channels), conv)
    return Candidate("compact", (group,), parallel=True)
