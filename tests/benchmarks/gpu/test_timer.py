"""Timing on the host's clock, which stands still while nothing is timed."""

from __future__ import annotations

import pytest
import torch
from fake_target import Clock

from gkp.benchmarks.gpu import timer
from gkp.benchmarks.gpu.timer import EVENTS, WALL, Running, clock_for, interleave, random_input
from gkp.runtime.measure import ratio, timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timer, "time", made)
    return made


def taking(clock: Clock, seconds: float, per_call: int = 1) -> Running:
    def call() -> None:
        clock.now += seconds

    return Running(call, per_call=per_call)


def test_a_call_of_twice_the_length_is_half_as_fast(clock: Clock) -> None:
    samples = interleave("cpu", {"a": taking(clock, 0.004), "b": taking(clock, 0.002)}, 0.1)
    assert len(samples["a"]) == len(samples["b"]) == 17, "rounds of 6 ms until 100 are spent"
    assert timing(samples["a"]).median == pytest.approx(4)
    assert ratio(samples["a"], samples["b"]).value == pytest.approx(2)


def test_the_time_is_that_of_one_piece_of_work(clock: Clock) -> None:
    samples = interleave("cpu", {"a": taking(clock, 0.004, per_call=4)}, 0.0)
    assert samples["a"] == [pytest.approx(1)] * 7


def test_a_short_call_is_repeated_within_a_sample(clock: Clock) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        clock.now += 1e-5

    samples = interleave("cpu", {"a": Running(call)}, 0.0, sample_ms=0.05)
    assert len(calls) == 3 + 2 * 2 + 5 * len(samples["a"]), "warm-ups, two trials, then five in every sample"


def test_events_are_for_gpus() -> None:
    running = Running(list)
    assert running.clock == EVENTS
    assert [clock_for("cpu", running), clock_for("cuda", running)] == [WALL, EVENTS]
    assert clock_for("cuda", Running(running.call, WALL)) == WALL


def test_inputs_are_the_same_every_time_and_in_the_precision_asked_for() -> None:
    a, b = (random_input((2, 3), "fp16", "cpu") for _ in range(2))
    assert torch.equal(a, b)
    assert a.dtype == torch.float16
    assert a.std() > 0
