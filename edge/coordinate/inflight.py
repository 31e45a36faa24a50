"""How many requests a coordinator has under way: at most so many, and fewer while the devices' queues are full."""

from __future__ import annotations

import threading
from collections import deque


class InFlight:
    """most: requests at once when nothing is full. A device that refuses a request says that the queues hold no more than
    what is under way without it: that is the limit from then on. It grows again by one for every round of answers
    (additive increase, as TCP does). First come, first served; a refused request goes first. Thread safe."""

    def __init__(self, most: int) -> None:
        self._most, self._limit, self._active = most, float(most), 0
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return int(self._limit)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    def enter(self, timeout: float, first: bool = False) -> bool:
        """Wait until there is room; False when there is none within timeout seconds. first: before all that wait."""
        me = object()
        with self._changed:
            if not self._waiting and self._active < self.limit:
                self._active += 1
                return True
            (self._waiting.appendleft if first else self._waiting.append)(me)
            try:
                room = self._changed.wait_for(lambda: self._waiting[0] is me and self._active < self.limit, timeout)
            finally:  # also after Ctrl-C: nobody else could enter while it heads the queue
                self._waiting.remove(me)
                self._changed.notify_all()
            self._active += room
        return room

    def leave(self, answered: bool = False, refused: bool = False) -> None:
        """After enter() gave True."""
        with self._changed:
            self._active -= 1
            if refused:
                self._limit = max(1.0, min(self._limit, float(self._active)))
            elif answered:
                self._limit = min(float(self._most), self._limit + 1 / self._limit)
            self._changed.notify_all()
