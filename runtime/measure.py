"""Timing: interleaved calls in one process, medians with quartiles, bootstrap intervals of ratios. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from gkp.manifest import Ratio, Timing
from gkp.runtime.statistics import quartiles, ratio_interval

Call = Callable[[], object]
K = TypeVar("K")
_FEWEST, _PATIENCE = 5, 10


def interleave(calls: Mapping[str, Call], *, budget_s: float, min_rounds: int = 7, max_rounds: int = 400,
               sample_ms: float = 5.0) -> dict[str, list[float]]:
    """Time every call turn by turn, in a new random order each round (so that none always follows the one that leaves
    the caches worst): milliseconds per call, one entry per round and name.

    A call shorter than `sample_ms` is repeated within a sample. Rounds go on until `budget_s` is spent, at least
    `min_rounds` (5 are enough once eleven budgets are spent), at most `max_rounds`. Every call is warmed up first.
    """
    names = list(calls)
    repeats = {name: _warm_up(calls[name], sample_ms) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    rng = np.random.default_rng(0)
    end = time.perf_counter() + budget_s
    for round_number in range(max_rounds):
        now = time.perf_counter()
        slow = budget_s > 0 and round_number >= _FEWEST and now > end + _PATIENCE * budget_s
        if slow or (round_number >= min_rounds and now > end):
            break
        for name in rng.permutation(names).tolist():
            call, count = calls[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) * 1e3 / count)
    return samples


def _warm_up(call: Call, sample_ms: float) -> int:
    """Two calls, then how many fit into one sample."""
    call()
    start = time.perf_counter()
    call()
    once = (time.perf_counter() - start) * 1e3
    if once >= sample_ms:
        return 1
    start = time.perf_counter()
    for _ in range(5):
        call()
    once = (time.perf_counter() - start) * 1e3 / 5
    return max(1, min(200, round(sample_ms / max(once, 1e-4))))


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
