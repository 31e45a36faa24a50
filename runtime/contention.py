"""Who else uses the processor while something is measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from gkp.manifest import Load
from gkp.runtime.environment import physical_cores

_STAT = Path("/proc/stat")
_SHORTEST_S = 0.25
"""The system counts processor time in hundredths of a second: of less, shares would be noise."""
_BUSY = (0, 1, 2, 5, 6, 7)
"""Of the columns of /proc/stat (proc(5)): user (guests included), nice, system, irq, softirq, steal."""


@dataclass(frozen=True)
class _Now:
    wall: float
    busy: float | None
    own: float


class Watch:
    """Started when it is made. threads: that the measured models want at a time."""

    def __init__(self, threads: int) -> None:
        self._threads, self._before, self._start = threads, _average(), _now()

    def read(self) -> Load:
        """Since it was made."""
        now, start = _now(), self._start
        wall, others = now.wall - start.wall, None
        if now.busy is not None and start.busy is not None and wall >= _SHORTEST_S:
            others = max(0.0, (now.busy - start.busy - (now.own - start.own)) / wall)
        return Load(average_before=self._before, average_after=_average(),
                    others=None if others is None else round(others, 3),
                    taken=None if others is None else round(taken(others, physical_cores(), self._threads), 3))


def taken(others: float, cores: int, threads: int) -> float:
    """Share of the cores wanted by `threads` that others had, if these use the free cores first."""
    return min(1.0, max(0.0, others - max(0, cores - threads)) / min(threads, cores))


def _average() -> float:
    return round(os.getloadavg()[0], 2)


def _now() -> _Now:
    return _Now(time.perf_counter(), _busy(), time.process_time())


def _busy() -> float | None:
    """Seconds that the processors which this process may use have been busy since the system started; None: unknown."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in _STAT.read_text("ascii").splitlines() if line.startswith("cpu")]
        ticks = sum(int(line[1 + column]) for line in lines if line[0] in allowed for column in _BUSY)
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


class Stolen:
    """What the hypervisor takes of the machine's processor time, from when it is made."""

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float | None:
        """So far; None: not told."""
        before, after = self._before, _ticks()
        if before is None or after is None or after[0] <= before[0]:
            return None
        return round((after[1] - before[1]) / (after[0] - before[0]), 4)


def _ticks() -> tuple[int, int] | None:
    """(all, stolen) ticks of the machine so far."""
    try:
        numbers = [int(n) for n in _STAT.read_text("ascii").splitlines()[0].split()[1:9]]
        return sum(numbers), numbers[7]
    except (OSError, ValueError, IndexError):
        return None
