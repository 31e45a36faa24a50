import signal
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.converter.trt.watch import Watch, watched


def test_an_inner_phase_counts_within_a_step_of_its_outer_one() -> None:
    watch = Watch()
    watch.start("outer", 4)
    watch.step("outer", 0)
    assert watch.share == 0.25
    watch.start("inner", 2)
    watch.step("inner", 0)
    assert watch.share == 0.25 + 0.125
    watch.finish("inner")
    watch.step("outer", 3)
    assert watch.share == 1


@given(st.lists(st.tuples(st.sampled_from(["start", "step", "finish"]), st.sampled_from("abc"), st.integers(-1, 9))))
def test_whatever_a_monitor_says_the_share_rises_within_0_and_1(events: list[tuple[str, str, int]]) -> None:
    watch, shares = Watch(), [0.0]
    for kind, phase, number in events:
        if kind == "finish":
            watch.finish(phase)
        else:
            (watch.start if kind == "start" else watch.step)(phase, number)
        shares.append(watch.share)
    assert shares == sorted(shares)
    assert 0 <= shares[-1] <= 1


def test_the_work_runs_beside_the_waiting_thread_and_its_result_comes_back() -> None:
    thread, seen = [], []

    def work(watch: Watch) -> str:
        thread.append(threading.get_ident())
        watch.start("p", 2)
        watch.step("p", 0)
        time.sleep(0.2)
        return "done"

    assert watched(work, lambda text, share: seen.append((text, share, threading.get_ident())), "working") == "done"
    assert thread != [threading.get_ident()]
    assert {i for *_, i in seen} == {threading.get_ident()}
    assert [s for _, s, _ in seen][-2:] == [0.5, 1.0]


def test_an_error_of_the_work_comes_back_and_is_not_reported_as_done() -> None:
    seen: list[float | None] = []

    def work(watch: Watch) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        watched(work, lambda text, share: seen.append(share), "working")
    assert 1.0 not in seen


def test_an_interrupted_waiter_stops_the_work_and_waits_for_its_end() -> None:
    ended = []

    def work(watch: Watch) -> None:
        while not watch.stopped:
            time.sleep(0.01)
        ended.append(True)

    def progress(text: str, share: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(work, progress, "working")
    assert ended == [True]


def test_a_second_interrupt_waits_for_the_end_of_the_work_too() -> None:
    ended = []

    def work(watch: Watch) -> None:
        while not watch.stopped:
            time.sleep(0.01)
        time.sleep(0.5)
        ended.append(True)

    def progress(text: str, share: float | None) -> None:
        threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watched(work, progress, "working")
    assert ended == [True]
