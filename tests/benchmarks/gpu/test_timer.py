"""Timing on the host's clock, for real."""

from __future__ import annotations

import time

import torch

from gkp.benchmarks.gpu.timer import EVENTS, WALL, Running, clock_for, interleave, random_input
from gkp.runtime.measure import ratio, timing


def sleeping(seconds: float, per_call: int = 1) -> Running:
    return Running(lambda: time.sleep(seconds), per_call=per_call)


def test_a_call_of_twice_the_length_is_half_as_fast() -> None:
    samples = interleave("cpu", {"a": sleeping(0.004), "b": sleeping(0.002)}, 0.1)
    assert len(samples["a"]) == len(samples["b"]) >= 7
    assert 3.9 < timing(samples["a"]).median < 8
    assert 1.5 < ratio(samples["a"], samples["b"]).value < 2.5


def test_the_time_is_that_of_one_piece_of_work() -> None:
    samples = interleave("cpu", {"a": sleeping(0.004, per_call=4)}, 0.0)
    assert 0.9 < timing(samples["a"]).median < 2


def test_a_short_call_is_repeated_within_a_sample() -> None:
    calls = []
    samples = interleave("cpu", {"a": Running(lambda: calls.append(1))}, 0.0, sample_ms=0.05)
    assert len(calls) > 3 * len(samples["a"])


def test_events_are_for_gpus() -> None:
    running = sleeping(0.0)
    assert running.clock == EVENTS
    assert [clock_for("cpu", running), clock_for("cuda", running)] == [WALL, EVENTS]
    assert clock_for("cuda", Running(running.call, WALL)) == WALL


def test_inputs_are_the_same_every_time_and_in_the_precision_asked_for() -> None:
    a, b = (random_input((2, 3), "fp16", "cpu") for _ in range(2))
    assert torch.equal(a, b)
    assert a.dtype == torch.float16
    assert a.std() > 0
