"""One thread that waits for many sockets, and calls those whose turn it is."""

from __future__ import annotations

import contextlib
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from socket import socket

from gkp.edge.wire.buffers import Buffers

TICK_S = 0.1
"""How often deadlines and signs of life are looked at."""
SOON_S = 0.005
"""What can wait, and is cheaper together with what comes after it, waits so long."""
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
RAW = 256 << 10
"""Bytes that are taken from a socket at once; then it is the next one's turn."""


class Loop:
    """name: of the thread. call() and close() may be used from any thread, the rest by what the loop calls. raw: a place
    for bytes, until whoever is called returns; buffers: memory for more; ticking: called about every TICK_S with
    time.monotonic()."""

    def __init__(self, name: str) -> None:
        self.raw = memoryview(bytearray(RAW))
        self.buffers = Buffers()
        self.ticking: list[Callable[[float], None]] = []
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._later: deque[tuple[float, Callable[[], None]]] = deque()
        self._lock, self._closing = threading.Lock(), False
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        self._selector.register(self._woken, READ, self._drain)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], None]) -> None:
        """Do it soon, in the loop's thread. Nothing happens when the loop is closed."""
        self._calls.append(work)
        if threading.current_thread() is not self._thread:
            self._stir()

    def soon(self, work: Callable[[], None]) -> None:
        """Do it SOON_S from now. In the loop's thread."""
        self._later.append((time.monotonic() + SOON_S, work))

    def listen(self, sock: socket, events: int, work: Callable[[int], None]) -> None:
        """Call work(events that happened) from now on, in place of what was said before. events: 0 for none."""
        known = sock in self._selector.get_map()
        if not events:
            self.remove(sock)
        elif known:
            self._selector.modify(sock, events, work)
        else:
            self._selector.register(sock, events, work)

    def remove(self, sock: socket) -> None:
        """Before the socket is closed."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)

    def close(self) -> None:
        """What is called right now ends first. Sockets belong to their owners."""
        self._closing = True
        self._stir()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _stir(self) -> None:
        with self._lock:
            if self._wake >= 0:
                with contextlib.suppress(BlockingIOError):  # full: it will wake
                    os.write(self._wake, b"\0")

    def _drain(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._woken, 4096)) == 4096:
                pass

    def _run(self) -> None:
        due = 0.0
        while not self._closing:
            wait = 0.0 if self._calls else max(0.0, min(due, self._later[0][0] if self._later else due) - time.monotonic())
            for key, events in self._selector.select(wait):
                if self._selector.get_map().get(key.fd) is key:  # else: removed or changed by one before it
                    key.data(events)
            for _ in range(len(self._calls)):
                self._calls.popleft()()
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                self._later.popleft()[1]()
            if now >= due:
                due = now + TICK_S
                for tick in list(self.ticking):
                    tick(now)
        while self._calls:  # what was asked for before it was closed
            self._calls.popleft()()
        self._selector.close()
        with self._lock:
            os.close(self._woken)
            os.close(self._wake)
            self._wake = -1
