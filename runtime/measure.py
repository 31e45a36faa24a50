"""Timing: interleaved calls in one process, medians with quartiles, intervals of ratios. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from gkp.manifest import Load, Ratio, Timing
from gkp.runtime.contention import Watch
from gkp.runtime.statistics import block_interval, quartiles, ratio_interval

Call = Callable[[], object]
Opened = AbstractContextManager[Mapping[str, Call]]
K = TypeVar("K")
BLOCKS, FEWEST_BLOCKS = 5, 3
_FEWEST, _PATIENCE, _LATE, _SAMPLE_MS = 5, 10, 25, 5.0


@dataclass(frozen=True)
class Samples:
    """Models that took turns. ms: milliseconds per call by name, one entry per round; blocks: how many rounds there were
    each time that the models had been opened anew; load: what else ran."""

    ms: Mapping[str, Sequence[float]]
    blocks: tuple[int, ...]
    load: Load

    def timing(self, name: str) -> Timing:
        return timing(self.ms[name])

    def ratio(self, reference: str, other: str) -> Ratio:
        """gkp.runtime.statistics.block_interval: above 1, `other` is the faster."""
        value, low, high = block_interval(self.ms[reference], self.ms[other], self.blocks)
        return Ratio(value=value, low=low, high=high)

    def fastest(self, among: Iterable[str] | None = None) -> str | None:
        return fastest(self.ms, among)


def interleave_anew(opened: Callable[[], Opened], *, threads: int, budget_s: float, blocks: int = BLOCKS,
                    done: Callable[[float], None] = lambda share: None) -> Samples:
    """`interleave` in blocks, for each of which all models are opened anew: an opening settles by chance where memory lies,
    and with it some percent of the time. opened: opens the models, runs each once, and gives their calls.

    `budget_s` counts from the first opening and holds the others, but a block has 2 rounds, or 1 where these would take
    eleven times its share; and once 25 budgets are spent, FEWEST_BLOCKS are enough: a ResNet-50 at batch 64 takes
    seconds per call. If others took the processor (Load.heavy), blocks are added until as much time again is spent, at
    most as many again. Names that are not in every block are left out. done: is told the share of the blocks that are."""
    found: list[dict[str, list[float]]] = []
    repeats: dict[str, int] = {}
    share, watch = budget_s / blocks, Watch(threads)
    start = time.perf_counter()
    while _more(len(found), blocks, time.perf_counter() - start, budget_s, watch):
        with opened() as calls:
            start = start if found else time.perf_counter()
            for name, call in calls.items():
                if name not in repeats:
                    repeats[name] = _repeats(call, _SAMPLE_MS)
                elif repeats[name] > 1:
                    _sample(call, repeats[name])
            found.append(_rounds(calls, repeats, end=start + (len(found) + 1) * share, fewest=2, fewest_slow=1,
                                 slow=time.perf_counter() + _PATIENCE * share, most=80, seed=len(found)))
        done(min(1.0, len(found) / blocks))
    names = [name for name in found[0] if all(name in block for block in found)]
    return Samples({name: [ms for block in found for ms in block[name]] for name in names},
                   tuple(len(next(iter(block.values()), ())) for block in found), watch.read())


def _more(taken: int, blocks: int, spent_s: float, budget_s: float, watch: Watch) -> bool:
    """Is another block to be taken?"""
    if taken < blocks:
        return taken < FEWEST_BLOCKS or spent_s < _LATE * budget_s
    return taken < 2 * blocks and spent_s < 2 * budget_s and watch.read().heavy


def interleave(calls: Mapping[str, Call], *, budget_s: float, min_rounds: int = 7, max_rounds: int = 400,
               sample_ms: float = _SAMPLE_MS) -> dict[str, list[float]]:
    """Time every call turn by turn, in a new random order each round (so that none always follows the one that leaves
    the caches worst): milliseconds per call, one entry per round and name.

    A call shorter than `sample_ms` is repeated within a sample. Rounds go on until `budget_s` is spent, at least
    `min_rounds` (5 are enough once eleven budgets are spent), at most `max_rounds`. Every call is warmed up first.
    """
    for call in calls.values():
        call()
    repeats = {name: _repeats(call, sample_ms) for name, call in calls.items()}
    end = time.perf_counter() + budget_s
    slow = end + _PATIENCE * budget_s if budget_s > 0 else float("inf")
    return _rounds(calls, repeats, end=end, fewest=min_rounds, fewest_slow=_FEWEST, slow=slow, most=max_rounds, seed=0)


def _rounds(calls: Mapping[str, Call], repeats: Mapping[str, int], *, end: float, fewest: int, fewest_slow: int, slow: float,
            most: int, seed: int) -> dict[str, list[float]]:
    """Until the clock shows `end`, but `fewest` rounds; when it shows `slow`, `fewest_slow` are enough."""
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(seed)
    for round_number in range(most):
        now = time.perf_counter()
        if (round_number >= fewest and now > end) or (round_number >= fewest_slow and now > slow):
            break
        for name in rng.permutation(names).tolist():
            samples[name].append(_sample(calls[name], repeats[name]))
    return samples


def _sample(call: Call, count: int) -> float:
    """Milliseconds per call, over so many."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e3 / count


def _repeats(call: Call, sample_ms: float) -> int:
    """Of a model that has run once: how many calls fit into one sample."""
    if _sample(call, 1) >= sample_ms:
        return 1
    return max(1, min(200, round(sample_ms / max(_sample(call, 5), 1e-4))))


def once(call: Call) -> float:
    """Milliseconds of the shorter of two calls: a first look."""
    return min(_sample(call, 1) for _ in range(2))


def fastest(samples: Mapping[K, Sequence[float]], among: Iterable[K] | None = None) -> K | None:
    """The key with the lowest median, of all keys or of those that are named; None when none of them was timed."""
    timed = [key for key in (samples if among is None else among) if samples.get(key)]
    return min(timed, key=lambda key: float(np.median(samples[key])), default=None)


def timing(samples: Sequence[float]) -> Timing:
    """Median and quartiles."""
    q1, median, q3 = quartiles(samples)
    return Timing(median=median, q1=q1, q3=q3, runs=len(samples))


def ratio(reference: Sequence[float], other: Sequence[float]) -> Ratio:
    """gkp.runtime.statistics.ratio_interval: above 1, `other` is the faster."""
    value, low, high = ratio_interval(reference, other)
    return Ratio(value=value, low=low, high=high)
