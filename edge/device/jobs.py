"""What a worker is to compute, the oldest request first and of that in the plan's order; one thread at a time computes."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Callable

_OVERDUE_S = 10.0


class Jobs:
    """lock: the worker's, which is held for everything but `work` and `overdue`; ended: of who waits for an end."""

    def __init__(self, lock: threading.Lock, ended: threading.Condition) -> None:
        self._lock, self._ended = lock, ended
        self._woken = threading.Condition(lock)  # of who computes
        self._heap: list[tuple[int, int, float, Callable[[], None]]] = []
        self._due = math.inf  # deadline of what is being computed
        self._computing = 0  # the thread that does
        self.stopping = False

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def computing(self) -> bool:
        return self._computing != 0

    @property
    def overdue(self) -> bool:
        """Is something computed that nobody has waited for in a long while? That may never end."""
        return time.monotonic() >= self._due + _OVERDUE_S

    def add(self, number: int, index: int, deadline: float, job: Callable[[], None], here: bool) -> None:
        """number: of the request; index: of the segment; deadline: of time.monotonic; here: this thread will call `work`."""
        heapq.heappush(self._heap, (number, index, deadline, job))
        if self._computing != threading.get_ident() and not here:
            self._woken.notify()

    def drop(self, number: int) -> None:
        """Those of a request."""
        self._heap = [job for job in self._heap if job[0] != number]
        heapq.heapify(self._heap)

    def stop(self) -> None:
        """Begin no other job."""
        self.stopping = True
        self._woken.notify()

    def wake(self) -> None:
        """Let who waits look again how long."""
        self._woken.notify()

    def wait(self, seconds: float | None) -> None:
        """Until there is something to compute."""
        if (not self._heap or self._computing) and not self.stopping:
            self._woken.wait(seconds)

    def work(self) -> None:
        """Compute what there is to compute, unless another thread does."""
        while self._heap:
            with self._lock:
                if self._computing or not self._heap or self.stopping:
                    return
                self._computing = threading.get_ident()
                _, _, self._due, job = heapq.heappop(self._heap)
            try:
                job()
            finally:
                with self._lock:
                    self._computing, self._due = 0, math.inf
                    if self.stopping:
                        self._ended.notify_all()
