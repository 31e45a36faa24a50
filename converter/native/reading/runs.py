"""Channels of a new value as runs of channels of others, and how to write them in few copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from gkp.converter.native.reading.moves import Elements

Origin = tuple[int, tuple[int, int], tuple[int, int]]
"""Base, offset and strides: where whole channels come from."""


@dataclass(frozen=True, eq=False)
class Run:
    """Channels [first, first + index.size) of a target: channel index[k] of a base (-1: zeros) from `offset` in
    steps of `strides`."""

    first: int
    index: Elements
    base: int
    offset: tuple[int, int]
    strides: tuple[int, int]

    @property
    def origin(self) -> Origin:
        return self.base, self.offset, self.strides


def gathered(runs: Sequence[Run]) -> tuple[list[Run], Elements]:
    """(runs, index): one run for each origin, one behind another, and where each channel of the
    target is then (-1: zero)."""
    index = np.full(sum(run.index.size for run in runs), -1, np.int64)
    side: list[Run] = []
    for origin in dict.fromkeys(run.origin for run in runs):
        own = [run for run in runs if run.origin == origin]
        places = np.concatenate([run.first + np.flatnonzero(run.index >= 0) for run in own])
        first = sum(run.index.size for run in side)
        index[places] = first + np.arange(places.size)
        side.append(Run(first, np.concatenate([run.index[run.index >= 0] for run in own]), *origin))
    return side, index


@dataclass
class Concatenations:
    """What was put together from several runs, by plane: a DenseNet does the same and a little more again and again."""

    _known: dict[tuple[int, ...], list[tuple[int, list[tuple[Origin, int]]]]] = field(default_factory=dict)

    def note(self, plane: tuple[int, ...], target: int, runs: Sequence[Run]) -> None:
        """The runs have filled the target."""
        if len(runs) > 1:
            self._known.setdefault(plane, []).append((target, _channels(runs)))

    def shorter(self, plane: tuple[int, ...], runs: Sequence[Run]) -> Sequence[Run]:
        """The runs, with the longest value among those before that they begin with as one run."""
        channels = _channels(runs)
        found = max(((value, len(old)) for value, old in self._known.get(plane, ()) if channels[:len(old)] == old),
                    key=lambda f: f[1], default=None)
        if found is None:
            return runs
        value, n = found
        shorter, first = [Run(0, np.arange(n), value, (0, 0), (1, 1))], n
        for origin, group in groupby(channels[n:], key=lambda channel: channel[0]):
            index = np.asarray([k for _, k in group], np.int64)
            shorter.append(Run(first, index, *origin))
            first += index.size
        return shorter


def _channels(runs: Sequence[Run]) -> list[tuple[Origin, int]]:
    return [(run.origin, int(k)) for run in runs for k in run.index]
