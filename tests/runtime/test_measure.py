"""Timing on a clock that the test controls: interleaved, warmed up, medians, quartiles, intervals."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.manifest import Load
from gkp.runtime import measure
from gkp.runtime.measure import BLOCKS, Call, interleave, interleave_anew, ratio, timing


@dataclass
class Clock:
    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, ms: float, log: list[str] | None = None, name: str = "") -> Callable[[], None]:
        def call() -> None:
            self.now += ms / 1e3
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(measure, "time", made)
    return made


def test_times_are_milliseconds_per_call(clock: Clock) -> None:
    samples = interleave({"slow": clock.spend(30), "quick": clock.spend(0.1)}, budget_s=1)
    assert samples["slow"] == pytest.approx([30] * len(samples["slow"]))
    assert samples["quick"] == pytest.approx([0.1] * len(samples["quick"]))
    assert len(samples["slow"]) == len(samples["quick"])


def test_calls_take_turns_in_changing_order(clock: Clock) -> None:
    log: list[str] = []
    interleave({n: clock.spend(5, log, n) for n in "abc"}, budget_s=0.0, min_rounds=40)
    rounds = ["".join(log[k:k + 3]) for k in range(6, len(log), 3)]  # after two warm-up calls of each
    assert len(rounds) == 40
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 3


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 7), (1.0, 100), (1000.0, 400)])
def test_rounds_go_on_until_the_budget_is_spent(budget: float, rounds: int, clock: Clock) -> None:
    samples = interleave({"a": clock.spend(10)}, budget_s=budget)
    assert abs(len(samples["a"]) - rounds) <= 2


def test_what_is_stopped_is_not_run_again_and_one_alone_ends_the_rounds(clock: Clock) -> None:
    asked: list[int] = []

    def stop(ms: Mapping[str, Sequence[float]], rounds: int) -> list[str]:
        asked.append(rounds)
        return ["b"] * (rounds >= 3) + ["c"] * (rounds >= 5)

    samples = interleave({n: clock.spend(10) for n in "abc"}, budget_s=100, stop=stop)
    assert {name: len(ms) for name, ms in samples.items()} == {"a": 5, "b": 3, "c": 5}
    assert asked == [1, 2, 3, 4, 5]


def test_quartiles() -> None:
    made = timing([1, 2, 3, 4, 100])
    assert (made.q1, made.median, made.q3, made.runs) == (2, 3, 4, 5)


@given(st.lists(st.floats(0.5, 2), min_size=9, max_size=40), st.floats(0.25, 4))
def test_a_ratio_lies_in_its_interval_and_a_slow_phase_cancels(phases: list[float], speedup: float) -> None:
    """Both calls were timed in every round: what slows both does not change the ratio."""
    made = ratio([p * speedup for p in phases], phases)
    assert made.low <= made.value + 1e-12
    assert made.value <= made.high + 1e-12
    np.testing.assert_allclose([made.low, made.value, made.high], speedup, rtol=1e-9)


def test_noise_widens_the_interval() -> None:
    rng = np.random.default_rng(0)
    one = np.ones(30)
    calm, noisy = (ratio(one, (rng.lognormal(0, s, 30)).tolist()) for s in (0.01, 0.3))
    assert calm.high - calm.low < noisy.high - noisy.low
    assert noisy.low < 1 < noisy.high


def test_equal_samples_have_the_ratio_one() -> None:
    made = ratio([2.0] * 9, [2.0] * 9)
    assert (made.low, made.value, made.high) == (1, 1, 1)


# ---- in blocks ------------------------------------------------------------------------------------------------------
Opener = Callable[[Container[str]], AbstractContextManager[dict[str, Call]]]


class FakeWatch:
    """Others take this share."""

    share: float | None = 0.0

    def __init__(self, threads: int) -> None:
        assert threads == 1

    def read(self) -> Load:
        return Load(average_before=0.0, average_after=0.0, others=self.share, taken=self.share)


def anew(clock: Clock, opening_ms: float = 0.0, ms: Callable[[int], float] = lambda block: 2.0) -> tuple[Opener, list[int]]:
    """Two models, the second twice as fast; how long they take is settled by each opening. And how many are open, each time
    that this changes."""
    is_open = [0]

    @contextmanager
    def opened(without: Container[str]) -> Iterator[dict[str, Call]]:
        block = len(is_open) // 2
        is_open.append(1)
        clock.now += opening_ms / 1e3
        yield {"a": clock.spend(ms(block)), "b": clock.spend(ms(block) / 2)}
        is_open.append(0)

    return opened, is_open


def test_models_are_opened_anew_for_every_block_and_closed_before_the_next(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, is_open = anew(clock, ms=lambda block: 2.0 + block)
    made = interleave_anew(opened, threads=1, budget_s=1.0)
    assert is_open == [0] + [1, 0] * BLOCKS
    assert len(made.blocks) == BLOCKS
    assert sum(made.blocks) == len(made.ms["a"]) == len(made.ms["b"])
    assert sorted({round(ms) for ms in made.ms["a"]}) == [2 + k for k in range(BLOCKS)]
    assert made.ratio("a", "b").high == pytest.approx(2.0)
    assert made.fastest() == "b"


@pytest.mark.parametrize(("ms", "opening_ms", "budget", "least"), [(2.0, 0.0, 1.0, 0.9), (2.0, 150.0, 1.0, 0.9),
                                                                    (900.0, 0.0, 0.1, 0.0)])
def test_blocks_share_the_budget_with_the_openings(ms: float, opening_ms: float, budget: float, least: float, clock: Clock,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, _ = anew(clock, opening_ms, lambda block: ms)
    made = interleave_anew(opened, threads=1, budget_s=budget)
    round_s = 1.5 * ms / 1e3
    assert least < clock.now < max(budget + 0.3, BLOCKS * (opening_ms / 1e3 + 3 * round_s))
    assert min(made.blocks) == (1 if ms > 100 else min(made.blocks)) >= 1


def test_three_blocks_are_enough_where_four_budgets_are_spent(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a dozen of a ResNet-50 at batch 16."""
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, _ = anew(clock, ms=lambda block: 9000.0)
    assert len(interleave_anew(opened, threads=1, budget_s=2.0).blocks) == 3
    opened, _ = anew(clock, ms=lambda block: 450.0)
    assert len(interleave_anew(opened, threads=1, budget_s=2.0).blocks) == BLOCKS


