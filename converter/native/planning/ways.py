"""The ways in which every convolution of a program can be computed, and which one is the fastest.

Compiling and timing every way of a ResNet-50 takes minutes. So the ways of one sort (one family, one transform before it)
are tried from the best by the model on: one of each, then the others of the sorts that are near the fastest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf

from gkp.converter.native.dtypes import BFLOAT16
from gkp.converter.native.kernels import channel, groups, pixel, polyphase, winograd
from gkp.converter.native.kernels.bfloats import direct as bfloats
from gkp.converter.native.kernels.cpu import Cpu
from gkp.converter.native.kernels.halves import direct as halves
from gkp.converter.native.kernels.halves import pixel as halves_pixel
from gkp.converter.native.kernels.integers import direct
from gkp.converter.native.kernels.layout import NARROW, Kind, Layout
from gkp.converter.native.kernels.matrix import direct as matrix
from gkp.converter.native.kernels.way import Family, Kinds, Way
from gkp.converter.native.planning.geometry import Geometry
from gkp.converter.native.planning.timer import Timer
from gkp.converter.native.program import Conv, Program

FAMILIES: tuple[Family, ...] = (pixel.ways, polyphase.ways, channel.ways, groups.ways, winograd.rows_ways,
                                winograd.tiles_ways)
"""Of equally fast ways the first one is taken."""
INTEGERS: tuple[Family, ...] = (direct.ways, matrix.ways)
"""Over sources with a grid."""
BFLOATS: tuple[Family, ...] = (bfloats.ways, matrix.ways)
"""Over sources in bfloat16."""
HALVES: tuple[Family, ...] = (halves.ways, halves_pixel.ways)
"""Over sources in float16."""
_HOPELESS = 3.0
"""A sort is not tried at all if its best way takes more than so many times the cycles of the pair's best, by the model."""
_WIDER = 1.5
"""Nor is one over float32, where there are kernels over floats of 16 bits, if the best of its pair takes more than so many
times what the best of these takes."""
_NEAR = 1.2
"""A sort is tried further if its best way takes at most so many times what the fastest for this pair of layouts takes."""
_PAIR_NEAR = 1.5
"""The same for a pair of layouts against the fastest of all pairs: between layouts a value has to be converted."""
_LIKELY = 1.3
"""Ways that take more than so many times the cycles of the best of their sort, by the model, are left out."""
_MATTERS = 0.004
"""Of the network's time: a convolution that takes less is not tried further."""


def conv_ways(program: Program, at: Geometry, cpu: Cpu, families: tuple[Family, ...] = FAMILIES) -> dict[int, list[Way]]:
    """By number of the step: the ways that run on the processor."""
    return {number: [w for s in at.kinds(step.source) for t in at.kinds(step.target)
                     for family in _families(at.layouts[step.source][s], at.layouts[step.target][t], families)
                     for w in family(step, at.layouts[step.source][s], at.layouts[step.target][t],
                                     _residual(step, at, t), cpu) if w.runs_on(cpu)]
            for number, step in enumerate(program.steps) if isinstance(step, Conv)}


def _families(source: Layout, target: Layout, floats: tuple[Family, ...]) -> tuple[Family, ...]:
    """What reads and writes these types: floats of 16 bits are written by kernels that read them."""
    if source.kind in NARROW:
        return BFLOATS if source.value.dtype == BFLOAT16 else HALVES
    if target.kind in NARROW:
        return ()
    return floats if source.value.grid is None else INTEGERS


def _residual(step: Conv, at: Geometry, target: Kind) -> Layout | None:
    return None if step.residual is None else at.layouts[step.residual][at.kind(step.residual, target)]


def time_ways(ways: Mapping[int, list[Way]], timer: Timer) -> dict[int, list[Way]]:
    """The fastest way for every pair of layouts, by the timer; where it measures, of those that are worth a measurement."""
    if not timer.measures:
        return _fastest(_timed(ways, timer))
    sorts = {n: _sorts(found) for n, found in ways.items()}
    first = {n: [ranked[0] for ranked in found] for n, found in sorts.items()}
    tried = _timed(first, timer)
    rest = {n: _worth_more(sorts[n], found) for n, found in _that_matter(tried).items()}
    more = _timed(rest, timer)
    return _fastest({n: [*found, *more.get(n, [])] for n, found in tried.items()})


def _timed(ways: Mapping[int, list[Way]], timer: Timer) -> dict[int, list[Way]]:
    """The ways with their seconds; all kernels are compiled in one go."""
    seconds = iter(timer.seconds([t for found in ways.values() for w in found for t in w.trials]))
    return {n: [replace(w, seconds=sum(next(seconds) for _ in w.trials)) for w in found] for n, found in ways.items()}


def _fastest(timed: Mapping[int, list[Way]]) -> dict[int, list[Way]]:
    """Of each step and pair of layouts."""
    return {n: list(_best(found).values()) for n, found in timed.items()}


def _best(ways: Iterable[Way]) -> dict[Kinds, Way]:
    best: dict[Kinds, Way] = {}
    for w in ways:
        if w.kinds not in best or w.seconds < best[w.kinds].seconds:
            best[w.kinds] = w
    return best


def _sorts(ways: Iterable[Way]) -> list[list[Way]]:
    """The ways of each sort and pair of layouts, as far as they have a chance, the best by the model first."""
    found: dict[tuple[Kinds, str], list[Way]] = {}
    least: dict[Kinds, float] = {}
    for w in ways:
        found.setdefault((w.kinds, w.sort), []).append(w)
        least[w.kinds] = min(w.cycles, least.get(w.kinds, w.cycles))
    narrow = min((cycles for (source, _), cycles in least.items() if source in NARROW), default=inf)
    chances = {kinds for kinds, cycles in least.items() if kinds[0] in NARROW or cycles <= _WIDER * narrow}
    ranked = [sorted(of_sort, key=lambda w: w.cycles) for (kinds, _), of_sort in found.items() if kinds in chances]
    return [of_sort for of_sort in ranked if of_sort[0].cycles <= _HOPELESS * least[of_sort[0].kinds]]


def _that_matter(tried: Mapping[int, list[Way]]) -> dict[int, list[Way]]:
    least = {n: min(w.seconds for w in found) for n, found in tried.items() if found}
    total = sum(least.values())
    return {n: tried[n] for n, seconds in least.items() if seconds > _MATTERS * total}


def _worth_more(sorts: Iterable[list[Way]], tried: Iterable[Way]) -> list[Way]:
    """The ways of one step that were not tried, of the sorts that are near the fastest."""
    seconds = {(w.kinds, w.sort): w.seconds for w in tried}
    pairs = {kinds: min(s for (k, _), s in seconds.items() if k == kinds) for kinds, _ in seconds}
    near = {key for key, s in seconds.items()
            if s <= _NEAR * pairs[key[0]] and pairs[key[0]] <= _PAIR_NEAR * min(pairs.values())}
    return [w for best, *others in sorts for w in others if (w.kinds, w.sort) in near and w.cycles <= _LIKELY * best.cycles]
