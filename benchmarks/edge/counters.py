"""What the kernel and the relay count: processor time of processes, bytes on interfaces. Linux only; None elsewhere."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gkp.benchmarks.edge.job import Counter
from gkp.benchmarks.edge.results import Machine
from gkp.runtime.contention import Stolen

WORD = 8
"""Bytes of a count in the relay's file, which holds ports x ports of them: [from][to], in the machine's byte order."""


def cpu_ms(pids: Sequence[int]) -> float | None:
    """Milliseconds that all threads of the processes have run; None when the kernel does not tell."""
    total = 0
    try:
        for pid in pids:
            for task in os.scandir(f"/proc/{pid}/task"):
                total += int(Path(task.path, "schedstat").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return total / 1e6


def sent_bytes(counter: Counter) -> int:
    """Bytes that left by an interface so far. OSError when there is none."""
    for line in Path(f"/proc/{counter.pid}/net/dev").read_text(encoding="ascii").splitlines():
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == counter.interface:
            return int(numbers.split()[8])
    raise OSError(f"process {counter.pid} has no interface {counter.interface}")


class Counters:
    """Bytes that left by all interfaces together, and those that the relay carried from device to device."""

    def __init__(self, counters: Sequence[Counter], matrix: str | None, ports: int) -> None:
        self._counters, self._ports, self._idle = counters, ports, (0.0, 0.0)
        self._map: mmap.mmap | None = None
        if matrix is not None:
            with open(matrix, "rb") as file:
                self._map = mmap.mmap(file.fileno(), ports * ports * WORD, access=mmap.ACCESS_READ)

    @property
    def there(self) -> bool:
        return bool(self._counters)

    def idle(self, seconds: float) -> float | None:
        """Bytes per second while nobody asks anything (keepalive, health checks): subtracted from then on."""
        if not self.there:
            return None
        before = self._now()
        time.sleep(seconds)
        after = self._now()
        self._idle = (after[0] - before[0]) / seconds, (after[1] - before[1]) / seconds
        return self._idle[0]

    def per_request(self, call: Callable[[], object], seconds: float, most: int = 50) -> tuple[float, float | None]:
        """(bytes on all interfaces, from device to device or None) of one request, on average."""
        before, start, requests = self._now(), time.perf_counter(), 0
        while requests < 3 or (requests < most and time.perf_counter() < start + seconds):
            call()
            requests += 1
        time.sleep(0.02)  # the last acknowledgements
        spent, after = time.perf_counter() - start, self._now()
        all_of, between = ((b - a - idle * spent) / requests for a, b, idle in zip(before, after, self._idle, strict=True))
        return max(0.0, all_of), None if self._map is None else max(0.0, between)

    def _now(self) -> tuple[int, int]:
        return sum(sent_bytes(c) for c in self._counters), self._between()

    def _between(self) -> int:
        if self._map is None:
            return 0
        words = memoryview(bytes(self._map)).cast("Q")
        return sum(words[k * self._ports + j] for k in range(1, self._ports) for j in range(1, self._ports))


class Watch:
    """The conditions from its making to .machine()."""

    def __init__(self) -> None:
        self._stolen, self._load = Stolen(), os.getloadavg()[0]

    def machine(self) -> Machine:
        return Machine(load_average=(round(self._load, 2), round(os.getloadavg()[0], 2)), steal=self._stolen.share())
