"""Threads that wait for many sockets, and call those whose turn it is.

One at a time: who has the turn does what came, the others wait in the kernel, which wakes one of them when something
happens: the one that came last. So a thread whose turn brought it something to do goes and does it, and nobody is woken to
take its place before there is a reason to."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from select import EPOLLIN, EPOLLONESHOT, EPOLLOUT, epoll
from socket import socket

from gkp.edge.wire.buffers import Buffers

TICK_S = 0.1
"""How often deadlines and signs of life are looked at, while there is anything to wait for."""
IDLE_S = 0.5
"""How often otherwise: a processor that nobody asks anything sleeps."""
READ, WRITE = EPOLLIN, EPOLLOUT
RAW = 256 << 10
"""Bytes that are taken from a socket at once; then it is the next one's turn."""
_MEET_S = 0.001
"""For a thread that only saw to it that the last one to wait has gone."""
_LEAVE_S = 1.0
"""For a thread to come back from what it does apart from its turns."""

Work = Callable[[int], None]
Tick = Callable[[float], bool]
"""Called with time.monotonic(): is there anything that it waits for?"""


class Loop:
    """name: of its thread. call(), until() and close() may be used from any thread, the rest by what the loop calls. raw: a
    place for bytes, until whoever is called returns; buffers: memory for more; ticking: called about every TICK_S after
    something happened, and as long as one of them waits for something, else every IDLE_S."""

    def __init__(self, name: str) -> None:
        self.raw = memoryview(bytearray(RAW))
        self.buffers = Buffers()
        self.ticking: list[Tick] = []
        self._name, self._poll = name, epoll()
        self._known: dict[int, tuple[int, Work]] = {}  # by descriptor: events that it waits for, whom to call
        self._calls: deque[Callable[[], None]] = deque()
        self._due = 0.0
        self._turn, self._owner = threading.Lock(), 0
        self._leading = threading.Lock()
        self._leader: Callable[[], bool] | None = None  # what the thread in until() waits for
        self._apart: Callable[[], None] | None = None
        self._lock, self._closing, self._inside = threading.Lock(), False, 0
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        self._known[self._woken] = READ, self._drain
        self._poll.register(self._woken, READ | EPOLLONESHOT)
        self._threads: list[threading.Thread] = []
        self._start()

    @property
    def mine(self) -> bool:
        """Has this thread the turn?"""
        return self._owner == threading.get_ident()

    def call(self, work: Callable[[], None]) -> None:
        """Do it soon, in a turn. Nothing happens when the loop is closed."""
        self._calls.append(work)
        if not self.mine:
            self._stir()

    def soon(self, work: Callable[[], None]) -> None:
        """Do it in the next turn, for which nobody is woken: about TICK_S from now where something waits, else IDLE_S."""
        self._calls.append(work)

    def share(self, work: Callable[[], None]) -> None:
        """Call work() from now on after each turn, without the turn, in the thread that had it. It may take long: there is
        another thread then. Once, before there is anything to do."""
        self._apart = work
        self._start()

    def until(self, holds: Callable[[], bool], seconds: float) -> None:
        """Do the loop's work in this thread, so that nobody need wake it, until holds() or the time is over. Returns at
        once when another thread does so already. holds: made true by what the loop calls."""
        if not self._leading.acquire(blocking=False) and (self._leader or not self._leading.acquire(timeout=_MEET_S)):
            return
        try:
            if not self._enter():
                return
            try:
                self._leader, end = holds, time.monotonic() + seconds
                while not holds() and not self._closing and (left := end - time.monotonic()) > 0:
                    self._take_turn(left)
            finally:
                self._leader = None
                self._leave()
        finally:
            self._leading.release()

    def listen(self, sock: socket, events: int, work: Work) -> None:
        """Call work(events that happened) from now on, in place of what was said before. events: 0 for none."""
        number = sock.fileno()
        if not events:
            self.remove(sock)
            return
        known, self._known[number] = number in self._known, (events, work)
        (self._poll.modify if known else self._poll.register)(number, events | EPOLLONESHOT)

    def remove(self, sock: socket) -> None:
        """Before the socket is closed."""
        if self._known.pop(sock.fileno(), None) is not None:
            with contextlib.suppress(OSError, ValueError):
                self._poll.unregister(sock)

    def close(self) -> None:
        """What is called right now ends first. Sockets belong to their owners."""
        self._closing = True
        self._stir()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_LEAVE_S)

    # ---- threads ----------------------------------------------------------------------------------------------------
    def _start(self) -> None:
        self._enter()
        self._threads.append(threading.Thread(target=self._run, name=self._name, daemon=True))
        self._threads[-1].start()

    def _run(self) -> None:
        while not self._closing:
            self._take_turn(IDLE_S)
            if (leader := self._leader) is not None and leader():
                self._stir()  # it sleeps, and should not: nobody else does until it has heard that
                with self._leading:
                    pass
            if self._apart is not None:
                self._apart()
        self._stir()  # the next one
        self._leave()

    def _enter(self) -> bool:
        with self._lock:
            self._inside += not self._poll.closed
            return not self._poll.closed

    def _leave(self) -> None:
        """The last one after close() does what was asked for before it."""
        with self._lock:
            self._inside -= 1
            if self._inside or not self._closing:
                return
        while self._calls:
            self._calls.popleft()()
        with self._lock:
            self._poll.close()
            os.close(self._woken)
            os.close(self._wake)

    def _stir(self) -> None:
        with self._lock:
            if not self._poll.closed:
                with contextlib.suppress(BlockingIOError):  # full: it will wake
                    os.write(self._wake, b"\0")

    def _drain(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._woken, 4096)) == 4096:
                pass

    # ---- a turn -----------------------------------------------------------------------------------------------------
    def _take_turn(self, most: float) -> None:
        """Wait until something happens, `most` seconds at most, and do what is due."""
        try:
            happened = self._poll.poll(0.0 if self._calls else max(0.0, min(self._due - time.monotonic(), most)))
            with self._turn:
                self._owner = threading.get_ident()
                try:
                    for number, events in happened:
                        self._tell(number, events)
                    for _ in range(len(self._calls)):
                        self._calls[0]()
                        self._calls.popleft()
                    if (now := time.monotonic()) >= self._due:
                        waits = [tick(now) for tick in list(self.ticking)]
                        self._due = now + (TICK_S if any(waits) else IDLE_S)
                    elif happened:
                        self._due = min(self._due, now + TICK_S)
                finally:
                    self._owner = 0
        except BaseException:  # Ctrl-C in until(): the others do what is left
            with self._turn:
                for number, (wanted, _) in self._known.items():
                    self._poll.modify(number, wanted | EPOLLONESHOT)
            raise

    def _tell(self, number: int, events: int) -> None:
        """A socket is not looked at while its turn lasts: no other thread would have anything to do with it."""
        known = self._known.get(number)
        if known is None:
            return
        wanted, work = known
        came = (READ if events & ~WRITE else 0) | (WRITE if events & ~READ else 0)  # an error is both
        work(came & wanted)
        if self._known.get(number) is known:
            self._poll.modify(number, wanted | EPOLLONESHOT)