@pytest.mark.parametrize(("share", "blocks"), [(0.0, BLOCKS), (None, BLOCKS), (0.04, BLOCKS), (0.5, 2 * BLOCKS)])
def test_under_load_as_many_blocks_again_are_taken(share: float | None, blocks: int, clock: Clock,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    monkeypatch.setattr(FakeWatch, "share", share)
    opened, _ = anew(clock)
    made = interleave_anew(opened, threads=1, budget_s=1.0)
    assert len(made.blocks) == blocks
    assert made.load.taken == share
    assert clock.now < 2.3, "as much time again, not more"


def test_slow_models_under_load_do_not_take_longer_than_the_extra_time(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    monkeypatch.setattr(FakeWatch, "share", 0.5)
    opened, _ = anew(clock, ms=lambda block: 300.0)
    assert len(interleave_anew(opened, threads=1, budget_s=1.0).blocks) == BLOCKS


def test_a_model_that_does_not_open_again_is_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    count = [0]

    @contextmanager
    def opened(without: Container[str]) -> Iterator[dict[str, Call]]:
        count[0] += 1
        yield {"a": clock.spend(1.0), **({"b": clock.spend(2.0)} if count[0] < 3 else {})}

    assert list(interleave_anew(opened, threads=1, budget_s=0.1).ms) == ["a"]


# ---- stopping early -------------------------------------------------------------------------------------------------
def racing(clock: Clock, ms: dict[str, float]) -> tuple[Opener, list[list[str]], list[str]]:
    """Models that take so long; and which were opened for each block, and every call."""
    blocks: list[list[str]] = []
    log: list[str] = []

    @contextmanager
    def opened(without: Container[str]) -> Iterator[dict[str, Call]]:
        blocks.append([name for name in ms if name not in without])
        yield {name: clock.spend(ms[name], log, name) for name in blocks[-1]}

    return opened, blocks, log


def slower_than(limit: float, after: int) -> measure.Stop:
    """Stops what takes longer, from so many blocks on."""
    return lambda ms, blocks: [name for name, found in ms.items() if blocks >= after and min(found) > limit]


def test_a_stopped_model_is_neither_opened_nor_run_again_and_keeps_what_was_measured(clock: Clock,
                                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, blocks, log = racing(clock, {"a": 10.0, "b": 30.0, "c": 12.0})
    made = interleave_anew(opened, threads=1, budget_s=1.0, stop=slower_than(20.0, 1))
    assert blocks == [["a", "b", "c"]] * 2 + [["a", "c"]] * (BLOCKS - 2)
    assert made.stopped == {"b"}
    assert len(made.ms["b"]) == sum(made.blocks[:2]) == log.count("b") > 2
    assert len(made.ms["a"]) == len(made.ms["c"]) == sum(made.blocks)
    found = made.ratio("b", "a")
    assert found is not None
    assert (found.low, found.value, found.high) == pytest.approx((3.0,) * 3)
    assert made.timing("b").runs == sum(made.blocks[:2])


def test_the_ratio_of_a_stopped_model_is_that_of_the_blocks_in_which_both_ran() -> None:
    """The other one was slower later."""
    a, b = [1.0, 1.0, 2.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.3, 3.3]
    made = measure.Samples({"a": a, "b": b}, (2, 2, 2), FakeWatch(1).read(), frozenset("b"))
    found, same = made.ratio("b", "a"), measure.Samples({"a": a[:4], "b": b}, (2, 2), FakeWatch(1).read()).ratio("b", "a")
    assert found is not None
    assert found == same
    assert found.value == pytest.approx((3.0 * 1.65) ** 0.5)
    assert found.high / found.low > 100, "two openings say little"


def test_of_one_block_there_is_no_ratio() -> None:
    made = measure.Samples({"a": [1.0] * 4, "b": [2.0] * 2}, (2, 2), FakeWatch(1).read(), frozenset("b"))
    assert made.ratio("b", "a") is None
    assert made.timing("b").median == 2.0


def test_what_a_first_look_stops_is_not_timed_at_all(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, blocks, log = racing(clock, {"a": 10.0, "b": 30.0})
    made = interleave_anew(opened, threads=1, budget_s=1.0, stop=slower_than(20.0, 0))
    assert blocks == [["a", "b"]] + [["a"]] * (BLOCKS - 1)
    assert (list(made.ms), made.stopped, log.count("b")) == (["a"], frozenset(), 1)


def test_the_first_look_is_a_round_that_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, _, log = racing(clock, {"a": 900.0, "b": 800.0})
    made = interleave_anew(opened, threads=1, budget_s=0.5)
    assert made.blocks == (1, 1, 1)
    assert len(log) == 6


@pytest.mark.parametrize("ms", [5.0, 300.0, 4000.0])
def test_progress_tells_the_share_of_the_time_from_the_first_round_on(ms: float, clock: Clock,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "Watch", FakeWatch)
    opened, _, _ = racing(clock, {"a": ms, "b": ms})
    told: list[tuple[float, float]] = []
    interleave_anew(opened, threads=1, budget_s=2.0, done=lambda share: told.append((clock.now, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(told) > 3
    for now, share in told:
        assert now / clock.now == pytest.approx(share, abs=0.2)
