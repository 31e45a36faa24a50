"""Timing: interleaved calls in one process, medians with quartiles, intervals of ratios. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from gkp.manifest import Load, Ratio, Timing
from gkp.runtime.contention import Watch
from gkp.runtime.statistics import block_interval, quartiles, ratio_interval

Call = Callable[[], object]
Opened = AbstractContextManager[Mapping[str, Call]]
Stop = Callable[[Mapping[str, Sequence[float]], int], Iterable[str]]
"""stop(ms, blocks): of models with these milliseconds in so many blocks, those that are not to be run again. 0 blocks: the
first round, a look; what is stopped then is not timed at all."""
K = TypeVar("K")
BLOCKS, FEWEST_BLOCKS = 5, 3
FIRST_STOP = 2
"""Blocks before a model may be stopped: of fewer a ratio has no interval."""
_FEWEST, _PATIENCE, _LATE, _SAMPLE_MS = 5, 10, 4, 5.0
_PATIENCE_OF_BLOCKS = 4


@dataclass(frozen=True)
class Samples:
    """Models that took turns. ms: milliseconds per call by name, one entry per round; blocks: how many rounds there were
    each time that the models had been opened anew; load: what else ran; stopped: the models that were not run to the end,
    which have the rounds of the first blocks only."""

    ms: Mapping[str, Sequence[float]]
    blocks: tuple[int, ...]
    load: Load
    stopped: frozenset[str] = frozenset()

    def timing(self, name: str) -> Timing:
        return timing(self.ms[name])

    def ratio(self, reference: str, other: str) -> Ratio | None:
        """gkp.runtime.statistics.block_interval over the blocks in which both ran: above 1, `other` is the faster. None:
        there are less than two."""
        rounds = min(len(self.ms[reference]), len(self.ms[other]))
        blocks = [n for n, end in zip(self.blocks, accumulate(self.blocks), strict=True) if end <= rounds]
        if len(blocks) < FIRST_STOP:
            return None
        value, low, high = block_interval(self.ms[reference][:rounds], self.ms[other][:rounds], blocks)
        return Ratio(value=value, low=low, high=high)

    def fastest(self, among: Iterable[str] | None = None) -> str | None:
        return fastest(self.ms, among)


def interleave_anew(opened: Callable[[Container[str]], Opened], *, threads: int, budget_s: float, blocks: int = BLOCKS,
                    stop: Stop = lambda ms, blocks: (), done: Callable[[float], None] = lambda share: None) -> Samples:
    """`interleave` in blocks, for each of which all models are opened anew: an opening settles by chance where memory lies,
    and with it some percent of the time. opened: opens the models but for those that it is given, runs each once, and gives
    their calls.

    `budget_s` counts from the first opening and holds the others, but a block has 2 rounds, or 1 where that takes four
    times its share; and once 4 budgets are spent, FEWEST_BLOCKS are enough: a ResNet-50 takes half a second per call. If
    others took the processor (Load.heavy), blocks are added until as much time again is spent, at most as many again.
    stop: is asked after the first round, and after every block from the second on. Names that are not in every block,
    though nobody stopped them, are left out. done: is told the share that is done, in time, by what the blocks have taken
    (in the first one, its first round)."""
    found: list[dict[str, list[float]]] = []
    repeats: dict[str, int] = {}
    stopped, left_out = set[str](), set[str]()
    share, watch = budget_s / blocks, Watch(threads)
    begin = start = time.perf_counter()

    def told(taken: float, block_s: float) -> None:
        done(min(1.0, taken / _expected(block_s, blocks, budget_s)))

    while _more(len(found), blocks, time.perf_counter() - start, budget_s, watch):
        with opened(left_out | stopped) as calls:
            first: dict[str, list[float]] = {}
            rounds = time.perf_counter()
            if not found:
                start = rounds
                first = _look(calls, repeats)
                left_out |= set(stop(first, 0))
                now = time.perf_counter()
                block_s = max(start + share, now) - begin
                told((now - begin) / block_s, block_s)
            calls = {name: call for name, call in calls.items() if name not in left_out}
            for name in () if first else calls:
                if repeats[name] > 1:
                    _sample(calls[name], repeats[name])
            found.append(_rounds(calls, repeats, end=start + (len(found) + 1) * share, fewest=2, fewest_slow=1,
                                 slow=rounds + _PATIENCE_OF_BLOCKS * share, most=80, seed=len(found),
                                 first={name: first[name] for name in calls if name in first}))
        if len(found) >= FIRST_STOP:
            stopped |= set(stop(_joined(found, stopped), len(found)))
        told(len(found), (time.perf_counter() - begin) / len(found))
    return Samples(_joined(found, stopped), tuple(len(next(iter(block.values()), ())) for block in found), watch.read(),
                   frozenset(stopped))


def _joined(found: Sequence[Mapping[str, Sequence[float]]], stopped: Container[str]) -> dict[str, list[float]]:
    """The rounds of all blocks, of those that ran in every one or were stopped."""
    names = [name for name in found[0] if name in stopped or all(name in block for block in found)]
    return {name: [ms for block in found for ms in block.get(name, ())] for name in names}


def _more(taken: int, blocks: int, spent_s: float, budget_s: float, watch: Watch) -> bool:
    """Is another block to be taken?"""
    if taken < blocks:
        return taken < FEWEST_BLOCKS or spent_s < _LATE * budget_s
    return taken < 2 * blocks and spent_s < 2 * budget_s and watch.read().heavy


def _expected(block_s: float, blocks: int, budget_s: float) -> int:
    """How many blocks there will be if each takes so long."""
    return next((n for n in range(FEWEST_BLOCKS, blocks) if n * block_s >= _LATE * budget_s), blocks)


def interleave(calls: Mapping[str, Call], *, budget_s: float, min_rounds: int = 7, max_rounds: int = 400,
               sample_ms: float = _SAMPLE_MS, stop: Stop = lambda ms, rounds: ()) -> dict[str, list[float]]:
    """Time every call turn by turn, in a new random order each round (so that none always follows the one that leaves
    the caches worst): milliseconds per call, one entry per round and name.

    A call shorter than `sample_ms` is repeated within a sample. Rounds go on until `budget_s` is spent, at least
    `min_rounds` (5 are enough once eleven budgets are spent), at most `max_rounds`. Every call is warmed up first. stop: is
    asked after every round, with the rounds in place of the blocks; once one call of several is left, that is the end.
    """
    for call in calls.values():
        call()
    repeats = {name: _repeats(call, sample_ms) for name, call in calls.items()}
    end = time.perf_counter() + budget_s
    slow = end + _PATIENCE * budget_s if budget_s > 0 else float("inf")
    return _rounds(calls, repeats, end=end, fewest=min_rounds, fewest_slow=_FEWEST, slow=slow, most=max_rounds, seed=0,
                   stop=stop)


def _rounds(calls: Mapping[str, Call], repeats: Mapping[str, int], *, end: float, fewest: int, fewest_slow: int, slow: float,
            most: int, seed: int, first: Mapping[str, list[float]] = MappingProxyType({}),
            stop: Stop = lambda ms, rounds: ()) -> dict[str, list[float]]:
    """Until the clock shows `end`, but `fewest` rounds; when it shows `slow`, `fewest_slow` are enough. first: a round that
    has been taken; stop: as of interleave."""
    left = list(calls)
    samples: dict[str, list[float]] = {name: list(first.get(name, ())) for name in left}
    rng = np.random.default_rng(seed)
    for round_number in range(1 if first else 0, most):
        now = time.perf_counter()
        if (round_number >= fewest and now > end) or (round_number >= fewest_slow and now > slow):
            break
        for name in rng.permutation(left).tolist():
            samples[name].append(_sample(calls[name], repeats[name]))
        stopped = set(stop(samples, round_number + 1))
        left = [name for name in left if name not in stopped]
        if stopped and len(left) < 2:
            break
    return samples


def _look(calls: Mapping[str, Call], repeats: dict[str, int]) -> dict[str, list[float]]:
    """A round of models that have run once, in random order. repeats: takes how many calls make a sample."""
    found = {name: [0.0] for name in calls}
    for name in np.random.default_rng(BLOCKS).permutation(list(calls)).tolist():
        once = _sample(calls[name], 1)
        repeats[name] = 1 if once >= _SAMPLE_MS else _repeats(calls[name], _SAMPLE_MS)
        found[name] = [once if repeats[name] == 1 else _sample(calls[name], repeats[name])]
    return found


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
