"""One turn at a time, in whichever thread: work that takes long, or an exception, holds up nobody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from gkp.edge.wire.loop import IDLE_S, READ, TICK_S, Loop

SOON_S = 30


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop("test")
    yield made
    made.close()


class Inbox:
    """A socket whose bytes a loop reads. came: (byte, thread that read it)."""

    def __init__(self, loop: Loop) -> None:
        self.came: list[tuple[bytes, threading.Thread]] = []
        self.loop, (self.near, self.far) = loop, socket.socketpair()
        self.near.setblocking(False)
        self.work: Callable[[bytes], None] = lambda data: None
        loop.call(lambda: loop.listen(self.near, READ, self._read))

    def _read(self, events: int) -> None:
        data = self.near.recv(1)
        self.came.append((data, threading.current_thread()))
        self.work(data)

    def wait(self, count: int) -> None:
        end = time.monotonic() + SOON_S
        while len(self.came) < count:
            assert time.monotonic() < end
            time.sleep(0.001)

    def close(self) -> None:
        self.loop.call(lambda: self.loop.remove(self.near))
        self.far.close()


@pytest.fixture
def inbox(loop: Loop) -> Iterator[Inbox]:
    made = Inbox(loop)
    yield made
    made.close()


def test_what_can_wait_is_done_in_the_next_turn_and_in_the_end_without_one(loop: Loop, inbox: Inbox) -> None:
    done: list[str] = []
    loop.soon(lambda: done.append("a"))
    inbox.far.send(b"1")
    inbox.wait(1)
    end = time.monotonic() + SOON_S
    loop.soon(lambda: done.append("b"))
    while done != ["a", "b"]:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_who_waits_for_something_is_asked_often_and_others_sleep(loop: Loop) -> None:
    """Ten times a second is a twelfth of a slow device's time, for nothing."""
    asked: list[float] = []
    waits = threading.Event()

    def tick(now: float) -> bool:
        asked.append(now)
        return waits.is_set()

    loop.call(lambda: loop.ticking.append(tick))
    time.sleep(2 * IDLE_S)
    asked.clear()
    time.sleep(3 * IDLE_S)
    assert len(asked) <= 4
    waits.set()
    time.sleep(IDLE_S + TICK_S)
    asked.clear()
    time.sleep(10 * TICK_S)
    assert 3 <= len(asked) <= 11


def test_after_something_came_ticks_are_near(loop: Loop, inbox: Inbox) -> None:
    asked: list[float] = []

    def tick(now: float) -> bool:
        asked.append(now)
        return False

    loop.call(lambda: loop.ticking.append(tick))
    soonest = IDLE_S
    for k in range(1, 6):  # one of them comes when the next tick is far
        time.sleep(0.15)
        asked.clear()
        began = time.monotonic()
        inbox.far.send(b"x")
        inbox.wait(k)
        while not asked:
            time.sleep(0.001)
        soonest = min(soonest, asked[0] - began)
    assert soonest < 2 * TICK_S


def test_who_waits_receives_itself_and_at_once(loop: Loop, inbox: Inbox) -> None:
    mine, slowest = 0, 0.0
    for k in range(1, 201):
        began = time.monotonic()
        inbox.far.send(b"x")
        loop.until(lambda k=k: len(inbox.came) >= k, SOON_S)  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - began)
        mine += inbox.came[-1][1] is threading.current_thread()
    assert len(inbox.came) == 200
    assert mine > 0
    assert slowest < SOON_S / 10


def test_what_another_thread_receives_wakes_who_waits_for_it(loop: Loop, inbox: Inbox) -> None:
    """As often as the two threads meet in any order, nobody sleeps until the next tick."""
    for k in range(1, 301):
        threading.Timer(0.0005, inbox.far.send, (b"x",)).start()
        began = time.monotonic()
        loop.until(lambda k=k: len(inbox.came) >= k, SOON_S)  # type: ignore[misc]
        assert time.monotonic() - began < SOON_S
        assert len(inbox.came) >= k


def test_one_thread_waits_like_this_and_the_time_is_kept(loop: Loop) -> None:
    began = time.monotonic()
    other = threading.Thread(target=loop.until, args=(lambda: False, 3 * TICK_S))
    other.start()
    time.sleep(TICK_S)
    loop.until(lambda: False, SOON_S)  # the other one does it
    other.join(SOON_S)
    assert 3 * TICK_S <= time.monotonic() - began < SOON_S


def test_what_takes_long_holds_up_no_turn(loop: Loop, inbox: Inbox) -> None:
    let, began = threading.Event(), threading.Event()
    todo: list[bytes] = []

    def work() -> None:
        if todo:
            todo.pop()
            began.set()
            assert not loop.mine
            let.wait(SOON_S)

    inbox.work = lambda data: todo.append(data) if data == b"!" else None
    loop.share(work)
    inbox.far.send(b"!")
    assert began.wait(SOON_S)
    for k in range(2, 20):
        inbox.far.send(b"x")
        inbox.wait(k)
    assert inbox.came[0][1] is not inbox.came[-1][1]
    let.set()


def test_an_exception_where_one_waits_is_raised_there_and_leaves_the_loop_as_it_was(loop: Loop, inbox: Inbox) -> None:
    """Ctrl-C comes at any moment."""
    second = Inbox(loop)
    held = threading.Event()

    def interrupted(data: bytes) -> None:
        if threading.current_thread() is threading.main_thread():
            held.set()
            raise KeyboardInterrupt

    inbox.work = interrupted
    end = time.monotonic() + SOON_S
    while not held.is_set():
        assert time.monotonic() < end
        inbox.far.send(b"x")
        second.far.send(b"y")
        with suppress(KeyboardInterrupt):
            loop.until(lambda: False, 0.01)
    had = len(second.came)
    for each, count in ((inbox, len(inbox.came)), (second, had)):
        each.far.send(b"z")
        each.wait(count + 1)
    second.close()


def test_calls_from_before_the_end_are_made_and_those_after_it_are_not() -> None:
    loop, made = Loop("test"), list[int]()
    loop.share(lambda: None)
    for k in range(100):
        loop.call(lambda k=k: made.append(k))  # type: ignore[misc]
    loop.close()
    assert made == list(range(100))
    loop.call(lambda: made.append(100))
    loop.until(lambda: False, SOON_S)  # there is nothing to wait for
    assert len(made) == 100
