"""How far a long piece of work is, and how long it may still take."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gkp.text import printable

_SURE = 2.0
"""Seconds of a stage before anything is said about its end."""
_SHARE = 0.03
"""Of a stage, done before anything is said about its end."""


class Watch:
    """Takes notes of progress; tells the stage, its share, and the time left of it at the rate of this stage so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begin = self._stage = clock()
        self._text, self._first = "starting", 0.0
        self._share: float | None = None

    def note(self, text: str, share: float | None) -> None:
        """A share below the last one, and one after stages without, begins a new stage."""
        if share is not None and (self._share is None or share < self._share):
            self._stage, self._first = self._clock(), share
        self._text, self._share = text, share

    @property
    def left(self) -> float | None:
        """Seconds to the end of the stage; None as long as nobody can tell."""
        if self._share is None:
            return None
        taken, done = self._clock() - self._stage, self._share - self._first
        return taken * (1 - self._share) / done if taken >= _SURE and done >= _SHARE else None

    @property
    def line(self) -> str:
        """`timing kernels (40 of 200): 20 %, 0:31 so far, about 0:44 left`."""
        share = "" if self._share is None else f": {100 * self._share:.0f} %"
        left = "" if self.left is None else f", about {minutes(self.left)} left"
        return f"{printable(self._text)}{share}, {minutes(self._clock() - self._begin)} so far{left}"


def minutes(seconds: float) -> str:
    """`1:05`."""
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


@contextmanager
def lines(watch: Watch, say: Callable[[str], None], every: float) -> Iterator[None]:
    """While it lasts, say the watch's line every so many seconds, by a thread: a stage may take long without a note."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(every):
            say(watch.line)

    teller = threading.Thread(target=tell, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
