"""Which calls are computed for a group of images before the next call, so that weights are read once for all of them.

A network's weights seldom fit the caches that a core has of its own: image by image they come from further away each time.
What a call computes lies near, but only while there is one image. So what is weighed is bytes against bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gkp.converter.native.planning.plan import Call, Place

_IMAGES = 8
"""In a group, at most: seven eighths of the traffic are gone."""
_NEAR = 1 << 20
"""Bytes. A network with fewer weights keeps them near from image to image; a part of a call has at most so many."""
_MEMORY = 32 << 20
"""Bytes that a thread takes for the images of a group, at most."""


def together(calls: Sequence[Call], sizes: Mapping[int, int]) -> tuple[int, ...]:
    """Of each call, the parts that are computed together (see Call). sizes: bytes of the buffers, by their numbers."""
    weights = [len(call.kernel.data) for call in calls]
    if sum(weights) <= _NEAR:
        return (0,) * len(calls)
    moved = [_moved(call, sizes) for call in calls]
    first = _first([w - m for w, m in zip(weights, moved, strict=True)])
    return tuple(0 if n < first else _parts(call) for n, call in enumerate(calls))


def images(own: int) -> int:
    """In a group, where each has so many bytes of memory of its own."""
    return max(1, min(_IMAGES, 1 + _MEMORY // own))


def _parts(call: Call) -> int:
    """So many that the weights of each stay near. Parts of other calls than convolutions may round differently."""
    return max(1, -(-len(call.kernel.data) // _NEAR)) if call.macs else 1


def _moved(call: Call, sizes: Mapping[int, int]) -> int:
    """Bytes of activations that a call reads and writes."""
    def size(place: Place | None) -> int:
        return sizes[place.at] if place is not None and place.where == "buffer" else 0

    return size(call.x) + size(call.r) + size(call.y)


def _first(gains: Sequence[int]) -> int:
    """Where the gains of all that follows are the largest; the end, where there are none."""
    best, total, first = 0, 0, len(gains)
    for n in reversed(range(len(gains))):
        total += gains[n]
        if total > best:
            best, first = total, n
    return first
