"""How many requests are under way: never more than said, fewer after a refusal, and in the order in which they came."""

from __future__ import annotations

import signal
import threading

import cluster_kit as kit
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.edge.coordinate.inflight import InFlight


def test_no_more_than_the_most_are_under_way() -> None:
    book = InFlight(3)
    assert [book.enter(0) for _ in range(5)] == [True] * 3 + [False] * 2
    book.leave()
    assert book.enter(0)
    assert not book.enter(0)


def test_refusals_lower_the_limit_to_what_was_accepted() -> None:
    book = InFlight(8)
    assert all(book.enter(0) for _ in range(8))
    for _ in range(6):
        book.leave(refused=True)
    assert book.limit == 2
    assert not book.enter(0)


def test_the_limit_grows_by_one_for_a_round_of_answers() -> None:
    book = InFlight(8)
    assert all(book.enter(0) for _ in range(4))
    for _ in range(2):
        book.leave(refused=True)
    assert book.limit == 2
    for _ in range(3):
        book.leave(answered=True)
        assert book.enter(0)
    assert book.limit == 3


@given(st.lists(st.sampled_from(["enter", "answered", "refused", "failed"]), max_size=60), st.integers(1, 5))
def test_the_limit_stays_between_one_and_the_most(steps: list[str], most: int) -> None:
    book, inside = InFlight(most), 0
    for step in steps:
        if step == "enter":
            entered = book.enter(0)
            assert entered == (inside < book.limit)
            inside += entered
        elif inside:
            book.leave(answered=step == "answered", refused=step == "refused")
            inside -= 1
        assert 1 <= book.limit <= most
        assert inside <= most


def test_who_is_interrupted_while_waiting_does_not_hold_up_the_others() -> None:
    book = InFlight(1)
    assert book.enter(0)
    threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        book.enter(10)
    book.leave()
    assert book.waiting == 0
    assert book.enter(1)


def test_first_come_first_served_but_a_refused_request_goes_first() -> None:
    book, order = InFlight(1), []
    assert book.enter(0)

    def wait(name: str, first: bool) -> None:
        assert book.enter(10, first)
        order.append(name)
        book.leave()

    threads = []
    for k, (name, first) in enumerate([("a", False), ("b", False), ("refused", True)]):
        threads.append(threading.Thread(target=wait, args=(name, first)))
        threads[-1].start()
        assert kit.until(lambda k=k: book.waiting == k + 1, 5)  # type: ignore[misc]
    book.leave()
    for thread in threads:
        thread.join()
    assert order == ["refused", "a", "b"]
