"""The time budget, with a clock that only jobs move."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from gkp.benchmarks.gpu.plan import Job, run_plan


class Clock:
    """Jobs of known length; notes what ran, what was skipped, and what was reported."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.ran: list[str] = []
        self.skipped: dict[str, str] = {}
        self.shares: list[float | None] = []

    def job(self, name: str, kind: str, guess: float, takes: float) -> Job:
        def run() -> None:
            self.time += takes
            self.ran.append(name)

        return Job(name, kind, guess, run, self._skip(name))

    def _skip(self, name: str) -> Callable[[str], None]:
        return lambda why: self.skipped.update({name: why})

    def plan(self, jobs: list[Job], budget: float, started: float | None = None) -> None:
        run_plan(jobs, budget, lambda text, share: self.shares.append(share), started, lambda: self.time)


def test_jobs_run_in_order_while_there_is_time() -> None:
    clock = Clock()
    clock.plan([clock.job(n, n, 4.0, 4.0) for n in "abc"], 10.0)
    assert clock.ran == ["a", "b"]
    assert clock.skipped == {"c": "no time left of the 10 s"}
    assert clock.shares == [0.0, 0.4]


def test_a_smaller_job_may_still_fit_after_one_that_did_not() -> None:
    clock = Clock()
    clock.plan([clock.job("a", "a", 8.0, 8.0), clock.job("big", "big", 5.0, 5.0), clock.job("small", "small", 1.0, 1.0)], 10.0)
    assert clock.ran == ["a", "small"]


def test_a_job_that_took_longer_than_guessed_is_not_trusted_again() -> None:
    clock = Clock()
    clock.plan([clock.job(n, "compile", 1.0, 6.0) for n in "ab"], 13.0)
    assert clock.ran == ["a"], "7 s are left, 6 s plus a reserve are needed"


def test_time_spent_before_the_first_job_counts() -> None:
    clock = Clock()
    clock.plan([clock.job("a", "a", 4.0, 4.0)], 10.0, started=clock.time - 7.0)
    assert list(clock.skipped) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.floats(0, 20), st.floats(0, 20)), max_size=20), st.floats(0.1, 60))
def test_it_ends_in_time_but_for_the_excess_of_the_last_job(lengths: list[tuple[str, float, float]], budget: float) -> None:
    clock = Clock()
    begin = clock.time
    clock.plan([clock.job(str(n), kind, guess, takes) for n, (kind, guess, takes) in enumerate(lengths)], budget)
    assert sorted([*clock.ran, *clock.skipped], key=int) == [str(n) for n in range(len(lengths))]
    surprise = max((max(0.0, takes - guess) for _, guess, takes in lengths), default=0.0)
    assert clock.time - begin <= budget + surprise + 1e-6
