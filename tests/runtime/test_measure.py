"""Timing on a clock that the test controls: interleaved, warmed up, medians, quartiles, intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkp.runtime import measure
from gkp.runtime.measure import interleave, ratio, timing


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
