"""Indivisible work to devices of any speed, so that the last device ends as early as possible.

    min T:   sum_d x[k, d] = 1 for every item k,   sum_k time[k] x[k, d] / speed[d] <= T for every device d,   x in {0, 1}

solved by scipy.optimize.milp (HiGHS), which is quick for the few dozen groups that a layer has; longest-first with exchanges
stands in when it does not end in time, and where all is equal there is nothing to solve.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gkp.errors import UsageError
from gkp.require import require

_SECONDS = 2.0
_LARGEST = 2000
"""Unknowns from which on the program is not tried."""


def balance(times: Sequence[float], speeds: Sequence[float]) -> list[int]:
    """The device of each item. times: of the items at speed 1; speeds: 0 for a device that gets nothing.

    Equal items on equal devices are dealt out in blocks of neighbours. UsageError without any device."""
    if not any(s > 0 for s in speeds):
        raise UsageError("no device can compute", "give a speed above 0")
    return list(_balanced(tuple(round(t, 9) for t in times), tuple(speeds)))


@lru_cache(maxsize=1024)
def _balanced(times: tuple[float, ...], speeds: tuple[float, ...]) -> tuple[int, ...]:
    active = [d for d, s in enumerate(speeds) if s > 0]
    if len(set(times)) <= 1 and len({speeds[d] for d in active}) == 1:
        return tuple(active[k * len(active) // len(times)] for k in range(len(times)))
    found = _exchanged(_longest_first(times, speeds, active), times, speeds, active)
    if len(times) * len(active) <= _LARGEST and last_end(found, times, speeds) > _bound(times, speeds) * (1 + 1e-9):
        solved = _program(times, speeds, active)
        if solved is not None and last_end(solved, times, speeds) < last_end(found, times, speeds) * (1 - 1e-9):
            return tuple(solved)
    return tuple(found)


def last_end(device: Sequence[int], times: Sequence[float], speeds: Sequence[float]) -> float:
    """When the last device is done."""
    load = [0.0] * len(speeds)
    for d, t in zip(device, times, strict=True):
        load[d] += t / speeds[d]
    return max(load)


def _bound(times: Sequence[float], speeds: Sequence[float]) -> float:
    """Nobody can end earlier: all work in proportion, or the longest item on the fastest device."""
    return max(sum(times) / sum(speeds), max(times) / max(speeds))


def _longest_first(times: Sequence[float], speeds: Sequence[float], active: Sequence[int]) -> list[int]:
    """Each item to the device that ends it first."""
    load, device = dict.fromkeys(active, 0.0), [0] * len(times)
    for k in sorted(range(len(times)), key=lambda k: -times[k]):
        device[k] = min(active, key=lambda d: (load[d] + times[k]) / speeds[d])
        load[device[k]] += times[k]
    return device


def _exchanged(device: list[int], times: Sequence[float], speeds: Sequence[float], active: Sequence[int]) -> list[int]:
    """Local search: the last device gives an item away, or exchanges one, while all are done earlier by that."""
    while True:
        end = {d: sum(t for e, t in zip(device, times, strict=True) if e == d) / speeds[d] for d in active}
        last = max(active, key=lambda d: end[d])
        better = next((changed for changed in _neighbours(device, active, last)
                       if last_end(changed, times, speeds) < end[last] * (1 - 1e-9)), None)
        if better is None:
            return device
        device = better


def _neighbours(device: Sequence[int], active: Sequence[int], last: int) -> Iterator[list[int]]:
    for k in (k for k, now in enumerate(device) if now == last):
        yield from ([*device[:k], d, *device[k + 1:]] for d in active if d != last)
        for other in (j for j, now in enumerate(device) if now != last):
            changed = list(device)
            changed[k], changed[other] = device[other], last
            yield changed


def _program(times: Sequence[float], speeds: Sequence[float], active: Sequence[int]) -> list[int] | None:
    """The integer program of the module; None when it finds nothing in time."""
    optimize = require_scipy()
    n, m, scale = len(times), len(active), max(times)
    once, ends = np.zeros((n, n * m + 1)), np.zeros((m, n * m + 1))
    for k in range(n):
        once[k, k * m:(k + 1) * m] = 1
        ends[range(m), range(k * m, (k + 1) * m)] = [times[k] / scale / speeds[d] for d in active]
    ends[:, -1] = -1
    cost, whole, upper = np.zeros(n * m + 1), np.ones(n * m + 1), np.ones(n * m + 1)
    cost[-1], whole[-1], upper[-1] = 1, 0, np.inf
    found = optimize.milp(
        cost, integrality=whole, bounds=optimize.Bounds(0, upper), options={"time_limit": _SECONDS, "mip_rel_gap": 1e-4},
        constraints=[optimize.LinearConstraint(once, 1, 1), optimize.LinearConstraint(ends, -np.inf, 0)])
    if found.x is None:
        return None
    return [active[int(np.argmax(found.x[k * m:(k + 1) * m]))] for k in range(n)]


def require_scipy() -> Any:
    """The module scipy.optimize, or BackendMissingError."""
    return require("scipy.optimize", "edge", "planning")
